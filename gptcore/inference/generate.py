"""Generation with a key-value cache: greedy or drawn, prompts of different lengths side by side."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch

from gptcore.errors import GptcoreError
from gptcore.inference.rows import Rows
from gptcore.inference.sampling import Sampling, draw, penalised, random_stream
from gptcore.model import GPT


class Drawn(NamedTuple):
    """A token that a text goes on with."""

    row: int
    """Number of the prompt; with several samples of each, prompt x samples + sample."""
    token: int
    logprob: float
    """Of the token under the model's own distribution, whatever it was drawn from, in nats."""


def generate(
    model: GPT,
    ids: Sequence[int] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    **sampling: float | None,
) -> list[list[int]]:
    """Continue one prompt (ids) or several; returns the new ids of each, without the stop id that ended it.

    `sampling`: the fields of `Sampling`, such as `temperature`, `top_k`, `top_p` and `seed`; without any it is greedy. Every
    prompt draws from its own random stream, made from `seed` and its number. Past the context the newest half is kept and
    encoded once. Prompts of a model with the prefix objective end with what hides a span and what begins it. Raises
    `GptcoreError` for an empty prompt, a setting that makes no sense and a masked model, which continues nothing.
    """
    single = not ids or isinstance(ids[0], int)
    prompts = cast("list[list[int]]", [list(ids)] if single else [list(cast(Sequence[int], prompt)) for prompt in ids])
    new: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, Sampling.of(**sampling), max_new_tokens=max_new_tokens, stop_ids=stop_ids):
        for drawn in step:
            new[drawn.row].append(drawn.token)
    return new


def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    numbers: Sequence[int] | None = None,
    samples: range = range(1),
    ended: set[int] | None = None,
) -> Iterator[list[Drawn]]:
    """Like `generate`, a step at a time: yields what each row that has not ended goes on with.

    A row is a prompt and one of the `samples`; its random stream is made from the seed, the prompt's number among `numbers`
    (unset: 0, 1, …) and the sample's. Rows that end with a stop id are added to `ended`; those that the caller adds end too.
    """
    _check(model, prompts, max_new_tokens)
    numbers = range(len(prompts)) if numbers is None else numbers
    randoms = [random_stream(sampling.seed, number, sample) for number in numbers for sample in samples]
    ended = set() if ended is None else ended
    rows = Rows(model, prompts, len(samples), max_new_tokens)
    for count in range(max_new_tokens):
        if count:
            rows.advance(ended)
        step = []
        for row, token, logprob in _next(rows, sampling, [randoms[row] for row in rows.numbers]):
            if row in ended:
                continue
            if token in stop_ids:
                ended.add(row)
                continue
            rows.texts[row].append(token)
            step.append(Drawn(row, token, logprob))
        if step:
            yield step
        if len(ended) == len(randoms):
            return


def _next(rows: Rows, sampling: Sampling, randoms: Sequence[np.random.Generator]) -> list[Drawn]:
    """What each row goes on with."""
    logits = rows.logits.cpu()
    logits = logits if logits.dtype == torch.float64 else logits.float()  # (B, V)
    wanted = logits
    if sampling.repetition_penalty != 1.0:
        wanted = penalised(logits, [rows.texts[row] for row in rows.numbers], sampling.repetition_penalty)
    tokens = draw(wanted, sampling, randoms)  # (B)
    logprobs = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return [Drawn(*each) for each in zip(rows.numbers, tokens.tolist(), logprobs.tolist(), strict=True)]


def _check(model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not prompts or not all(prompts):
        raise GptcoreError("the prompt is empty: give at least one token to continue from")
    if model.config.objective == "masked":
        raise GptcoreError(
            "a masked model fills in what is hidden and continues nothing: hide a word of the text with <|mask|>"
        )
    if max_new_tokens < 1:
        raise GptcoreError(f"max_new_tokens is {max_new_tokens}: a prompt is continued by one token or more")
    for number, prompt in enumerate(prompts):
        if wrong := next((token for token in prompt if not 0 <= token < model.vocab_size), None):
            raise GptcoreError(
                f"prompt {number + 1} holds token {wrong}, the model's vocabulary ends at {model.vocab_size - 1}"
            )


@torch.no_grad()
def fill(model: GPT, ids: Sequence[int], mask: int) -> list[int]:
    """`ids` with every `mask` among them replaced by the likeliest token. Raises `GptcoreError` when there is none.

    For masked models; more than the context is read in pieces.
    """
    if mask not in ids:
        raise GptcoreError("nothing is hidden in the text: write <|mask|> where the model should fill in a word")
    filled: list[int] = []
    for piece in torch.split(torch.tensor(list(ids), device=model.embedding.weight.device), model.config.context):
        likeliest = model(piece[None])[0].argmax(-1)  # (T)
        filled += torch.where(piece == mask, likeliest, piece).tolist()
    return filled
