"""What a model cost: seconds of every stage, and tokens, energy and attempts of its trainings; money, where there is a price.

A card tells two sums. `alone` is what this model took when everything it is made of was there: its training and evaluation.
`whole_chain` adds all that it is made of, down to the sources; it is what making the model from nothing would take, and must
not be added up over models, which share stages: a task model's holds its base's.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from gptcore.artifacts import REPORT, Artifact, Store, read_manifest
from gptcore.config import CostConfig
from gptcore.lineage import Lineage

COST = "cost.json"
"""File in the report of a training that holds its attempts."""
_STAGE = re.compile(r"corpus|tokenizer|base|start|model|(examples|shards|finetune)(-.+)?")
"""Inputs that are artifacts; all others are sources."""
_MOST = 40
"""A card is one tag in MLflow, of at most 5,000 characters: with more stages than these it tells kinds of stages."""
_NOTES = 6


@dataclass(frozen=True)
class _Stage:
    """What building one artifact took."""

    name: str
    seconds: float
    training: Mapping[str, Any] = field(default_factory=dict)
    """Its `cost.json`; empty for what is no training."""
    failed_builds: int = 0
    """Builds before it that failed or were killed, of what is no training. How long they took is not known."""


def cost_card(
    store: Store, model: Artifact, evaluation: Artifact, prices: CostConfig, known: Iterable[Artifact] = ()
) -> dict[str, Any]:
    """The card of a model as plain values, small enough for a tag.

    What it is made of is looked up among the artifacts `known`, then in the store. A reused stage counts with what building
    it took. What nothing tells is None, and `notes` say why.
    """
    own = [_stage(model.path), _stage(evaluation.path)]
    made_of, gone = _made_of(store.root, model, {artifact.digest: artifact.path for artifact in known})
    everything = [*made_of, *own]
    seconds: dict[str, float] = {}
    for stage in everything:
        name = stage.name if len(everything) <= _MOST else stage.name.partition("-")[0]
        seconds[name] = round(seconds.get(name, 0.0) + stage.seconds, 1)
    return {
        "alone": _total(own, prices),
        "whole_chain": _total(everything, prices),
        "seconds_of_stages": seconds,
        "currency": prices.currency,
        "energy_source": "; ".join(sorted({str(s.training["energy_source"]) for s in _trainings(everything, "energy_source")})),
        "notes": [note[:300] for note in _notes(everything, gone, prices)][:_NOTES],
    }


def card_rows(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A card as lines for people: what, how much. None for one of an older shape."""
    if "whole_chain" not in card:
        return []
    rows = []
    for title, key in (("this model alone", "alone"), ("with all it is made of", "whole_chain")):
        total = card[key]
        attempts = f"{total['training_attempts']} training attempt(s), {total['failed_attempts']} of them failed"
        again = f", {total['repeated_steps']:,} steps repeated ({total['repeated_tokens']:,} tokens)"
        rows.append((title, f"{duration(total['seconds'])}, {total['training_tokens']:,} training tokens"))
        spent = money(total["money"], card["currency"])
        rows.append(("", f"energy of training {energy(total['training_energy_joules'])}, money {spent}"))
        failed = f", {total['failed_builds']} failed build(s) of other stages"
        attempts += (again if total["repeated_steps"] else "") + (failed if total["failed_builds"] else "")
        rows.append(("", attempts))
    stages = ", ".join(f"{stage} {seconds:,.0f}" for stage, seconds in card["seconds_of_stages"].items())
    rows.append(("seconds of the stages", stages))
    if card["energy_source"]:
        rows.append(("energy told by", card["energy_source"]))
    return [*rows, *(("note", note) for note in card["notes"])]


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def energy(joules: float | None) -> str:
    """Joules in words."""
    if joules is None:
        return "unknown"
    return f"{joules:,.0f} J ({joules / 3.6e6:.3g} kWh)"


def money(amount: float | None, currency: str) -> str:
    """An amount in words; small ones keep two digits that say something."""
    if amount is None:
        return "unknown"
    return f"{amount:,.2f} {currency}" if amount == 0 or amount >= 1 else f"{amount:.2g} {currency}"


def _made_of(root: Path, model: Artifact, known: Mapping[str, Path]) -> tuple[list[_Stage], list[str]]:
    """The artifacts that a model is made of, each once, sources first; and the stages that are gone from the store."""
    found: list[_Stage] = []
    gone: list[str] = []
    seen: set[str] = set()
    lineage = cache(lambda: Lineage(root))  # reads every manifest of the store: only where one is not known

    def walk(inputs: Mapping[str, str]) -> None:
        for name, digest in inputs.items():
            if digest in seen or not _STAGE.fullmatch(name):
                continue
            seen.add(digest)
            path = known.get(digest) or lineage().node(digest).path
            if path is None:
                gone.append(name)
            else:
                walk(read_manifest(path)["inputs"])
                found.append(_stage(path))

    walk(model.manifest()["inputs"])
    return found, gone


def _stage(folder: Path) -> _Stage:
    manifest = read_manifest(folder)
    training = _training(folder, manifest["numbers"])
    # A manifest knows the run that finished a stage; a training may have had others before, which were killed.
    seconds = float(manifest["seconds"]) + float(training.get("seconds_of_earlier_runs", 0.0))
    failed = 0 if training else int(manifest.get("builds", 1)) - 1
    return _Stage(str(manifest["stage"]), seconds, training, failed)


def _training(folder: Path, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """`cost.json` of a training; without one, or with that of an older version, what the manifest's numbers tell."""
    try:
        told = json.loads((folder / REPORT / COST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = None
    if isinstance(told, dict) and "attempts" in told:
        return told
    if "tokens_per_second" not in numbers:
        return {}
    return {"tokens": numbers.get("tokens", 0), "energy_missing": "there is no record of its attempts"}


def _trainings(stages: Sequence[_Stage], fact: str) -> Iterator[_Stage]:
    """The trainings that tell a fact."""
    return (stage for stage in stages if stage.training.get(fact))


def _total(stages: Sequence[_Stage], prices: CostConfig) -> dict[str, Any]:
    def count(fact: str) -> int:
        return round(sum(float(stage.training[fact]) for stage in _trainings(stages, fact)))

    told = [stage.training["energy_joules"] for stage in stages if stage.training.get("energy_joules") is not None]
    seconds, joules = sum(stage.seconds for stage in stages), sum(told) if told else None
    return {
        "seconds": round(seconds, 1),
        "training_tokens": count("tokens"),
        "training_energy_joules": None if joules is None else round(joules, 1),
        "money": price(seconds, joules, prices),
        "training_attempts": count("attempts"),
        "failed_attempts": count("failed_attempts"),
        "repeated_steps": count("repeated_steps"),
        "repeated_tokens": count("repeated_tokens"),
        "failed_builds": sum(stage.failed_builds for stage in stages),
    }


def price(seconds: float, joules: float | None, prices: CostConfig) -> float | None:
    """The machine by the hour and training's electricity by the kilowatt-hour; None when there is nothing to multiply."""
    parts = []
    if prices.per_hour is not None:
        parts.append(seconds / 3600 * prices.per_hour)
    if prices.per_kwh is not None and joules is not None:
        parts.append(joules / 3.6e6 * prices.per_kwh)
    return round(sum(parts), 6) if parts else None


def _notes(stages: Sequence[_Stage], gone: Sequence[str], prices: CostConfig) -> Iterator[str]:
    """Why something is unknown, a sentence each."""
    silent: dict[str, list[str]] = {}
    for stage in _trainings(stages, "energy_missing"):
        silent.setdefault(stage.training["energy_missing"], []).append(stage.name)
    for reason, names in silent.items():
        yield f"energy not measured in {', '.join(names)}: {reason}"
    if prices.per_kwh is not None and silent:
        yield "the money is without the energy that was not measured"
    if gone:
        yield f"not counted, because gone from the store: {', '.join(sorted(set(gone)))}"
    if failed := sorted({stage.name for stage in stages if stage.failed_builds}):
        yield f"without the seconds of failed builds, which nobody knows: {', '.join(failed)}"
