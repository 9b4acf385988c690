"""What a model makes of a text: the probability of every token, what it looked at, and what carried each prediction.

How a text is read stands in `reading`, how predictions are attributed to tokens in `attribution`. Everything is computed in
float32 and returned as plain numbers.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcore.errors import GptcoreError
from gptcore.inference.attribution import Attributions, attribute, scores
from gptcore.inference.explanation import Carried, Explanation, Guess, Label, Prediction
from gptcore.inference.reading import (
    Reading,
    answer_rows,
    piece_text,
    read_answer,
    read_base,
    read_prompt,
    whole_characters,
    written_answer,
)
from gptcore.model import GPT, LoadedModel, load_model
from gptcore.model.folder import pick_device
from gptcore.model.inputs import Inputs, inputs
from gptcore.model.quantisation import Int8Embedding
from gptcore.model.transformer import Block, attention_weights
from gptcore.tokens.objectives import IGNORED, padded

_LIKELIEST = 10
"""Tokens that are named for each place."""
_ATTRIBUTED = 256
"""Predictions, the newest, whose attributions are taken: each costs readings of the text."""
_LABELS_ATTRIBUTED = 16
"""Labels, the likeliest, of which it is told what speaks for them, against each other."""
_MAP_BYTES = 4_000_000
"""Weights in all attention maps together; of more only those between the newest tokens are kept."""
_AT_ONCE = 4096
"""Tokens in a batch."""


def open_model(folder: Path) -> LoadedModel:
    """A model folder opened in float32, on a card if there is one: the type that everything here is computed in."""
    return load_model(folder, pick_device("auto"), torch.float32)


def explain(loaded: LoadedModel, text: str, *, points: int = 8) -> Explanation:
    """Explain what a base makes of a text, or what a task model made of its answer to it.

    `points`: where gradients are taken, see `attribute`; 0 leaves attributions out. Raises `GptcoreError` for an empty text.
    """
    if not text.strip():
        raise GptcoreError("the text is empty: give one as an argument, with --file or on standard input")
    model, tokenizer = loaded.model, loaded.tokenizer
    if points and isinstance(model.embedding, Int8Embedding):
        raise GptcoreError("weights in eight bits have no gradients: take --points 0, or the model that they were made of")
    kind, reading, labels = _read(loaded, text, points)
    batch = inputs(reading.batch, model.embedding.weight.device)
    ids: list[int] = batch.tokens[0].tolist()
    asked = list(reading.asked)
    size = min(len(ids), max(1, math.isqrt(_MAP_BYTES // (model.config.layers * model.config.heads))))
    hidden, attention = look(model, batch, size)
    before = hidden[[place - 1 for place in asked]] if reading.hides is None else _alone(model, batch, asked, reading.hides)
    predictions = dict(zip(asked, _predictions(loaded, before, [ids[place] for place in asked]), strict=True))
    newest = asked[-_ATTRIBUTED:] if points else []
    for place, carried in zip(newest, _attributed(loaded, batch, newest, reading.hides, points), strict=True):
        predictions[place] = dataclasses.replace(predictions[place], carried=carried)
    left_out = [
        f"Attention is shown between the newest {size} of {len(ids)} tokens." if size < len(ids) else "",
        f"Attributions are those of the newest {len(newest)} of {len(asked)} predictions."
        if 0 < len(newest) < len(asked)
        else "",
    ]
    return Explanation(
        kind=kind,
        ids=ids,
        pieces=[piece_text(tokenizer, token) for token in ids],
        characters=whole_characters(tokenizer, ids),
        control=[token in tokenizer.control_ids for token in ids],
        predictions=predictions,
        next=_guesses(loaded, hidden[-1:])[0] if kind == "continue" else (),
        attention=attention.numpy(),
        labels=labels,
        bytes=reading.bytes,
        points=points,
        left_out=(*reading.left_out, *filter(None, left_out)),
    )


def _read(loaded: LoadedModel, text: str, points: int) -> tuple[str, Reading, tuple[Label, ...]]:
    """Kind, reading and, of a classifier, its labels."""
    if loaded.task is None:
        return "fill" if loaded.model.config.objective == "masked" else "continue", read_base(loaded, text), ()
    kind, (prompt, left_out) = str(loaded.task["type"]), read_prompt(loaded, text)
    labels = _labels(loaded, prompt, points) if kind == "classify" else ()
    tokenizer = loaded.tokenizer
    answer = [*tokenizer.encode(labels[0].label), tokenizer.end_id] if labels else written_answer(loaded, prompt)
    return kind, read_answer(loaded, prompt, answer, left_out), labels


# ----------------------------------------------------------------------------------------------------- attention --


@torch.no_grad()
def look(model: GPT, rows: Inputs, size: int) -> tuple[Tensor, Tensor]:
    """Hidden states (T, D) of one row, and the attention (layers, heads, size, size) between its newest tokens."""
    maps: list[Tensor] = []

    def keep(_module: nn.Module, given: tuple[Any, ...], rule: dict[str, Any], _output: Tensor) -> None:
        q, k, _, mask = given
        maps.append(attention_weights(q, k, mask, **rule)[0, :, -size:, -size:].float().cpu())

    handles = [block.attention.attend.register_forward_hook(keep, with_kwargs=True) for block in _blocks(model)]
    try:
        hidden = model.hidden(rows.tokens, layout=rows.layout)[0]
    finally:
        for handle in handles:
            handle.remove()
    return hidden, torch.stack(maps)


def _blocks(model: GPT) -> Iterator[Block]:
    for block in model.blocks:
        assert isinstance(block, Block)
        yield block


# --------------------------------------------------------------------------------------------------- predictions --


@torch.no_grad()
def _alone(model: GPT, rows: Inputs, asked: Sequence[int], hides: int) -> Tensor:
    """Hidden states (n, D) at the places asked, each where its token alone is hidden."""
    states = []
    for part in _batches(asked, rows.tokens.shape[1]):
        tokens = _single(rows, part, hides).tokens
        states.append(model.hidden(tokens)[range(len(part)), part])
    return torch.cat(states)


def _single(rows: Inputs, asked: Sequence[int], hides: int | None) -> Inputs:
    """A row per place of the one row, whose only label is the token there."""
    tokens = rows.tokens.repeat(len(asked), 1)  # (n, T)
    labels, row = torch.full_like(tokens, IGNORED), range(len(asked))
    if hides is not None:
        labels[row, asked] = tokens[row, asked]
        tokens[row, asked] = hides
        return Inputs(tokens, labels, rows.layout)
    before = [place - 1 for place in asked]
    labels[row, before] = tokens[row, asked]
    if rows.layout is None:  # what comes after is not seen
        tokens, labels = tokens[:, : max(asked)], labels[:, : max(asked)]
    return Inputs(tokens, labels, rows.layout)


def _batches(places: Sequence[int], length: int) -> Iterator[Sequence[int]]:
    size = max(1, _AT_ONCE // length)
    return (places[start : start + size] for start in range(0, len(places), size))


@torch.no_grad()
def _predictions(loaded: LoadedModel, hidden: Tensor, came: Sequence[int]) -> list[Prediction]:
    """Of the tokens that came, from the hidden states (n, D) that predict them."""
    found = []
    for state, token, likeliest in zip(hidden, came, _guesses(loaded, hidden), strict=True):
        logits = loaded.model.logits(state).double()  # (V)
        bits = (logits.logsumexp(-1) - logits[token]).item() / math.log(2)
        found.append(Prediction(bits, 1 + int((logits > logits[token]).sum()), likeliest))
    return found


@torch.no_grad()
def _guesses(loaded: LoadedModel, hidden: Tensor) -> list[tuple[Guess, ...]]:
    """The likeliest tokens for each of the hidden states (n, D)."""
    tokenizer, found = loaded.tokenizer, []
    for state in hidden:
        best = loaded.model.logits(state).double().softmax(-1).topk(min(_LIKELIEST, loaded.model.vocab_size))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found.append(tuple(Guess(piece_text(tokenizer, token), share) for token, share in pairs))
    return found


# -------------------------------------------------------------------------------------------------- attributions --


def _attributed(loaded: LoadedModel, rows: Inputs, asked: Sequence[int], hides: int | None, points: int) -> Iterator[Carried]:
    """What carried the prediction of the tokens at these places, one after the other."""
    spoken, length = _spoken(loaded), rows.tokens.shape[1]
    for part in _batches(asked, length):
        single = _single(rows, part, hides)
        found = attribute(loaded.model, single, spoken[single.tokens], spoken, points)
        yield from _carried(found, length)


def _labels(loaded: LoadedModel, prompt: Sequence[int], points: int) -> tuple[Label, ...]:
    """The labels of a classifier, the likeliest first."""
    assert loaded.task is not None
    model, tokenizer, names = loaded.model, loaded.tokenizer, loaded.task["labels"]
    rows = answer_rows(loaded, prompt, [[*tokenizer.encode(label), tokenizer.end_id] for label in names])
    batches = _batches(range(len(rows)), len(prompt) + 8)
    device = model.embedding.weight.device
    with torch.no_grad():
        parts = [inputs(padded([rows[row] for row in part], tokenizer.pad_id), device) for part in batches]
        bits = torch.cat([scores(model, part) for part in parts]).double()
    nats, order = bits * math.log(2), bits.argsort(descending=True, stable=True).tolist()
    labels = [Label(names[row], nats[row].item(), nats.softmax(0)[row].item()) for row in order]
    best = order[:_LABELS_ATTRIBUTED] if points else []
    if len(best) > 1:
        among, spoken = inputs(padded([rows[row] for row in best], tokenizer.pad_id), device), _spoken(loaded)
        text = spoken[among.tokens]
        text[:, len(prompt) :] = False
        found = attribute(model, among, text, spoken, points, against=True)
        for number, carried in enumerate(_carried(found, len(prompt))):
            labels[number] = dataclasses.replace(labels[number], carried=carried)
    return tuple(labels)


def _spoken(loaded: LoadedModel) -> Tensor:
    """True for every id (V) that stands in texts: no control symbol, nor what only fills up the embedding."""
    ids = torch.arange(loaded.model.vocab_size, device=loaded.model.embedding.weight.device)
    control = torch.tensor(sorted(loaded.tokenizer.control_ids), device=ids.device)
    return (ids < loaded.tokenizer.vocabulary) & ~torch.isin(ids, control)


def _carried(found: Attributions, length: int) -> Iterator[Carried]:
    """A row each, with zeros or a cut to `length` tokens."""
    bits = F.pad(found.bits, (0, max(0, length - found.bits.shape[1])))[:, :length].double().cpu().numpy()
    for row, blank, missed in zip(bits, found.blank.tolist(), found.missed.tolist(), strict=True):
        yield Carried(row, blank, missed)
