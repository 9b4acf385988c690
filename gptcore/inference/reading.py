"""A text as a model reads it, and which of its tokens the model can be asked about.

causal   begin, the text                        a token's probability follows from those before it
prefix   begin, what hides it, begin, the text  the same: the whole text is the hidden span
masked   begin, the text, the end of BERT's     each token's when it alone is hidden (Salazar et al. 2020)
a task   begin, user, the text, assistant, the answer, end: asked is the answer, as in training
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptcore.config import ModelConfig
from gptcore.downstream import prompt_ids
from gptcore.downstream.encode import answer_room
from gptcore.inference.generate import generate
from gptcore.model import LoadedModel
from gptcore.tokens import Tokenizer
from gptcore.tokens.objectives import IGNORED, Batch, Symbols, infilled

_LONGEST = 4
"""Bytes of the longest character in UTF-8."""


@dataclass(frozen=True)
class Reading:
    """A text as it is read."""

    batch: Batch
    """One row (1, T)."""
    asked: range
    """Places of the tokens whose probability is asked."""
    hides: int | None
    """What takes the place of a token that is asked for; None where nothing after it is seen anyway."""
    bytes: int
    """UTF-8 bytes of the tokens that are asked for."""
    left_out: list[str]
    """A sentence about what did not fit."""


def read_base(loaded: LoadedModel, text: str) -> Reading:
    """A text of which every token is asked. Of one that is longer than the context the newest part is read."""
    tokenizer, config = loaded.tokenizer, loaded.model.config
    ids, left_out = tokenizer.encode(text), []
    ending = [tokenizer.end_id] if config.objective == "masked" and tokenizer.ends_texts else []
    room = config.context - (3 if config.objective == "prefix" else 1 + len(ending))
    start, size = 0, len(text.encode())
    if len(ids) > room:
        near = max(0, len(ids) - room - _LONGEST)
        written = {near + begin: spelled for begin, _, spelled in whole_characters(tokenizer, ids[near:])}
        start = min((begin for begin in written if begin >= len(ids) - room), default=len(ids) - room)
        size = sum(len(spelled.encode()) for begin, spelled in written.items() if begin >= start)
        kept = f"its newest {len(ids) - start:,} of {len(ids):,} tokens are read."
        left_out.append(f"The text is longer than the context of {config.context:,} tokens: {kept}")
    batch, asked = _laid_out([tokenizer.begin_id, *ids[start:], *ending], 1, config, tokenizer)
    asked = asked[: len(asked) - len(ending)]
    return Reading(batch, asked, tokenizer.mask_id if config.objective == "masked" else None, size, left_out)


def read_prompt(loaded: LoadedModel, text: str) -> tuple[list[int], list[str]]:
    """What stands before the answer of a task, and a sentence if the text had to be cut, at its end as in training."""
    assert loaded.task is not None
    tokenizer, config = loaded.tokenizer, loaded.model.config
    room = config.context - answer_room(tokenizer, loaded.task) - len(_asking(loaded))
    prompt, whole = (prompt_ids(tokenizer, text, max(4, most)) for most in (room, len(text.encode()) + 4))
    if len(prompt) == len(whole):
        return prompt, []
    return prompt, [f"The text has {len(whole) - 3} tokens, of which the task reads the first {len(prompt) - 3}."]


def read_answer(loaded: LoadedModel, prompt: Sequence[int], answer: Sequence[int], left_out: list[str]) -> Reading:
    """A task's prompt and an answer, of which every token is asked."""
    batch, asked = _laid_out([*prompt, *answer], len(prompt), loaded.model.config, loaded.tokenizer)
    return Reading(batch, asked, None, len(loaded.tokenizer.decode(answer).encode()), left_out)


def written_answer(loaded: LoadedModel, prompt: Sequence[int]) -> list[int]:
    """The likeliest answer to a prompt, with its end where it came to one."""
    assert loaded.task is not None
    most, end = int(loaded.task["max_new_tokens"]), loaded.tokenizer.end_id
    stops = [end, loaded.tokenizer.begin_id]
    answer = generate(loaded.model, [*prompt, *_asking(loaded)], max_new_tokens=most, stop_ids=stops)[0]
    return [*answer, end] if len(answer) < most else answer


def answer_rows(loaded: LoadedModel, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[Batch]:
    """A row per answer, whose labels are its tokens."""
    rows = []
    for answer in answers:
        batch, asked = _laid_out([*prompt, *answer], len(prompt), loaded.model.config, loaded.tokenizer)
        labels = np.full_like(batch.tokens, IGNORED)
        labels[0, asked.start - 1 : asked.stop - 1] = answer
        rows.append(Batch(batch.tokens, labels, batch.places, batch.spans, batch.parts, batch.exposed))
    return rows


def _laid_out(ids: list[int], start: int, config: ModelConfig, tokenizer: Tokenizer) -> tuple[Batch, range]:
    """The row (1, T) of ids of which those from `start` on are predicted, and the places of these."""
    if config.objective != "prefix":
        row = np.array([ids], np.int64)
        return Batch(row, np.full_like(row, IGNORED)), range(start, len(ids))
    # With an end that is only predicted, all of the ids are read.
    text = np.array([*ids, tokenizer.end_id], np.int64)
    return infilled(text, [(start, len(text))], Symbols.of(tokenizer)), range(start + 2, len(ids) + 2)


def _asking(loaded: LoadedModel) -> list[int]:
    """What asks a model for the hidden span."""
    if loaded.model.config.objective != "prefix":
        return []
    return [loaded.tokenizer.mask_id, loaded.tokenizer.begin_id]


# ------------------------------------------------------------------------------------------------------- spelling --


def whole_characters(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[int, int, str]]:
    """(from, to, text) of the tokens that together spell whole characters; a control symbol alone, with its name.

    What is no UTF-8, as at a cut, stands for itself.
    """
    found: list[tuple[int, int, str]] = []
    start = 0
    while start < len(ids):
        end, text = start + 1, piece_text(tokenizer, ids[start])
        for longer in range(start + 1, min(len(ids), start + _LONGEST) + 1):
            part = ids[start:longer]
            if tokenizer.control_ids.intersection(part):
                break
            spelled = tokenizer.decode(part)
            if "\ufffd" not in spelled:
                end, text = longer, spelled
                break
        found.append((start, end, text))
        start = end
    return found


def piece_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text: what it decodes to, or its name where that is no whole character."""
    text = "" if token in tokenizer.control_ids else tokenizer.decode([token])
    return text if text and "\ufffd" not in text else tokenizer.piece(token)
