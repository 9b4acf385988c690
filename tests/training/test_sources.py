"""A base that reads several sources: in the shares of its mixture, and measured on each of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from gptcore.artifacts import sha256_file
from gptcore.config import ShardsConfig
from gptcore.corpus import SPLITS, Document
from gptcore.corpus.build import read_split, write_split
from gptcore.tokens import Tokenizer, encode_corpus
from gptcore.tokens.objectives import IGNORED
from gptcore.training.attempts import Recorder
from gptcore.training.job import Job, Run
from gptcore.training.journal import Journal, read_journal
from gptcore.training.loop import train
from gptcore.training.trainer import Rank, Trainer

MIXTURE = {"lists": 1, "prose": 3}


@pytest.fixture(scope="module")
def two_sources(tiny, tmp_path_factory) -> Path:
    """Shards of the tiny corpus as `prose` and of as many numbered lists."""
    folder = tmp_path_factory.mktemp("two-sources")
    for split in SPLITS:
        texts = read_split(tiny.corpus, split)["text"].tolist()
        prose = [Document(f"p{n}", text, "prose", f"p{n}") for n, text in enumerate(texts)]
        lists = [Document(f"l{n}", f"{n} given, {n + 1} shape, {n + 2} axis" * 3, "lists", f"l{n}") for n in range(len(texts))]
        write_split(folder / "corpus" / "data" / f"{split}.parquet", prose + lists, split)
    encode_corpus(folder / "shards", ShardsConfig(), folder / "corpus", Tokenizer.load(tiny.tokenizer / "tokenizer"))
    return folder / "shards"


def run_of(tiny, folder: Path, shards: Path, **training) -> Run:
    run = Run(folder)
    run.folder.mkdir()
    settings = tiny.training(**{"steps": 20, "precision": "float32", "evaluation_tokens": 1500, **training})
    tokenizer = str(tiny.tokenizer / "tokenizer")
    run.write(Job(model=tiny.model(), training=settings, shards=str(shards), shards_digest="shards", tokenizer=tokenizer))
    return run


def measured(run: Run) -> dict[str, float]:
    return [line["values"] for line in read_journal(run.journal) if "valid/loss" in line.get("values", {})][-1]


def test_several_sources_are_measured_together_and_each_for_itself(tiny, two_sources, tmp_path):
    trainer = Trainer(run_of(tiny, tmp_path / "run", two_sources), Rank(), Journal(tmp_path / "journal.jsonl"))
    nats, labels, text_bytes = {}, {}, {}
    for source, part in trainer.held_out.items():
        batches = [tuple(map(torch.from_numpy, (batch.tokens, batch.labels))) for batch in part.batches]
        with torch.no_grad():
            losses = [
                functional.cross_entropy(trainer.model(ids).flatten(0, 1), wanted.flatten(), reduction="sum").item()
                for ids, wanted in batches
            ]
        nats[source], labels[source] = sum(losses), sum(int((wanted != IGNORED).sum()) for _, wanted in batches)
        text_bytes[source] = part.text_bytes
    expected = {
        "valid/loss": sum(nats.values()) / sum(labels.values()),
        "valid/bits_per_byte": sum(nats.values()) / np.log(2) / sum(text_bytes.values()),
    }
    for source in MIXTURE:
        expected[f"valid/loss/{source}"] = nats[source] / labels[source]
        expected[f"valid/bits_per_byte/{source}"] = nats[source] / np.log(2) / text_bytes[source]
    assert trainer.evaluate() == pytest.approx(expected, rel=1e-5)


def test_one_source_is_measured_once(tiny, tmp_path):
    trainer = Trainer(run_of(tiny, tmp_path / "run", tiny.shards), Rank(), Journal(tmp_path / "journal.jsonl"))
    assert trainer.evaluate().keys() == {"valid/loss", "valid/bits_per_byte"}


@pytest.mark.parametrize("mixture", [None, MIXTURE])
def test_the_rows_of_all_processes_are_the_global_batch(tiny, two_sources, tmp_path, mixture):
    run = run_of(tiny, tmp_path / "run", two_sources, batch=6, mixture=mixture)
    trainers = [Trainer(run, Rank(number, 3), Journal(tmp_path / "journal.jsonl")) for number in range(3)]
    for step in (0, 7):
        batch = trainers[0].batches.at(step)
        for number, trainer in enumerate(trainers):
            micro = list(trainer._micro_batches(trainer.batches.at(step)))
            for place, whole in enumerate((batch.tokens, batch.labels)):
                assert torch.cat([pair[place] for pair in micro]).tolist() == whole[number::3].tolist()


def test_a_mixed_training_that_is_stopped_goes_on_to_the_same_bits(tiny, two_sources, tmp_path):
    weights = []
    for name, stops in (("straight", []), ("stopped", [3, 11])):
        run = run_of(tiny, tmp_path / name, two_sources, mixture=MIXTURE)
        for stop in stops:
            steps = iter(range(stop))
            assert not train(run, Rank(), lambda steps=steps: next(steps, None) is None, Recorder(tmp_path / "attempts"))
        assert train(run, Rank(), lambda: False, Recorder(tmp_path / "attempts"))
        weights.append(sha256_file(run.model / "model.safetensors"))
    assert weights[0] == weights[1]


def test_what_a_mixture_leaves_out_is_not_learned(tiny, two_sources, tmp_path):
    losses = {}
    for only in MIXTURE:
        mixture = {source: float(source == only) for source in MIXTURE}
        run = run_of(tiny, tmp_path / only, two_sources, mixture=mixture, steps=60)
        assert train(run, Rank(), lambda: False, Recorder(tmp_path / "attempts"))
        losses[only] = measured(run)
    assert losses["lists"]["valid/loss/lists"] < losses["prose"]["valid/loss/lists"] - 0.5
    assert losses["prose"]["valid/loss/prose"] < losses["lists"]["valid/loss/prose"] - 0.5
