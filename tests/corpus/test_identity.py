import os
import platform
import time

from gptcore.artifacts import digest_of
from gptcore.config import FilesSource, PythonDocsSource
from gptcore.corpus import identify
from gptcore.corpus.sources import digests


def write_old(path, text):
    """A file that was last written a minute ago."""
    path.write_text(text)
    os.utime(path, (time.time() - 60,) * 2)


def test_the_identity_follows_the_content_and_not_the_place(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        write_old(tmp_path / place / "a.txt", "the same text")
    here, there = (identify(FilesSource(paths=(str(tmp_path / place),)), tmp_path) for place in ("here", "there"))
    assert here == there
    write_old(tmp_path / "there" / "a.txt", "another text!")
    assert identify(FilesSource(paths=(str(tmp_path / "there"),)), tmp_path) != here


def test_a_file_that_did_not_change_is_not_read_again(tmp_path, monkeypatch):
    write_old(tmp_path / "a.txt", "text")
    source = FilesSource(paths=(str(tmp_path / "a.txt"),))
    first = identify(source, tmp_path / "home")
    monkeypatch.setattr(digests, "sha256_file", None)  # calling it would fail
    assert identify(source, tmp_path / "home") == first


def test_a_file_that_changed_within_one_tick_of_the_clock_is_seen(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    state = path.stat()
    source = FilesSource(paths=(str(path),))
    first = identify(source, tmp_path / "home")
    path.write_text("two")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert identify(source, tmp_path / "home") != first


def test_a_damaged_memory_of_digests_is_forgotten(tmp_path):
    write_old(tmp_path / "a.txt", "text")
    source = FilesSource(paths=(str(tmp_path / "a.txt"),))
    first = identify(source, tmp_path)
    (tmp_path / "cache" / "sha256.json").write_text("{")
    assert identify(source, tmp_path) == first


def test_a_package_is_identified_by_what_its_installer_recorded(tmp_path, monkeypatch):
    package = tmp_path / "site" / "parcel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('"""A parcel."""\n')
    info = tmp_path / "site" / "parcel-1.0.dist-info"
    info.mkdir()
    (info / "RECORD").write_text("parcel/__init__.py,sha256=abc,18\nparcel/data.bin,sha256=x,1\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    source = PythonDocsSource(packages=("parcel",))
    first = identify(source, tmp_path)
    assert first["parcel"]["distributions"] == ["parcel-1.0"]
    (info / "RECORD").write_text("parcel/data.bin,sha256=y,1\nparcel/__init__.py,sha256=abc,18\n")
    assert identify(source, tmp_path) == first
    (info / "RECORD").write_text("parcel/__init__.py,sha256=abd,18\n")
    assert identify(source, tmp_path) != first
    (info / "RECORD").unlink()
    by_content = identify(source, tmp_path)
    (package / "__init__.py").write_text('"""Another."""\n')
    assert identify(source, tmp_path) != by_content


def test_the_standard_library_is_identified_by_python_s_version(tmp_path):
    identity = identify(PythonDocsSource(packages=("stdlib",)), tmp_path)
    assert identity["stdlib"]["python"] == platform.python_version()
    assert digest_of(identity)
