import json

import datasets
import pytest

from gptcore.config import HubSource
from gptcore.corpus import Document, SetAside, identify, read_source
from gptcore.errors import SourceError


@pytest.fixture
def folder(tmp_path):
    """A local dataset: three rows with the names of their labels in the features."""
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "thread": datasets.Value("int64"),
            "label": datasets.ClassLabel(names=["ham", "spam"]),
        }
    )
    rows = {"text": ["first", "second", None], "thread": [7, 7, 8], "label": [1, 0, 1]}
    path = tmp_path / "mails"
    path.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path / "train.parquet")
    return path


def test_a_local_folder_is_read_as_a_stream_of_rows_with_the_names_of_labels(folder):
    source = HubSource(dataset=str(folder), group="thread", target="label")
    assert list(read_source(source)) == [
        Document("1", "first", "hub", "7", {}, "spam"),
        Document("2", "second", "hub", "7", {}, "ham"),
        SetAside("3", "hub", "no_text"),
    ]


def test_without_a_group_every_row_is_its_own_and_the_limit_ends_the_stream(folder):
    found = list(read_source(HubSource(dataset=str(folder), limit=1)))
    assert found == [Document("1", "first", "hub", "1", {})]


def test_a_local_folder_is_identified_by_its_files(folder, tmp_path):
    source = HubSource(dataset=str(folder))
    first = identify(source, tmp_path)
    assert list(first["files"]) == ["train.parquet"]
    (folder / "train.jsonl").write_text(json.dumps({"text": "more"}))
    assert identify(source, tmp_path) != first


def test_a_revision_that_is_a_commit_is_its_own_identity_and_asks_nobody(tmp_path):
    assert identify(HubSource(dataset="owner/name", revision="a" * 40), tmp_path) == {"commit": "a" * 40}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"split": "holdout"}, "split holdout"),
        ({"text": "body"}, "has no column 'body', its columns are: text, thread, label"),
        ({"group": "topic"}, "has no column 'topic'"),
    ],
)
def test_a_split_or_column_that_is_not_there_is_a_clear_error(folder, settings, says):
    with pytest.raises(SourceError, match=f"source hub: .*{says}"):
        list(read_source(HubSource(dataset=str(folder), **settings)))


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(SourceError, match="source hub: there is no folder"):
        read_source(HubSource(dataset=str(tmp_path / "nothing")))


def test_rows_that_break_in_the_middle_of_the_stream_are_a_clear_error(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "good"}\n{broken\n')
    with pytest.raises(SourceError, match="cannot read the dataset"):
        list(read_source(HubSource(dataset=str(tmp_path / "data"))))


def test_a_hub_that_cannot_be_reached_is_a_clear_error_at_once(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    for ask in (lambda source: identify(source, tmp_path), read_source):
        with pytest.raises(SourceError, match=r"source hub: cannot read the dataset owner/name .*the hub can be reached"):
            ask(HubSource(dataset="owner/name"))
