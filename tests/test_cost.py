"""The cost card of a version: itself, and the whole chain behind it."""

import json
import shutil

import pytest

from gptcore.artifacts import Artifact, Recipe, Store
from gptcore.config import CostConfig
from gptcore.cost import card_rows, cost_card, duration, money


def training(**facts) -> dict:
    return {
        "seconds_of_earlier_runs": 0, "tokens": 1000, "repeated_steps": 0, "repeated_tokens": 0, "energy_joules": None,
        "energy_source": "", "energy_missing": "no meter", "attempts": 1, "failed_attempts": 0, **facts,
    }  # fmt: skip


def build(store: Store, stage: str, seconds: float, cost: dict | None = None, **inputs: str) -> Artifact:
    """An artifact that says it took `seconds`."""

    def make(folder):
        (folder / "content").write_text(stage)
        if cost is not None:
            (folder / "report").mkdir()
            (folder / "report" / "cost.json").write_text(json.dumps(cost))
        return {}

    artifact = store.build(Recipe(stage, "a", 1, {}, {key.replace("_", "-"): value for key, value in inputs.items()}), make)
    file = artifact.path / "artifact.json"
    file.write_text(json.dumps({**artifact.manifest(), "seconds": seconds}))
    return artifact


@pytest.fixture
def chain(tmp_path):
    """A base that was killed once, and a task model made of it."""
    store = Store(tmp_path)
    corpus = build(store, "corpus", 10.0, books="1" * 64)
    shards = build(store, "shards", 5.0, corpus=corpus.digest)
    killed = training(
        seconds_of_earlier_runs=40.0, attempts=2, failed_attempts=1, repeated_steps=3, repeated_tokens=30,
        energy_joules=3.6e6, energy_source="RAPL", energy_missing="",
    )  # fmt: skip
    base = build(store, "base", 100.0, killed, shards=shards.digest, corpus=corpus.digest)
    model = build(store, "finetune-sum", 20.0, training(tokens=200), base=base.digest, shards=shards.digest)
    return store, corpus, base, model, build(store, "evaluation-base", 1.0), build(store, "evaluation-sum", 2.0)


def test_a_card_holds_failed_and_earlier_attempts_and_every_stage_once(chain):
    store, _, base, _, evaluation, _ = chain
    card = cost_card(store, base, evaluation, CostConfig())
    assert card["seconds_of_stages"] == {"corpus": 10.0, "shards": 5.0, "base": 140.0, "evaluation-base": 1.0}
    assert card["alone"] == {
        "seconds": 141.0, "training_tokens": 1000, "training_energy_joules": 3.6e6, "money": None, "training_attempts": 2,
        "failed_attempts": 1, "repeated_steps": 3, "repeated_tokens": 30, "failed_builds": 0,
    }  # fmt: skip
    assert card["whole_chain"]["seconds"] == 156.0
    assert (card["energy_source"], card["notes"]) == ("RAPL", [])


def test_the_whole_chain_of_a_task_model_holds_its_base_and_its_own_sum_does_not(chain):
    store, _, base, model, of_base, of_model = chain
    card = cost_card(store, model, of_model, CostConfig())
    base_alone = cost_card(store, base, of_base, CostConfig())["alone"]
    assert card["alone"]["training_tokens"] == 200
    assert card["whole_chain"]["training_tokens"] == 200 + base_alone["training_tokens"]
    assert card["whole_chain"]["failed_attempts"] == 1
    assert card["whole_chain"]["seconds"] == 10 + 5 + 140 + 20 + 2
    assert card["alone"]["training_energy_joules"] is None
    assert card["notes"] == ["energy not measured in finetune-sum: no meter"]
    assert cost_card(store, model, of_model, CostConfig(), known=[base]) == card


def test_money_is_the_machine_by_the_hour_and_electricity_by_the_kilowatt_hour(chain):
    store, _, base, model, of_base, of_model = chain
    card = cost_card(store, base, of_base, CostConfig(per_hour=36.0, per_kwh=0.25, currency="CHF"))
    assert card["alone"]["money"] == pytest.approx(141 / 3600 * 36 + 0.25)
    assert card["currency"] == "CHF"
    only_energy = cost_card(store, model, of_model, CostConfig(per_kwh=0.25))
    assert only_energy["alone"]["money"] is None
    assert only_energy["whole_chain"]["money"] == pytest.approx(0.25)
    assert "the money is without the energy that was not measured" in only_energy["notes"]
    assert cost_card(store, model, of_model, CostConfig(per_hour=0.0))["alone"]["money"] == 0


def test_what_is_gone_or_has_no_record_is_said(chain):
    store, corpus, base, _, evaluation, _ = chain
    shutil.rmtree(corpus.path)
    (base.path / "report" / "cost.json").write_text('{"training_seconds": 9, "tokens": 1, "resumed": 0}')  # of an older version
    manifest = base.manifest()
    (base.path / "artifact.json").write_text(json.dumps({**manifest, "numbers": {"tokens": 7.0, "tokens_per_second": 1.0}}))
    card = cost_card(store, base, evaluation, CostConfig())
    assert card["alone"]["training_tokens"] == 7
    assert card["seconds_of_stages"] == {"shards": 5.0, "base": 100.0, "evaluation-base": 1.0}
    assert card["notes"] == [
        "energy not measured in base: there is no record of its attempts",
        "not counted, because gone from the store: corpus",
    ]


def test_a_stage_that_failed_before_it_was_built_is_counted(tmp_path):
    store = Store(tmp_path)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            store.build(Recipe("corpus", "a", 1, {}, {}), lambda folder: {"n": 1 / 0})
    corpus = build(store, "corpus", 3.0)
    base = build(store, "base", 1.0, training(), corpus=corpus.digest)
    card = cost_card(store, base, build(store, "evaluation-base", 1.0), CostConfig())
    assert (card["alone"]["failed_builds"], card["whole_chain"]["failed_builds"]) == (0, 2)
    assert "without the seconds of failed builds, which nobody knows: corpus" in card["notes"]
    assert ", 2 failed build(s) of other stages" in card_rows(card)[5][1]
    assert corpus.manifest()["builds"] == 3
    assert store.build(Recipe("corpus", "a", 1, {}, {}), lambda folder: {}, force=True).manifest()["builds"] == 1


def test_a_card_of_very_many_stages_still_fits_into_a_tag(tmp_path):
    store = Store(tmp_path)
    many = {f"examples_{number}{'x' * 50}": build(store, f"examples-{number}{'x' * 50}", 1.0).digest for number in range(45)}
    base = build(store, "base", 1.0, training(), **many)
    card = cost_card(store, base, build(store, "evaluation-base", 1.0), CostConfig())
    assert card["seconds_of_stages"] == {"examples": 45.0, "base": 1.0, "evaluation": 1.0}
    assert len(json.dumps(card)) < 5000


def test_a_card_reads_like_a_bill(chain):
    store, _, _, model, _, evaluation = chain
    rows = card_rows(cost_card(store, model, evaluation, CostConfig(per_hour=36.0)))
    text = "\n".join(f"{title}: {words}" for title, words in rows)
    assert "with all it is made of: 2 min 57 s, 1,200 training tokens" in text
    assert "energy of training 3,600,000 J (1 kWh), money 1.77 EUR" in text
    assert "3 training attempt(s), 1 of them failed, 3 steps repeated (30 tokens)" in text
    assert card_rows({"seconds": 1.0, "tokens": 5}) == [], "a card of an older version"
    assert (duration(7261), money(0.0031, "EUR"), money(None, "EUR")) == ("2 h 01 min", "0.0031 EUR", "unknown")
