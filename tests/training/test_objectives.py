"""A base learns to fill in and to continue, whatever its objective is, and goes on to the same bits after a stop."""

from pathlib import Path

import pytest

from gptcore.artifacts import sha256_file
from gptcore.evaluation.samples import write_samples
from gptcore.inference import Predictor
from gptcore.training.attempts import Recorder
from gptcore.training.job import Job, Run
from gptcore.training.journal import read_journal
from gptcore.training.loop import train
from gptcore.training.trainer import Rank

SETTINGS = [
    {"objective": "masked"},
    {"objective": "masked", "document_mask": True, "positions": "learned"},
    {"objective": "prefix"},
    {"objective": "prefix", "document_mask": True, "positions": "sinusoidal"},
    {"objective": "causal", "document_mask": True},
]


def trained(tiny, folder: Path, model: dict, stops=(), **training) -> Run:
    run = Run(folder)
    run.folder.mkdir()
    settings = tiny.training(**{"steps": 40, "evaluation_tokens": 1500, "evaluations": 2, **training})
    shards, tokenizer = str(tiny.shards), str(tiny.tokenizer / "tokenizer")
    run.write(Job(model=tiny.model(**model), training=settings, shards=shards, shards_digest="shards", tokenizer=tokenizer))
    for stop in stops:
        steps = iter(range(stop))
        assert not train(run, Rank(), lambda steps=steps: next(steps, None) is None, Recorder(folder / "attempts"))
    assert train(run, Rank(), lambda: False, Recorder(folder / "attempts"))
    return run


@pytest.mark.parametrize("model", SETTINGS, ids=lambda model: "-".join(map(str, model.values())))
def test_it_learns_stops_and_goes_on_to_the_same_bits(tiny, tmp_path, model):
    runs = [trained(tiny, tmp_path / "straight", model), trained(tiny, tmp_path / "stopped", model, stops=[7, 20])]
    assert len({sha256_file(run.model / "model.safetensors") for run in runs}) == 1
    values = [line["values"] for line in read_journal(runs[0].journal) if line["kind"] == "metric"]
    measured = [line for line in values if "valid/loss" in line]
    assert measured[-1]["valid/loss"] < measured[0]["valid/loss"] < 7.0
    assert ("valid/bits_per_byte" in measured[0]) == (model["objective"] == "causal")
    write_samples(runs[0].model, tiny.shards, tmp_path / "samples.md")
    assert "text says" in (tmp_path / "samples.md").read_text(encoding="utf-8")


def test_a_masked_model_fills_in_words_and_keeps_the_rest(tiny, tmp_path):
    predictor = Predictor(trained(tiny, tmp_path / "run", {"objective": "masked"}).model)
    text = "Return the <|mask|> of the given array.\n  Twice <|mask|>"
    (filled,) = predictor.predict([text])
    before, middle, _ = text.split("<|mask|>")
    assert filled.startswith(before)
    assert middle in filled
    assert "<|mask|>" not in filled
    assert list(predictor.stream(text)) == [filled]


def test_static_masks_of_an_epoch_are_those_of_the_next(tiny, tmp_path):
    digests = set()
    for anew in (True, False):
        run = trained(tiny, tmp_path / str(anew), {"objective": "masked"}, steps=3, masking={"anew": anew})
        digests.add(sha256_file(run.model / "model.safetensors"))
    assert len(digests) == 1, "in the first epoch both hide the same"
