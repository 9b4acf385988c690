"""What a sweep leaves behind."""

from pathlib import Path

import pandas
import pytest

from gptcore.artifacts import Artifact
from gptcore.config import load_config
from gptcore.evaluation.trials import comparison, write_trials
from gptcore.search import TrialResult
from gptcore.sweeps import SweepConfig, grid


@pytest.fixture(scope="module")
def ended():
    """A sweep with a number, a name and a whole section, one trial of which failed."""
    config = {"name": "tiny", "corpus": {"sources": [{"type": "files", "paths": ["texts"]}]}, "training": {"steps": 3}}
    space = {
        "training.optimizer.rate": ["1e-4", 0.01], "tokenizer.algorithm": ["bpe", "unigram"],
        "corpus.sources": [[{"type": "files", "paths": ["文本"]}]],
    }  # fmt: skip
    sweep = SweepConfig.model_validate({"name": "all-kinds", "config": config, "space": space})
    results = []
    for number, changes in enumerate(grid(sweep), 1):
        found = TrialResult(number, changes, sweep.trial_config(changes))
        if number == 2:
            results.append(TrialResult(number, changes, found.config, error="out of | memory"))
            continue
        numbers = {"parameters": 1000 * number, "steps": 3, "valid_bits_per_byte": 3.0 - number / 10}
        model = Artifact("base", "tiny", Path("store") / str(number), f"{number}" * 64, "d", numbers, seconds=2.5)
        results.append(TrialResult(number, changes, found.config, model, 3.0 - number / 10))
    return sweep, results


def test_the_table_has_a_row_per_trial_the_best_first_and_plain_numbers(ended):
    table = comparison(*ended)
    assert table["trial"].tolist() == [4, 3, 1, 2]
    assert table["training.optimizer.rate"].tolist() == [0.01, 0.01, 0.0001, 0.0001]
    assert table["valid_bits_per_byte"].tolist()[:3] == [2.6, 2.7, 2.9]
    assert table["error"].tolist() == ["", "", "", "out of | memory"]


def test_the_folder_holds_table_page_picture_and_settings_that_load(ended, tmp_path):
    sweep, results = ended
    write_trials(tmp_path, sweep, results, Path("/home/sweeps/all-kinds"))
    assert pandas.read_csv(tmp_path / "trials.csv")["trial"].tolist() == [4, 3, 1, 2]
    text = (tmp_path / "trials.md").read_text(encoding="utf-8")
    assert "Best: trial 4 of 4: valid_bits_per_byte 2.6 with training.optimizer.rate=0.01, tokenizer.algorithm=unigram" in text
    assert "gptcore run /home/sweeps/all-kinds/best.yaml" in text
    assert r"out of \| memory" in text
    assert (tmp_path / "trials.png").stat().st_size > 10_000
    assert load_config(tmp_path / "best.yaml") == results[3].config
