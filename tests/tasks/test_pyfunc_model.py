import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptcore.artifacts import Recipe
from gptcore.inference import Predictor
from gptcore.model import GPT, save_model
from gptcore.tokens import Tokenizer

TEXTS = ["The array", "Return the mean of the series."]
FEW = {"max_new_tokens": 3}
DRAWN = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 7}
MORE = {**DRAWN, "min_p": 0.01, "repetition_penalty": 1.2, "stop": ["e", "a"], "samples": 2}

# What a stranger does, in a process and a folder of his own.
USE = f"""
import json, sys
import mlflow, pandas as pd
model, tokenizer = (mlflow.pyfunc.load_model(uri) for uri in sys.argv[1:])
texts, few = {TEXTS}, {FEW}
frame = pd.DataFrame({{"id": [1, 2], "text": texts}})
print(json.dumps({{
    "list": model.predict(texts, params=few),
    "frame": model.predict(frame, params=few),
    "first column": model.predict(frame[["text"]].rename(columns={{"text": "body"}}), params=few),
    "one text": model.predict(texts[0], params=few),
    "drawn": model.predict(texts, params={DRAWN}),
    "more": model.predict(texts, params={MORE}),
    "its own length": model.predict(texts),
    "ids": tokenizer.predict(texts),
    "code": sys.modules["gptcore"].__file__,
}}))
"""


@pytest.fixture
def logged(bench, tiny):
    """A small real model, registered and promoted, and its tokenizer."""
    folder = tiny.tokenizer / "tokenizer"
    torch.manual_seed(0)
    model = GPT(tiny.model(), Tokenizer.load(folder).vocabulary)
    base = bench.build(Recipe("base", "docs-gpt", 1, {}, {}), lambda to: save_model(to / "model", model, folder) or {})
    bench.build(Recipe("tokenizer", "docs-gpt", 1, {}, {}), lambda to: shutil.copytree(folder, to / "tokenizer") and {})
    bench.registry.register(bench.tracking, base, {"metrics": {}})
    bench.registry.promote("docs-gpt", 1, "the first")
    assert bench.said == []
    return bench


def test_the_champion_answers_in_another_process_and_folder_without_pickle(logged, tiny, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    tokenizer = logged.models()["docs-gpt-tokenizer"].model_id
    done = subprocess.run(
        [sys.executable, "-c", USE, "models:/docs-gpt@champion", f"models:/{tokenizer}"],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "MLFLOW_TRACKING_URI": logged.tracking.connection.uri},
        capture_output=True,
        text=True,
    )
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    said = json.loads(done.stdout)
    predictor = Predictor(logged.registry.resolve("docs-gpt@champion"))
    few = predictor.predict(TEXTS, **FEW)
    assert said["list"] == said["frame"] == said["first column"] == few
    assert said["one text"] == few[:1]
    assert said["drawn"] == predictor.predict(TEXTS, **DRAWN) != few
    assert said["more"] == predictor.predict(TEXTS, **{**MORE, "stop": ("e", "a")})
    assert len(said["more"]) == 4
    assert not any("e" in text or "a" in text for text in said["more"])
    assert said["its own length"] == predictor.predict(TEXTS)
    assert said["ids"] == Tokenizer.load(tiny.tokenizer / "tokenizer").encode_batch(TEXTS)
    assert Path(said["code"]).is_relative_to(logged.home / "mlartifacts"), "its own code, not what happens to be installed"


def test_a_logged_model_holds_code_safetensors_and_pinned_requirements_and_no_pickle(logged):
    place = Path(logged.models()["docs-gpt"].artifact_location.removeprefix("file://"))
    files = {str(file.relative_to(place)) for file in place.rglob("*") if file.is_file()}
    assert {"artifacts/model/model.safetensors", "artifacts/model/model.json", "pyfunc_model.py", "MLmodel"} <= files
    assert "code/gptcore/model/transformer.py" in files
    assert not [file for file in files if file.endswith((".pkl", ".pickle", ".pt", ".bin", ".pyc"))]
    requirements = (place / "requirements.txt").read_text().splitlines()
    assert f"torch=={torch.__version__.partition('+')[0]}" in requirements
    assert all("==" in line for line in requirements)
