"""What a freshly trained model says to a few validation texts: a first look, before anything is measured."""

from pathlib import Path

import numpy as np

from gptcore.evaluation.markdown import fenced, page
from gptcore.inference.generate import fill, generate
from gptcore.model import load_model
from gptcore.model.folder import pick_device
from gptcore.tokens import Shards

_COUNT = 4
_BEGINNING = 24
"""Tokens of a document that the base is shown."""
_NEW_TOKENS = 48
_HIDDEN = 5


def write_samples(model: Path, shards: Path, path: Path) -> None:
    """Write a Markdown page: the model in a folder continues validation documents of `shards`, fills in what is
    hidden of them, or answers validation rows."""
    loaded = load_model(model, pick_device("auto"))
    tokenizer, opened = loaded.tokenizer, Shards.open(shards)
    split = opened.split("valid")
    parts = [f"# Samples of {'a ' + loaded.task['type'] + ' model' if loaded.task else 'the base'}"]
    for document in np.random.default_rng(0).permutation(split.documents)[:_COUNT]:
        ids = split.document(int(document)).tolist()
        shown = int(np.argmax(split.mask(int(document)) > 0)) if opened.masked else min(_BEGINNING, len(ids) // 2 + 1)
        if loaded.model.config.objective == "masked":
            text = ids[: _BEGINNING + _NEW_TOKENS]
            hidden = [tokenizer.mask_id if at % _HIDDEN == _HIDDEN - 1 else token for at, token in enumerate(text)]
            filled = tokenizer.decode(fill(loaded.model, hidden, tokenizer.mask_id))
            parts += [f"Of every {_HIDDEN}th token it did not see, it makes", fenced(filled), "and the text says"]
            parts.append(fenced(tokenizer.decode(text)))
            continue
        asking = [tokenizer.mask_id, tokenizer.begin_id] if loaded.model.config.objective == "prefix" else []
        stops = [tokenizer.end_id, tokenizer.begin_id]
        (said,) = generate(loaded.model, [[*ids[:shown], *asking]], max_new_tokens=_NEW_TOKENS, stop_ids=stops)
        parts += ["Given", fenced(tokenizer.decode(ids[:shown])), "it says", fenced(tokenizer.decode(said))]
        parts += ["and the text says", fenced(tokenizer.decode(ids[shown : shown + _NEW_TOKENS]))]
    path.write_text(page(*parts), encoding="utf-8")
