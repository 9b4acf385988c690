"""Artifacts: a readable address, a proven identity. Build or reuse, under a lock, published atomically.

    <home>/store/<stage>/<name>/<fingerprint[:12]>/              a finished artifact; `artifact.json` was written last
    <home>/store/<stage>/<name>/<fingerprint[:12]>.partial/      being built; swept when its builder is gone
    <home>/store/<stage>/<name>/<fingerprint[:12]>.run/          the workspace of a resumable stage: journal, checkpoints
    <home>/locks/<stage>-<name>-<fingerprint[:12]>.begun         a byte for every build since the last one that was published

Fingerprint = the recipe: stage, its version, its settings, its inputs' digests.
Digest = the result: the content of the files. What is for people (plots, timings) lies in `report/` and stays out of it,
so that two runs that reach the same bits have the same digest.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gptcore.errors import ArtifactError, CorruptArtifactError, disk_full_is_clear, is_disk_full

SCHEMA = 1
MANIFEST = "artifact.json"
REPORT = "report"
_LIBRARIES = ("torch", "numpy", "pandas", "pyarrow", "datasets", "sentencepiece", "safetensors", "mlflow", "prefect")

Numbers = Mapping[str, float | int | str]
Migration = Callable[[Path], None]

MIGRATIONS: Mapping[int, Migration] = {}
"""Schema -> what brings a home from it to the next one. It may be called again on a home in which it was killed."""


@dataclass(frozen=True)
class Recipe:
    """What a stage is asked to make. Two equal recipes have one fingerprint and one address."""

    stage: str
    name: str
    version: int
    """Raised when the stage's output changes meaning."""
    settings: Mapping[str, Any]
    """Only what can change the result."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Name of each input -> its digest."""

    @property
    def fingerprint(self) -> str:
        """sha256 over stage, version, settings and the inputs' digests. The name is an address, not a part of the result."""
        return digest_of({"stage": self.stage, "version": self.version, "settings": self.settings, "inputs": self.inputs})


@dataclass(frozen=True)
class Artifact:
    """A finished noun of the chain: where it is, what it is and a few numbers."""

    stage: str
    name: str
    path: Path
    fingerprint: str
    digest: str
    numbers: Numbers = field(default_factory=dict)
    seconds: float = 0.0
    """How long building took."""
    reused: bool = False
    """Whether this run found it finished."""

    def manifest(self) -> dict[str, Any]:
        """The whole `artifact.json`: settings, inputs, files, when, on what."""
        return read_manifest(self.path)


@dataclass(frozen=True)
class Decision:
    """Whether a stage is reused or built, and why."""

    action: str
    """`reuse`, `resume` or `build`."""
    reason: str


class Store:
    """The artifacts of one home. Thin on purpose: a remote store would replace only this class."""

    def __init__(self, home: Path) -> None:
        self.home = open_home(home)
        self.root = self.home / "store"
        self._verified: set[Path] = set()

    def address(self, recipe: Recipe) -> Path:
        """Where the artifact of this recipe is or will be."""
        return self.root / recipe.stage / recipe.name / recipe.fingerprint[:12]

    def workspace(self, recipe: Recipe) -> Path:
        """The folder that a resumable stage keeps between runs, beside its artifact."""
        return self.address(recipe).with_name(recipe.fingerprint[:12] + ".run")

    def find(self, recipe: Recipe) -> Artifact | None:
        """The finished artifact, its files' sizes checked. Raises `CorruptArtifactError` naming the first wrong file."""
        path = self.address(recipe)
        if not (path / MANIFEST).is_file():
            return None
        return replace(load_artifact(path), reused=True)

    def verify_once(self, artifact: Artifact) -> None:
        """Compare every file with its sha256 the first time this process uses the artifact.

        A model that was fetched from a registry has no manifest; it was compared with its registered digest then.
        """
        if artifact.path not in self._verified and (artifact.path / MANIFEST).exists():
            verify(artifact.path)
            self._verified.add(artifact.path)

    def build(self, recipe: Recipe, make: Callable[[Path], Numbers], *, force: bool = False) -> Artifact:
        """Return the artifact of `recipe`; if it is not there, let `make(folder)` fill a folder and publish it.

        Of two runs that want the same artifact one builds, the other waits and reuses.
        Raises `DiskFullError` when space runs out; what was published before is untouched.
        """
        address = self.address(recipe)
        with disk_full_is_clear(self.home), self.lock(recipe):
            if not force and (found := self.find(recipe)) is not None:
                return found
            partial = address.with_name(address.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)  # a killed builder's; its lock is ours now
            self._sweep(address.parent)
            partial.mkdir(parents=True)
            started, begun = time.monotonic(), Path(self.lock(recipe).lock_file).with_suffix(".begun")
            with begun.open("ab") as file:  # before anything can fail or be killed
                file.write(b".")
            try:
                numbers = make(partial)
                _write_manifest(partial, recipe, numbers, time.monotonic() - started, begun.stat().st_size)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            publish(partial, address)
            begun.unlink(missing_ok=True)
            self._verified.add(address)
            return load_artifact(address)

    def explain(self, recipe: Recipe) -> Decision:
        """Say whether `recipe` would be reused or built, and what differs from the newest artifact of that name."""
        if (self.address(recipe) / MANIFEST).is_file():
            return Decision("reuse", "nothing changed")
        newest = self.newest(recipe.stage, recipe.name)
        why = "never built" if newest is None else "changed: " + "; ".join(differences(newest, recipe))
        if any((self.workspace(recipe) / "checkpoints").glob("step-*")):
            return Decision("resume", f"{why}; unfinished, continues from its last checkpoint")
        return Decision("build", why)

    def newest(self, stage: str, name: str) -> dict[str, Any] | None:
        """The manifest of the artifact of that name that was built last."""
        manifests = [read_manifest(path.parent) for path in (self.root / stage / name).glob(f"*/{MANIFEST}")]
        return max(manifests, key=lambda manifest: str(manifest["built_at"]), default=None)

    def note_use(self, artifact: Artifact) -> bool:
        """Remember that a run uses it now, so that it does not count as old; whether it is still there."""
        try:
            os.utime(artifact.path / MANIFEST)
        except FileNotFoundError:
            return False
        except OSError:  # a store that may only be read: nobody removes anything there either
            return True
        return True

    def lock(self, recipe: Recipe) -> FileLock:
        """One builder per address; the lock dies with its process."""
        return self.lock_at(self.address(recipe))

    def lock_at(self, address: Path) -> FileLock:
        """The lock of the artifact that is or will be at `address`."""
        folder = self.home / "locks"
        folder.mkdir(exist_ok=True)
        return FileLock(folder / f"{address.parent.parent.name}-{address.parent.name}-{address.name}.lock")

    def _sweep(self, folder: Path) -> None:
        """Remove what killed builders left, except where one is at work right now."""
        for partial in folder.glob("*.partial"):
            try:
                with self.lock_at(partial.with_suffix("")).acquire(timeout=0):
                    shutil.rmtree(partial)
            except Timeout:
                continue


# ------------------------------------------------------------------------------------------------------- loading --


def load_artifact(path: Path) -> Artifact:
    """Open a finished artifact; sizes are checked always. Raises `ArtifactError` or `CorruptArtifactError`."""
    manifest = read_manifest(path)
    for relative, entry in manifest["files"].items():
        file = path / relative
        size = file.stat().st_size if file.is_file() else None
        if size != entry["size"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {entry['size']}"
            raise CorruptArtifactError(f"{file} {found}; rebuild it with: gptcore run --rebuild {manifest['stage']}")
    return Artifact(
        stage=manifest["stage"],
        name=manifest["name"],
        path=path,
        fingerprint=manifest["fingerprint"],
        digest=manifest["digest"],
        numbers=manifest["numbers"],
        seconds=manifest["seconds"],
    )


def verify(path: Path) -> Artifact:
    """Open a finished artifact and compare every file with its sha256."""
    artifact = load_artifact(path)
    manifest = artifact.manifest()
    for relative, entry in manifest["files"].items():
        if sha256_file(path / relative) != entry["sha256"]:
            raise CorruptArtifactError(
                f"{path / relative} is not the file that was published (its sha256 differs); "
                f"rebuild it with: gptcore run --rebuild {artifact.stage}"
            )
    return artifact


def read_manifest(path: Path) -> dict[str, Any]:
    """`artifact.json` of a folder. Raises `ArtifactError` when there is none or it cannot be read."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is not a finished artifact: it has no {MANIFEST}") from None
    except ValueError as error:
        raise CorruptArtifactError(f"{path / MANIFEST} cannot be read ({error}); delete {path} and run again") from error
    if manifest.get("schema", SCHEMA) > SCHEMA:
        raise ArtifactError(
            f"{path} was written in schema {manifest['schema']}, this gptcore reads schema {SCHEMA}; use a newer gptcore"
        )
    return manifest


# ------------------------------------------------------------------------------------------------------- hashing --


def digest_of(value: Any) -> str:
    """sha256 of a plain value in canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's content, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------- publishing --


def publish(partial: Path, address: Path) -> None:
    """Move a finished folder to its address so that it is there whole or not at all, also after a power cut."""
    for file in sorted(partial.rglob("*")):
        sync(file)
    sync(partial)
    replaced = address.with_name(address.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if address.exists():
        address.rename(replaced)
    partial.rename(address)
    sync(address.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")  # two processes may open a new home at once
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(temporary)
    temporary.replace(path)


def _write_manifest(folder: Path, recipe: Recipe, numbers: Numbers, seconds: float, builds: int) -> None:
    files = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    manifest = {
        "schema": SCHEMA,
        "stage": recipe.stage,
        "name": recipe.name,
        "version": recipe.version,
        "fingerprint": recipe.fingerprint,
        "digest": content_digest(files),
        "settings": recipe.settings,
        "inputs": recipe.inputs,
        "numbers": numbers,
        "files": files,
        "built_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "seconds": round(seconds, 3),
        "builds": builds,  # more than one: those before it failed or were killed
        **circumstances(),
    }
    write_json(folder / MANIFEST, manifest)


def content_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The digest of an artifact from the `files` of its manifest; `report/` stays out of it."""
    return digest_of({name: entry["sha256"] for name, entry in files.items() if not name.startswith(f"{REPORT}/")})


def circumstances() -> dict[str, Any]:
    """What a manifest says about where it was built: git_commit, machine, libraries."""
    return {
        "git_commit": _git_commit(),
        "machine": {"python": platform.python_version(), "platform": platform.platform(), "cores": os.cpu_count()},
        "libraries": _libraries(),
    }


@cache
def _git_commit() -> str | None:
    """Commit of the code that built the artifact, when it runs from a checkout."""
    result = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None


@cache
def _libraries() -> dict[str, str]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


# ---------------------------------------------------------------------------------------------------- explaining --


def differences(manifest: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """What differs between an artifact and a recipe: its stage's version, settings, inputs."""
    changes = []
    if manifest["version"] != recipe.version:
        changes.append(f"stage version {manifest['version']} -> {recipe.version}")
    old, new = _flat(manifest["settings"]), _flat(json.loads(json.dumps(recipe.settings)))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            changes.append(f"{key}: {old.get(key)} -> {new.get(key)}")
    inputs = manifest["inputs"].keys() | recipe.inputs.keys()
    return changes + [f"input {key}" for key in sorted(inputs) if manifest["inputs"].get(key) != recipe.inputs.get(key)]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}
    if isinstance(value, list) and value:
        return {k: v for index, inner in enumerate(value) for k, v in _flat(inner, f"{prefix}{index}.").items()}
    return {prefix.removesuffix("."): value}


# ---------------------------------------------------------------------------------------------------------- home --


def _say(text: str) -> None:
    print(f"gptcore: {text}", file=sys.stderr)


def home_folder() -> Path:
    """`GPTCORE_HOME`, or `.gptcore` in the working folder; always absolute."""
    return Path(os.environ.get("GPTCORE_HOME") or ".gptcore").absolute()


def open_home(
    home: Path, schema: int = SCHEMA, migrations: Mapping[int, Migration] = MIGRATIONS, say: Callable[[str], None] = _say
) -> Path:
    """Create the home (mode 0700), or bring an older one up to `schema`, saying so. Raises `ArtifactError` for any other."""
    home = home.absolute()
    with disk_full_is_clear(home):
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (home / "schema").exists():
                write_json(home / "schema", schema)
            if _schema_of(home) != schema:
                _migrate(home, schema, migrations, say)
        except OSError as error:
            if is_disk_full(error):
                raise
            raise ArtifactError(f"cannot use {home} as gptcore's home: {error.strerror}; set GPTCORE_HOME") from error
    return home


def _migrate(home: Path, schema: int, migrations: Mapping[int, Migration], say: Callable[[str], None]) -> None:
    """One step after the other; a step that is killed is done again, so each must allow that."""
    with FileLock(home / "schema.lock"):
        found = _schema_of(home)  # another process may have been first
        if not isinstance(found, int) or found > schema or any(step not in migrations for step in range(found, schema)):
            newer = isinstance(found, int) and found > schema
            raise ArtifactError(
                f"{home} was written in schema {found}, this gptcore reads schema {schema}; "
                f"{'use a newer gptcore, or ' if newer else ''}set GPTCORE_HOME to a new folder"
            )
        for step in range(found, schema):
            say(f"{home} is brought from schema {step} to {step + 1}")
            migrations[step](home)
            write_json(home / "schema", step + 1)


def _schema_of(home: Path) -> Any:
    try:
        return json.loads((home / "schema").read_text())
    except ValueError:
        return None
