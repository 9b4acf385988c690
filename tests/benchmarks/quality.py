"""Quality for time: how few bits per byte a training reaches.   python tests/benchmarks/quality.py TEXTS.jsonl.gz [--tune]

TEXTS has the columns `text` and `split` (train, valid). Tokenizer, shards and training are the pipeline's own; without --set
a vocabulary of 4,096, 4 layers x 256, a context of 256 and 2.95 M training tokens. Bits per byte are over all documents held
out: in windows side by side, as training measures, and in windows that overlap by half, as evaluation does. Seconds are those
of the optimizer steps alone, without compiling, evaluations and saves.

With --tune nothing is read from valid: about 0.5 MB of train, whole documents drawn by a hash of their text, are held out
instead. Settings that were found with it may then be measured once without it. Tokenizer and shards are kept in --work.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas
from pydantic import ValidationError

from gptcore.artifacts import digest_of
from gptcore.config import ModelConfig, Section, ShardsConfig, TokenizerConfig, TrainingConfig, apply_override, settings_error
from gptcore.errors import GptcoreError
from gptcore.tokens import Tokenizer
from gptcore.tokens.encoding import encode_corpus
from gptcore.tokens.learning import learn_tokenizer
from gptcore.tokens.shards import Shards
from gptcore.training.job import Job, Run
from gptcore.training.journal import read_journal
from gptcore.training.process import run_training

TUNE_BYTES = 500_000
"""Of train, held out with --tune."""


class QualityConfig(Section):
    """What is trained."""

    tokenizer: TokenizerConfig = TokenizerConfig(vocabulary=4096)
    """The tokenizer, learned from the training text."""
    model: ModelConfig = ModelConfig(layers=4, width=256, heads=4, context=256)
    """The shape."""
    training: TrainingConfig = TrainingConfig(tokens=2_950_000, evaluations=1, evaluation_tokens=10**9)
    """The budget and the optimizer."""


def quality_config(overrides: list[str]) -> QualityConfig:
    """The settings with `section.key=value` in their place. Raises `SettingsError`."""
    values: dict[str, Any] = QualityConfig().model_dump()
    for override in overrides:
        apply_override(values, override)
    try:
        return QualityConfig.model_validate(values)
    except ValidationError as error:
        raise settings_error(error, "the benchmark") from error


def read_texts(file: Path, *, tune: bool) -> pandas.DataFrame:
    """Rows of source, id, text and split; with `tune` those of train alone, some of which are then valid."""
    rows = pandas.read_json(file, lines=True)[["text", "split"]]
    rows = rows.assign(source="text", id=[f"{number:06}" for number in range(len(rows))])
    if not tune:
        return rows
    rows = rows[rows["split"] == "train"]
    order = rows["text"].map(lambda text: hashlib.sha256(text.encode()).hexdigest()).sort_values().index
    sizes = rows["text"].loc[order].map(lambda text: len(text.encode())).cumsum()
    return rows.assign(split=rows.index.isin(order[sizes <= TUNE_BYTES])).replace({"split": {True: "valid", False: "train"}})


def prepare(rows: pandas.DataFrame, config: TokenizerConfig, work: Path) -> Path:
    """A folder with `corpus`, `tokenizer` and `shards` of these texts, made unless it is there."""
    folder = work / digest_of([config.model_dump(), rows.to_dict("list")])[:12]
    if not (folder / "shards" / "index.json").is_file():
        (folder / "corpus" / "data").mkdir(parents=True, exist_ok=True)
        for split in ("train", "valid", "test"):
            rows[rows["split"] == split].to_parquet(folder / "corpus" / "data" / f"{split}.parquet", index=False)
        learn_tokenizer(folder, config, folder / "corpus")
        encode_corpus(folder / "shards", ShardsConfig(), folder / "corpus", Tokenizer.load(folder / "tokenizer"))
    return folder


def train(config: QualityConfig, prepared: Path, run: Run) -> dict[str, Any]:
    """Train in the folder of `run`; what its journal tells."""
    shards = prepared / "shards"
    run_training(
        run,
        Job(
            model=config.model, training=config.training, shards=str(shards), tokenizer=str(prepared / "tokenizer"),
            shards_digest=digest_of(json.loads((shards / "index.json").read_text())),
        ),
        lambda line: print(line["text"], file=sys.stderr) if line["kind"] == "event" else None,
    )  # fmt: skip
    resolved = run.resolved()
    assert resolved is not None, "the training ended"
    lines = [line["values"] | {"step": line["step"]} for line in read_journal(run.journal) if line["kind"] == "metric"]
    told = [line for line in lines if "tokens_per_second" in line]
    seconds = sum(
        (line["tokens"] - before) / line["tokens_per_second"]
        for line, before in zip(told, [0.0, *(line["tokens"] for line in told)], strict=False)
    )
    measured = [line["valid/bits_per_byte"] for line in lines if "valid/bits_per_byte" in line]
    return {
        "bits_per_byte": round(measured[-1], 4), "tokens": round(told[-1]["tokens"]), "steps": resolved.steps,
        "seconds": round(seconds, 1), "tokens_per_second": round(told[-1]["tokens"] / seconds, 1),
        "compiled": resolved.compiled, "precision": resolved.precision, "threads": resolved.threads,
    }  # fmt: skip


def strided(model: Path, rows: pandas.DataFrame) -> float:
    """Bits per byte of the held-out documents in windows that overlap by half."""
    from gptcore.evaluation.base import score_documents
    from gptcore.model import load_model

    scores = score_documents(load_model(model), rows[rows["split"] == "valid"])
    return round(float(scores["bits"].sum() / scores["bytes"].sum()), 4)


def main() -> None:
    """Train once and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="a .jsonl or .jsonl.gz file with the columns text and split")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="tokenizer.*, model.* or training.*")
    parser.add_argument("--tune", action="store_true", help="hold out a part of train and leave valid alone")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / f"gptcore-quality-{os.getuid()}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    try:
        config, rows = quality_config(arguments.set), read_texts(arguments.texts, tune=arguments.tune)
        prepared = prepare(rows, config.tokenizer, arguments.work)
        with tempfile.TemporaryDirectory(prefix="quality-") as folder:
            answer = train(config, prepared, Run(Path(folder)))
            answer["strided_bits_per_byte"] = strided(Path(folder) / "model", rows)
    except GptcoreError as error:
        sys.exit(str(error))
    train_split = Shards.open(prepared / "shards").split("train")
    size = sum(train_split.bytes(document) for document in range(train_split.documents))
    answer |= {"bytes_per_token": round(size / train_split.tokens, 3), "held_out": "of train" if arguments.tune else "valid"}
    if arguments.json:
        print(json.dumps(answer | {"settings": arguments.set}))
    else:
        print("\n".join(f"{name.replace('_', ' '):24}{value}" for name, value in answer.items()))


if __name__ == "__main__":
    main()
