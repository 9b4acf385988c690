import numpy as np
import pandas
import pytest

from gptcore.config import EvaluationConfig
from gptcore.errors import ArtifactError, CorpusError
from gptcore.evaluation.comparison import Comparison
from gptcore.evaluation.forgetting import as_markdown, build_forgetting, decide, read_forgetting

CONFIG = EvaluationConfig(resamples=200)


def compared(difference, low, high):
    """A candidate beside a champion with 2 bits per byte."""
    verdict = "better" if high < 0 else "worse" if low > 0 else "no clear difference"
    return Comparison(2.0 + difference, 2.0, difference, low, high, 0.5, difference < 0, verdict, 50)


BETTER, UNCLEAR, WORSE = compared(-0.2, -0.25, -0.15), compared(-0.02, -0.06, 0.02), compared(0.1, 0.05, 0.15)
KEPT, IMPROVED = compared(0.01, -0.01, 0.03), compared(-0.05, -0.08, -0.02)
FORGOT, PERHAPS = compared(0.2, 0.1, 0.3), compared(0.03, 0.01, 0.05)


@pytest.mark.parametrize(
    ("old", "new", "promoted", "why"),
    [
        (KEPT, BETTER, True, "better on the new text and keeps the old"),
        (IMPROVED, BETTER, True, "better on the new text"),
        (FORGOT, BETTER, False, "forgets too much, the old text may cost +15.0% of 2.0% allowed"),
        (PERHAPS, BETTER, False, "forgets too much, the old text may cost +2.5% of 2.0% allowed"),
        (KEPT, UNCLEAR, False, "not clearly better on the new text"),
        (IMPROVED, WORSE, False, "worse on the new text"),
        (FORGOT, WORSE, False, "worse on the new text"),
    ],
)
def test_a_candidate_is_promoted_when_it_is_clearly_better_on_the_new_and_surely_not_worse_on_the_old(old, new, promoted, why):
    gate = decide(old, new, 0.02)
    assert gate.promote is promoted
    assert gate.reason.startswith(why)
    assert "bits per byte" in gate.reason


def test_more_may_be_forgotten_where_the_settings_allow_it():
    assert decide(FORGOT, BETTER, 0.15).promote
    assert not decide(KEPT, BETTER, 0.0).promote


def test_a_gain_that_is_sure_but_next_to_nothing_is_none():
    hardly = compared(-1e-5, -1.1e-5, -0.9e-5)
    assert decide(KEPT, hardly, 0.02).promote
    gate = decide(KEPT, hardly, 0.02, 0.001)
    assert (gate.promote, gate.reason[:45]) == (False, "better on the new text by less than 0.1%: new")
    assert decide(KEPT, BETTER, 0.02, 0.1).promote


@pytest.fixture
def measured(tmp_path):
    """Two evaluations of 60 old and 40 new documents, on which the candidate needs 1 % more and 10 % fewer bits."""
    drawn = np.random.default_rng(0)
    ids = [f"row:{number}" for number in range(100)]
    bits = drawn.uniform(900, 1100, 100)
    factor = np.where(np.arange(100) < 60, 1.01, 0.9) * drawn.normal(1, 0.002, 100)
    for name, needed in (("champion", bits), ("candidate", bits * factor)):
        (tmp_path / name).mkdir()
        frame = pandas.DataFrame({"id": ids, "source": "s", "bytes": 500, "bits": needed, "tokens": 100})
        frame.sample(frac=1, random_state=len(name)).to_parquet(tmp_path / name / "scores.parquet")
    (tmp_path / "new" / "data").mkdir(parents=True)
    pandas.DataFrame({"id": ids[60:], "source": "s"}).to_parquet(tmp_path / "new" / "data" / "test.parquet")
    (tmp_path / "forgetting").mkdir()
    return tmp_path


def build(folder):
    return build_forgetting(folder / "forgetting", folder / "champion", folder / "candidate", folder / "new", CONFIG)


def test_the_table_tells_both_models_on_both_test_sets_with_intervals_and_verdicts(measured):
    numbers = build(measured)
    table, old, new = read_forgetting(measured / "forgetting")
    assert table[["model", "test_set", "documents", "verdict"]].to_numpy().tolist() == [
        ["champion", "old", 60, ""], ["champion", "new", 40, ""],
        ["candidate", "old", 60, "worse"], ["candidate", "new", 40, "better"],
    ]  # fmt: skip
    assert (table["low"] < table["bits_per_byte"]).all()
    assert (table["bits_per_byte"] < table["high"]).all()
    np.testing.assert_allclose(table["change"].dropna(), [0.01, -0.1], atol=0.001)
    frame = pandas.read_parquet(measured / "champion" / "scores.parquet").set_index("id")
    of_old = frame.loc[[f"row:{number}" for number in range(60)]]
    assert numbers["old_champion"] == pytest.approx(of_old["bits"].sum() / of_old["bytes"].sum())
    assert decide(old, new, 0.02).promote
    shown = (measured / "forgetting" / "report" / "forgetting.md").read_text()
    assert as_markdown(table) in shown
    assert len(as_markdown(table).splitlines()) == 6
    assert pandas.read_csv(measured / "forgetting" / "report" / "forgetting.csv").shape == (4, 8)


def test_evaluations_of_other_documents_are_refused(measured):
    frame = pandas.read_parquet(measured / "champion" / "scores.parquet")
    frame.iloc[1:].to_parquet(measured / "champion" / "scores.parquet")
    with pytest.raises(ArtifactError, match="not measured on the same documents"):
        build(measured)


def test_a_test_set_without_documents_is_refused(measured):
    pandas.DataFrame({"id": ["other"], "source": "s"}).to_parquet(measured / "new" / "data" / "test.parquet")
    with pytest.raises(CorpusError, match="no document of the new test set is left"):
        build(measured)
