"""From anything down to its sources and up to everything that depends on it."""

import shutil

import pandas
import pytest

from gptcore.artifacts import Recipe, Store
from gptcore.lineage import Lineage


def table(*ids: str):
    def make(folder):
        (folder / "data").mkdir()
        pandas.DataFrame({"id": ids, "text": ids}).to_parquet(folder / "data" / "train.parquet")
        return {}

    return make


def text(content: str):
    return lambda folder: {"n": (folder / "data").write_text(content)}


@pytest.fixture
def chain(tmp_path):
    """Two sources, one corpus each, one tokenizer of both, and a model of the first corpus and the tokenizer."""
    store = Store(tmp_path)
    first = store.build(Recipe("corpus", "a", 1, {}, {"books": "1" * 64}), table("moby-dick", "emma"))
    second = store.build(Recipe("corpus", "b", 1, {}, {"mails": "2" * 64}), table("re: lunch"))
    tokenizer = store.build(Recipe("tokenizer", "a", 1, {}, {"corpus": first.digest, "more": second.digest}), text("pieces"))
    base = store.build(Recipe("base", "a", 1, {}, {"corpus": first.digest, "tokenizer": tokenizer.digest}), text("weights"))
    return store, first, second, tokenizer, base


def stages(nodes):
    return [(node.stage, node.name) for node in nodes]


def test_a_model_leads_down_to_its_sources(chain):
    store, *_, base = chain
    lineage = Lineage(store.root)
    tree = lineage.tree(lineage.node(base.digest))
    assert [inner["stage"] for inner in tree["made_of"]] == ["corpus", "tokenizer"]
    books = tree["made_of"][0]["made_of"][0]
    assert (books["stage"], books["digest"], books["path"]) == ("books", "1" * 64, None)


def test_what_goes_in_along_several_ways_is_opened_once(tmp_path):
    store = Store(tmp_path)
    base = store.build(Recipe("base", "a", 1, {}, {"books": "1" * 64}), text("0"))
    for number in range(1, 40):
        shards = store.build(Recipe("shards", "a", 1, {}, {"base": base.digest}), text(f"shards {number}"))
        inputs = {"base": base.digest, "shards": shards.digest, "more": base.digest}
        base = store.build(Recipe("base", "a", 1, {}, inputs), text(str(number)))
    lineage = Lineage(store.root)
    tree = lineage.tree(lineage.node(base.digest))
    assert tree["made_of"][1]["made_of"][0]["above"]
    deepest = tree
    while deepest["made_of"]:
        deepest = deepest["made_of"][0]
    assert deepest["stage"] == "books"


def test_a_source_and_a_document_lead_up_to_everything_that_depends_on_them(chain):
    store, first, second, *_ = chain
    lineage = Lineage(store.root)
    assert stages(lineage.of_source("mails")) == [("corpus", "b")]
    assert stages(lineage.dependents({second.digest})) == [("tokenizer", "a"), ("base", "a")]
    assert stages(lineage.of_document("emma")) == [("corpus", "a")]
    assert lineage.of_document("nowhere") == []
    assert lineage.of_source("corpus") == []
    assert stages(lineage.dependents({first.digest})) == [("tokenizer", "a"), ("base", "a")]


def test_what_is_gone_or_broken_is_named_but_stops_nothing(chain):
    store, first, _, tokenizer, base = chain
    shutil.rmtree(first.path)
    (tokenizer.path / "artifact.json").write_text("{")
    lineage = Lineage(store.root)
    assert [(n.stage, n.path) for n in lineage.made_of(lineage.node(base.digest))] == [("corpus", None), ("tokenizer", None)]


def test_an_input_that_was_built_again_after_what_is_made_of_it_still_counts(chain):
    store, first, *_ = chain
    store.build(Recipe("corpus", "a", 1, {}, {"books": "1" * 64}), table("moby-dick", "emma"), force=True)
    lineage = Lineage(store.root)
    assert set(stages(lineage.dependents({"1" * 64}))) == {("corpus", "a"), ("tokenizer", "a"), ("base", "a")}
    assert lineage.node(first.digest).digest == first.digest
