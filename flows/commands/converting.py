"""Models of other formats: import, export."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import Json, Model, folder_of, tell
from gptcore.artifacts import home_folder, open_home

app = typer.Typer()


@app.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(metavar="HF_MODEL", help="A folder with a model of transformers, or its name on the hub.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the pipeline that it is to be the base of.", show_default="after the model")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a base of a model of transformers: it is trained on, fine-tuned, evaluated and registered like one of ours."""
    import sys

    from flows.terminal import Terminal
    from gptcore.artifacts import Store
    from gptcore.model.importing import find_original, name_of
    from tasks.base import import_base
    from tasks.run import Run

    home = open_home(home_folder())
    original = find_original(source, home)
    with Terminal() as terminal:
        base = import_base(Run(Store(home), terminal), name or name_of(source), original)
    numbers = base.manifest()["numbers"]
    answer = {
        "path": str(base.path),
        "digest": base.digest,
        "reused": base.reused,
        "model": original.model.model_dump(),
        **numbers,
    }
    tell(
        answer, as_json,
        lambda: f"{source}: {numbers['parameters'] / 1e6:,.1f} M parameters, {numbers['vocabulary']:,} tokens -> {base.path}\n"
        f"Train it on:          base: {{init_from: {base.path}}}\n"
        f"Or take it as it is:  base: {{import: {source}}}",
    )  # fmt: skip
    sys.stdout.flush()


@app.command()
def export(
    model: Model,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    int8: Annotated[
        bool, typer.Option(help="Weights in eight bits, for gptcore itself, instead of a folder for transformers.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a model as transformers opens it, compared with the original before it is there."""
    folder = folder_of(model)
    from gptcore.inference.export import export as convert
    from gptcore.inference.export import export_int8

    if int8:
        answer = export_int8(folder, target)
        text = '{path}: {megabytes:.1f} MB instead of {megabytes_before:.1f}\nUse it: gptcore generate {path} "…"'
    else:
        answer = {"path": str(target), **convert(folder, target, _card(folder))}
        text = (
            "{path}: a {architecture}; its logits differ by {largest_difference:.1g} at most from the model's, which reach "
            "{largest_logit:.3g}"
        )
    tell(answer, as_json, lambda: text.format(**answer))


def _card(folder: Path) -> str:
    """What the newest evaluation of the model's artifact wrote of it; nothing where there is none."""
    from gptcore.artifacts import MANIFEST, read_manifest
    from gptcore.lineage import Lineage

    if not (folder.parent / MANIFEST).is_file():
        return ""
    digest = read_manifest(folder.parent)["digest"]
    evaluations = [
        node for node in Lineage(home_folder() / "store").dependents({digest}) if node.stage.startswith("evaluation-")
    ]
    cards = [node.path / "report" / "model_card.md" for node in evaluations if digest in node.inputs.values() and node.path]
    return next((card.read_text(encoding="utf-8") for card in reversed(cards) if card.is_file()), "")
