"""What several commands share: their arguments, the settings they read, the way they answer."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gptcore.artifacts import home_folder, open_home
from gptcore.config import PipelineConfig, load_config
from gptcore.errors import SettingsError

Config = Annotated[Path | None, typer.Argument(help="Settings (YAML); default: the quickstart.", show_default=False)]
Text = Annotated[list[str] | None, typer.Option(help="Use these files or folders as the text.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value", show_default=False)]
Rebuild = Annotated[list[str] | None, typer.Option(help="Build this stage although it is there.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Name = Annotated[str, typer.Argument(help="A registered name, without version or alias.")]
Model = Annotated[str, typer.Argument(help="name@alias, name/version, a stage, or the path of an artifact or checkpoint.")]
Registered = Annotated[str, typer.Argument(metavar="MODEL", help="name@alias or name/version.")]
Seed = Annotated[int, typer.Option(help="Another seed draws another text.")]


def tell(answer: Any, as_json: bool, for_people: Callable[[], Any]) -> None:
    """Print the answer of a command: one line of JSON, or a sentence or table for people."""
    from flows.terminal import Terminal

    shown = json.dumps(answer, ensure_ascii=False) if as_json else for_people()
    if isinstance(shown, str):
        print(shown)
    else:
        Terminal(sys.stdout).console.print(shown)


def read_settings(config: Path | None, text: list[str] | None, overrides: list[str] | None) -> PipelineConfig:
    """The settings that a command line asks for: a file, or the quickstart, with other text and other values."""
    if text and config is not None and config.suffix.lower() not in (".yaml", ".yml"):
        raise SettingsError(
            f"{config} is no settings file; --text takes one path, so repeat it: --text {text[0]} --text {config}"
        )
    if config is not None and config.is_dir():
        raise SettingsError(f"{config} is a folder, not a settings file; to use what lies in it as the text: --text {config}")
    for path in text or ():
        if path.strip() and not any(mark in path for mark in "*?[") and not Path(path).expanduser().exists():
            raise SettingsError(f"--text {path}: there is no such file or folder in {Path.cwd()}")
    return load_config(config or quickstart(), overrides or (), text or ())


def quickstart() -> Path:
    """The default settings: in the wheel inside `flows`, in a checkout under deployments/."""
    flows = Path(__file__).parents[1]
    packed = flows / "configs" / "quickstart.yaml"
    return packed if packed.exists() else flows.parent / "deployments" / "configs" / "quickstart.yaml"


def check_stages(settings: PipelineConfig, rebuild: list[str]) -> None:
    """Refuse to rebuild what is no stage of these settings."""
    tasks = [task.name for task in settings.tasks]
    before = ["start" if settings.base.init_from else "tokenizer", "shards"] if settings.base.import_from is None else []
    known = ["corpus", *before, "base", "evaluation-base"]
    known += [f"{stage}-{task}" for task in tasks for stage in ("examples", "shards", "finetune", "evaluation")]
    if unknown := [stage for stage in rebuild if stage not in known]:
        raise SettingsError(f"--rebuild {unknown[0]}: no such stage; there are {', '.join(known)}")


def open_registry() -> Any:
    """The registry of the home; imports mlflow."""
    from flows.operations.server import set_default_environment

    set_default_environment()
    from tasks.registry import Registry

    return Registry(open_home(home_folder()), lambda text: print(text, file=sys.stderr))


def folder_of(model: str) -> Path:
    """The model folder behind what a person typed."""
    from flows.lookup import model_folder

    return model_folder(model, open_home(home_folder()), open_registry)
