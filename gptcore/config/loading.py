"""From YAML and `--set` to settings, and what is wrong with them in words."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gptcore.config.pipeline import PipelineConfig
from gptcore.config.presets import preset
from gptcore.config.section import Section
from gptcore.errors import SettingsError


def load_config(path: Path | str, overrides: Sequence[str] = (), texts: Sequence[str] = ()) -> PipelineConfig:
    """Read a YAML file, put the files `texts` in place of its text, apply `section.key=value` overrides, check everything.

    A `model` section may start from a preset: `model: {preset: modern-5m, context: 512}`.
    Raises `SettingsError` that names all problems at once.
    """
    values = read_yaml(Path(path))
    if texts:
        _use_texts(values, texts)
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, f"{path} with --set" if overrides else str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The plain values of a settings file. Raises `SettingsError` when it cannot be read or holds no settings."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot read the settings {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"the settings {path} are not UTF-8 text (byte {error.start}); save them as UTF-8") from error
    try:
        values = yaml.load(text, _Loader) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path} holds no settings: expected sections such as `corpus:` and `training:`")
    return values


def parse_config(values: Mapping[str, Any], where: str = "the settings") -> PipelineConfig:
    """Check plain values, as they come from YAML or JSON. Raises `SettingsError` that names all problems at once."""
    try:
        _refuse_credentials(values, where)
        expanded = dict(values)
        if isinstance(model := expanded.get("model"), dict) and "preset" in model:
            rest = {key: value for key, value in model.items() if key != "preset"}
            expanded["model"] = {**preset(str(model["preset"])).model_dump(exclude_unset=True), **rest}
        return PipelineConfig.model_validate(expanded)
    except ValidationError as error:
        raise settings_error(error, where) from error


def settings_error(error: ValidationError, where: str) -> SettingsError:
    """All problems that pydantic found, a line each, in words for people."""
    problems = [f"  {_place(problem['loc'])}: {_say(problem)}" for problem in error.errors()]
    return SettingsError(f"{where}: {len(problems)} problem(s) in the settings\n" + "\n".join(problems))


class _Loader(yaml.SafeLoader):
    """YAML without keys that stand twice: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(problem=f"the key {twice!r} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _use_texts(values: dict[str, Any], texts: Sequence[str]) -> None:
    """Other text makes another model: with a name of its own, without tasks, prompts and a mixture that belong to the old."""
    if not all(text.strip() for text in texts):
        raise SettingsError("--text is empty: name a file or a folder, such as --text my-texts")
    first = Path(texts[0]).absolute()
    stem = re.sub(r"[^a-z0-9]+", "-", first.name.split(".")[0].lower()).strip("-") or "text"
    own = f"{stem[:51]}-gpt"
    values["name"] = own if own != values.get("name") else f"{stem[:51]}-text-gpt"  # never the name of the old text's model
    source = {"type": "files", "paths": [str(Path(text).absolute()) for text in texts]}
    corpus = values.get("corpus") or {}
    if isinstance(corpus, dict):
        values["corpus"] = {**corpus, "sources": [source]}
    for section, old in (("evaluation", "prompts"), ("training", "mixture")):
        if isinstance(part := values.get(section), dict):
            values[section] = {key: value for key, value in part.items() if key != old}
    values["tasks"] = []


_BUDGETS = ("minutes", "steps", "tokens")


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key in place; list items are addressed by number: `tasks.0.training.steps=5`."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise SettingsError(f"--set {override}: expected section.key=value, for example training.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {override}: {text!r} is not a valid value") from error
    set_value(values, key.strip(), value, f"--set {override}")


def set_value(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set one dotted key in place; list items are addressed by number. Raises `SettingsError` that begins with `where`."""
    parts = key.split(".")
    place: Any = values
    for part in parts[:-1]:
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise SettingsError(f"{where}: there are {len(place)} items, {part!r} is none of their numbers")
            place = place[int(part)]
        elif isinstance(place, dict):
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        else:
            raise SettingsError(f"{where}: {part!r} lies inside a value that has no parts")
    last = parts[-1]
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        # One budget replaces another: `--set training.steps=40` on a config that says `minutes: 3` means 40 steps.
        if last in _BUDGETS and value is not None:
            for other in _BUDGETS:
                place.pop(other, None)
        place[last] = value
    else:
        raise SettingsError(f"{where}: {last!r} cannot be set there")


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "settings"


def _say(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        known = sorted({name for section in Section.__subclasses__() for name in section.model_fields})
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
        return f"unknown setting; did you mean {near[0]}?" if near else "unknown setting"
    if problem["type"] == "missing":
        return "missing"
    text = str(problem["msg"]).removeprefix("Value error, ")
    return text if problem["type"] == "value_error" else f"{text} (is {problem.get('input')!r})"


def _refuse_credentials(value: Any, place: str) -> None:
    """A secret in the settings would travel to MLflow, Prefect and every artifact."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_credentials(inner, f"{place}: {key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_credentials(inner, place)
    elif isinstance(value, str) and re.search(r"://[^/\s]*@", value):
        raise SettingsError(f"{place} holds a URL with a user or password; put credentials into the environment instead")
