import contextlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.errors import ArtifactError, CorruptArtifactError, TokenizerError
from gptcore.tokens import Shards, ShardWriter

DOCUMENTS = st.lists(st.lists(st.integers(0, 999), max_size=12), max_size=12)


def source_of(document) -> str:
    """Of documents that begin alike."""
    return f"source-{document[0] % 3}" if document else "none"


def write(folder: Path, documents, vocabulary=1000, limit=20, masked=False, split="train") -> Path:
    with ShardWriter(folder, vocabulary, "digest", limit, masked=masked) as writer:
        for document in documents:
            mask = [token % 2 for token in document] if masked else None
            writer.add(split, document, 3 * len(document), mask, source_of(document))
    return folder


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(1, 40), st.booleans(), st.data())
def test_nothing_is_cropped_or_lost(documents, limit, masked, data):
    with tempfile.TemporaryDirectory() as folder:
        split = Shards.open(write(Path(folder), documents, limit=limit, masked=masked)).split("train")
        assert split.documents == len(documents)
        assert [split.document(i).tolist() for i in range(len(documents))] == documents
        assert [split.bytes(i) for i in range(len(documents))] == [3 * len(document) for document in documents]
        expected = [[token % 2 if masked else 1 for token in document] for document in documents]
        assert [split.mask(i).tolist() for i in range(len(documents))] == expected
        assert [split.source(i) for i in range(len(documents))] == [source_of(document) for document in documents]
        stream = [token for document in documents for token in document]
        assert split.tokens == len(stream)
        start = data.draw(st.integers(0, len(stream)))
        length = data.draw(st.integers(0, len(stream) - start))
        assert split.window(start, length).tolist() == stream[start : start + length]


@given(DOCUMENTS, st.integers(1, 40), st.sampled_from(["source-0", "source-1", "none", "unknown"]), st.data())
def test_a_source_is_a_stream_of_its_documents(documents, limit, source, data):
    with tempfile.TemporaryDirectory() as folder:
        stream = Shards.open(write(Path(folder), documents, limit=limit)).split("train").of(source)
        tokens = [token for document in documents if source_of(document) == source for token in document]
        assert stream.tokens == len(tokens)
        start = data.draw(st.integers(0, len(tokens)))
        length = data.draw(st.integers(0, len(tokens) - start))
        assert stream.window(start, length).tolist() == tokens[start : start + length]
        with pytest.raises(IndexError, match=f"of {len(tokens)}"):
            stream.window(start, len(tokens) + 1)


def test_no_document_is_cut_at_the_end_of_a_file(tmp_path):
    write(tmp_path, [[1] * 8, [2] * 8, [3] * 8, [4] * 30, [5]], limit=20)
    shards = json.loads((tmp_path / "index.json").read_text())["splits"]["train"]["shards"]
    assert [(shard["name"], shard["tokens"]) for shard in shards] == [("00000", 16), ("00001", 8), ("00002", 30), ("00003", 1)]


@pytest.mark.parametrize(("vocabulary", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_the_files_are_plain_little_endian_ids_and_boundaries(tmp_path, vocabulary, dtype):
    documents = [[0, vocabulary - 1], [7], [1, 2, 3]]
    write(tmp_path, documents, vocabulary, masked=True)
    place = tmp_path / "train"
    assert np.fromfile(place / "00000.tokens", dtype).tolist() == [0, vocabulary - 1, 7, 1, 2, 3]
    assert np.fromfile(place / "00000.mask", np.uint8).tolist() == [0, (vocabulary - 1) % 2, 1, 1, 0, 1]
    assert np.load(place / "00000.offsets.npy").tolist() == [0, 2, 3, 6]
    assert np.load(place / "00000.bytes.npy").tolist() == [6, 3, 9]
    assert np.load(place / "00000.sources.npy").tolist() == [0, 1, 1]
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["sources"] == ["source-0", "source-1"]
    assert index["splits"]["train"] | {"shards": []} == {"documents": 3, "tokens": 6, "bytes": 18, "shards": []}
    shards = Shards.open(tmp_path)
    assert (shards.vocabulary, shards.tokenizer, shards.masked, shards.dtype) == (vocabulary, "digest", True, np.dtype(dtype))


def test_equal_documents_give_equal_bytes(tmp_path):
    documents = [[1, 2], [3] * 30, []]
    first, second = (write(tmp_path / name, documents, masked=True) for name in ("a", "b"))
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_a_split_without_documents_is_empty(tmp_path):
    split = Shards.open(write(tmp_path, [[1]])).split("test")
    assert (split.documents, split.tokens, split.window(0, 0).tolist()) == (0, 0, [])


@pytest.mark.parametrize("index", [-1, 3])
def test_a_document_that_is_not_there_is_an_index_error(tmp_path, index):
    split = Shards.open(write(tmp_path, [[1], [2], [3]])).split("train")
    with pytest.raises(IndexError, match=f"document {index} of 3"):
        split.document(index)


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, 4), (3, 1), (1, -1)])
def test_a_window_beyond_the_text_is_an_index_error(tmp_path, start, length):
    with pytest.raises(IndexError, match="of 3"):
        Shards.open(write(tmp_path, [[1], [2], [3]])).split("train").window(start, length)


@pytest.mark.parametrize("ids", [[1000], [-1], [2**16 + 1]])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path, ids):
    with pytest.raises(TokenizerError, match=r"outside 0\.\.999"), ShardWriter(tmp_path, 1000, "digest", 10) as writer:
        writer.add("train", ids, 1)


def test_an_error_while_writing_leaves_no_index(tmp_path):
    with contextlib.suppress(KeyboardInterrupt), ShardWriter(tmp_path, 1000, "digest", 10) as writer:
        writer.add("train", [1], 1)
        raise KeyboardInterrupt
    with pytest.raises(ArtifactError, match=r"holds no shards: index\.json is missing"):
        Shards.open(tmp_path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def enlarge(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


FILES = ["00000.tokens", "00000.mask", "00000.offsets.npy", "00000.bytes.npy", "00000.sources.npy"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_a_damaged_shard_is_named(tmp_path, name, damage):
    path = write(tmp_path, [[1, 2], [3]], masked=True) / "train" / name
    damage(path)
    with pytest.raises(CorruptArtifactError, match=f"{name}.*rebuild"):
        Shards.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage"), [*((name, enlarge) for name in FILES[:2]), *((name, garble) for name in FILES[2:])]
)
def test_an_enlarged_or_garbled_shard_is_named(tmp_path, name, damage):
    path = write(tmp_path, [[1, 2], [3]], masked=True) / "train" / name
    damage(path)
    with pytest.raises(CorruptArtifactError, match=f"{name}.*rebuild"):
        Shards.open(tmp_path)


@pytest.mark.parametrize("boundaries", [[0, 4, 3], [1, 2, 3], [0, 2, 4]])
def test_boundaries_that_do_not_divide_the_tokens_are_refused(tmp_path, boundaries):
    write(tmp_path, [[1, 2], [3]])
    np.save(tmp_path / "train" / "00000.offsets.npy", np.array(boundaries, np.int64))
    with pytest.raises(CorruptArtifactError, match=r"offsets\.npy does not divide the 3 tokens"):
        Shards.open(tmp_path)


def test_a_document_of_a_source_that_the_index_does_not_name_is_refused(tmp_path):
    write(tmp_path, [[1, 2], [3]])
    np.save(tmp_path / "train" / "00000.sources.npy", np.array([0, 2], np.uint16))
    with pytest.raises(CorruptArtifactError, match=r"sources\.npy names other sources than the 2 of index\.json"):
        Shards.open(tmp_path)


@pytest.mark.parametrize("index", ["", "{", "[]", '{"dtype": "uint16"}', '{"dtype": "nonsense"}'])
def test_an_index_that_cannot_be_read_is_named(tmp_path, index):
    (tmp_path / "index.json").write_text(index)
    with pytest.raises(CorruptArtifactError, match=r"index\.json cannot be read"):
        Shards.open(tmp_path)
