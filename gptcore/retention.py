"""What may go: whatever is old and nothing needs. Pure decisions; who looks and who removes is `flows/operations/clean.py`.

pinned   what a version under an alias needs: its artifact, its evaluation and test set, and all that these were made of
kept     pinned; the newest artifact of every stage and name; what was built or used lately; and what all these were made of
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptcore.lineage import Node


@dataclass(frozen=True)
class Workspace:
    """The folder in which a training worked: `<fingerprint>.run/`, beside its artifact."""

    path: Path
    changed: float
    """When something in it changed last, in seconds since 1970."""


def pinned(nodes: Sequence[Node], digests: Iterable[str], paths: Iterable[Path]) -> set[str]:
    """The digests that are needed by artifacts with one of `digests` or at one of `paths`: their own, and all inputs' down."""
    places = set(paths)
    return made_of(nodes, {*digests, *(node.digest for node in nodes if node.path in places)})


def kept(nodes: Sequence[Node], pins: Iterable[str], used: Mapping[Path, float], since: float) -> set[str]:
    """The digests of all artifacts that stay. `used` says when an artifact was built or used last, in seconds since 1970."""
    newest: dict[tuple[str, str], Node] = {}
    for node in sorted(nodes, key=lambda node: node.built_at):
        newest[node.stage, node.name] = node
    young = {node.digest for node in nodes if node.path is not None and used[node.path] >= since}
    return made_of(nodes, {*pins, *young, *(node.digest for node in newest.values())})


def removable(nodes: Sequence[Node], kept: set[str]) -> list[Node]:
    """The artifacts that may go. Two with one digest stay or go together: nobody can tell which one was meant."""
    return [node for node in nodes if node.digest not in kept and node.path is not None]


def idle(workspaces: Iterable[Workspace], nodes: Sequence[Node], pins: set[str], since: float) -> dict[Workspace, str]:
    """The workspaces that may go, and why. Those of what is pinned stay whole, however old."""
    digests = {node.path: node.digest for node in nodes}
    reasons = {}
    for workspace in workspaces:
        digest = digests.get(workspace.path.with_suffix(""))
        if workspace.changed >= since or digest in pins:
            continue
        reasons[workspace] = "the training never finished" if digest is None else "the training is finished, the model stays"
    return reasons


def made_of(nodes: Sequence[Node], digests: Iterable[str]) -> set[str]:
    """`digests`, and those of all that went into them, directly or not."""
    inputs: dict[str, set[str]] = {}
    for node in nodes:
        inputs.setdefault(node.digest, set()).update(node.inputs.values())
    reached: set[str] = set()
    pending = list(digests)
    while pending:
        digest = pending.pop()
        if digest not in reached:
            reached.add(digest)
            pending += inputs.get(digest, ())
    return reached
