"""Source type `python_docs`: the docstrings of installed packages, found with `find_spec` and parsed with `ast`.

Nothing is imported: a package's code never runs. What counts is what a module defines at its top and in its classes, also
below an `if` or `try` there; functions inside functions and folders of tests are left out.
"""

import ast
import gc
import importlib.util
import json
import os
import platform
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from gptcore.artifacts import digest_of, sync
from gptcore.config import PythonDocsSource
from gptcore.corpus.document import Document, SetAside
from gptcore.corpus.sources.digests import file_digests
from gptcore.errors import SourceError
from gptcore.work import map_work

STDLIB = "stdlib"
_TESTS = {"test", "tests", "idle_test"}
_NOT_STDLIB = {"site-packages", "dist-packages"}
_BRANCHES = ("body", "handlers", "orelse", "finalbody", "cases")
_PARSER = 1
"""Raised when the same files give other rows, so that what an older parser left in the cache is not used."""


class Package(NamedTuple):
    """An installed package and where it is: folders, or the single file of a module."""

    name: str
    roots: tuple[Path, ...]

    def modules(self) -> dict[str, Path]:
        """{module name: file} of every Python file outside folders of tests, in the order of paths."""
        modules: dict[str, Path] = {}
        for root in self.roots:
            if root.is_file():
                return {self.name: root}
            for path in _python_files(root, _TESTS | _NOT_STDLIB if self.name == STDLIB else _TESTS):
                parts = path.relative_to(root).with_suffix("").parts
                parts = parts[:-1] if parts[-1] == "__init__" else parts
                # Of foo.py and foo/__init__.py Python imports the folder, which comes later.
                modules[".".join(parts if self.name == STDLIB else (self.name, *parts))] = path
        return modules


class Row(NamedTuple):
    """A docstring, or with the kind `not_python` a file that does not parse."""

    module: str
    kind: str
    qualname: str
    text: str


def identify_python_docs(source: PythonDocsSource, home: Path) -> dict[str, Any]:
    """{package: what is installed}.

    The standard library by Python's version and the sizes of its files; a package by its distributions and what their
    installer recorded of its Python files; a package without such a record by its files' sha256.
    """
    return _identities(_find_packages(source), home, source.name)


def read_python_docs(source: PythonDocsSource, workers: int, home: Path | None) -> Iterator[Document | SetAside]:
    """The docstrings of all packages, in the order of the settings and within a package of its files' paths.

    `id` is `module:qualname` (a module's is `module`), `group` the module, `meta` package, kind and qualname.
    """
    packages = _find_packages(source)
    return _read(source.name, packages, workers, home)


# ------------------------------------------------------------------------------------------------------- finding --


def find_package(name: str, source: str) -> Package:
    """Find an installed package, or `stdlib`, without importing it. Raises `SourceError` when it is not there."""
    if name == STDLIB:
        return Package(name, (Path(sysconfig.get_paths()["stdlib"]),))
    try:
        # Of a dotted name find_spec would import the parents.
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise SourceError(
            f"source {source}: package {name!r} is not installed; install it or take it out of `packages` "
            "(which lists top-level names as in `import sklearn`)"
        )
    if spec.submodule_search_locations is not None:
        return Package(name, tuple(Path(place) for place in spec.submodule_search_locations))
    if spec.origin is not None and spec.origin.endswith(".py"):
        return Package(name, (Path(spec.origin),))
    raise SourceError(f"source {source}: package {name!r} holds no Python files to read; take it out of `packages`")


def _find_packages(source: PythonDocsSource) -> list[Package]:
    return [find_package(name, source.name) for name in dict.fromkeys(source.packages)]


def _python_files(folder: Path, skip: Set[str]) -> Iterator[Path]:
    for inside, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - skip - {"__pycache__"})
        yield from (Path(inside, name) for name in sorted(files) if name.endswith(".py"))


# --------------------------------------------------------------------------------------------------- identifying --


def _identities(packages: Iterable[Package], home: Path, source: str) -> dict[str, Any]:
    return {package.name: _identify(package, home, source) for package in packages}


def _identify(package: Package, home: Path, source: str) -> dict[str, Any]:
    if package.name == STDLIB:
        sizes = {module: path.stat().st_size for module, path in package.modules().items()}
        return {"python": platform.python_version(), "files": digest_of(sizes)}
    # What parses, and so what is read, depends on Python's syntax.
    python = ".".join(platform.python_version_tuple()[:2])
    recorded = [entry for root in package.roots for entry in _recorded(root)]
    if recorded:
        distributions = sorted({distribution for distribution, _ in recorded})
        return {"python": python, "distributions": distributions, "record": digest_of(sorted(line for _, line in recorded))}
    return {"python": python, "files": digest_of(file_digests(package.modules(), home, f"source {source}"))}


def _recorded(root: Path) -> Iterator[tuple[str, str]]:
    """Distribution and line of every Python file of a package in what installers recorded beside it (PEP 376)."""
    start = f"{root.name}/" if root.is_dir() else f"{root.name},"
    for record in root.parent.glob("*.dist-info/RECORD"):
        text = record.read_text(encoding="utf-8")
        if start in text:  # most records are of other packages
            for line in text.splitlines():
                if line.startswith(start) and ".py,sha256=" in line:
                    yield record.parent.name.removesuffix(".dist-info"), line


# ------------------------------------------------------------------------------------------------------- parsing --


def _read(source: str, packages: list[Package], workers: int, home: Path | None) -> Iterator[Document | SetAside]:
    rows = _parse(packages, workers) if home is None else _remember(packages, workers, home, source)
    for package in packages:
        seen: Counter[str] = Counter()
        for row in rows[package.name]:
            identity = f"{row.module}:{row.qualname}" if row.qualname else row.module
            seen[identity] += 1
            if seen[identity] > 1:  # a property's setter, a definition in each branch of an `if`
                identity = f"{identity}~{seen[identity]}"
            if row.kind == "not_python":
                yield SetAside(identity, source, row.kind, row.text)
            else:
                meta = {"package": package.name, "kind": row.kind, "qualname": row.qualname}
                yield Document(identity, row.text, source, group=row.module, meta=meta)


def _parse(packages: Sequence[Package], workers: int) -> dict[str, list[Row]]:
    """The rows of every package. One map over all files, so that no worker waits at the end of a package."""
    files = [(package.name, module, str(path)) for package in packages for module, path in package.modules().items()]
    rows: dict[str, list[Row]] = {package.name: [] for package in packages}
    for (package, _, _), found in zip(files, map_work(parse_file, files, workers), strict=True):
        rows[package] += found
    return rows


def parse_file(file: tuple[str, str, str]) -> list[Row]:
    """The docstrings of one file (package, module, path), in the order of the text; indentation is removed."""
    _, module, path = file
    collecting = gc.isenabled()
    gc.disable()  # the tree holds no cycles, and looking for some takes half of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings
            tree = ast.parse(Path(path).read_bytes())
        return list(_docstrings(tree, module))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return [Row(module, "not_python", "", str(error))]
    finally:
        if collecting:
            gc.enable()


def _docstrings(tree: ast.Module, module: str) -> Iterator[Row]:
    if text := ast.get_docstring(tree):
        yield Row(module, "module", "", text)
    pending: list[tuple[str, ast.AST]] = [("", child) for child in reversed(tree.body)]
    while pending:
        inside, node = pending.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            qualname = inside + node.name
            is_class = isinstance(node, ast.ClassDef)
            if text := ast.get_docstring(node):
                yield Row(module, "class" if is_class else "function", qualname, text)
            children = node.body if is_class else []
            inside = f"{qualname}."
        else:
            children = [child for part in _BRANCHES for child in getattr(node, part, ())]
        pending += [(inside, child) for child in reversed(children)]


# ---------------------------------------------------------------------------------------------------- remembering --


def _remember(packages: list[Package], workers: int, home: Path, source: str) -> dict[str, list[Row]]:
    """The rows of every package, from `<home>/cache` where they were found before; only the newest of each is kept."""
    folder = home / "cache" / "python_docs"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # who comes second finds what the first has parsed
        memories = {
            package: folder / f"{package}-{digest_of([_PARSER, identity])[:16]}.jsonl"
            for package, identity in _identities(packages, home, source).items()
        }
        recalled = {package: _recall(memory) for package, memory in memories.items()}
        parsed = _parse([package for package in packages if recalled[package.name] is None], workers)
        for package, rows in parsed.items():
            for outdated in folder.glob(f"{package}-*"):
                outdated.unlink()
            temporary = memories[package].with_suffix(".new")
            temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
            sync(temporary)
            temporary.replace(memories[package])
    return {package: parsed.get(package, rows or []) for package, rows in recalled.items()}


def _recall(memory: Path) -> list[Row] | None:
    try:
        return [Row(*json.loads(line)) for line in memory.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError):
        return None
