"""What an artifact was made of, down to the sources, and what was made of it: read from the manifests of a store."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pyarrow.lib

from gptcore.artifacts import MANIFEST, read_manifest
from gptcore.errors import ArtifactError


@dataclass(frozen=True)
class Node:
    """An artifact of the store, or an input that is none: a source, or an artifact that is gone."""

    stage: str
    name: str
    digest: str
    path: Path | None = None
    """None for what does not lie in the store."""
    built_at: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    """Name of each input -> its digest."""

    def as_row(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        path = str(self.path) if self.path else None
        return {"stage": self.stage, "name": self.name, "digest": self.digest, "path": path, "built_at": self.built_at}


class Lineage:
    """Every finished artifact of a store and who is made of whom. A digest names the content, whoever built it."""

    def __init__(self, root: Path) -> None:
        self.nodes = sorted(_read(root), key=lambda node: node.built_at)
        self._by_digest = {node.digest: node for node in self.nodes}

    def node(self, digest: str, stage: str = "") -> Node:
        """The newest artifact with this digest; without one, a node that only names it."""
        return self._by_digest.get(digest) or Node(stage, "", digest)

    def made_of(self, node: Node) -> list[Node]:
        """What went directly into an artifact."""
        return [self.node(digest, stage) for stage, digest in node.inputs.items()]

    def tree(self, node: Node, seen: set[str] | None = None) -> dict[str, Any]:
        """The artifact with everything it was made of, nested under `made_of`; what stands `above` already is not opened again.

        A model that was trained on in many rounds shares its ancestors with its ancestors: opened each time, they would double
        with every round.
        """
        seen = set() if seen is None else seen
        if node.inputs and node.digest in seen:
            return {**node.as_row(), "made_of": [], "above": True}
        seen.add(node.digest)
        return {**node.as_row(), "made_of": [self.tree(inner, seen) for inner in self.made_of(node)]}

    def dependents(self, digests: set[str]) -> list[Node]:
        """Every artifact that was made of one of `digests`, directly or not, in the order they were built."""
        reached, before = set(digests), 0
        while len(reached) > before:
            before = len(reached)
            reached |= {node.digest for node in self.nodes if reached & set(node.inputs.values())}
        return [node for node in self.nodes if reached & set(node.inputs.values())]

    def of_source(self, name: str) -> list[Node]:
        """The artifacts that read the source of this name."""
        return [node for node in self.nodes if name in node.inputs and node.inputs[name] not in self._by_digest]

    def of_document(self, identity: str) -> list[Node]:
        """The corpora and examples in which a document or row with this id stands."""
        tables = [node for node in self.nodes if node.stage.startswith(("corpus", "examples-"))]
        return [node for node in tables if node.path is not None and _holds(node.path / "data", identity)]


def _read(root: Path) -> Iterator[Node]:
    for file in root.glob(f"*/*/*/{MANIFEST}"):
        if file.parent.suffix:
            continue  # about to be published, or replaced
        try:
            manifest = read_manifest(file.parent)
            yield Node(
                manifest["stage"], manifest["name"], manifest["digest"], file.parent, manifest["built_at"], manifest["inputs"]
            )
        except (ArtifactError, KeyError):
            continue  # what cannot be read has no lineage; `verify` names it


def _holds(folder: Path, identity: str) -> bool:
    try:
        table = pyarrow.dataset.dataset(sorted(map(str, folder.rglob("*.parquet"))))
        return bool(table.count_rows(filter=pyarrow.dataset.field("id") == identity))
    except (OSError, pyarrow.lib.ArrowException):
        return False
