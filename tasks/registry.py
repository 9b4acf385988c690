"""Registered models: names, versions, aliases. A version carries its evidence; a change of champion cannot be half done.

    <name>          versions of the base              champion    what everybody uses
    <name>-<task>   versions of a task's model        previous    the champion before it
                                                      challenger  the newest that was not better

Loading an MLflow model executes code that lies in it, so nothing here does: a reference is resolved to a folder of settings,
weights and tokenizer, in the store or downloaded and checked, and gptcore opens it.
"""

import contextlib
import getpass
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from gptcore.artifacts import Artifact, digest_of, sha256_file, verify
from gptcore.errors import ArtifactError, CorruptArtifactError, GptcoreError, ModelNotFoundError, RegistryError, SettingsError
from tasks.breaker import root_cause
from tasks.tracking import Connection, Tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
_HISTORY = "gptcore.history."
_DELETED = "gptcore.deleted."
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"
"""Sorts as text, and says that it is UTC."""
_REFERENCE = re.compile(r"(?P<name>[^@/]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))?")
_RETRY = 5.0
"""Seconds between two tries to register."""
# Anything else may pass: a server that is down or restarts, a database that is locked.
_FINAL = {"INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED", "ENDPOINT_NOT_FOUND", "FEATURE_DISABLED"}


@dataclass(frozen=True)
class Version:
    """A registered version of a model."""

    name: str
    version: int
    aliases: tuple[str, ...]
    digest: str
    """Of the artifact it was made from."""
    metrics: Mapping[str, float]
    path: Path
    """Where the artifact lay when it was registered."""
    run_id: str | None
    """MLflow's run that built it."""
    created: datetime
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """What it was registered with beside its metrics: verdict, cost, the parents' digests."""

    def as_row(self) -> dict[str, Any]:
        """All of it as plain values, for a table or JSON."""
        return {
            "name": self.name,
            "version": self.version,
            "aliases": list(self.aliases),
            "digest": self.digest,
            "created": self.created.isoformat(sep=" ", timespec="minutes"),
            "metrics": dict(self.metrics),
            "path": str(self.path),
            "mlflow_run_id": self.run_id,
            **self.evidence,
        }


def registered_name(artifact: Artifact) -> str:
    """The name under which the model of a base or fine-tuning artifact is registered."""
    return artifact.name if artifact.stage == "base" else f"{artifact.name}-{artifact.stage.removeprefix('finetune-')}"


def registry_patience() -> float:
    """Seconds for which a registry that cannot be reached is waited for: `GPTCORE_REGISTRY_PATIENCE`, or 120."""
    text = os.environ.get("GPTCORE_REGISTRY_PATIENCE") or "120"
    with contextlib.suppress(ValueError):
        if math.isfinite(seconds := float(text)) and seconds >= 0:
            return seconds
    raise SettingsError(f"GPTCORE_REGISTRY_PATIENCE is {text!r}, but it is a number of seconds, such as 120")


class Registry:
    """The model registry of a home. `say` hears what is worth a line."""

    def __init__(self, home: Path, say: Callable[[str], None] = lambda _: None) -> None:
        self.home = home
        self.connection = Connection(home)
        self._say = say

    # -------------------------------------------------------------------------------------------------- register --

    def register(self, tracking: Tracking, artifact: Artifact, evidence: Mapping[str, Any]) -> Version:
        """Register the model of an artifact; the version it has already, unchanged, if its digest is known.

        `evidence` has `metrics` (name -> number) and whatever else speaks for it, such as `cost`. A registry
        that cannot be reached is waited for (`patience`), then `RegistryError` is raised.
        """
        patience = registry_patience()
        deadline = time.monotonic() + patience
        told = False
        while True:
            try:
                return self._register(tracking, artifact, evidence)
            except GptcoreError:
                raise
            except Exception as error:  # as in Breaker: no list is complete
                if getattr(error, "error_code", None) in _FINAL:
                    raise self._refused(error) from error
                if time.monotonic() + _RETRY > deadline:
                    raise RegistryError(
                        f"{registered_name(artifact)} could not be registered at {self.connection.address} within "
                        f"{patience:.0f} seconds ({root_cause(error)}); everything is kept and the next gptcore run "
                        "will only register"
                    ) from error
                if not told:
                    self._say(f"waiting up to {patience:.0f} seconds for the registry at {self.connection.address}")
                    told = True
                time.sleep(_RETRY)

    def _register(self, tracking: Tracking, artifact: Artifact, evidence: Mapping[str, Any]) -> Version:
        name, client = registered_name(artifact), self.connection.client
        model_id = tracking.ship_model(artifact)
        with self._lock(name):
            if self._find(name) is None:
                client.create_registered_model(name, tags={"gptcore.stage": artifact.stage})
            for known in self._versions(name):
                if known.digest == artifact.digest:
                    return known
            manifest = artifact.manifest()
            tags = {
                "gptcore.digest": artifact.digest,
                "gptcore.artifact": str(artifact.path),
                "gptcore.model_digest": model_digest(manifest),
                "gptcore.parents": json.dumps(manifest["inputs"]),
                **{f"gptcore.{key}": _text(value) for key, value in evidence.items()},
            }
            run_id = client.get_logged_model(model_id).source_run_id
            with self.connection.as_global():
                made = client.create_model_version(
                    name, f"models:/{model_id}", run_id=run_id, tags=tags, model_id=model_id, await_creation_for=0
                )
            client.set_logged_model_tags(
                model_id, {"mlflow.modelVersions": json.dumps([{"name": name, "version": int(made.version)}])}
            )
            return next(version for version in self._versions(name) if version.version == int(made.version))

    # --------------------------------------------------------------------------------------------------- promote --

    def promote(self, name: str, version: int, reason: str, *, forced: bool = False) -> Version:
        """Make a version the champion and the champion before it `previous`; `reason` stays in the history.

        The intent is written first, so that a change that is cut short is completed by the next command.
        """
        with self._reached(), self._lock(name):
            self._settle(name)
            return self._promote(name, version, reason, forced=forced)

    def rollback(self, name: str, reason: str) -> Version:
        """Make the champion before this one champion again, whatever its numbers; `reason` stays in the history.

        The champion that was becomes `previous`, so a second rollback takes the first one back.
        """
        with self._reached(), self._lock(name):
            self._known(name)
            self._settle(name)
            before = self._aliases(name).get(PREVIOUS)
            if before is None:
                raise RegistryError(f"{name} never had another champion, so there is nothing to roll back to")
            return self._promote(name, before, reason, forced=True)

    def _promote(self, name: str, version: int, reason: str, *, forced: bool) -> Version:
        self._require(name, version)
        before = self._aliases(name).get(CHAMPION)
        if before != version:
            entry = {"from": before, "to": version, "reason": reason, "forced": forced, "user": _user()}
            key = _HISTORY + datetime.now(UTC).strftime(_TIME)
            self._note(name, key, entry, done=False)
            self._change(name, key, entry)
        return self._require(name, version)

    def challenge(self, name: str, version: int, verdict: str = "not better than the champion") -> Version:
        """Let a version that was not better be known as the challenger."""
        with self._reached(), self._lock(name):
            self._require(name, version)
            self._judge(name, version, verdict)
            self.connection.client.set_registered_model_alias(name, CHALLENGER, str(version))
            return self._require(name, version)

    def delete(self, name: str, version: int) -> Version:
        """Take a version out of the registry; who did it and when stays on the name. Refused while an alias points to it.

        MLflow's run, its model and their files stay; so does the artifact, which the next run that makes it registers anew.
        """
        with self._reached(), self._lock(name):
            self._known(name)
            self._settle(name)
            found = self._require(name, version)
            if found.aliases:
                ways = {
                    CHAMPION: f"promote another version, or: gptcore rollback {name}",
                    PREVIOUS: "it stays until another version becomes champion",
                    CHALLENGER: "it stays until it is promoted or another version is judged",
                }
                known = [ways[alias] for alias in found.aliases if alias in ways]
                what = "; ".join(known) or "take the alias away in MLflow first"
                raise RegistryError(f"{name}/{version} is {' and '.join(found.aliases)} and is not deleted: {what}")
            client = self.connection.client
            note = {"time": datetime.now(UTC).strftime(_TIME), "user": _user(), "digest": found.digest}
            client.set_registered_model_tag(name, f"{_DELETED}{version}", json.dumps(note))
            client.delete_model_version(name, str(version))
            return found

    def complete_unfinished(self, name: str) -> list[str]:
        """Finish a change of champion that was cut short, and notice one that was made elsewhere; what was done, in words."""
        with self._reached(), self._lock(name):
            return self._settle(name) if self._find(name) is not None else []

    def history(self, name: str) -> list[dict[str, Any]]:
        """Every change of champion, oldest first: `time`, `from`, `to`, `reason`, `forced`, `user`, `done`.

        One that was cut short is completed before, and has `completed`, the time of that; one made elsewhere is noted.
        """
        with self._reached(), self._lock(name):
            self._known(name)
            self._settle(name)
            return [{"time": key.removeprefix(_HISTORY), **entry} for key, entry in self._history(name).items()]

    def champion_at(self, name: str, moment: datetime) -> int | None:
        """The version that was champion at a moment, as far as the history knows; None before the first."""
        until = moment.astimezone(UTC).strftime(_TIME)
        real = [entry for entry in self.history(name) if not entry.get("abandoned")]
        changes = [entry for entry in real if entry.get("completed", entry["time"]) <= until]
        return changes[-1]["to"] if changes else None

    def _judge(self, name: str, version: int, verdict: str) -> None:
        self.connection.client.set_model_version_tag(name, str(version), "gptcore.verdict", verdict)

    def _change(self, name: str, key: str, entry: dict[str, Any]) -> None:
        client = self.connection.client
        if entry["from"] in self._numbers(name):  # it may have been deleted since
            client.set_registered_model_alias(name, PREVIOUS, str(entry["from"]))
        elif self._aliases(name).get(PREVIOUS) == entry["to"]:
            client.delete_registered_model_alias(name, PREVIOUS)
        client.set_registered_model_alias(name, CHAMPION, str(entry["to"]))
        if self._aliases(name).get(CHALLENGER) == entry["to"]:
            client.delete_registered_model_alias(name, CHALLENGER)
        self._judge(name, entry["to"], f"forced: {entry['reason']}" if entry["forced"] else entry["reason"])
        self._note(name, key, entry, done=True)

    def _settle(self, name: str) -> list[str]:
        said = []
        champion, last = self._aliases(name).get(CHAMPION), None
        for key, entry in self._history(name).items():
            if not entry["done"] and champion in (entry["from"], entry["to"]) and entry["to"] in self._numbers(name):
                if champion == entry["from"]:
                    entry["completed"] = datetime.now(UTC).strftime(_TIME)
                self._change(name, key, entry)
                champion = entry["to"]
                said.append(f"{name}: completed the change of champion to version {champion} that was cut short")
            elif not entry["done"]:
                self._note(name, key, {**entry, "abandoned": True}, done=True)
                continue
            last = entry["to"]
        if self._history(name) and champion != last:
            said.append(f"{name}: the champion was changed elsewhere, from version {last} to {champion or 'none'}")
            entry = {"from": last, "to": champion, "reason": "changed elsewhere", "forced": False, "user": None}
            self._note(name, _HISTORY + datetime.now(UTC).strftime(_TIME), entry, done=True)
        for sentence in said:
            self._say(sentence)
        return said

    def _note(self, name: str, key: str, entry: Mapping[str, Any], *, done: bool) -> None:
        self.connection.client.set_registered_model_tag(name, key, json.dumps({**entry, "done": done}))

    def _history(self, name: str) -> dict[str, dict[str, Any]]:
        model = self._find(name)
        tags = model.tags if model is not None else {}
        return {key: json.loads(tags[key]) for key in sorted(tags) if key.startswith(_HISTORY)}

    # ---------------------------------------------------------------------------------------------------- look up --

    def names(self) -> list[str]:
        """All registered names."""
        with self._reached():
            return sorted(str(model.name) for model in self._pages(self.connection.client.search_registered_models))

    def versions(self, name: str) -> list[Version]:
        """All versions of a name, oldest first; none for an unknown name."""
        with self._reached():
            return self._versions(name) if self._find(name) is not None else []

    def all_versions(self) -> list[Version]:
        """Every version of every name, newest first."""
        found = [version for name in self.names() for version in self.versions(name)]
        return sorted(found, key=lambda version: version.created, reverse=True)

    def champion(self, name: str) -> Version | None:
        """The version that everybody uses, if one was promoted."""
        return next((version for version in self.versions(name) if CHAMPION in version.aliases), None)

    def find(self, reference: str) -> Version:
        """The version behind `name` (its champion), `name@alias` or `name/3`. Raises `ModelNotFoundError`, listing them all."""
        match = _REFERENCE.fullmatch(reference)
        versions = self.versions(match["name"]) if match else []
        for version in versions:
            if match and match["version"] is not None and version.version == int(match["version"]):
                return version
            if match and match["version"] is None and (match["alias"] or CHAMPION) in version.aliases:
                return version
        known = [f"{v.name}/{v.version}" + "".join(f" @{alias}" for alias in v.aliases) for v in self.all_versions()]
        raise ModelNotFoundError(
            f"there is no model {reference!r}; there are: {', '.join(known)}"
            if known
            else f"there is no model {reference!r}, and none is registered yet; make one with: gptcore run"
        )

    def resolve(self, reference: str) -> Path:
        """The model folder behind a reference: in the store if it is there unchanged, else downloaded and checked.

        Raises `ModelNotFoundError`, `RegistryError`, or `CorruptArtifactError` when the download is not what was registered.
        """
        version = self.find(reference)
        if not version.digest:
            raise ModelNotFoundError(
                f"{version.name}/{version.version} was not registered by gptcore, which cannot open it; use another version"
            )
        with contextlib.suppress(ArtifactError):
            artifact = verify(version.path)  # one that is damaged is fetched anew
            if artifact.digest == version.digest:
                return artifact.path / "model"
        return self._download(version)

    def check_served(self, version: Version) -> None:
        """Compare the files that MLflow serves for a version with those that were registered.

        Raises `CorruptArtifactError` when they differ and `RegistryError` when they cannot be fetched.
        """
        shutil.rmtree(self._cached(version), ignore_errors=True)  # what was fetched before says nothing about now
        self._download(version)
        shutil.rmtree(self._cached(version))

    def attach(self, version: Version, file: Path, folder: str) -> str:
        """Store a file among the artifacts of the run that made a version, in `folder` there; returns the run's id.

        Raises `RegistryError` when MLflow cannot be reached or has that run no more.
        """
        with self._reached():
            if version.run_id is None or not self.connection.exists(version.run_id):
                raise RegistryError(
                    f"the run that made {version.name}/{version.version} is no longer in MLflow; {file} is kept"
                )
            self.connection.client.log_artifact(version.run_id, str(file), folder)
            return version.run_id

    def _cached(self, version: Version) -> Path:
        return self.home / "cache" / "models" / f"{version.name}-{version.version}-{version.digest[:12]}"

    def _download(self, version: Version) -> Path:
        folder = self._cached(version)
        if folder.is_dir() and _digest_of_files(folder / "model") == version.evidence.get("model_digest"):
            return folder / "model"
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with self._reached(), FileLock(folder.with_suffix(".lock")):
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            import mlflow.artifacts

            place = self.connection.client.get_model_version_download_uri(version.name, str(version.version))
            loaded = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{place.rstrip('/')}/artifacts/model", dst_path=str(partial), tracking_uri=self.connection.uri
            )
            if _digest_of_files(Path(loaded)) != version.evidence.get("model_digest"):
                shutil.rmtree(partial)
                raise CorruptArtifactError(
                    f"the files of {version.name}/{version.version} at {place} are not those that were registered; "
                    "train it again with gptcore run, or use another version"
                )
            partial.rename(folder)
        return folder / "model"

    # ----------------------------------------------------------------------------------------------------- basics --

    def _find(self, name: str) -> "RegisteredModel | None":
        return self.connection.find(self.connection.client.get_registered_model, name)

    def _known(self, name: str) -> None:
        if self._find(name) is None:
            raise ModelNotFoundError(f"there is no model {name!r}; there are: {', '.join(self.names()) or 'none yet'}")

    def _aliases(self, name: str) -> dict[str, int]:
        model = self._find(name)
        return {alias: int(version) for alias, version in model.aliases.items()} if model is not None else {}

    def _versions(self, name: str) -> list[Version]:
        search, aliases = self.connection.client.search_model_versions, self._aliases(name)
        found = [_version(made, aliases) for made in self._pages(search, filter_string=f"name = '{name}'")]
        return sorted(found, key=lambda version: version.version)

    def _numbers(self, name: str) -> list[int]:
        return [version.version for version in self._versions(name)]

    def _require(self, name: str, version: int) -> Version:
        for known in self._versions(name):
            if known.version == version:
                return known
        model = self._find(name)
        note = json.loads(model.tags.get(f"{_DELETED}{version}", "null")) if model is not None else None
        gone = f" (deleted on {note['time'][:10]} by {note['user'] or 'somebody'})" if note else ""
        raise ModelNotFoundError(
            f"{name} has no version {version}{gone}; "
            f"it has: {', '.join(str(v.version) for v in self._versions(name)) or 'none'}"
        )

    def _pages(self, search: Callable[..., Any], **what: Any) -> Iterator[Any]:
        token = None
        while True:
            page = search(**what, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _lock(self, name: str) -> FileLock:
        folder = self.home / "locks"
        folder.mkdir(exist_ok=True)
        return FileLock(folder / f"registry-{name}.lock")

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except GptcoreError:
            raise
        except Exception as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> RegistryError:
        if getattr(error, "error_code", None) in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            return RegistryError(
                f"the model registry at {self.connection.address} does not let you do this; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD to a user who may"
            )
        return RegistryError(
            f"the model registry at {self.connection.address} refused or cannot be reached ({root_cause(error)}); "
            "check MLFLOW_TRACKING_URI and that its server runs, then try again"
        )


def model_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 over the files of an artifact's model folder, as its manifest lists them."""
    files = manifest["files"].items()
    return digest_of({name.removeprefix("model/"): entry["sha256"] for name, entry in files if name.startswith("model/")})


def _digest_of_files(folder: Path) -> str:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return digest_of({str(file.relative_to(folder)): sha256_file(file) for file in files})


def _version(made: "ModelVersion", aliases: Mapping[str, int]) -> Version:
    tags = {key.removeprefix("gptcore."): value for key, value in made.tags.items() if key.startswith("gptcore.")}
    digest, path, metrics = tags.pop("digest", ""), tags.pop("artifact", ""), json.loads(tags.pop("metrics", "{}"))
    number = int(made.version)
    return Version(
        name=made.name,
        version=number,
        aliases=tuple(sorted(alias for alias, version in aliases.items() if version == number)),
        digest=digest,
        metrics=metrics,
        path=Path(path),
        run_id=made.run_id or None,
        created=datetime.fromtimestamp(made.creation_timestamp / 1000, UTC),
        evidence={key: _value(value) for key, value in tags.items()},
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _value(text: str) -> Any:
    try:
        return json.loads(text) if text.startswith(("{", "[")) else text
    except ValueError:
        return text


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None
