"""What MLflow keeps of a model, and how it answers: a model from code, weights in safetensors, no pickle.

A copy of this file lies in every logged model, with gptcore beside it, and is run by `mlflow.pyfunc.load_model`:

    model = mlflow.pyfunc.load_model("models:/docs-gpt@champion")
    model.predict(["Return the"], params={"max_new_tokens": 20, "temperature": 0.7, "seed": 1})

A model folder answers with texts, a tokenizer folder with lists of token ids.
"""

import importlib.metadata
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array

Kind = Literal["model", "tokenizer"]

# What gptcore needs to open and use a folder of either kind, by distribution name.
_NEEDS: dict[Kind, tuple[str, ...]] = {
    "tokenizer": ("mlflow", "filelock", "numpy", "pandas", "pydantic", "pyyaml", "sentencepiece"),
    "model": (
        "mlflow",
        "filelock",
        "numpy",
        "pandas",
        "pydantic",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "torch",
    ),
}
_PARAMETERS = ParamSchema(
    [
        ParamSpec("max_new_tokens", DataType.long, 0),  # 0: what the model was made for
        ParamSpec("temperature", DataType.double, 0.0),  # 0: always the likeliest token
        ParamSpec("top_k", DataType.long, 0),  # 0: every token may be drawn
        ParamSpec("top_p", DataType.double, 1.0),  # 1: every token may be drawn
        ParamSpec("min_p", DataType.double, 0.0),  # 0: every token may be drawn
        ParamSpec("repetition_penalty", DataType.double, 1.0),  # 1: what was said may be said again
        ParamSpec("stop", DataType.string, [], (-1,)),  # texts that end an answer
        ParamSpec("samples", DataType.long, 1),  # so many answers to the first text, then to the second, …
        ParamSpec("seed", DataType.long, 0),
    ]
)


class TextModel(PythonModel):
    """Texts in, one answer each out, or as many as `samples` says, in their order."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the folder that was logged; torch comes in here, and for models only."""
        if "tokenizer" in context.artifacts:
            from gptcore.tokens import Tokenizer

            self._answer: Any = Tokenizer.load(Path(context.artifacts["tokenizer"])).encode_batch
        else:
            from gptcore.inference import Predictor

            self._answer = Predictor(Path(context.artifacts["model"])).predict

    # A list comes too. MLflow knows no hint for "either" and warns in red of every hint that it does not know.
    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[Any]:  # noqa: ARG002
        """Answer a text, a list of texts or a frame: its column `text`, else its first column."""
        texts: Any = model_input
        if isinstance(texts, pd.DataFrame):
            texts = texts["text" if "text" in texts else texts.columns[0]]
        texts = [texts] if isinstance(texts, str) else [str(text) for text in texts]
        wanted = dict(params or {})
        if "max_new_tokens" in wanted:
            wanted["max_new_tokens"] = wanted["max_new_tokens"] or None
        if "stop" in wanted:
            wanted["stop"] = tuple(wanted["stop"])
        answers: list[Any] = self._answer(texts, **wanted)
        return answers


# Run by MLflow from the copy in a logged model; when our own code imports this file, it only fills a variable of MLflow's.
mlflow.models.set_model(TextModel())


def upload_model(client: MlflowClient, model: LoggedModel, kind: Kind, source: Path, scratch: Path) -> None:
    """Give a LoggedModel its files: the folder `source`, our code and what it needs. Nothing is loaded, torch neither."""
    card = Model(
        artifact_path=model.artifact_location,
        model_uuid=model.model_id,
        model_id=model.model_id,
        run_id=model.source_run_id,
    )
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        save_model(Path(folder) / "model", kind, source, card)
        client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))


def save_model(destination: Path, kind: Kind, source: Path, card: Model) -> None:
    """Write an MLflow model of the folder `source` to the new folder `destination`.

    The signature names no inputs on purpose: with them MLflow would make a frame of every list, and drop all columns of a
    frame but the first.
    """
    import gptcore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "no input example": running one would load the model
        mlflow.pyfunc.save_model(
            path=str(destination),
            python_model=__file__,
            artifacts={kind: str(source)},
            code_paths=[str(Path(gptcore.__file__).parent)],
            pip_requirements=_requirements(kind),
            signature=ModelSignature(
                outputs=Schema([ColSpec(DataType.string if kind == "model" else Array(DataType.long))]),
                params=_PARAMETERS if kind == "model" else None,  # type: ignore[arg-type]  # None is its default
            ),
            mlflow_model=card,
        )
    for cache in list(destination.rglob("__pycache__")):
        shutil.rmtree(cache)


def _requirements(kind: Kind) -> list[str]:
    """Pinned to what is installed; a local part such as torch's `+cpu` exists in no package index."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _NEEDS[kind]]
