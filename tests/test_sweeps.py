"""Which trials a sweep has: every one checked before the first starts, and the same ones whenever it is run again."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.config import TrainingConfig, load_config
from gptcore.errors import SettingsError
from gptcore.search import TrialResult, best_of, ranked, search
from gptcore.sweeps import SweepConfig, grid, load_sweep, settings_yaml

ROOT = Path(__file__).parents[1]
BASE = {
    "name": "tiny",
    "corpus": {"sources": [{"type": "files", "paths": ["texts"]}]},
    "model": {"layers": 2, "width": 64, "heads": 4, "context": 64},
    "training": {"steps": 10},
    "tasks": [{"type": "classify", "source": {"type": "files", "paths": ["rows.jsonl"]}, "training": {"steps": 5}}],
}
RANGE = {"training.optimizer.rate": {"low": "1e-4", "high": 0.1, "log": True}, "model.layers": {"low": 1, "high": 4}}


def sweep(**fields) -> SweepConfig:
    return SweepConfig.model_validate({"name": "rates", "config": BASE, **fields})


def problems(**fields) -> str:
    with pytest.raises(ValueError) as told:
        sweep(**fields)
    return str(told.value)


@pytest.fixture
def written(tmp_path):
    """A function that writes a sweep's file beside its base and loads it with overrides."""

    def load(*overrides: str, **values) -> SweepConfig:
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(BASE))
        (tmp_path / "My rates.yaml").write_text(yaml.safe_dump({"base": "tiny.yaml", **values}))
        return load_sweep(tmp_path / "My rates.yaml", overrides)

    return load


# ------------------------------------------------------------------------------------------------------------ grid --


@settings(max_examples=30, deadline=None)
@given(
    rates=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=4, unique=True),
    layers=st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True),
    steps=st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True),
)
def test_a_grid_has_every_combination_exactly_once(rates, layers, steps):
    found = sweep(space={"training.optimizer.rate": rates, "model.layers": layers, "training.steps": steps})
    seen = []
    search(found, lambda number, changes: seen.append((number, *changes.values())))
    assert [number for number, *_ in seen] == list(range(1, found.count + 1))
    assert {tuple(values) for _, *values in seen} == {(r, n, s) for r in rates for n in layers for s in steps}
    assert len(seen) == found.count == len(rates) * len(layers) * len(steps)


def test_a_trial_differs_from_its_pipeline_in_nothing_but_what_it_tries():
    found = sweep(space={"training.optimizer.rate": [0.1, "1e-3"], "training.minutes": [2]})
    config = found.trial_config(list(grid(found))[1])
    ours = config.training.model_copy(update={"minutes": None, "steps": 10})
    assert ours == TrainingConfig(steps=10, optimizer={"rate": 0.001})
    assert config.training.minutes == 2, "one budget replaces the other"
    assert config.model_copy(update={"training": found.config.training}) == found.config


def test_whole_sections_can_be_tried():
    found = sweep(space={"model": [{"preset": "modern-5m"}, {"layers": 1, "width": 32, "heads": 2}]})
    assert [found.trial_config(changes).model.width for changes in grid(found)] == [256, 32]


def test_every_problem_of_every_trial_is_told_before_the_first_starts():
    text = problems(space={"model.heads": [3, 4, 5], "training.optimizer.rate": [0.01, -1], "training.stepps": [1]})
    assert "heads (3) do not divide width (64)" in text
    assert "heads (5) do not divide width (64)" in text
    assert "training.optimizer.rate: Input should be greater than 0 (is -1) (in 3 of 6 trials, first model.heads=3" in text
    assert "training.stepps: unknown setting; did you mean steps? (in 6 of 6 trials" in text


def test_what_makes_no_sense_together_is_told():
    text = problems(
        space={"evaluation.seed": [1, 2], "training.steps": {"low": 1, "high": 9}, "model.preset": ["gpt2"]},
        trials=3, until="summarize",
    )  # fmt: skip
    for part in (
        "until: 'summarize' is neither base nor a task; there are: classify",
        "bits per byte are measured on a base",
        "evaluation.seed changes nothing",
        "training.steps is a range",
        "a preset is a whole section",
        "trials: a grid",
    ):
        assert part in text or part.startswith("bits")  # fmt: skip
    assert "tasks.0.training.steps changes nothing in a trial that ends with base" in problems(
        space={"tasks.0.training.steps": [1, 2]}
    )
    assert "a trial stands twice" in problems(space={"training.steps": [5, "5"]})
    assert "a grid of 1,024 trials" in problems(space={"training.seed": list(range(32)), "split.seed": list(range(32))})
    assert "bits per byte are measured on a base only" in problems(
        space={"training.seed": [1]}, until="classify", metric="valid_bits_per_byte"
    )
    assert "step (0) must be above zero" in problems(space={"training.seed": {"low": 1, "high": 2, "step": 0}}, method="optuna")
    assert "space" in problems(space={})
    assert "training.seed needs a list of values" in problems(space={"training.seed": 3})


def test_a_loss_and_bits_per_byte_are_to_be_small_and_speed_large():
    space = {"training.seed": [1, 2]}
    assert (sweep(space=space).number, sweep(space=space).maximise) == ("valid_bits_per_byte", False)
    assert sweep(space=space, until="classify").number == "valid_loss"
    assert sweep(space=space, metric="tokens_per_second").maximise
    assert not sweep(space=space, metric="tokens_per_second", goal="min").maximise


# ---------------------------------------------------------------------------------------------------------- optuna --


def distance(changes) -> float:
    """Smallest at a rate of 0.01 and 3 layers."""
    return abs(math.log10(changes["training.optimizer.rate"]) + 2) + abs(changes["model.layers"] - 3)


def asked(found: SweepConfig, answer=distance) -> list[dict]:
    seen: list[dict] = []

    def objective(number, changes):
        assert number == len(seen) + 1
        seen.append(dict(changes))
        return answer(changes)

    search(found, objective)
    return seen


def test_optuna_with_one_seed_and_the_same_answers_asks_for_the_same_trials():
    found = sweep(space=RANGE, method="optuna", trials=16)
    first = asked(found)
    assert asked(found) == first
    assert asked(sweep(space=RANGE, method="optuna", trials=16, seed=1)) != first
    assert len(first) == 16
    for changes in first:
        assert 1e-4 <= changes["training.optimizer.rate"] <= 0.1
        assert changes["model.layers"] in (1, 2, 3, 4)
        found.trial_config(changes)


def test_a_longer_sweep_begins_with_the_trials_of_the_shorter_one():
    """So more trials can be asked for later, and a sweep that was killed goes on where it was."""
    assert asked(sweep(space=RANGE, method="optuna", trials=18))[:12] == asked(sweep(space=RANGE, method="optuna", trials=12))


def test_a_trial_that_fails_does_not_end_the_sweep_and_its_corner_is_avoided_later():
    later = []
    for seed in range(4):
        found = sweep(space=RANGE, method="optuna", trials=30, seed=seed)
        seen = asked(found, lambda changes: None if changes["model.layers"] < 3 else distance(changes))
        assert len(seen) == 30
        later += [changes["model.layers"] < 3 for changes in seen[10:]]
    assert sum(later) < 0.45 * len(later), "half of the space fails, and so would half of what is drawn at random"


def test_optuna_chooses_among_values_of_any_kind():
    found = sweep(
        space={"model": [{"preset": "modern-5m"}, {"layers": 1}], "model.tied": [True, False]}, method="optuna", trials=6
    )
    assert {str(changes["model"]) for changes in asked(found, lambda _: 1.0)} == {"{'preset': 'modern-5m'}", "{'layers': 1}"}


def test_a_value_that_is_wrong_by_itself_is_told_before_the_first_trial_and_one_that_depends_is_left_to_it():
    text = problems(space={"training.ratee": [1], "training.optimizer.rate": {"low": -1, "high": 1}}, method="optuna")
    assert "training.ratee: unknown setting" in text
    assert "training.optimizer.rate: Input should be greater than 0" in text
    found = sweep(space={"model.heads": [4, 5], "model.width": [64, 80]}, method="optuna", trials=3)
    with pytest.raises(SettingsError, match=r"heads \(5\) do not divide width \(64\)"):
        found.trial_config({"model.heads": 5, "model.width": 64})


# ------------------------------------------------------------------------------------------------------------ files --


def test_a_file_names_its_base_what_all_trials_have_and_what_they_differ_in(written):
    found = written(set={"training.steps": 7}, space={"training.optimizer.rate": [0.1, 0.2]})
    assert (found.name, found.config.name, found.config.training.steps) == ("my-rates", "tiny", 7)
    assert found.space == {"training.optimizer.rate": (0.1, 0.2)}


def test_set_reaches_the_sweep_its_space_and_its_pipeline(written):
    found = written(
        "name=other", "config.training.steps=3", "space.training.optimizer.rate=[0.5]", "space.model.layers=[1, 2]",
        set={"training.steps": 7}, space={"training.optimizer.rate": [0.1, 0.2]},
    )  # fmt: skip
    assert (found.name, found.config.training.steps) == ("other", 3)
    assert found.space == {"training.optimizer.rate": (0.5,), "model.layers": (1, 2)}


def test_what_is_wrong_with_a_file_is_told(written, tmp_path):
    space = {"training.seed": [1]}
    with pytest.raises(SettingsError, match="both base and config"):
        written(config=BASE, space=space)
    with pytest.raises(SettingsError, match=r"cannot read the settings .*nowhere\.yaml"):
        written(base="nowhere.yaml", space=space)
    with pytest.raises(SettingsError, match="names no pipeline"):
        written(base=None, space=space)
    with pytest.raises(SettingsError, match="spaces: unknown setting; did you mean space"):
        written(spaces=space)
    with pytest.raises(SettingsError, match=r"(?s)the pipeline's settings of .*training\.stepps: unknown setting"):
        written("config.training.stepps=1", space=space)
    with pytest.raises(SettingsError, match="URL with a user or password"):
        written(space={"corpus.sources.0.paths": [["https://me:secret@host/x"]]})


def test_a_sweep_survives_json_as_the_parameter_of_a_deployment():
    for found in (sweep(space={"training.steps": [1, 2]}), sweep(space=RANGE, method="optuna", trials=3)):
        assert SweepConfig.model_validate_json(found.model_dump_json()) == found


def test_the_best_settings_round_trip_through_their_file(tmp_path):
    found = load_sweep(ROOT / "deployments" / "sweeps" / "quickstart-rates.yaml")
    for number, changes in enumerate(grid(found)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(settings_yaml(found.trial_config(changes), "chosen\n从验证集"), encoding="utf-8")
        assert load_config(path) == found.trial_config(changes)
        assert path.read_text(encoding="utf-8").startswith("# chosen\n# 从验证集\nname: docs-gpt\n")


def test_of_equal_trials_the_first_is_best_and_those_that_failed_come_last():
    found = sweep(space={"training.seed": [1, 2, 3, 4]})
    values = [None, 2.0, 1.0, 1.0]
    results = [TrialResult(number, {}, value=value) for number, value in enumerate(values, 1)]
    assert best_of(found, results).number == 3
    assert [result.number for result in ranked(found, results)] == [3, 4, 2, 1]
    fastest = sweep(space={"training.seed": [1, 2, 3, 4]}, metric="tokens_per_second")
    assert best_of(fastest, results).number == 2
    assert best_of(found, results[:1]) is None
