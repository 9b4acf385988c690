import csv
import gzip
import json

import pandas
import pytest

from gptcore.config import FilesSource
from gptcore.corpus import Document, SetAside, identify, read_source
from gptcore.errors import SourceError


def read(*paths, **settings):
    return list(read_source(FilesSource(paths=tuple(str(path) for path in paths), **settings)))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


ROWS = [{"text": "first text", "topic": "a", "label": 1}, {"text": "second, text\nof two lines", "topic": "b", "label": 2}]


def write_table(folder, suffix):
    path = folder / f"table{suffix}"
    if suffix == ".jsonl":
        return write_jsonl(path, ROWS)
    frame = pandas.DataFrame(ROWS)
    frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_table_gives_a_document_per_row_plain_and_packed(tmp_path, suffix, packed):
    path = write_table(tmp_path, suffix)
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        path = path.with_name(f"{path.name}.gz")
    documents = read(path, group="topic", target="label")
    meta = {"file": path.name}
    assert documents == [
        Document(f"{path.name}:1", "first text", "files", "a", meta, "1"),
        Document(f"{path.name}:2", "second, text\nof two lines", "files", "b", meta, "2"),
    ]


@pytest.mark.parametrize("name", ["note.txt", "note.md", "note.txt.gz", "NOTE.MD"])
def test_a_text_file_is_one_document_and_its_own_group(tmp_path, name):
    content = "Grüße\r\naus Köln".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read(tmp_path / name) == [Document(name, "Grüße\r\naus Köln", "files", name, {"file": name})]


@pytest.mark.parametrize(
    ("group", "groups"),
    [
        (None, ["t.jsonl:1", "t.jsonl:2"]),
        ("row", ["t.jsonl:1", "t.jsonl:2"]),
        ("part", ["t.jsonl:1", "t.jsonl:2"]),
        ("file", ["t.jsonl", "t.jsonl"]),
        ("topic", ["a", "b"]),
    ],
)
def test_a_row_s_group_is_what_the_setting_says(tmp_path, group, groups):
    path = write_jsonl(tmp_path / "t.jsonl", ROWS)
    assert [document.group for document in read(path, group=group)] == groups


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_text(tmp_path, encoding):
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    (tmp_path / "a.txt").write_text(mark + "Grüße", encoding=encoding)
    (tmp_path / "b.csv").write_text(mark + "text,topic\nGrüße,a\n", encoding=encoding)
    assert [document.text for document in read(tmp_path)] == ["Grüße", "Grüße"]


def test_broken_encoding_costs_the_row_and_not_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "bad \xff\xfe"}\n\n{"text": "good too"}\n')
    (tmp_path / "b.csv").write_bytes(b"text\ngood\nbad \x8a\nfine\n")
    (tmp_path / "c.txt").write_bytes(b"latin \xe9")
    found = read(tmp_path)
    assert [item.text for item in found if isinstance(item, Document)] == ["good", "good too", "good", "fine"]
    aside = [item for item in found if isinstance(item, SetAside)]
    assert [(item.id, item.reason) for item in aside] == [
        ("a.jsonl:2", "broken_encoding"),
        ("b.csv:2", "broken_encoding"),
        ("c.txt", "broken_encoding"),
    ]
    assert all(item.text.encode() and item.bytes for item in aside)


def test_what_is_no_row_or_has_no_text_is_set_aside_with_its_reason(tmp_path):
    lines = [json.dumps(ROWS[0]), "{not json", "[1, 2]", '{"topic": "b"}', '{"text": 5, "topic": "b"}', '{"text": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.csv").write_text("text,topic\none,a\ntwo,b,too many\n")
    found = read(tmp_path)
    assert [item.reason for item in found if isinstance(item, SetAside)] == [
        *["broken_row"] * 2,
        *["no_text"] * 3,
        "broken_row",
    ]
    unanswered = read(write_jsonl(tmp_path / "c.jsonl", [*ROWS, {"text": "and", "label": None}]), target="label")
    assert [item.reason for item in unanswered if isinstance(item, SetAside)] == ["no_target"]


def test_a_file_that_cannot_be_unpacked_or_is_of_another_type_is_set_aside_and_the_others_are_read(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"this is not gzip")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"cut off " * 1000)[:-20])
    (tmp_path / "c.parquet").write_bytes(b"this is not parquet")
    (tmp_path / "d.pdf").write_bytes(b"%PDF")
    (tmp_path / "e.txt").write_text("good")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "f.txt").write_text("not meant")
    found = read(tmp_path)
    assert [(item.id, item.reason) for item in found if isinstance(item, SetAside)] == [
        ("a.txt.gz", "broken_file"),
        ("b.txt.gz", "broken_file"),
        ("c.parquet", "broken_file"),
        ("d.pdf", "unknown_type"),
    ]
    assert [item.text for item in found if isinstance(item, Document)] == ["good"]


def test_rows_before_the_place_where_a_packed_file_breaks_are_kept(tmp_path):
    rows = [{"text": f"row {number} " + "x" * (number % 7)} for number in range(20_000)]
    packed = gzip.compress(write_jsonl(tmp_path / "a.jsonl", rows).read_bytes())
    (tmp_path / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    *documents, last = read(tmp_path / "b.jsonl.gz")
    assert len(documents) > 1000
    assert documents[-1].text == rows[len(documents) - 1]["text"]
    assert (last.id, last.reason) == ("b.jsonl.gz", "broken_file")


def test_a_csv_field_may_be_longer_than_the_csv_module_likes(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], ["long, " * 50_000]])
    assert [len(document.text) for document in read(tmp_path / "a.csv")] == [300_000]


def test_folders_globs_and_files_give_short_names_and_no_file_twice(tmp_path, monkeypatch):
    for name in ("books/b.txt", "books/old/a.txt", "other/b.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    documents = read("books", "books/*.txt", "other/*.txt", tmp_path / "c.txt", "b*")
    assert {document.id: document.text for document in documents} == {
        "b.txt": "books/b.txt",
        "old/a.txt": "books/old/a.txt",
        "other/b.txt": "other/b.txt",
        "c.txt": "c.txt",
    }


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("nothing.txt", "there is no file or folder .*nothing.txt"),
        ("*.jsonl", r"no file matches .*\*\.jsonl"),
        ("", "is of a type that is read .*.parquet"),
        ("image.png", "is of a type that is read"),
    ],
)
def test_a_source_that_holds_nothing_is_an_error_before_anything_is_read(tmp_path, pattern, says):
    (tmp_path / "image.png").write_bytes(b"png")
    source = FilesSource(name="mine", paths=(str(tmp_path / pattern),))
    with pytest.raises(SourceError, match=f"source mine: .*{says}"):
        read_source(source)
    with pytest.raises(SourceError, match=f"source mine: .*{says}"):
        identify(source, tmp_path / "home")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("settings", [{"text": "body"}, {"group": "body"}, {"target": "body"}])
def test_a_missing_column_is_an_error_that_names_it_and_those_that_are_there(tmp_path, suffix, settings):
    path = write_table(tmp_path, suffix)
    with pytest.raises(SourceError, match=rf"table\{suffix} has no column 'body', its columns are: text, topic, label"):
        read(path, **settings)
