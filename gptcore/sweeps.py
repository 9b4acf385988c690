"""Sweeps: one pipeline's settings many times, a little different each time. `gptcore/search.py` goes through the trials.

A trial goes as far as the model it is judged by and is judged on validation text: no test set is looked at to choose.
"""

import copy
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from gptcore.config import (
    Count,
    Name,
    PipelineConfig,
    Section,
    apply_override,
    parse_config,
    read_yaml,
    set_value,
    settings_error,
)
from gptcore.errors import SettingsError

Changes = Mapping[str, Any]
"""Dotted settings -> their values in one trial."""

_MOST = 1000
"""Trials of a grid. More are a mistake more often than a wish."""
_TRIALS = 20
"""Trials of Optuna when nobody says how many."""


class Range(Section):
    """From low to high, both included. Whole numbers if low, high and step are."""

    low: int | float
    """Smallest value."""
    high: int | float
    """Largest value."""
    log: bool = False
    """Draw the logarithm evenly: for learning rates and sizes."""
    step: int | float | None = None
    """Only low, low + step, low + 2 step …"""

    @model_validator(mode="after")
    def _can_be_drawn_from(self) -> Self:
        problems = []
        if self.low >= self.high:
            problems.append(f"low ({self.low}) must be below high ({self.high})")
        if self.log and self.low <= 0:
            problems.append(f"log needs a low above zero, this one is {self.low}")
        if self.log and self.step is not None:
            problems.append("log and step exclude each other")
        if self.step is not None and self.step <= 0:
            problems.append(f"step ({self.step}) must be above zero")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def whole(self) -> bool:
        """Whether it holds whole numbers only."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 1))


Values = Annotated[tuple[Any, ...], Field(min_length=1)]
Dimension = Annotated[
    Annotated[Values, Tag("values")] | Annotated[Range, Tag("range")],
    Discriminator(lambda given: "range" if isinstance(given, Mapping | Range) else "values"),
]


class SweepConfig(Section):
    """Trials of one pipeline: the only parameter of the sweep. Checked together with the settings of its trials."""

    name: Name
    """How its folder `<home>/sweeps/<name>` and its runs are called."""
    config: PipelineConfig
    """The pipeline's settings, from which every trial differs in what `space` names."""
    space: dict[str, Dimension] = Field(min_length=1)
    """Dotted setting -> a list of values, or, for Optuna, a range such as {low: 0.001, high: 0.1, log: true}."""
    method: Literal["grid", "optuna"] = "grid"
    """`grid`: every combination of the values. `optuna`: drawn by Optuna's TPE, which learns from the trials before."""
    trials: Count | None = None
    """optuna: trials in all, those that fail included. Unset: 20, of which the first 10 are drawn at random."""
    until: str = "base"
    """How far a trial goes: `base`, or the name of a task, whose model is trained then too."""
    metric: Literal["valid_bits_per_byte", "valid_loss", "tokens_per_second"] | None = None
    """What trials are judged by, after the last step; never a test set. Unset: valid_bits_per_byte of a base, valid_loss of a
    task's model. A loss is in nats per token: it compares no two tokenizers."""
    goal: Literal["min", "max"] | None = None
    """Unset: max for tokens_per_second, else min."""
    seed: int = 0
    """optuna: another seed draws other trials."""

    @field_validator("space", mode="before")
    @classmethod
    def _with_dotted_keys(cls, space: Any) -> Any:
        if not isinstance(space, Mapping):
            return space
        flat = _dotted(space)
        for key, given in flat.items():
            if not isinstance(given, list | tuple | Mapping | Range):
                raise ValueError(f"{key} needs a list of values, or a range such as {{low: 1, high: 9}} (is {given!r})")
        return flat

    @model_validator(mode="after")
    def _every_trial_can_start(self) -> Self:
        problems = self._misfits() or (_grid_problems(self) if self.method == "grid" else _range_problems(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def number(self) -> str:
        """Which number of the model's artifact the trials are judged by."""
        return self.metric or ("valid_bits_per_byte" if self.until == "base" else "valid_loss")

    @property
    def maximise(self) -> bool:
        """Whether more is better."""
        return self.goal == "max" or (self.goal is None and self.number == "tokens_per_second")

    @property
    def count(self) -> int:
        """How many trials there are."""
        if self.method == "optuna":
            return self.trials or _TRIALS
        return math.prod(len(values) for values in self.space.values() if isinstance(values, tuple))

    def trial_config(self, changes: Changes) -> PipelineConfig:
        """The whole settings of a trial. Raises `SettingsError` for values that do not fit."""
        values = self.config.model_dump(mode="json")
        for key, value in changes.items():
            set_value(values, key, copy.deepcopy(value), f"space: {key}")
        return parse_config(values, "the trial " + words(changes))

    def _misfits(self) -> list[str]:
        """What is wrong apart from the values themselves."""
        problems = []
        tasks = [task.name for task in self.config.tasks]
        if self.until not in ("base", *tasks):
            problems.append(f"until: {self.until!r} is neither base nor a task; there are: {', '.join(tasks) or 'no tasks'}")
        if self.number == "valid_bits_per_byte" and self.until != "base":
            problems.append("metric: bits per byte are measured on a base only; use valid_loss for a task's model")
        for key, dimension in self.space.items():
            first = key.split(".")[0]
            if first in ("name", "evaluation") or (first == "tasks" and self.until == "base"):
                problems.append(f"space: {key} changes nothing in a trial that ends with {self.until}; take it out")
            if key == "model.preset":
                problems.append("space: a preset is a whole section; write `model: [{preset: gpt2}, {preset: modern-5m}]`")
            if self.method == "grid" and isinstance(dimension, Range):
                problems.append(f"space: {key} is a range, and a grid needs a list of values; write one, or method: optuna")
        if self.method == "grid" and self.trials is not None:
            problems.append("trials: a grid tries every combination; leave it out, or write method: optuna")
        if self.method == "grid" and self.count > _MOST:
            problems.append(f"space: a grid of {self.count:,} trials; take fewer values, or method: optuna with `trials`")
        return problems


def _dotted(space: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{training: {steps: [1, 2]}}` is `{training.steps: [1, 2]}`; of two that name one setting the later counts."""
    flat: dict[str, Any] = {}
    for key, value in space.items():
        nested = isinstance(value, Mapping) and value and not {"low", "high"} & value.keys()
        flat |= _dotted(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _grid_problems(sweep: SweepConfig) -> list[str]:
    """Every problem of every trial, each once; and trials that stand twice."""
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for changes in grid(sweep):
        try:
            settings = sweep.trial_config(changes).model_dump_json()
        except SettingsError as error:
            for problem in _problems(error):
                found.setdefault(problem, []).append(words(changes))
        else:
            if settings in seen:
                found.setdefault("space: a trial stands twice, take the second value out", []).append(words(changes))
            seen.add(settings)
    return [f"{text} (in {len(trials)} of {sweep.count} trials, first {trials[0]})" for text, trials in found.items()]


def _range_problems(sweep: SweepConfig) -> list[str]:
    """What is wrong with a value whatever the others are. Values that only do not fit together make a trial fail later."""
    found: dict[str, None] = {}
    for key, dimension in sweep.space.items():
        for value in (dimension.low, dimension.high) if isinstance(dimension, Range) else dimension:
            try:
                sweep.trial_config({key: value})
            except SettingsError as error:
                cause = error.__cause__
                joint = isinstance(cause, ValidationError) and all(each["type"] == "value_error" for each in cause.errors())
                found |= {} if joint else dict.fromkeys(_problems(error))
    return list(found)


def _problems(error: SettingsError) -> list[str]:
    head, *lines = str(error).splitlines()
    return [line.strip() for line in lines] or [head]


# ------------------------------------------------------------------------------------------------------- loading --


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep's YAML file and apply `key=value` overrides.

    Beside the fields of `SweepConfig` it may hold `base:`, the pipeline's settings file (a path as seen from the sweep's
    file), in place of `config:`, and `set:`, dotted settings that every trial has other than the base. Unset, `name` is the
    file's. Raises `SettingsError` that names all problems at once.
    """
    values = read_yaml(path)
    values.setdefault("name", re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-") or "sweep")
    base, fixed = values.pop("base", None), values.pop("set", None) or {}
    if base is not None:
        if "config" in values:
            raise SettingsError(f"{path} has both base and config: keep one, they are the pipeline's settings")
        values["config"] = read_yaml(path.parent / str(base))
    for override in overrides:
        apply_override(values, override)
    if not isinstance(values.get("config"), dict):
        raise SettingsError(f"{path} names no pipeline: write `base: my.yaml`, a path as seen from this file")
    if not isinstance(fixed, dict):
        raise SettingsError(f"{path}: set holds dotted settings and their values, such as {{training.steps: 100}}")
    given = [override.partition("=")[0].strip() for override in overrides]
    for key, value in fixed.items():
        if f"config.{key}" not in given:  # what is said on the command line counts
            set_value(values["config"], str(key), value, f"{path}: set: {key}")
    values["config"] = parse_config(values["config"], f"the pipeline's settings of {path}")
    try:
        return SweepConfig.model_validate(values)
    except ValidationError as error:
        raise settings_error(error, f"{path} with --set" if overrides else str(path)) from error


def settings_yaml(config: PipelineConfig, heading: str) -> str:
    """A settings file that loads as `config`, with a comment on its first lines."""
    comment = "".join(f"# {line}\n" for line in heading.splitlines())
    # Whatever may be None is None by default.
    return comment + yaml.safe_dump(
        config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True, width=120
    )


# --------------------------------------------------------------------------------------------------------- trials --


def words(changes: Changes) -> str:
    """A trial's settings in one line: `training.optimizer.rate=0.02, model.layers=4`."""
    return ", ".join(f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in changes.items())


def grid(sweep: SweepConfig) -> Iterator[dict[str, Any]]:
    """Every combination once, the last setting changing fastest."""
    values = [dimension for dimension in sweep.space.values() if isinstance(dimension, tuple)]
    for combination in itertools.product(*values):
        yield dict(zip(sweep.space, combination, strict=True))
