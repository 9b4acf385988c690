"""Generation with a key-value cache: greedy or sampled, prompts of different lengths side by side."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from gptcore.errors import GptcoreError
from gptcore.model import GPT, Cache


def generate(
    model: GPT,
    ids: Sequence[int] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Continue one prompt (ids) or several; returns the new ids of each, without the stop id that ended it.

    `temperature` 0 is greedy; `top_k` and `top_p` narrow the choice to the likeliest k and to the smallest set of that
    probability (Holtzman et al. 2020). Every prompt draws from its own random stream, made from `seed` and its number.
    Past the context the newest half is kept and encoded once. Prompts of a model with the prefix objective end with what hides
    a span and what begins it. Raises `GptcoreError` for an empty prompt and for a masked model, which continues nothing.
    """
    single = not ids or isinstance(ids[0], int)
    prompts = cast("list[list[int]]", [list(ids)] if single else [list(cast(Sequence[int], prompt)) for prompt in ids])
    new: list[list[int]] = [[] for _ in prompts]
    for chosen in stream(
        model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        stop_ids=stop_ids,
    ):  # fmt: skip
        for row, token in enumerate(chosen):
            if token is not None:
                new[row].append(token)
    return new


@torch.no_grad()
def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
) -> Iterator[list[int | None]]:
    """Like `generate`, a step at a time: yields each prompt's next id, None once it has ended."""
    if not prompts or not all(prompts):
        raise GptcoreError("the prompt is empty: give at least one token to continue from")
    if model.config.objective == "masked":
        raise GptcoreError(
            "a masked model fills in what is hidden and continues nothing: hide a word of the text with <|mask|>"
        )
    device, context = model.embedding.weight.device, model.config.context
    randoms = [torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63) for row in range(len(prompts))]
    texts = [list(prompt) for prompt in prompts]
    # What is continued moves into the prefix when it is encoded again, and what asks for a span stays at its end.
    asking = [text[-2:] if model.config.objective == "prefix" else [] for text in texts]
    texts = [text[: len(text) - len(tail)] for text, tail in zip(texts, asking, strict=True)]
    alive = [True] * len(texts)
    cache: Cache | None = None
    for _ in range(max_new_tokens):
        if cache is None or cache.length == context:
            kept = context - len(asking[0]) if cache is None else max(1, context // 2)
            cache, logits = prefill(model, [[*text[-kept:], *tail] for text, tail in zip(texts, asking, strict=True)])
        else:
            last = torch.tensor([[text[-1]] for text in texts], device=device)
            logits = model(last, cache)[:, -1]  # (B, V)
        chosen = choose(logits.float().cpu(), temperature, top_k, top_p, randoms)
        step: list[int | None] = []
        for row, token in enumerate(chosen.tolist()):
            alive[row] = alive[row] and token not in stop_ids
            texts[row].append(token)
            step.append(token if alive[row] else None)
        if not any(alive):
            return
        yield step


@torch.no_grad()
def prefill(model: GPT, texts: Sequence[Sequence[int]]) -> tuple[Cache, Tensor]:
    """Encode prompts, padded on the left, into a fresh cache; returns it and the logits (B, V) after the last token."""
    device, longest = model.embedding.weight.device, max(len(text) for text in texts)
    padding = torch.tensor([longest - len(text) for text in texts], device=device)
    tokens = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts], device=device)
    cache = Cache(model, len(texts), model.config.context, padding if bool(padding.any()) else None)
    hidden = model.hidden(tokens, cache)  # (B, T, D)
    return cache, model.logits(hidden[:, -1])


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


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, randoms: Sequence[torch.Generator]
) -> Tensor:
    """One id (B) per row of logits (B, V)."""
    if temperature <= 0.0:
        return logits.argmax(-1)
    logits, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = (logits / temperature).softmax(-1)
    if top_k:
        probabilities[:, top_k:] = 0.0
    if top_p is not None and top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities  # what the likelier ones sum to
        beyond = before >= top_p * probabilities.sum(-1, keepdim=True)
        beyond[:, 0] = False  # the likeliest one is never beyond
        probabilities[beyond] = 0.0
    upto = probabilities.double().cumsum(-1)  # (B, V)
    drawn = torch.stack([torch.rand((1,), generator=random, dtype=torch.float64, device="cpu") for random in randoms])  # (B, 1)
    # The first place where the sum exceeds the draw; zero-probability places are never the first.
    place = torch.searchsorted(upto, drawn * upto[:, -1:], right=True).clamp_max(logits.shape[-1] - 1)
    return order.gather(-1, place).squeeze(-1)
