import json
import random
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest

from gptcore.config import CorpusConfig, FilesSource, PythonDocsSource, SplitConfig, TaskConfig, TrainingConfig
from gptcore.corpus import SPLITS, build_corpus, read_split, split_of
from gptcore.corpus.contamination import ngram_hashes
from gptcore.downstream import build_examples
from gptcore.errors import CorpusError, SettingsError, SourceError

SPLIT = SplitConfig(valid=0.25, test=0.25, minimum=5)
TRAINING = TrainingConfig(steps=1)
NOUNS = ["array", "column", "matrix", "vector", "series", "string", "number", "list", "frame", "index", "period", "label"]


def sentence(drawn: random.Random, words: int = 12) -> str:
    return " ".join(f"{drawn.choice(NOUNS)}{drawn.randint(0, 999)}" for _ in range(words)).capitalize() + "."


def write_table(path: Path, rows: list[dict]) -> FilesSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return FilesSource(paths=(str(path),), target="label", group="group")


def labelled(count: int = 80) -> list[dict]:
    drawn = random.Random(0)
    return [{"text": sentence(drawn, 20), "label": "ab"[n % 2], "group": f"g{n}"} for n in range(count)]


def classify(source: FilesSource, **changes) -> TaskConfig:
    return TaskConfig(type="classify", source=source, training=TRAINING, **changes)


def rows_of(folder: Path) -> dict[str, pandas.DataFrame]:
    return {name: pandas.read_parquet(folder / "data" / f"{name}.parquet") for name in SPLITS}


def set_aside(folder: Path) -> dict[str, str]:
    table = pandas.read_parquet(folder / "report" / "set_aside.parquet")
    return dict(zip(table["id"], table["reason"], strict=True))


@pytest.fixture
def packages(tmp_path, monkeypatch) -> PythonDocsSource:
    """Two installed packages of 24 modules each, with five documented functions a module."""
    drawn = random.Random(1)
    for package in ("redlib", "bluelib"):
        folder = tmp_path / "installed" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        for module in range(24):
            functions = [
                f'def f{n}():\n    """Sort the {drawn.choice(NOUNS)} {n} of {package} {module}.\n\n    '
                + "\n    ".join(sentence(drawn) for _ in range(4))
                + '\n    """\n'
                for n in range(5)
            ]
            (folder / f"part{module}.py").write_text("raise SystemExit('never imported')\n" + "\n".join(functions))
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    return PythonDocsSource(packages=("redlib", "bluelib"))


def test_docstrings_become_rows_that_stand_in_the_split_of_their_module(packages, tmp_path):
    task = TaskConfig(type="summarize", source=packages, training=TRAINING, max_new_tokens=9)
    numbers = build_examples(tmp_path / "out", task, SPLIT)
    rows = rows_of(tmp_path / "out")
    assert list(rows["train"].columns) == ["id", "input", "target", "group", "split", "meta"]
    assert sum(numbers[f"{name}_rows"] for name in SPLITS) == 2 * 24 * 5
    for name, table in rows.items():
        assert {split_of(group, SPLIT) for group in table["group"]} == {name}
        assert set(table["split"]) == {name}
        assert table["target"].str.match(r"Sort the \w+ \d of (red|blue)lib \d+\.$").all()
        assert not table["input"].str.contains("Sort the").any()
    assert json.loads((tmp_path / "out" / "task.json").read_text()) == {
        "type": "summarize", "name": "summarize", "labels": [], "max_new_tokens": 9,
    }  # fmt: skip
    opened = datasets.load_dataset(str(tmp_path / "out" / "data"), cache_dir=str(tmp_path / "cache"))
    assert opened["test"]["input"][:] == rows["test"]["input"].tolist()


def test_packages_are_labels_and_their_names_are_masked(packages, tmp_path):
    numbers = build_examples(tmp_path / "out", TaskConfig(type="classify", source=packages, training=TRAINING), SPLIT)
    assert numbers["labels"] == 2
    assert json.loads((tmp_path / "out" / "task.json").read_text())["labels"] == ["bluelib", "redlib"]
    for table in rows_of(tmp_path / "out").values():
        assert not table["input"].str.contains("redlib|bluelib").any()
        assert (table["target"] == table["group"].str.split(".").str[0]).all()


def test_the_base_learns_no_text_of_a_test_row(packages, tmp_path):
    """A copy of a test row's docstring in a module of train must not stand in the corpus's train split."""
    task = TaskConfig(type="classify", source=packages, training=TRAINING)
    build_examples(tmp_path / "examples", task, SPLIT)
    test = rows_of(tmp_path / "examples")["test"]
    folder = tmp_path / "installed" / "redlib"
    original = json.loads(test["meta"][0])["qualname"], test["group"][0]
    source = (tmp_path / "installed" / Path(*original[1].split("."))).with_suffix(".py").read_text()
    text = source.split(f"def {original[0]}():")[1].split('"""')[1]
    copy = next(f"copy{n}" for n in range(100) if split_of(f"redlib.copy{n}", SPLIT) == "train")
    (folder / f"{copy}.py").write_text(f'def g():\n    """{text}\n    Copied.\n    """\n')
    build_corpus(tmp_path / "corpus", CorpusConfig(sources=(packages,), workers=1), SPLIT, [tmp_path / "examples"])
    assert f"redlib.{copy}" not in set(read_split(tmp_path / "corpus", "train")["group"])
    assert set_aside(tmp_path / "corpus")[f"redlib.{copy}:g"] == "in_test_of_classify"


def test_the_protected_n_grams_are_those_of_the_test_rows_in_their_order(tmp_path):
    source = write_table(tmp_path / "rows.jsonl", labelled())
    build_examples(tmp_path / "out", classify(source), SPLIT)
    test = rows_of(tmp_path / "out")["test"]
    with np.load(tmp_path / "out" / "protected.npz") as protected:
        hashes, rows, sizes = protected["hashes"], protected["rows"], protected["sizes"]
    assert (np.diff(hashes.astype(object)) >= 0).all()
    for number, row in test.iterrows():
        expected = ngram_hashes(f"{row['input']}\n{row['target']}", SPLIT.ngram)
        assert sorted(hashes[rows == number]) == expected.tolist()
        assert sizes[number] == expected.size


def test_held_out_rows_that_stand_in_train_are_set_aside(tmp_path):
    rows = labelled()
    train = next(row for row in rows if split_of(row["group"], SPLIT) == "train")
    test = next(row for row in rows if split_of(row["group"], SPLIT) == "test")
    rows.append({**test, "text": f"{train['text']} And a little more."})
    build_examples(tmp_path / "out", classify(write_table(tmp_path / "rows.jsonl", rows)), SPLIT)
    assert set_aside(tmp_path / "out") == {"rows.jsonl:81": "overlaps_train"}


def test_what_is_no_row_is_set_aside_with_its_reason_and_counted(tmp_path):
    rows = labelled()
    last = {"group": "g0", "label": "a"}
    rows += [
        {**rows[0]},
        {**last, "text": ""},
        {**last, "text": "Some text.", "label": " "},
        {**last, "text": "Other.", "label": None},
    ]
    rows += [{**last, "text": "Rare.", "label": "c"}, {**last, "text": "NUL \0 inside."}]
    numbers = build_examples(
        tmp_path / "out", classify(write_table(tmp_path / "rows.jsonl", rows), min_label_share=0.05), SPLIT
    )
    reasons = ["duplicate", "empty", "no_answer", "no_target", "rare_label", "binary"]
    assert set_aside(tmp_path / "out") == {f"rows.jsonl:{81 + n}": reason for n, reason in enumerate(reasons)}
    counts = pandas.read_csv(tmp_path / "out" / "report" / "counts.csv")
    assert counts["documents"].sum() == numbers["texts_read"] == 86
    assert "rare_label" in (tmp_path / "out" / "report" / "card.md").read_text()


def test_a_held_out_label_that_train_does_not_know_is_set_aside(tmp_path):
    rows = labelled()
    for row in rows:
        if split_of(row["group"], SPLIT) == "test" and row["label"] == "a":
            row["label"] = "unseen"
    build_examples(tmp_path / "out", classify(write_table(tmp_path / "rows.jsonl", rows)), SPLIT)
    assert set(set_aside(tmp_path / "out").values()) == {"label_not_in_train"}


def test_a_smaller_training_set_leaves_the_test_set_as_it_is(tmp_path):
    source = write_table(tmp_path / "rows.jsonl", labelled())
    build_examples(tmp_path / "all", classify(source), SPLIT)
    build_examples(tmp_path / "few", classify(source, max_rows=10), SPLIT)
    build_examples(tmp_path / "tested", classify(source, max_test_rows=6), SPLIT)
    every, few, tested = (rows_of(tmp_path / name) for name in ("all", "few", "tested"))
    assert len(few["train"]) == 10
    assert set(few["train"]["id"]) < set(every["train"]["id"])
    pandas.testing.assert_frame_equal(few["test"], every["test"])
    assert len(tested["test"]) == 6
    assert set(tested["test"]["id"]) < set(every["test"]["id"])


def test_equal_sources_give_equal_bytes(tmp_path):
    source = write_table(tmp_path / "rows.jsonl", labelled())
    for name in ("a", "b"):
        build_examples(tmp_path / name, classify(source, max_rows=20), SPLIT)
    for file in [*(f"data/{name}.parquet" for name in SPLITS), "protected.npz", "task.json"]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_too_few_rows_are_one_clear_error(tmp_path):
    source = write_table(tmp_path / "rows.jsonl", labelled(12))
    with pytest.raises(
        CorpusError, match=r"task classify has too few rows: \d+ train, \d+ valid, \d+ test, each split needs 20"
    ):
        build_examples(tmp_path / "out", classify(source), SplitConfig())


def test_too_few_drawn_rows_name_the_setting(tmp_path):
    source = write_table(tmp_path / "rows.jsonl", labelled())
    with pytest.raises(CorpusError, match="raise max_test_rows or lower"):
        build_examples(tmp_path / "out", classify(source, max_test_rows=3), SPLIT)


def test_a_table_without_a_column_of_answers_is_one_clear_error(tmp_path):
    source = write_table(tmp_path / "rows.jsonl", labelled())
    with pytest.raises(SettingsError, match="names no column with answers"):
        build_examples(tmp_path / "out", classify(source.model_copy(update={"target": None})), SPLIT)
    with pytest.raises(SourceError, match="no column 'summary'"):
        build_examples(tmp_path / "out", classify(source.model_copy(update={"target": "summary"})), SPLIT)
