"""Text in, text out: what a model folder does, whatever it was trained for."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from gptcore.downstream import prompt_ids
from gptcore.inference.generate import fill, generate, prefill, stream
from gptcore.model import load_model
from gptcore.model.folder import pick_device

Result = TypeVar("Result")

MASK = "<|mask|>"
"""Hides a word from a masked model, in the text that it is given."""
_ROWS = 32
"""Prompts side by side, of similar length."""
_NEW_TOKENS = 64


class Predictor:
    """A model folder, opened for use: a base continues, or fills in what `<|mask|>` hides if it is a masked model; `summarize`
    summarises, `classify` names the likeliest label."""

    def __init__(self, folder: Path, device: str = "auto") -> None:
        self.loaded = load_model(folder, pick_device(device))
        self.task = self.loaded.task
        self._context, self._objective = self.loaded.model.config.context, self.loaded.model.config.objective
        self.continues = self.task is None and self._objective != "masked"
        """Whether an answer goes on from where its text ends, and is no text of its own."""

    def predict(
        self,
        texts: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """One answer per text, in their order. `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 leave every choice open."""
        if not texts:
            return []
        if self.task is not None and self.task["type"] == "classify":
            return [self.task["labels"][index] for index in self.label_scores(texts).argmax(-1)]
        if self._objective == "masked":
            return [self._filled(text) for text in texts]
        room = max_new_tokens or (self.task or {}).get("max_new_tokens") or _NEW_TOKENS

        def answer(prompts: list[list[int]]) -> list[list[int]]:
            return generate(
                self.loaded.model, prompts, max_new_tokens=room, temperature=temperature, top_k=top_k or None,
                top_p=top_p, seed=seed, stop_ids=self._stops(),
            )  # fmt: skip

        prompts = [self.prompt(text, room) for text in texts]
        return [self.loaded.tokenizer.decode(ids) for ids in _by_length(prompts, answer)]

    def stream(
        self, text: str, *, max_new_tokens: int | None = None, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:  # fmt: skip
        """The answer to one text in growing pieces; a character is held back until all its bytes are there."""
        if self._objective == "masked":
            yield self._filled(text)
            return
        room = max_new_tokens or (self.task or {}).get("max_new_tokens") or _NEW_TOKENS
        steps = stream(
            self.loaded.model, [self.prompt(text, room)], max_new_tokens=room, temperature=temperature,
            top_k=top_k or None, top_p=top_p, seed=seed, stop_ids=self._stops(),
        )  # fmt: skip
        ids: list[int] = []
        shown = ""
        for (token,) in steps:
            if token is None:
                break
            ids.append(token)
            whole = self.loaded.tokenizer.decode(ids)
            if whole.startswith(shown) and not whole.endswith("\ufffd"):
                yield whole[len(shown) :]
                shown = whole
        rest = self.loaded.tokenizer.decode(ids)
        if rest != shown and rest.startswith(shown):
            yield rest[len(shown) :]

    @torch.no_grad()
    def label_scores(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Log-likelihood of every label, its end included, as the answer to every text: (texts, labels), in nats."""
        assert self.task is not None
        tokenizer = self.loaded.tokenizer
        answers = [[*tokenizer.encode(label), tokenizer.end_id] for label in self.task["labels"]]
        room = max(len(answer) for answer in answers)
        prompts = [self.prompt(text, room) for text in texts]
        return np.array(_by_length(prompts, lambda batch: self._score(batch, answers)), dtype=np.float64)

    def _score(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
        """(prompts, answers): each prompt is encoded once, each answer then read after it."""
        model = self.loaded.model
        cache, first = prefill(model, prompts)
        start, first = cache.length, first.float().log_softmax(-1)  # (B, V)
        columns = []
        for answer in answers:
            score = first[:, answer[0]]  # (B)
            if len(answer) > 1:
                cache.rewind(start)
                tokens = torch.tensor([answer[:-1]] * len(prompts), device=first.device)
                after = model(tokens, cache).float().log_softmax(-1)  # (B, n, V)
                wanted = torch.tensor(answer[1:], device=first.device).expand(len(prompts), -1)
                score = score + after.gather(-1, wanted.unsqueeze(-1)).squeeze(-1).sum(-1)
            columns.append(score)
        rows: list[list[float]] = torch.stack(columns, -1).tolist()
        return rows

    def prompt(self, text: str, room: int) -> list[int]:
        """The ids that the model continues, cut so that `room` new tokens fit into its context where that is possible."""
        tokenizer = self.loaded.tokenizer
        asking = [tokenizer.mask_id, tokenizer.begin_id] if self._objective == "prefix" else []
        context = self._context - len(asking)
        if self.task is not None:
            return [*prompt_ids(tokenizer, text, max(4, context - room)), *asking]
        # A base forgets the beginning of what is too long, not its end.
        kept = max(1, context - room) if room < context else context // 2
        return [tokenizer.begin_id, *(tokenizer.encode(text)[-kept + 1 :] if kept > 1 else []), *asking]

    def _filled(self, text: str) -> str:
        """The text with the likeliest tokens where it says `<|mask|>`."""
        tokenizer = self.loaded.tokenizer
        first, *rest = (tokenizer.encode(part) for part in text.split(MASK))
        ids = [tokenizer.begin_id, *first, *(id for part in rest for id in (tokenizer.mask_id, *part))]
        return tokenizer.decode(fill(self.loaded.model, ids, tokenizer.mask_id))

    def _stops(self) -> list[int]:
        tokenizer = self.loaded.tokenizer
        return [tokenizer.end_id, tokenizer.begin_id]


def _by_length(prompts: list[list[int]], work: Callable[[list[list[int]]], list[Result]]) -> list[Result]:
    """`work` on batches of prompts of similar length; results in the order of `prompts`."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    results: dict[int, Result] = {}
    for start in range(0, len(order), _ROWS):
        batch = order[start : start + _ROWS]
        results.update(zip(batch, work([prompts[index] for index in batch]), strict=True))
    return [results[index] for index in range(len(prompts))]
