"""`gptcore clean`: what of a home may go, told first and removed on demand. Why something stays is `gptcore/retention.py`.

Removing is a rename into `.removed/` beside it, then a deletion: killed in between, nothing is half there, and the next clean
sweeps the rest. Whatever a run is building right now is locked and left alone; what it uses counts as used since it began.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from gptcore.artifacts import MANIFEST, Store
from gptcore.errors import ArtifactError, RegistryError, is_disk_full
from gptcore.lineage import Lineage, Node
from gptcore.retention import Workspace, idle, kept, pinned, removable
from gptcore.room import freed_by, last_change, size_of
from tasks.active import active_runs
from tasks.ledger import Record
from tasks.registry import Registry, Version

DAY = 86_400.0
REMOVED = ".removed"
_LEFT_ALONE = DAY
"""Seconds without a change after which what a command left in `scratch/` belongs to nobody any more."""


@dataclass(frozen=True)
class Removal:
    """One thing that may go."""

    path: Path
    what: str
    """artifact, checkpoints, leftover or download."""
    label: str
    """stage/name/fingerprint, or where it lies in the home."""
    why: str
    changed: float
    """When it was used or changed last, in seconds since 1970."""
    size: int
    """Bytes of its files."""
    address: Path | None = None
    """The artifact's address whose lock guards it."""

    def as_row(self, now: float) -> dict[str, Any]:
        """Plain values, for a table or JSON."""
        days = round(max(0.0, now - self.changed) / DAY, 1)
        return {
            "what": self.what, "label": self.label, "bytes": self.size, "age_days": days, "why": self.why,
            "path": str(self.path),
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What may go from a home, and what the rest is there for."""

    removals: list[Removal]
    artifacts: int
    """Artifacts that stay."""
    pinned: int
    """Those of them that a version under an alias needs."""

    @property
    def frees(self) -> int:
        """Bytes that removing all of it gives back."""
        return freed_by(removal.path for removal in self.removals)


def plan_clean(store: Store, registry: Registry, keep_days: float) -> Plan:
    """Look, and touch nothing. Raises `RegistryError` when the aliases cannot be known."""
    since = time.time() - keep_days * DAY
    # What a run that lives has used since it began stays, and so does what that was made of.
    since = min([since, *(run.started - 60 for run in active_runs(store.home))])
    nodes = Lineage(store.root).nodes
    versions = _versions(registry, nodes)
    pins = _pins(registry, versions, nodes)
    used = {node.path: last_use for node in nodes if node.path and (last_use := _used(node.path)) is not None}
    nodes = [node for node in nodes if node.path in used]
    stay = kept(nodes, pins, used, since)
    names = {version.digest: f"{version.name}/{version.version}" for version in versions}
    found = [_artifact(node, used[node.path], names) for node in removable(nodes, stay) if node.path is not None]
    gone = {removal.path for removal in found}
    found += _workspaces(store, nodes, pins, gone, since)
    found += [*_leftovers(store), *_downloads(store.home, since)]
    idle_ones = [removal for removal in found if not _in_use(store, removal)]
    return Plan(idle_ones, len(nodes) - len(gone), sum(node.digest in pins for node in nodes))


def apply(store: Store, plan: Plan) -> list[Removal]:
    """Remove what was planned; what somebody took into use meanwhile stays. Returns what is gone."""
    return [removal for removal in plan.removals if _remove(store, removal)]


@contextlib.contextmanager
def upkeep(home: Path) -> Iterator[None]:
    """Only one clean or backup of a home at a time. Raises `ArtifactError` while another one is at work."""
    handle = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the folder itself: a full disk has no room for another file
        except BlockingIOError:
            raise ArtifactError(f"another gptcore clean or backup is at work in {home}; wait until it is done") from None
        yield
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------------- looking --


def _versions(registry: Registry, nodes: list[Node]) -> list[Version]:
    """Every registered version. Raises `RegistryError` where that would be a guess."""
    if nodes and registry.connection.is_private and not (registry.home / "mlflow.db").exists():
        raise RegistryError(
            f"{registry.home} has artifacts but no mlflow.db, so nobody knows which models are in use and nothing is removed; "
            "bring mlflow.db back, or set MLFLOW_TRACKING_URI if another MLflow was used"
        )
    try:
        return registry.all_versions()
    except RegistryError as error:
        raise RegistryError(f"nothing is removed, because the aliases cannot be known: {error}") from error


def _pins(registry: Registry, versions: list[Version], nodes: list[Node]) -> set[str]:
    """The digests that versions under an alias need, and those that went to an MLflow whose aliases are not known here."""
    used = [version for version in versions if version.aliases]
    named = (version.evidence.get(key) for version in used for key in ("evaluation", "test_set"))
    records = [record for path in (registry.home / "tracking").glob("*/*/*.json") if (record := Record.load(path))]
    elsewhere = {record.digest for record in records if record.digest and record.uri != registry.connection.address}
    return pinned(nodes, {version.digest for version in used} | elsewhere, [Path(str(place)) for place in named if place])


def _artifact(node: Node, used: float, names: dict[str, str]) -> Removal:
    assert node.path is not None
    registered = f"{names[node.digest]} stays in MLflow" if node.digest in names else "no alias needs it"
    why = f"{registered}, newer ones are there, not used lately"
    return Removal(node.path, "artifact", _label(node.path), why, used, size_of(node.path), node.path)


def _workspaces(store: Store, nodes: list[Node], pins: set[str], gone: set[Path], since: float) -> list[Removal]:
    found = [Workspace(path, last_change(path)) for path in store.root.glob("*/*/*.run")]
    reasons = idle(found, nodes, pins, since)
    removals = []
    for workspace in found:
        address = workspace.path.with_suffix("")
        why = "its artifact goes" if address in gone else reasons.get(workspace)
        if why is not None:
            label = f"{_label(address)}, checkpoints"
            size = size_of(workspace.path)
            removals.append(Removal(workspace.path, "checkpoints", label, why, workspace.changed, size, address))
    return removals


def _leftovers(store: Store) -> list[Removal]:
    """What killed builders, publishers and cleaners left in the store, and killed commands in `scratch/`."""
    removals = []
    for kind, why in (("partial", "its builder was killed"), ("replaced", "it was built anew")):
        for path in store.root.glob(f"*/*/*.{kind}"):
            address = path.with_suffix("")
            if kind == "partial" or (address / MANIFEST).exists():  # else a kill came between the two renames
                removals.append(_leftover(path, f"{_label(address)}, {kind}", why, address))
    for path in store.root.glob("*/*/*"):
        if path.suffix == "" and not path.name.startswith(".") and path.is_dir() and not (path / MANIFEST).exists():
            removals.append(_leftover(path, _label(path), "an earlier clean was killed", path))
    trash = [*store.root.glob(f"*/*/{REMOVED}/*"), *store.home.glob(f"cache/*/{REMOVED}/*"), *store.home.glob(f"*/{REMOVED}/*")]
    removals += [_leftover(path, str(path.relative_to(store.home)), "an earlier clean was killed") for path in trash]
    for path in store.home.glob("scratch/*"):
        if path.name != REMOVED and time.time() - last_change(path) > _LEFT_ALONE:
            removals.append(_leftover(path, str(path.relative_to(store.home)), "its command was killed"))
    return removals


def _downloads(home: Path, since: float) -> list[Removal]:
    """Copies that can be had again: models fetched from the registry, model folders made of checkpoints."""
    removals = []
    for kind, why in (("models", "fetched again when it is needed"), ("checkpoints", "made again when it is needed")):
        for path in (home / "cache" / kind).glob("*"):
            changed = last_change(path)
            if path.is_dir() and path.name != REMOVED and changed < since:
                removals.append(Removal(path, "download", str(path.relative_to(home)), why, changed, size_of(path)))
    return removals


def _leftover(path: Path, label: str, why: str, address: Path | None = None) -> Removal:
    return Removal(path, "leftover", label, why, last_change(path), size_of(path), address)


def _label(address: Path) -> str:
    return "/".join(address.parts[-3:])


def _used(path: Path) -> float | None:
    """When an artifact was built or used last; None if it is gone by now."""
    try:
        return (path / MANIFEST).stat().st_mtime
    except FileNotFoundError:
        return None


def _in_use(store: Store, removal: Removal) -> bool:
    """Whether somebody builds or trains at its address right now."""
    if removal.address is None:
        return False
    try:
        with store.lock_at(removal.address).acquire(timeout=0):
            return False
    except Timeout:
        return True


# ------------------------------------------------------------------------------------------------------ removing --


def _remove(store: Store, removal: Removal) -> bool:
    if removal.address is None:
        return _discard(removal)
    lock = store.lock_at(removal.address)
    try:
        with lock.acquire(timeout=0):
            done = _discard(removal)
            if done and removal.what == "artifact":
                Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it notices and takes a new one
            return done
    except Timeout:
        return False


def _discard(removal: Removal) -> bool:
    """Out of the way with one rename, then deleted; put back if a run has begun to use it since it was looked at."""
    path = removal.path
    aside = path.parent / REMOVED / f"{path.name}-{time.time_ns()}"
    try:
        if path.parent.name == REMOVED:
            aside = path
        else:
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
    except FileNotFoundError:
        return False
    except OSError as error:
        if not is_disk_full(error):
            raise
        # Not even room for a folder: without its manifest it is no artifact any more, and the next clean finds the rest.
        (path / MANIFEST).unlink(missing_ok=True)
        aside = path
    if aside != path and removal.what == "artifact" and _used(aside) != removal.changed:
        aside.rename(path)
        return False
    _delete(aside)
    if aside.parent.name == REMOVED:
        with contextlib.suppress(OSError):
            aside.parent.rmdir()
    return not path.exists()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
