"""What is not as it was when a record was written: files, sources, this code, its libraries, the machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.rounds import chain_of
from gptcore.artifacts import REPORT, Artifact, Recipe, Store, circumstances, differences, read_manifest, sha256_file
from gptcore.config import FilesSource, PipelineConfig
from gptcore.errors import ArtifactError, SourceError
from gptcore.record import Manifest, Record, is_imported, is_training
from gptcore.training.job import Resolved
from tasks.run import Run, Silent

_RESULTLESS = {"mlflow", "prefect"}
"""Libraries whose version cannot change a result."""


@dataclass(frozen=True)
class Change:
    """Something that is not as it was when the record was written."""

    what: str
    weight: Literal["stops", "doubt", "note"]
    """`stops`: no equal result is possible; `doubt`: bits may differ; `note`: worth knowing."""


class _Rehearsal(Run):
    """Every stage gives what the record says, so that what today's code asks of each can be compared with it."""

    def __init__(self, store: Store, record: Record) -> None:
        super().__init__(store, Silent())
        self.record = record
        self.recipes: dict[str, Recipe] = {}

    def stage(self, recipe: Recipe, *_: Any, **__: Any) -> Artifact:
        """Nothing is built."""
        self.recipes[recipe.stage] = recipe
        if recipe.stage not in self.record.manifests:
            raise ArtifactError(
                f"this version of gptcore needs {recipe.stage} to make {self.record.target}, which its record does not hold: "
                "check out the commit that the record names and try again"
            )
        digest = self.record.manifests[recipe.stage]["digest"]
        return Artifact(recipe.stage, recipe.name, self.record.folders[recipe.stage], recipe.fingerprint, digest)


def what_changed(record: Record, config: PipelineConfig, store: Store) -> list[Change]:
    """All of it, but what the trainings had decided for themselves."""
    return [*_damage(record, store), *_in_the_recipes(record, config, store), *_in_the_circumstances(record)]


def _damage(record: Record, store: Store) -> list[Change]:
    """Files that are not those that were published: of the artifact itself, and of what it went on from."""
    folder = record.folders[record.target]
    folders = [*record.given.values(), folder]
    changes = []
    if folder.is_relative_to(store.home / "cache"):
        folders.remove(folder)
        changes.append(Change("its files are not in the store any more, MLflow has the record", "note"))
    return changes + [
        Change(f"{folder / name} is not the file that was published", "note" if name.startswith(f"{REPORT}/") else "stops")
        for folder in folders
        for name, entry in read_manifest(folder)["files"].items()
        if not _is(folder / name, entry)
    ]


def _is(file: Path, entry: Mapping[str, Any]) -> bool:
    return file.is_file() and file.stat().st_size == entry["size"] and sha256_file(file) == entry["sha256"]


def _in_the_recipes(record: Record, config: PipelineConfig, store: Store) -> list[Change]:
    """Sources that changed, and stages that today's code makes another way."""
    rehearsal = _Rehearsal(store, record)
    try:
        chain_of(record, rehearsal, config).noun(record.last)
    except SourceError as error:
        where = f"; its record's paths begin in the working folder, {Path.cwd()}" if _has_relative_paths(config) else ""
        raise SourceError(f"{record.target} of {record.name} cannot be rebuilt: {error}{where}") from error
    changes: dict[str, Change] = {}
    for stage, recipe in rehearsal.recipes.items():
        manifest = record.manifests[stage]
        for text in differences(manifest, recipe):
            name = text.removeprefix("input ")
            if name in record.sources and name != text:
                when = str(manifest["built_at"])[:10]
                change = Change(f"the source {name} does not hold what it held on {when}", "stops")
            elif name != text:
                change = Change(f"{stage} was made of {name}, which this version of gptcore does not give it", "stops")
            else:
                change = Change(f"{stage}: {text}", "doubt")
            changes.setdefault(change.what, change)
    return list(changes.values())


def _has_relative_paths(config: PipelineConfig) -> bool:
    sources = [*config.corpus.sources, *(task.source for task in config.tasks)]
    paths = [Path(path).expanduser() for source in sources if isinstance(source, FilesSource) for path in source.paths]
    return not all(path.is_absolute() for path in paths)


def _in_the_circumstances(record: Record) -> list[Change]:
    """Libraries, Python, cores and commit that are not the recorded ones; each named once, with the stages it concerns."""
    stages: dict[Change, list[str]] = {}
    for stage, manifest in record.manifests.items():
        for change in _circumstances_of(manifest):
            stages.setdefault(change, []).append(stage)
    everywhere = len(record.manifests)
    return [
        change if len(named) == everywhere else Change(f"{change.what} ({', '.join(named)})", change.weight)
        for change, named in stages.items()
    ]


def _circumstances_of(manifest: Manifest) -> list[Change]:
    here = circumstances()
    then, now = manifest["libraries"], here["libraries"]
    changes = [
        Change(f"{library} {then[library]} then, {now.get(library) or 'not installed'} now", "doubt")
        for library in then
        if library not in _RESULTLESS and then[library] != now.get(library)
    ]
    for fact, was in manifest["machine"].items():
        if was != here["machine"].get(fact):
            weight: Literal["doubt", "note"] = "note" if fact == "platform" else "doubt"
            changes.append(Change(f"{fact} {was} then, {here['machine'].get(fact)} now", weight))
    if manifest["git_commit"] != here["git_commit"]:
        commits = [str(commit)[:12] if commit else "unknown" for commit in (manifest["git_commit"], here["git_commit"])]
        changes.append(Change(f"commit {commits[0]} then, {commits[1]} now", "note"))
    return changes


def recorded_answers(record: Record) -> tuple[dict[str, Resolved], list[Change]]:
    """What every recorded training had decided before its first step, as far as this machine can follow it."""
    answers: dict[str, Resolved] = {}
    changes: dict[Change, None] = {}
    for stage, manifest in record.manifests.items():
        if not is_training(stage) or is_imported(manifest):
            continue
        file = record.folders[stage] / "report" / "resolved.json"
        try:
            recorded = Resolved.model_validate_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"the record is incomplete: {file}, in which {stage} noted its steps, threads and precision, cannot be read "
                f"({str(error).splitlines()[0]}); bring it back, or train anew with gptcore run"
            ) from error
        from gptcore.training.budget import follow_here  # loads torch

        answers[stage], missing = follow_here(recorded)
        changes |= dict.fromkeys(Change(f"{stage}: {text}", "doubt") for text in missing)
    return answers, list(changes)
