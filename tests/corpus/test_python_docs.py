import sys

import pytest

from gptcore.config import PythonDocsSource
from gptcore.corpus import SetAside, read_source
from gptcore.corpus.sources import python_docs
from gptcore.errors import SourceError

INIT = '''"""A parcel of things."""
raise RuntimeError("was imported")
'''
SHAPES = '''
class Shape:
    """A shape.

    One line
        and one below it.
    """

    def area(self):
        """The area."""
        def inner():
            """Not part of the module."""

    @property
    def name(self):
        """Its name."""

    @name.setter
    def name(self, value):
        """Set its name."""

    class Corner:
        """A corner."""

try:
    import fast
except ImportError:
    async def slow():
        """Slow \\d escape."""
else:
    if fast:
        def quick():
            "Quick."

def silent(): pass
'''


@pytest.fixture
def parcel(tmp_path, monkeypatch):
    """A package that fails when imported, with a folder of tests, a file that is no Python and one of a single line."""
    root = tmp_path / "parcel"
    (root / "tests").mkdir(parents=True)
    (root / "deep").mkdir()
    (root / "__init__.py").write_text(INIT)
    (root / "shapes.py").write_text(SHAPES)
    (root / "broken.py").write_text("def broken(:\n")
    (root / "tests" / "test_shapes.py").write_text('"""Tests of shapes."""')
    (root / "deep" / "__init__.py").write_text('"""Deep things."""')
    (root / "deep" / "latin.py").write_bytes('# coding: latin-1\n"""Grüße."""'.encode("latin-1"))
    monkeypatch.syspath_prepend(tmp_path)
    return PythonDocsSource(packages=("parcel",))


def test_docstrings_are_found_with_kind_and_name_and_without_import_or_tests(parcel):
    found = list(read_source(parcel))
    assert [(item.id, item.text, item.group) for item in found if not isinstance(item, SetAside)] == [
        ("parcel", "A parcel of things.", "parcel"),
        ("parcel.shapes:Shape", "A shape.\n\nOne line\n    and one below it.", "parcel.shapes"),
        ("parcel.shapes:Shape.area", "The area.", "parcel.shapes"),
        ("parcel.shapes:Shape.name", "Its name.", "parcel.shapes"),
        ("parcel.shapes:Shape.name~2", "Set its name.", "parcel.shapes"),
        ("parcel.shapes:Shape.Corner", "A corner.", "parcel.shapes"),
        ("parcel.shapes:slow", "Slow \\d escape.", "parcel.shapes"),
        ("parcel.shapes:quick", "Quick.", "parcel.shapes"),
        ("parcel.deep", "Deep things.", "parcel.deep"),
        ("parcel.deep.latin", "Grüße.", "parcel.deep.latin"),
    ]
    kinds = {item.id: item.meta for item in found if not isinstance(item, SetAside)}
    assert kinds["parcel"] == {"package": "parcel", "kind": "module", "qualname": ""}
    assert kinds["parcel.shapes:Shape.Corner"] == {"package": "parcel", "kind": "class", "qualname": "Shape.Corner"}
    assert kinds["parcel.shapes:slow"] == {"package": "parcel", "kind": "function", "qualname": "slow"}
    assert [(item.id, item.reason) for item in found if isinstance(item, SetAside)] == [("parcel.broken", "not_python")]
    assert "parcel" not in sys.modules


def test_more_workers_read_the_same(parcel):
    assert list(read_source(parcel, workers=2)) == list(read_source(parcel, workers=1))


def test_what_was_parsed_is_remembered_until_the_package_changes(parcel, tmp_path, monkeypatch):
    home = tmp_path / "home"
    first = list(read_source(parcel, home=home))
    assert first == list(read_source(parcel))
    with monkeypatch.context() as patched:
        patched.setattr(python_docs, "parse_file", None)  # calling it would fail
        assert list(read_source(parcel, home=home)) == first
    (tmp_path / "parcel" / "broken.py").write_text('"""Mended."""')
    assert [item.text for item in read_source(parcel, home=home) if item.id == "parcel.broken"] == ["Mended."]
    assert len(list((home / "cache" / "python_docs").glob("parcel-*"))) == 1


def test_the_standard_library_is_read_without_its_tests_and_without_installed_packages():
    stdlib = python_docs.find_package("stdlib", "docs").modules()
    assert {"json.decoder", "argparse", "idlelib.editor", "asyncio"} <= stdlib.keys()
    assert not [name for name in stdlib if name.startswith(("test.", "idlelib.idle_test", "site-packages"))]
    assert stdlib["json"].name == "__init__.py"


def test_a_module_of_one_file_is_a_package_too():
    (document, *_) = read_source(PythonDocsSource(packages=("argparse",)))
    assert (document.id, document.meta["kind"]) == ("argparse", "module")


@pytest.mark.parametrize("name", ["no_such_package", "scikit-learn", "os.path"])
def test_a_package_that_is_not_installed_is_an_error_that_names_it(name):
    with pytest.raises(SourceError, match=f"source docs: package '{name}' is not installed"):
        read_source(PythonDocsSource(name="docs", packages=("argparse", name)))


def test_a_package_without_python_is_an_error_that_names_it():
    with pytest.raises(SourceError, match="package 'sys' holds no Python files"):
        read_source(PythonDocsSource(packages=("sys",)))
