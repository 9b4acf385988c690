"""What a freshly trained model says to a few validation texts: a first look, before anything is measured."""

from pathlib import Path

import numpy as np

from gptcore.evaluation.markdown import fenced, page
from gptcore.inference import generate
from gptcore.model import load_model
from gptcore.model.folder import pick_device
from gptcore.tokens import Shards

_COUNT = 4
_BEGINNING = 24
"""Tokens of a document that the base is shown."""
_NEW_TOKENS = 48


def write_samples(model: Path, shards: Path, path: Path) -> None:
    """Write a Markdown page: the model in a folder continues validation documents of `shards`, or answers validation rows."""
    loaded = load_model(model, pick_device("auto"))
    tokenizer, opened = loaded.tokenizer, Shards.open(shards)
    split = opened.split("valid")
    parts = [f"# Samples of {'a ' + loaded.task['type'] + ' model' if loaded.task else 'the base'}"]
    for document in np.random.default_rng(0).permutation(split.documents)[:_COUNT]:
        ids = split.document(int(document)).tolist()
        shown = int(np.argmax(split.mask(int(document)) > 0)) if opened.masked else min(_BEGINNING, len(ids) // 2 + 1)
        said = generate(loaded.model, ids[:shown], max_new_tokens=_NEW_TOKENS, stop_ids=[tokenizer.end_id, tokenizer.begin_id])[
            0
        ]
        parts += ["Given", fenced(tokenizer.decode(ids[:shown])), "it says", fenced(tokenizer.decode(said))]
        parts += ["and the text says", fenced(tokenizer.decode(ids[shown : shown + _NEW_TOKENS]))]
    path.write_text(page(*parts), encoding="utf-8")
