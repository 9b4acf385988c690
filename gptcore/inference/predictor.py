"""Text in, text out: what a model folder does, whatever it was trained for."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import psutil
import torch
from pydantic import field_validator

from gptcore.config.section import Count
from gptcore.downstream import prompt_ids
from gptcore.errors import GptcoreError, SettingsError
from gptcore.inference.generate import fill, stream
from gptcore.inference.rows import prefill
from gptcore.inference.sampling import Sampling, draw, random_stream
from gptcore.inference.writing import Writing
from gptcore.model import load_model
from gptcore.model.folder import default_dtype, pick_device

Result = TypeVar("Result")

MASK = "<|mask|>"
"""Hides a word from a masked model, in the text that it is given."""
_ROWS = 32
"""Texts side by side, of similar length."""
_NEW_TOKENS = 64


class Request(Sampling):
    """What is asked of a model beside its prompt: how it draws, how long, how often, and where it stops."""

    max_new_tokens: Count | None = None
    """Longest answer in tokens. Unset: what the model was made for."""
    stop: tuple[str, ...] = ()
    """Texts at which an answer ends; they are no part of it."""
    samples: Count = 1
    """Answers to each prompt, each drawn for itself."""

    @field_validator("stop")
    @classmethod
    def _says_something(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if not all(stop):
            raise ValueError("a text to stop at has one character or more")
        return stop

    def check_choosing(self) -> None:
        """Raises `SettingsError` for what says nothing to a choice among given texts."""
        if others := sorted(self.model_dump(exclude_defaults=True).keys() - {"temperature", "samples", "seed"}):
            raise SettingsError(
                f"{', '.join(others)}: among given texts temperature, samples and seed alone decide; leave out the rest"
            )


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt."""

    text: str
    ended: Literal["end", "stop", "length"] = "end"
    """The model ended it, a stop text did, or there was no room for more."""
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Of each of the ids under the model's own distribution, in nats."""

    @property
    def logprob(self) -> float:
        """Of the whole."""
        return sum(self.logprobs)


@dataclass(frozen=True)
class Choice:
    """What a model chose among given texts."""

    texts: tuple[str, ...]
    """One for each sample."""
    scores: dict[str, float]
    """Log-likelihood of every text that it could have chosen, in nats."""


class Predictor:
    """A model folder, opened for use: a base continues, or fills in what `<|mask|>` hides if it is a masked model; `summarize`
    summarises, `classify` names the likeliest label."""

    def __init__(self, folder: Path, device: str = "auto", dtype: torch.dtype | None = None) -> None:
        """`dtype` as in `load_model`; unset, the one that is fastest here."""
        self.loaded = load_model(folder, pick_device(device), dtype or "fastest")
        self.task = self.loaded.task
        self._context, self._objective = self.loaded.model.config.context, self.loaded.model.config.objective
        self.continues = self.task is None and self._objective != "masked"
        """Whether an answer goes on from where its text ends, and is no text of its own."""

    @property
    def draws(self) -> bool:
        """Whether an answer is written token by token: neither filled in nor one of some labels."""
        return self._objective != "masked" and (self.task is None or self.task["type"] != "classify")

    def predict(self, texts: Sequence[str], **request: Any) -> list[str]:
        """One answer per text, in their order; with `samples`, so many for the first text, then for the second, …

        `request`: the fields of `Request`, such as `max_new_tokens` and `temperature`; without any it is greedy.
        """
        return [answer.text for answers in self.answers(texts, **request) for answer in answers]

    def answers(self, texts: Sequence[str], *, first: int = 0, **request: Any) -> list[list[Answer]]:
        """The answers to every text, each with its tokens. `first`: number of the first text, of which samples are drawn."""
        asked = Request.of(**request)
        if not self.draws:
            return [[Answer(text)] * asked.samples for text in self._read(texts)]
        prompts = [self.prompt(text, self._room(asked)) for text in texts]

        def work(numbers: list[int]) -> list[list[Answer]]:
            writer = self._write([prompts[number] for number in numbers], [first + number for number in numbers], asked)
            answers = _exhausted(writer)
            return [answers[at : at + asked.samples] for at in range(0, len(answers), asked.samples)]

        return _by_length(prompts, work, max(1, _ROWS // asked.samples))

    def stream(self, text: str, *, number: int = 0, **request: Any) -> Generator[str, None, list[Answer]]:
        """The answers that `answers` gives to the text of this number, in the end; until then the first one in growing pieces.
        Whole characters only, and nothing that could be the beginning of a stop."""
        asked = Request.of(**request)
        if not self.draws:
            answer = Answer(self._read([text])[0])
            yield answer.text
            return [answer] * asked.samples
        return (yield from self._write([self.prompt(text, self._room(asked))], [number], asked, aloud=True))

    def _write(
        self, prompts: list[list[int]], numbers: list[int], asked: Request, aloud: bool = False
    ) -> Generator[str, None, list[Answer]]:
        """Answer prompts side by side, each encoded once for all its samples; `aloud`: yield the pieces of the first answer."""
        decode, ended = self.loaded.tokenizer.decode, set[int]()
        writings = [Writing(decode, asked.stop) for _ in range(len(prompts) * asked.samples)]
        logprobs: list[list[float]] = [[] for _ in writings]
        for step in stream(
            self.loaded.model, prompts, asked, max_new_tokens=self._room(asked), stop_ids=self._stops(),
            numbers=numbers, samples=range(asked.samples), ended=ended,
        ):  # fmt: skip
            for row, token, logprob in step:
                writings[row].ids.append(token)
                logprobs[row].append(logprob)
                shown = aloud and row == 0
                piece = writings[row].read() if shown or asked.stop else ""
                if writings[row].stopped:
                    ended.add(row)
                if shown and piece:
                    yield piece
        answers = []
        for row, writing in enumerate(writings):
            rest = writing.finish()
            if aloud and row == 0 and rest:
                yield rest
            reason: Any = "stop" if writing.stopped else "end" if row in ended else "length"
            ids = tuple(writing.ids)
            answers.append(Answer(writing.text, reason, ids, tuple(logprobs[row][: len(ids)])))
        return answers

    def _read(self, texts: Sequence[str]) -> list[str]:
        """The answers of a model that draws none."""
        if self._objective == "masked":
            return [self._filled(text) for text in texts]
        assert self.task is not None
        return [self.task["labels"][index] for index in self.label_scores(texts).argmax(-1)] if texts else []

    def label_scores(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Log-likelihood of every label, its end included, as the answer to every text: (texts, labels), in nats."""
        assert self.task is not None
        return self.choice_scores(texts, self.task["labels"])

    def choose(self, texts: Sequence[str], choices: Sequence[str], *, first: int = 0, **request: Any) -> list[Choice]:
        """Which of `choices` answers each text: the likeliest, or with a temperature `samples` draws from
        softmax(log-likelihood / temperature). `first`: number of the first text, of which the draws are made.

        Raises `GptcoreError` as `choice_scores` does, for a choice that is given twice, and for other ways to draw.
        """
        asked = Request.of(**request)
        asked.check_choosing()
        if twice := next((choice for at, choice in enumerate(choices) if choice in choices[:at]), None):
            raise GptcoreError(f"the choice {twice[:40]!r} is given twice: give every text once")
        scores = self.choice_scores(texts, choices)
        logits = torch.tensor(scores, device="cpu").repeat_interleave(asked.samples, 0)  # (texts x samples, choices)
        numbers, samples = range(first, first + len(texts)), range(asked.samples)
        randoms = [random_stream(asked.seed, number, sample) for number in numbers for sample in samples]
        drawn = draw(logits, asked, randoms).reshape(len(texts), asked.samples).tolist()
        return [
            Choice(tuple(choices[index] for index in row), dict(zip(choices, likely, strict=True)))
            for row, likely in zip(drawn, scores.tolist(), strict=True)
        ]

    @torch.no_grad()
    def choice_scores(self, texts: Sequence[str], choices: Sequence[str]) -> npt.NDArray[np.float64]:
        """Log-likelihood of every one of `choices` as the answer to every text: (texts, choices), in nats.

        The end is a part of what a task model says, and of none that a base goes on with. Raises `GptcoreError` for a choice
        that is empty or longer than the context, and for a masked model.
        """
        if self._objective == "masked":
            raise GptcoreError("a masked model fills in what is hidden and chooses among no continuations")
        answers = self._spelled(choices)
        prompts = [self.prompt(text, max(map(len, answers))) for text in texts]
        rows = _by_length(prompts, lambda numbers: self._score([prompts[number] for number in numbers], answers))
        return np.array(rows, dtype=np.float64).reshape(len(texts), len(choices))

    def _spelled(self, choices: Sequence[str]) -> list[list[int]]:
        """The ids of every choice."""
        if not all(choices) or not choices:
            raise GptcoreError("a choice is empty: give every text that the answer may be")
        ending = [] if self.task is None else [self.loaded.tokenizer.end_id]
        answers = [[*self.loaded.tokenizer.encode(choice), *ending] for choice in choices]
        longest = max(range(len(answers)), key=lambda index: len(answers[index]))
        if (room := len(answers[longest])) > self._context - 4:
            raise GptcoreError(
                f"the choice {choices[longest][:40]!r} of {room} tokens leaves no room for a prompt in a context of "
                f"{self._context}"
            )
        return answers

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

    def tokens_read(self, text: str, choices: Sequence[str] = (), **request: Any) -> tuple[int, int]:
        """How many tokens of a text the model reads, and how many there are; of a longer one a base reads the newest and a task
        model the first, so that the answer, be it the longest of `choices`, fits into the context too."""
        there = len(self.loaded.tokenizer.encode(text))
        if self._objective == "masked":
            return there, there
        choices = choices or ([] if self.draws or self.task is None else self.task["labels"])
        room = max(map(len, self._spelled(choices))) if choices else self._room(Request.of(**request))
        around = len(self.prompt("", room))
        return len(self.prompt(text, room)) - around, there

    def memory_mb(self) -> float:
        """What the process holds now, or on a card the most that it held there, in MB."""
        if self.loaded.model.embedding.weight.is_cuda:
            return torch.cuda.max_memory_allocated() / 1e6
        return psutil.Process().memory_info().rss / 1e6

    def _room(self, asked: Request) -> int:
        """Longest answer in tokens."""
        return asked.max_new_tokens or (self.task or {}).get("max_new_tokens") or _NEW_TOKENS

    def _filled(self, text: str) -> str:
        """The text with the likeliest tokens where it says `<|mask|>`."""
        tokenizer = self.loaded.tokenizer
        first, *rest = (tokenizer.encode(part) for part in text.split(MASK))
        ids = [tokenizer.begin_id, *first, *(id for part in rest for id in (tokenizer.mask_id, *part))]
        ids += [tokenizer.end_id] if tokenizer.ends_texts else []
        return tokenizer.decode(fill(self.loaded.model, ids, tokenizer.mask_id))

    def _stops(self) -> list[int]:
        tokenizer = self.loaded.tokenizer
        return [tokenizer.end_id, tokenizer.begin_id]


def exact_predictor(folder: Path) -> Predictor:
    """A predictor for numbers that are kept: with whole weights, in the type that training computes in here."""
    return Predictor(folder, dtype=default_dtype(pick_device("auto")))


def _exhausted(writer: Generator[str, None, Result]) -> Result:
    """What a generator returns in the end."""
    while True:
        try:
            next(writer)
        except StopIteration as end:
            result: Result = end.value
            return result


def _by_length(prompts: list[list[int]], work: Callable[[list[int]], list[Result]], rows: int = _ROWS) -> list[Result]:
    """`work` on the numbers of prompts of similar length; results in the order of `prompts`."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    results: dict[int, Result] = {}
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        results.update(zip(batch, work(batch), strict=True))
    return [results[index] for index in range(len(prompts))]
