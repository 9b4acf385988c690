"""Task `classify`: a text -> one of the labels of the training rows. Of a docstring: which package it documents.

A docstring names its package, so these names are replaced. The same names are replaced in every text, whatever its label:
otherwise the name that is left standing would tell which one it is not.
"""

import importlib.metadata
import re
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from gptcore.config import PythonDocsSource, TaskConfig
from gptcore.corpus.document import Document
from gptcore.downstream.row import Found, Row

HEADLINE = ("accuracy", True)
"""The number that decides, and whether higher is better."""
REASONS = {
    "no_answer": "has an empty label",
    "too_short_to_tell": "has under 100 characters, too few to tell its package",
    "rare_label": "has a label rarer than min_label_share",
    "label_not_in_train": "has a label that no training row has",
}
NEUTRAL = "library"
"""Stands where a package's name stood."""

_SHORTEST_DOCSTRING = 100
_STDLIB = "stdlib"
_CHAIN = re.compile(r"(?<![\w.])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
_AS = re.compile(r"(?<=\bas )\w+")
_ALIAS = re.compile(r"\bimport\s+([A-Za-z_][\w.]*)\s+as\s+(\w+)")
_IMPORTED = re.compile(r"\bfrom\s+([A-Za-z_][\w.]*)\s+import\s+(\w+(?:[ \t]*,[ \t]*\w+)*)")


def find_rows(documents: Iterable[Document], task: TaskConfig) -> Found:
    """A row per document; its label is its answer or, of a docstring, its package."""
    found = Found()
    if not isinstance(task.source, PythonDocsSource):
        for document in documents:
            label = " ".join((document.target or "").split())
            found.add(document, (document.text.strip(), label) if label else "no_answer")
        return found
    documents = list(documents)
    mask = masking(task.source.packages, documents) if task.mask_names else str
    for document in documents:
        if len(document.text) < _SHORTEST_DOCSTRING:
            found.add(document, "too_short_to_tell")
        else:
            found.add(document, (mask(document.text.strip()), document.meta["package"]))
    return found


def frequent_labels(rows: Sequence[Row], min_share: float) -> set[str]:
    """The labels that at least `min_share` of the rows have."""
    counts = Counter(row.target for row in rows)
    return {label for label, count in counts.items() if count >= min_share * len(rows)}


# ------------------------------------------------------------------------------------------------------ masking --


def masking(packages: Sequence[str], documents: Sequence[Document]) -> Callable[[str], str]:
    """A function that replaces the names of these packages in a text.

    Replaced are the names under which they are imported and distributed, also inside longer names (`is_numpy`); the short
    names that the documents themselves import them by (`np`), where they are used as such; and in dotted names the module
    names that follow: `np.linalg.norm` and `scipy.linalg.norm` become `library.norm`.
    """
    modules = {part for document in documents for part in document.group.split(".")}
    own = {*packages, *(sys.stdlib_module_names if _STDLIB in packages else ())}
    short = _short_names(own, modules, documents)
    names = _name_pattern(packages)

    def mask_chain(match: re.Match[str]) -> str:
        parts = match.group().split(".")
        if parts[0] not in own and parts[0] not in short:
            return match.group()
        rest = parts[1:]
        while rest and rest[0] in modules:
            rest = rest[1:]
        return ".".join([NEUTRAL, *rest])

    def mask_alias(match: re.Match[str]) -> str:
        return NEUTRAL if match.group() in short else match.group()

    return lambda text: names.sub(NEUTRAL, _AS.sub(mask_alias, _CHAIN.sub(mask_chain, text)))


def _name_pattern(packages: Sequence[str]) -> re.Pattern[str]:
    """Import and distribution names in any case, with any separator, with or without a leading `py`, and not inside a word."""
    distributions = importlib.metadata.packages_distributions()
    names = {name.lower() for package in packages for name in (package, *distributions.get(package, ()))}
    flexible = [r"[-_. ]?".join(map(re.escape, re.split(r"[-_.]+", name))) for name in sorted(names, key=len, reverse=True)]
    return re.compile(rf"(?<![A-Za-z])(?i:(?:py)?(?:{'|'.join(flexible)}))(?![a-z])")


def _short_names(own: Container[str], modules: set[str], documents: Iterable[Document]) -> set[str]:
    """What the documents' own examples call packages and modules: `import numpy as np`, `from scipy import stats`."""
    names: set[str] = set()
    for document in documents:
        if "import" in document.text:
            names.update(alias for target, alias in _ALIAS.findall(document.text) if target.split(".")[0] in own)
            for target, imported in _IMPORTED.findall(document.text):
                if target.split(".")[0] in own:
                    names.update(modules.intersection(name.strip() for name in imported.split(",")))
    return names


# ------------------------------------------------------------------------------------------------------- scores --


def accuracy(outputs: Sequence[str], targets: Sequence[str]) -> NDArray[np.float64]:
    """1 where the label is right, else 0; the mean is the accuracy. (rows,)"""
    return np.array([output == target for output, target in zip(outputs, targets, strict=True)], np.float64)


def macro_f1(outputs: Sequence[str], targets: Sequence[str], labels: Sequence[str]) -> float:
    """Mean over `labels` of the F1 of each, 0..1; a label that is neither given nor answered counts as 0."""
    from sklearn.metrics import f1_score  # over a second

    return float(f1_score(list(targets), list(outputs), labels=list(labels), average="macro", zero_division=0.0))
