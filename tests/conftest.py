"""Tiny real things that several rooms share, made once."""

import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from gptcore.config import (
    CorpusConfig,
    FilesSource,
    ModelConfig,
    ShardsConfig,
    SplitConfig,
    TokenizerConfig,
    TrainingConfig,
)

# Started in the background of a shell, Ctrl-C is ignored here and in every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = [
    "array",
    "value",
    "index",
    "column",
    "matrix",
    "vector",
    "sum",
    "mean",
    "float",
    "integer",
    "return",
    "given",
    "shape",
    "axis",
    "input",
    "output",
    "data",
    "frame",
    "series",
    "string",
    "number",
    "list",
    "function",
    "method",
    "class",
    "object",
    "parameter",
    "default",
    "optional",
    "file",
    "path",
    "name",
    "key",
    "order",
    "sort",
    "group",
    "split",
    "merge",
    "join",
    "plot",
    "line",
    "bar",
    "figure",
    "color",
    "label",
    "time",
    "date",
    "period",
    "frequency",
    "random",
    "seed",
    "sample",
    "test",
    "train",
    "model",
    "fit",
    "predict",
]


def write_texts(folder: Path, count: int = 400, seed: int = 0) -> Path:
    """Little files of made-up but regular prose, each different enough not to overlap with another."""
    drawn = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        lines = []
        for _ in range(drawn.randint(3, 8)):
            subject, verb, thing = (drawn.choice(WORDS) for _ in range(3))
            rest = " ".join(drawn.choices(WORDS, k=drawn.randint(3, 9)))
            lines.append(f"The {subject} {verb}s the {thing} of {rest} number {drawn.randint(0, 999)}.")
        (folder / f"text-{number:03d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Tiny:
    """A corpus, its tokenizer and its shards, as plain folders."""

    texts: Path
    corpus: Path
    tokenizer: Path
    shards: Path

    def model(self, **changes) -> ModelConfig:
        return ModelConfig(**{"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 32, **changes})

    def training(self, **changes) -> TrainingConfig:
        budget = {} if {"minutes", "tokens"} & changes.keys() else {"steps": 6}
        return TrainingConfig(
            **{
                "batch": 4,
                "threads": 1,
                "evaluations": 2,
                "evaluation_tokens": 512,
                "device": "cpu",
                **budget,
                **changes,
            }
        )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    from gptcore.corpus import build_corpus
    from gptcore.tokens import Tokenizer, encode_corpus, learn_tokenizer

    root = tmp_path_factory.mktemp("tiny")
    tiny = Tiny(write_texts(root / "texts"), root / "corpus", root / "tokenizer", root / "shards")
    for folder in (tiny.corpus, tiny.tokenizer, tiny.shards):
        folder.mkdir()
    source = FilesSource(paths=(str(tiny.texts),))
    build_corpus(tiny.corpus, CorpusConfig(sources=(source,), workers=1), SplitConfig(valid=0.1, test=0.1))
    learn_tokenizer(tiny.tokenizer, TokenizerConfig(vocabulary=400), tiny.corpus)
    encode_corpus(tiny.shards, ShardsConfig(), tiny.corpus, Tokenizer.load(tiny.tokenizer / "tokenizer"))
    return tiny


@pytest.fixture
def copy_of(tmp_path):
    """A function that copies a folder so that a test may damage it."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return copy
