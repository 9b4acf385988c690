import csv
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest

from gptcore.config import CorpusConfig, FilesSource, SplitConfig
from gptcore.corpus import SPLITS, build_corpus, read_split, split_of
from gptcore.corpus.contamination import Protected
from gptcore.errors import ArtifactError, CorpusError, SourceError

SPLIT = SplitConfig(valid=0.2, test=0.2, minimum=5)
VOCABULARY = [f"word{number}" for number in range(5000)]


def prose(seed, count=40):
    """Text that shares no 13-gram with the text of another seed."""
    return " ".join(np.random.default_rng(seed).choice(VOCABULARY, count))


def config(path, **settings):
    names = {"min_characters", "max_characters", "workers"}
    source = FilesSource(paths=(str(path),), **{key: value for key, value in settings.items() if key not in names})
    return CorpusConfig(sources=(source,), **{"workers": 1, **{k: v for k, v in settings.items() if k in names}})


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def build(folder, path, split=SPLIT, protected=(), **settings):
    folder.mkdir()
    return build_corpus(folder, config(path, **settings), split, protected)


def rows_of(folder):
    return pandas.concat([read_split(folder, name) for name in SPLITS], ignore_index=True)


def counts_of(folder):
    with (folder / "report" / "counts.csv").open(newline="") as file:
        return {(row["source"], row["outcome"]): (int(row["documents"]), int(row["bytes"])) for row in csv.DictReader(file)}


def dealt_to(name, split=SPLIT, start=0):
    """The first row number whose group goes to a split."""
    return next(number for number in range(start, 10_000) if split_of(f"rows.jsonl:{number + 1}", split) == name)


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """80 good texts, and one of everything that cannot be used."""
    texts = [prose(seed) for seed in range(80)]
    texts += [prose(3), "too short", " \n ", "nul \0 " * 20, "half a pair \ud800 " * 10, "cafe\u0301\r\n" * 20]
    path = write_rows(tmp_path_factory.mktemp("messy") / "rows.jsonl", texts)
    with path.open("ab") as file:
        file.write(b'{"text": "latin \xe9"}\n{no json}\n')
    return path


@pytest.fixture(scope="module")
def corpus(messy):
    folder = messy.parent / "corpus"
    build(folder, messy)
    return folder


def test_every_text_ends_in_a_split_or_is_set_aside_with_its_reason(corpus):
    counts = counts_of(corpus)
    read = counts.pop(("files", "read"))
    assert read[0] == 88 == sum(documents for documents, _ in counts.values())
    assert read[1] == sum(size for _, size in counts.values())
    for reason in ("duplicate", "too_short", "empty", "binary", "lone_surrogate", "broken_encoding", "broken_row"):
        assert counts["files", reason][0] == 1
    aside = pandas.read_parquet(corpus / "report" / "set_aside.parquet")
    assert list(aside.columns) == ["id", "source", "reason", "text"]
    assert len(aside) == 7
    card = (corpus / "report" / "card.md").read_text()
    assert all(f"`{reason}` (1)" in card for reason in aside.reason)
    assert (corpus / "report" / "corpus.png").read_bytes().startswith(b"\x89PNG")


def test_text_is_cleaned_before_it_is_written(corpus):
    assert "caf\u00e9\n" * 20 in set(rows_of(corpus).text)


def test_datasets_opens_the_corpus(corpus, tmp_path):
    opened = datasets.load_dataset(str(corpus / "data"), cache_dir=str(tmp_path))
    assert set(opened) == {"train", "validation", "test"}
    assert opened["train"].column_names == ["id", "text", "source", "group", "split", "meta"]
    assert opened["test"]["text"][:] == read_split(corpus, "test").text.tolist()


def test_the_same_text_gives_the_same_bytes(corpus, messy, tmp_path):
    build(tmp_path / "again", messy, workers=2)
    for name in SPLITS:
        one, other = (folder / "data" / f"{name}.parquet" for folder in (corpus, tmp_path / "again"))
        assert one.read_bytes() == other.read_bytes()


def test_every_row_stands_in_the_split_of_its_group_in_the_order_of_the_source(corpus):
    for name in SPLITS:
        rows = read_split(corpus, name)
        assert set(rows.split) == {name}
        assert all(split_of(group, SPLIT) == name for group in rows.group)
        places = [int(identity.split(":")[1]) for identity in rows.id]
        assert places == sorted(places)
        assert json.loads(rows.meta[0]) == {"file": "rows.jsonl"}


def test_long_texts_are_cut_without_loss_and_their_parts_stay_together(tmp_path):
    texts = [prose(seed, count=400) for seed in range(60)]
    build(tmp_path / "corpus", write_rows(tmp_path / "rows.jsonl", texts), max_characters=500)
    rows = rows_of(tmp_path / "corpus")
    assert rows.text.str.len().max() <= 500
    assert (rows.groupby("group").split.nunique() == 1).all()
    assert rows.id[rows.group == "rows.jsonl:1"].tolist()[:2] == ["rows.jsonl:1#0001", "rows.jsonl:1#0002"]
    joined = rows.groupby("group").text.agg("".join)
    assert [joined[f"rows.jsonl:{number}"] for number in range(1, 61)] == texts


def test_with_group_part_every_part_is_dealt_for_itself(tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(prose(seed, count=100) for seed in range(100)))
    numbers = build(tmp_path / "corpus", tmp_path / "book.txt", group="part", max_characters=500)
    rows = rows_of(tmp_path / "corpus")
    assert (rows.group == rows.id).all()
    assert all(numbers[f"{name}_documents"] >= 5 for name in SPLITS)


def test_a_held_out_text_that_shares_too_much_with_train_is_set_aside_and_the_share_reported(tmp_path):
    texts = [prose(seed) for seed in range(100)]
    train, test, valid = dealt_to("train"), dealt_to("test"), dealt_to("valid")
    texts[test] = texts[train] + " and some words more"
    few = " ".join(texts[train].split()[:14])  # two of its grams, of the 41 to 42 of the text below
    texts[valid] = f"{few} {prose(1000)}"
    numbers = build(tmp_path / "corpus", write_rows(tmp_path / "rows.jsonl", texts))
    aside = pandas.read_parquet(tmp_path / "corpus" / "report" / "set_aside.parquet")
    assert aside[["id", "reason"]].to_numpy().tolist() == [[f"rows.jsonl:{test + 1}", "overlaps_train"]]
    dealt = [split_of(f"rows.jsonl:{number}", SPLIT) for number in range(1, 101)]
    assert numbers["test_overlapping"] == numbers["test_sharing_any"] == round(1 / dealt.count("test"), 4)
    assert numbers["valid_sharing_any"] == round(1 / dealt.count("valid"), 4)
    assert numbers["valid_overlapping"] == numbers["test_shared_ngrams"] == 0
    assert 0 < numbers["valid_shared_ngrams"] < 0.01


def write_examples(folder, name, texts):
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps({"type": "summarize", "name": name}))
    Protected.of(name, texts, SPLIT.ngram).save(folder / "protected.npz")
    return folder


def test_train_gives_up_what_holds_a_task_s_test_row_before_held_out_texts_are_judged(tmp_path):
    texts = [prose(seed) for seed in range(100)]
    train, test = dealt_to("train"), dealt_to("test")
    texts[test] = texts[train] + " and some words more"
    examples = write_examples(tmp_path / "examples", "digest", [prose(5000), texts[train]])
    build(tmp_path / "corpus", write_rows(tmp_path / "rows.jsonl", texts), protected=[examples])
    aside = pandas.read_parquet(tmp_path / "corpus" / "report" / "set_aside.parquet")
    assert aside[["id", "reason"]].to_numpy().tolist() == [[f"rows.jsonl:{train + 1}", "in_test_of_digest"]]
    assert f"rows.jsonl:{test + 1}" in set(read_split(tmp_path / "corpus", "test").id)


def test_examples_that_protect_nothing_readable_are_a_clear_error(messy, tmp_path):
    with pytest.raises(ArtifactError, match="holds no readable test rows to protect"):
        build(tmp_path / "corpus", messy, protected=[tmp_path])


def test_too_few_groups_are_one_error_that_counts_and_says_what_to_change(tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(prose(seed, count=100) for seed in range(100)))
    with pytest.raises(CorpusError) as error:
        build(tmp_path / "corpus", tmp_path / "book.txt", max_characters=500)
    said = str(error.value)
    assert "in 1 groups are left, each split needs 5" in said
    assert "set `group: part`" in said
    assert not (tmp_path / "corpus" / "data").exists()


def test_the_share_that_an_error_advises_is_enough(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [prose(seed) for seed in range(300)])
    with pytest.raises(CorpusError, match=r"raise split\.valid to 0\.05 \(is 0\.005\)") as error:
        build(tmp_path / "corpus", path, split=SplitConfig(valid=0.005, test=0.2, minimum=5))
    assert "split.test" not in str(error.value)
    assert build(tmp_path / "again", path, split=SplitConfig(valid=0.05, test=0.2, minimum=5))["valid_documents"] >= 5


def test_an_empty_corpus_is_an_error_that_says_why(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ["short", "", "also short"])
    with pytest.raises(CorpusError, match="the corpus is empty: 3 texts were read and 2 too_short, 1 empty set aside"):
        build(tmp_path / "corpus", path)
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(CorpusError, match="the corpus is empty: 0 texts were read"):
        build(tmp_path / "other", tmp_path / "none.jsonl")


def test_a_second_source_that_is_missing_is_said_before_the_first_is_read(messy, tmp_path):
    sources = (FilesSource(name="one", paths=(str(messy),), text="no such column"), FilesSource(name="two", paths=("nowhere",)))
    with pytest.raises(SourceError, match="source two: there is no file"):
        build_corpus(tmp_path, CorpusConfig(sources=sources), SPLIT)


def test_a_text_in_two_sources_is_kept_once_in_the_first(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", [prose(seed) for seed in range(60)])
    two = write_rows(tmp_path / "two.jsonl", [prose(seed) for seed in range(50, 70)])
    sources = (FilesSource(name="one", paths=(str(one),)), FilesSource(name="two", paths=(str(two),)))
    (tmp_path / "corpus").mkdir()
    build_corpus(tmp_path / "corpus", CorpusConfig(sources=sources), SPLIT)
    assert counts_of(tmp_path / "corpus")["two", "duplicate"][0] == 10
    assert rows_of(tmp_path / "corpus").source.value_counts().to_dict() == {"one": 60, "two": 10}


def test_a_split_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(ArtifactError, match="holds no split 'train'"):
        read_split(tmp_path, "train")


def test_importing_the_room_loads_nothing_heavy():
    heavy = ("pandas", "pyarrow", "datasets", "matplotlib", "torch", "huggingface_hub")
    code = f"import sys, gptcore.corpus; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
