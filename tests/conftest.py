"""Tiny real things that several rooms share, made once."""

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

from gptcore.config import (
    CorpusConfig,
    FilesSource,
    ModelConfig,
    ShardsConfig,
    SplitConfig,
    TokenizerConfig,
    TrainingConfig,
)

# The first example of a law may load torch, and a machine may be busy: how long one takes is no fact to be tested.
hypothesis.settings.register_profile("gptcore", deadline=None)
hypothesis.settings.load_profile("gptcore")

# Started in the background of a shell, Ctrl-C is ignored here and in every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = [
    "array",
    "value",
    "index",
    "column",
    "matrix",
    "vector",
    "sum",
    "mean",
    "float",
    "integer",
    "return",
    "given",
    "shape",
    "axis",
    "input",
    "output",
    "data",
    "frame",
    "series",
    "string",
    "number",
    "list",
    "function",
    "method",
    "class",
    "object",
    "parameter",
    "default",
    "optional",
    "file",
    "path",
    "name",
    "key",
    "order",
    "sort",
    "group",
    "split",
    "merge",
    "join",
    "plot",
    "line",
    "bar",
    "figure",
    "color",
    "label",
    "time",
    "date",
    "period",
    "frequency",
    "random",
    "seed",
    "sample",
    "test",
    "train",
    "model",
    "fit",
    "predict",
]


def write_texts(folder: Path, count: int = 400, seed: int = 0) -> Path:
    """Little files of made-up but regular prose, each different enough not to overlap with another."""
    drawn = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        lines = []
        for _ in range(drawn.randint(3, 8)):
            subject, verb, thing = (drawn.choice(WORDS) for _ in range(3))
            rest = " ".join(drawn.choices(WORDS, k=drawn.randint(3, 9)))
            lines.append(f"The {subject} {verb}s the {thing} of {rest} number {drawn.randint(0, 999)}.")
        (folder / f"text-{number:03d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Tiny:
    """A corpus, its tokenizer and its shards, as plain folders."""

    texts: Path
    corpus: Path
    tokenizer: Path
    shards: Path

    def model(self, **changes) -> ModelConfig:
        return ModelConfig(**{"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 32, **changes})

    def training(self, **changes) -> TrainingConfig:
        budget = {} if {"minutes", "tokens"} & changes.keys() else {"steps": 6}
        return TrainingConfig(
            **{
                "batch": 4,
                "threads": 1,
                "evaluations": 2,
                "evaluation_tokens": 512,
                "device": "cpu",
                **budget,
                **changes,
            }
        )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    from gptcore.corpus import build_corpus
    from gptcore.tokens import Tokenizer, encode_corpus, learn_tokenizer

    root = tmp_path_factory.mktemp("tiny")
    tiny = Tiny(write_texts(root / "texts"), root / "corpus", root / "tokenizer", root / "shards")
    for folder in (tiny.corpus, tiny.tokenizer, tiny.shards):
        folder.mkdir()
    source = FilesSource(paths=(str(tiny.texts),))
    build_corpus(tiny.corpus, CorpusConfig(sources=(source,), workers=1), SplitConfig(valid=0.1, test=0.1))
    learn_tokenizer(tiny.tokenizer, TokenizerConfig(vocabulary=400), tiny.corpus)
    encode_corpus(tiny.shards, ShardsConfig(), tiny.corpus, Tokenizer.load(tiny.tokenizer / "tokenizer"))
    return tiny


@pytest.fixture
def copy_of(tmp_path):
    """A function that copies a folder so that a test may damage it."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return copy


class MlflowServer:
    """An MLflow server with a password on loopback: one process, the one that `mlflow server --workers 1` would start."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.password = folder, secrets.token_urlsafe(16)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        (folder / "auth.ini").write_text(
            f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{folder}/auth.db\n"
            f"admin_username = gptcore\nadmin_password = {self.password}\nauth_cache_ttl_seconds = 3600\n"
        )
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.port}",
            "MLFLOW_TRACKING_USERNAME": "gptcore",
            "MLFLOW_TRACKING_PASSWORD": self.password,
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # on a busy machine an answer may take its time
        }

    def start(self) -> None:
        """Start it, on the database and the port that it had before, and wait until it answers."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        environment |= {
            "DO_NOT_TRACK": "1",
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self.password,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{self.folder}/mlflow.db",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(self.folder / "artifacts"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "_MLFLOW_SGI_NAME": "uvicorn",
        }
        command = [sys.executable, "-m", "uvicorn", "--host", "127.0.0.1", "--port", str(self.port), "--factory"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--no-access-log", "mlflow.server.auth:create_app"],
                env=environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10):
                    return
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """As kill -9, wherever it is."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def own_mlflow_server(tmp_path_factory) -> Iterator[MlflowServer]:
    """A real server that one test may kill and start again; not started yet."""
    server = MlflowServer(tmp_path_factory.mktemp("own-mlflow-server"))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def any_mlflow_server(tmp_path_factory) -> Iterator[MlflowServer]:
    """A real server for all; whoever gets it first starts it. Who wants to kill one has `own_mlflow_server`."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow-server"))
    yield server
    server.kill()
