import json
import subprocess
import sys

import numpy as np
import pandas
import pytest

from gptcore.errors import ArtifactError
from gptcore.evaluation import headline, plots, read_results, summary_rows
from gptcore.evaluation.comparison import compare_statistics
from gptcore.evaluation.intervals import Interval, bootstrap, mean_interval, mean_of, ratio_interval
from gptcore.evaluation.markdown import fenced, table
from gptcore.evaluation.overview import results_page
from gptcore.evaluation.report import training_curves, write_base_report, write_task_report
from gptcore.evaluation.results import beside_model, beside_number, measured, write_results

SETTINGS = {"resamples": 1000, "seed": 0, "prompts": [], "samples": 1, "batch": 32}
MODEL = {"parameters": 12_345_678, "layers": 2, "precision": "bfloat16"}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base evaluation of two sources with made-up scores."""
    random = np.random.default_rng(0)
    sizes = random.integers(200, 3000, 60)
    scores = pandas.DataFrame({"bytes": sizes, "bits": sizes * random.uniform(1.2, 1.6, 60), "tokens": sizes // 4})

    def metrics(rows):
        bits = ratio_interval(rows["bits"], rows["bytes"])
        xz = {"xz -9 primed": beside_number(bits, 1.8, higher_is_better=False)}
        return {"bits_per_byte": measured(bits, xz), "perplexity": measured(Interval(47.25, 45.0, 50.0))}

    parts = {"三国": scores[:30], "python-docs": scores[30:]}
    results = {
        "kind": "base", "name": "base", "headline": "bits_per_byte", "metrics": metrics(scores),
        "sources": {
            name: {"documents": 30, "bytes": 45_000, "tokens": 11_000, "metrics": metrics(rows)}
            for name, rows in parts.items()
        },
        "data": {"train": {"documents": 900, "bytes": 1_234_567},
                 "test": {"documents": 60, "bytes": 90_000, "tokens": 22_000}},
        "model": MODEL, "settings": SETTINGS,
        "samples": [{"prompt": "Return the", "likeliest": " sum of `x`.", "drawn": "\n```python\n| a |"}],
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("evaluation-base")
    write_results(folder, results)
    write_base_report(folder, results, scores)
    return folder


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    """A summarize evaluation with made-up scores."""
    random = np.random.default_rng(1)
    ours, theirs = random.beta(3, 4, 80), random.beta(2, 5, 80)
    found = compare_statistics(mean_of(ours), mean_of(theirs), 80)
    beside = {"first sentence": beside_model(bootstrap(mean_of(theirs), 80), found)}
    results = {
        "kind": "summarize", "name": "summarize", "headline": "rouge_l",
        "metrics": {"rouge_l": measured(mean_interval(ours), beside)},
        "data": {"train": {"rows": 700}, "test": {"rows": 80}}, "model": MODEL, "settings": SETTINGS,
        "samples": [{"input": "a|b\nc", "target": "t", "output": "", "score": 0.0, "first_sentence": "a|b c"}],
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("evaluation-summarize")
    write_results(folder, results)
    write_task_report(folder, results, pandas.DataFrame({"score": ours, "first_sentence_score": theirs}))
    return folder


def test_the_headline_is_the_number_that_decides(base, summaries):
    name, value, higher_is_better = headline(read_results(base))
    assert (name, higher_is_better) == ("bits_per_byte", False)
    assert 1.2 < value < 1.6
    assert headline(read_results(summaries))[::2] == ("rouge_l", True)


def test_the_results_page_begins_with_the_number_its_interval_and_its_baseline(base):
    lines = (base / "report" / "results.md").read_text(encoding="utf-8").split("\n")
    entry = read_results(base)["metrics"]["bits_per_byte"]
    assert lines[2] == (
        f"**Bits per byte {entry['value']:.3f}** on 60 test documents (lower is better; 95 % interval "
        f"{entry['low']:.3f} to {entry['high']:.3f}): better than xz -9 primed (1.800)."
    )


def test_pages_show_every_picture_that_lies_beside_them(base, summaries):
    for folder in (base, summaries):
        page = (folder / "report" / "results.md").read_text(encoding="utf-8")
        pictures = sorted((folder / "report").glob("*.png"))
        assert len(pictures) == 2
        for picture in pictures:
            assert f"]({picture.name})" in page
            assert picture.read_bytes().startswith(PNG)


def test_text_of_a_model_cannot_break_the_page(base, summaries):
    assert "````text\n\n```python\n| a |\n````" in (base / "report" / "results.md").read_text(encoding="utf-8")
    page = (summaries / "report" / "results.md").read_text(encoding="utf-8")
    assert r"| first sentence | a\|b c |" in page
    assert "| this model (ROUGE-L 0.00) | (nothing) |" in page


def test_pictures_are_drawn_when_everything_scored_zero(tmp_path):
    nothing = {"score": {"this model": Interval(0.0, 0.0, 0.0), "first sentence": Interval(0.0, 0.0, 0.0)}}
    plots.bars(tmp_path / "bars.png", nothing, title="all zero", note="")
    plots.distribution(tmp_path / "rows.png", {"this model": [0.0, 0.0]}, title="zero", note="", unit="score", rows="rows")
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in ("bars.png", "rows.png"))


@pytest.mark.filterwarnings("error")
def test_labels_that_the_font_cannot_write_are_numbered_as_in_the_table(tmp_path):
    plots.confusion(tmp_path / "confusion.png", [[3, 0], [1, 2]], ["魏", "Shu"], title="labels")
    assert plots._legible(["魏", "Shu", "x" * 40]) == ["#1", "Shu", "x" * 27 + "…"]


def test_fences_are_longer_than_any_inside():
    assert fenced("a `` b ```` c") == "`````text\na `` b ```` c\n`````"
    assert table(("a", "b"), [("x|y\n", 1)]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


def test_the_model_card_says_what_it_is_how_good_it_is_and_what_not_to_do_with_it(base, summaries):
    for folder in (base, summaries):
        card = (folder / "report" / "model_card.md").read_text(encoding="utf-8")
        for wanted in (
            "# Model card",
            "12,345,678",
            "95 % interval",
            "## What it must not be used for",
            "## How to use it",
        ):
            assert wanted in card


def test_summary_rows_hold_every_number_beside_every_baseline(base, summaries):
    rows = summary_rows({"docs-gpt": base, "docs-gpt-summarize": summaries})
    assert list(rows.columns) == [
        "model", "metric", "value", "low", "high", "baseline", "baseline_value", "better", "verdict"
    ]  # fmt: skip
    assert rows[["model", "metric"]].values.tolist() == [
        ["docs-gpt", "bits_per_byte"], ["docs-gpt", "perplexity"], ["docs-gpt-summarize", "rouge_l"]
    ]  # fmt: skip
    first, second, third = rows.to_dict("records")
    assert (first["baseline"], first["baseline_value"], first["better"]) == ("xz -9 primed", 1.8, True)
    assert pandas.isna([second["baseline"], second["baseline_value"], second["better"]]).all()
    assert (third["better"], third["verdict"]) == (True, "better")


def test_one_page_for_the_run_shows_all_models_and_their_pictures(base, summaries, tmp_path):
    curves = tmp_path / "curves.png"
    curves.write_bytes(PNG)
    page = results_page(
        tmp_path / "run",
        {"docs-gpt": base, "docs-gpt-summarize": summaries},
        title="Results of docs-gpt",
        pictures={"docs-gpt, training curves": curves, "not there": tmp_path / "missing.png"},
    )
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Results of docs-gpt\n")
    assert "| docs-gpt | bits per byte |" in text
    assert "not there" not in text
    shown = {line.split("](")[1].rstrip(")") for line in text.split("\n") if line.startswith("![")}
    assert shown == {path.name for path in (tmp_path / "run").glob("*.png")}
    assert len(shown) == 5


def test_an_unfinished_evaluation_is_one_clear_sentence(tmp_path):
    with pytest.raises(ArtifactError, match="is not a finished evaluation"):
        read_results(tmp_path)


@pytest.mark.parametrize("steps", [0, 1, 30, 400])
def test_training_curves_are_drawn_from_a_journal_of_any_length_and_of_many_sources(tmp_path, steps):
    lines = [{"t": 1.0, "step": 0, "kind": "event", "event": "start", "text": "started"}]
    for step in range(1, steps + 1):
        values = {"train/loss": 9 / step + 3, "rate": 1.0, "tokens_per_second": 5000.0, "gradient_norm": 1.0}
        lines.append({"t": 1.0, "step": step, "kind": "metric", "values": values})
        if step % 100 == 0:
            values = {"valid/loss": 3.2, "valid/bits_per_byte": 1.4}
            values |= {f"valid/bits_per_byte/source-{number}": 1.0 + number / 10 for number in range(10)}
            lines.append({"t": 1.0, "step": step, "kind": "metric", "values": values})
    journal = tmp_path / "journal.jsonl"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "ki', encoding="utf-8")
    training_curves(journal, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_reports_and_comparisons_load_no_torch():
    code = (
        "import gptcore.evaluation, gptcore.evaluation.report, gptcore.evaluation.overview, sys; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
