import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.config import CorpusConfig, FilesSource, SplitConfig
from gptcore.corpus import SPLITS, build_corpus, identify, read_split, split_of
from gptcore.corpus.additions import build_all, build_new, content, subtract, unite, write_files
from gptcore.corpus.contamination import ngram_hashes, shares_in_train
from gptcore.corpus.document import Document
from gptcore.corpus.prepare import Corpus

SPLIT = SplitConfig(valid=0.2, test=0.2, minimum=2)
SHORT = SplitConfig(valid=0.25, test=0.25, ngram=2)
VOCABULARY = [f"word{number}" for number in range(5000)]
NOTHING = {name: [] for name in SPLITS}


def prose(seed, count=40):
    return " ".join(np.random.default_rng(seed).choice(VOCABULARY, count))


def gathered(documents, split):
    """A corpus before anything is compared, from documents that are all different."""
    corpus = Corpus()
    for document in {document.text: document for document in documents}.values():
        corpus.documents[split_of(document.group, split)].append(document)
    return corpus


WORDS = st.lists(st.sampled_from("abcdefg"), min_size=2, max_size=6).map(" ".join)
DOCUMENTS = st.lists(st.tuples(st.integers(0, 12), WORDS), max_size=14)


@settings(max_examples=60, deadline=None)
@given(st.lists(DOCUMENTS, min_size=1, max_size=4))
def test_whatever_comes_in_whichever_round_no_test_document_of_any_round_is_train_of_any_round(rounds):
    old, gone, tested, trained = NOTHING, set(), set(), set()
    for texts in rounds:
        # Groups and ids come again with other texts, as when a table is sorted anew.
        given_now = [Document(f"row:{n}", text, "table", f"group-{group}") for n, (group, text) in enumerate(texts)]
        corpus = gathered(given_now, SHORT)
        count = sum(map(len, corpus.documents.values()))
        retired = subtract(corpus, old, SHORT, gone=gone)
        assert sum(map(len, corpus.documents.values())) + len(corpus.aside) == count, "kept or set aside, never lost"
        places = {(document.source, document.id) for document in retired}
        united = unite(old, corpus.documents, places)
        assert [d for name in SPLITS for d in united[name]] == [
            d for name in SPLITS for d in [*(o for o in old[name] if o not in retired), *corpus.documents[name]]
        ]
        every = [(d.source, d.id) for name in SPLITS for d in united[name]]
        assert len(set(every)) == len(every), "a place belongs to one text"
        held_out = [d for name in SPLITS[1:] for d in united[name]]
        train = [ngram_hashes(d.text, SHORT.ngram) for d in united["train"]]
        shares = shares_in_train([ngram_hashes(d.text, SHORT.ngram) for d in held_out], train)
        assert (shares <= SHORT.max_overlap).all()
        tested |= {d.text for d in held_out}
        trained |= {d.text for d in united["train"]}
        gone |= {content(d.text) for d in retired}
        old = united
    assert not tested & trained


@given(DOCUMENTS)
def test_what_is_added_twice_is_new_once(texts):
    documents = [Document(f"row:{n}", text, "table", f"group-{group}") for n, (group, text) in enumerate(texts)]
    first, again = gathered(documents, SHORT), gathered([replace(d, id=f"moved-{d.id}") for d in documents], SHORT)
    subtract(first, NOTHING, SHORT)
    subtract(again, first.documents, SHORT)
    assert not any(again.documents.values())


def test_a_new_text_of_a_known_group_goes_where_its_group_is():
    old = {**NOTHING, "test": [Document("a", prose(0), "s", "book")]}
    corpus = Corpus()
    corpus.documents["train"].append(Document("b", prose(1), "s", "book"))  # another seed or other shares dealt it here
    subtract(corpus, old, SPLIT)
    assert [d.id for d in corpus.documents["test"]] == ["b"]


def test_a_new_train_text_that_holds_an_old_test_text_is_set_aside():
    old = {**NOTHING, "test": [Document("a", prose(0), "s", "a")]}
    corpus = Corpus()
    corpus.documents["train"] += [Document("b", f"{prose(1)} {prose(0)}", "s", "b"), Document("c", prose(2), "s", "c")]
    assert subtract(corpus, old, SPLIT) == []
    assert [d.id for d in corpus.documents["train"]] == ["c"]
    assert [(item.id, item.reason) for item in corpus.aside] == [("b", "in_test_of_earlier_versions")]


def test_an_old_test_text_that_new_train_texts_hold_only_together_is_retired():
    words = prose(0, 100).split()
    parts = [" ".join(words[start : start + 25]) for start in range(0, 75, 15)]
    old = {**NOTHING, "test": [Document("a", " ".join(words), "s", "a"), Document("z", prose(9), "s", "z")]}
    corpus = Corpus()
    corpus.documents["train"] += [Document(f"p{n}", f"{prose(n + 50, 300)} {part}", "s", "p") for n, part in enumerate(parts)]
    retired = subtract(corpus, old, SPLIT)
    assert len(corpus.documents["train"]) == len(parts)
    assert [d.id for d in retired] == ["a"]
    assert [d.id for d in unite(old, corpus.documents, {("s", "a")})["test"]] == ["z"]


# ------------------------------------------------------------------------------------------------------ folders --


def write_rows(path, seeds):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": prose(seed)}) + "\n" for seed in seeds))


@pytest.fixture
def texts(tmp_path):
    write_rows(tmp_path / "texts" / "a.jsonl", range(60))
    return tmp_path / "texts"


def config_of(folder):
    return CorpusConfig(sources=(FilesSource(paths=(str(folder),)),), workers=1)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A corpus of the same rows."""
    home = tmp_path_factory.mktemp("old")
    write_rows(home / "texts" / "a.jsonl", range(60))
    config = config_of(home / "texts")
    build_corpus(home / "corpus", config, SPLIT)
    write_files(home / "corpus", config, {"files": identify(config.sources[0], home)}, {})
    return home / "corpus"


def added(folder, texts, old, home):
    folder.mkdir()
    config = config_of(texts)
    return build_new(folder, config, SPLIT, old, {"files": identify(config.sources[0], home)}, (), home)


def texts_of(folder):
    return {name: sorted(read_split(folder, name)["text"]) for name in SPLITS}


def test_only_what_is_new_is_read_and_both_are_one_corpus_again(texts, old, tmp_path):
    (texts / "a.jsonl").rename(texts / "moved.jsonl")
    (texts / "moved.jsonl").touch()
    write_rows(texts / "b.jsonl", range(50, 110))
    numbers = added(tmp_path / "new", texts, old, tmp_path)
    assert numbers["files_passed"] == 1, "a file that only moved is not read again"
    new = texts_of(tmp_path / "new")
    assert sorted(itertools.chain(*new.values())) == sorted(prose(seed) for seed in range(60, 110))
    (tmp_path / "all").mkdir()
    build_all(tmp_path / "all", old, tmp_path / "new")
    before, after = texts_of(old), texts_of(tmp_path / "all")
    assert after == {name: sorted(before[name] + new[name]) for name in SPLITS}
    assert "| train |" in (tmp_path / "all" / "report" / "card.md").read_text()
    third = added(tmp_path / "third", texts, tmp_path / "all", tmp_path)
    assert (third["files_passed"], third["train_documents"]) == (2, 0)


def test_a_table_that_grew_and_was_sorted_anew_brings_its_new_rows_only(texts, old, tmp_path):
    write_rows(texts / "a.jsonl", reversed(range(90)))
    numbers = added(tmp_path / "new", texts, old, tmp_path)
    assert numbers["files_passed"] == 0
    new = texts_of(tmp_path / "new")
    assert sorted(itertools.chain(*new.values())) == sorted(prose(seed) for seed in range(60, 90))
    (tmp_path / "all").mkdir()
    build_all(tmp_path / "all", old, tmp_path / "new")
    ids = [identity for name in SPLITS for identity in read_split(tmp_path / "all", name)["id"]]
    assert len(set(ids)) == 90, "the number of a row names another text now, which gets an id of its own"


def test_new_text_may_leave_a_split_empty(texts, old, tmp_path):
    write_rows(texts / "b.jsonl", [99])
    numbers = added(tmp_path / "new", texts, old, tmp_path)
    assert sum(int(numbers[f"{name}_documents"]) for name in SPLITS) == 1
    assert sum(len(read_split(tmp_path / "new", name)) for name in SPLITS) == 1
