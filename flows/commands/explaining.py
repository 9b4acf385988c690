"""Looking into a model: explain."""

import hashlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import Json, Model, folder_of, open_registry, tell
from flows.lookup import registered
from gptcore.artifacts import home_folder, open_home
from gptcore.errors import GptcoreError, SettingsError, disk_full_is_clear

app = typer.Typer()


@app.command()
def explain(
    model: Model,
    text: Annotated[str | None, typer.Argument(help="The text; without it, standard input.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option(help="Read the text from this file.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="The page; one that is there is replaced.")] = Path("explain.html"),
    points: Annotated[
        int, typer.Option(help="Where gradients are taken; 1: gradient x input; 0: no attributions.", min=0, max=64)
    ] = 8,
    log: Annotated[bool, typer.Option("--log", help="Store the page in the MLflow run that made the model.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a model makes of a text, on a page: every token's probability, what it looked at, what carried it."""
    _check_page(out)
    written = _text(text, file)
    folder = folder_of(model)
    version = registered(model, open_home(home_folder()), open_registry) if log else None
    from gptcore.inference.explain import explain as explain_text
    from gptcore.inference.explain import open_model
    from gptcore.inference.explain_page import explanation_page

    loaded = open_model(folder)
    explained = explain_text(loaded, written, points=points)
    for sentence in explained.left_out:
        print(sentence, file=sys.stderr)
    _write(out, explanation_page(explained, loaded, model))
    answer = {"model": model, "page": str(out.absolute()), **explained.as_row()}
    where = f"{out}: {explained.bits:,.1f} bits for {explained.bytes:,} bytes"
    if version is not None:
        place = f"explanations/{hashlib.sha256(written.encode()).hexdigest()[:12]}"
        run_id = open_registry().attach(version, out, place)
        answer["mlflow"] = {"run_id": run_id, "artifact": f"{place}/{out.name}"}
        where += f"; stored as {place}/{out.name} in MLflow's run {run_id}"
    tell(answer, as_json, lambda: where)


def _check_page(page: Path) -> None:
    """Whether the page can be written, before any work."""
    if page.is_dir():
        raise SettingsError(f"--out {page} is a folder; give the page a name, such as {page / 'explain.html'}")
    if not page.absolute().parent.is_dir():
        raise SettingsError(f"--out {page}: there is no folder {page.parent}; make it first")


def _write(page: Path, text: str) -> None:
    with disk_full_is_clear(page.parent):
        try:
            page.write_text(text, encoding="utf-8")
        except PermissionError as error:
            raise SettingsError(f"--out {page} may not be written; give another place") from error


def _text(argument: str | None, file: Path | None) -> str:
    """The text that was given, without the end of the last line of a file or of standard input."""
    if argument is not None and file is not None:
        raise SettingsError(f"a text and --file {file} were both given; give one of them")
    if argument is not None:
        return argument
    try:
        read = sys.stdin.buffer.read() if file is None else file.read_bytes()
        return read.decode("utf-8").removesuffix("\n")
    except OSError as error:
        raise GptcoreError(f"--file {file} cannot be read ({error.strerror}); give a text file") from error
    except UnicodeDecodeError as error:
        where = "standard input" if file is None else f"--file {file}"
        raise GptcoreError(f"{where} is not UTF-8 text (byte {error.start}); convert it first") from error
