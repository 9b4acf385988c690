"""Tiny models with known answers: what they say follows from their weights by hand."""

import json
from types import SimpleNamespace

import pandas
import pytest

from gptcore.config import EvaluationConfig

TOPICS = {
    "arrays": "The array has a shape and an axis. It holds numbers in a matrix of {n} columns.",
    "dates": "The date has a time zone. It holds a period and a frequency of {n} days.",
    "plots": "The figure has a color and a legend. It holds lines and labels on {n} axes.",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models lose more by waiting for a second thread than they gain."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model_of(tiny, tmp_path):
    """A function that writes a model folder; `change(model, tokenizer)` sets the weights."""

    def write(change=None, *, task=None, name="model", **settings):
        return write_model(tmp_path / name, tiny, change, task, **settings)

    return write


def write_model(folder, tiny, change=None, task=None, **settings):
    from gptcore.model import GPT, save_model
    from gptcore.tokens import Tokenizer

    tokenizer = Tokenizer.load(tiny.tokenizer / "tokenizer")
    model = GPT(tiny.model(**settings), tokenizer.vocabulary).initialise(0)
    if change is not None:
        change(model, tokenizer)
    save_model(folder, model, tiny.tokenizer / "tokenizer", task)
    return folder


@pytest.fixture(scope="module")
def evaluated_base(tiny, tmp_path_factory):
    """A base evaluation, its model (random weights) and its settings."""
    from gptcore.evaluation.base import evaluate_base

    root, config = tmp_path_factory.mktemp("evaluated"), EvaluationConfig(resamples=200, samples=2, batch=8)
    (root / "evaluation").mkdir()
    numbers = evaluate_base(root / "evaluation", write_model(root / "model", tiny), tiny.corpus, config)
    return SimpleNamespace(folder=root / "evaluation", model=root / "model", numbers=numbers, config=config)


@pytest.fixture
def model_that_says(model_of):
    """A function that writes a model whose likeliest next token is always the first of `text`, or the end."""

    def write(text, **settings):
        def change(model, tokenizer):
            # The last norm puts out its bias, whatever flows in, and the head answers it with one token.
            model.norm.weight.data.zero_()
            model.norm.bias.data.fill_(1.0)
            model.head.weight.data.zero_()
            model.head.weight.data[tokenizer.encode(text)[0] if text else tokenizer.end_id] = 1.0

        return model_of(change, norm="layer", tied=False, **settings)

    return write


@pytest.fixture
def examples_of(tmp_path):
    """A function that writes an examples folder: 30 training rows and 12 test rows, half of them of the first label."""

    def write(kind, *, texts=TOPICS, test_rows=12):
        folder, labels = tmp_path / "examples", list(texts)
        (folder / "data").mkdir(parents=True)
        for split, count in (("train", 30), ("valid", 6), ("test", test_rows)):
            chosen = [labels[0] if n % 2 else labels[n // 2 % len(labels)] for n in range(count)]
            inputs = [texts[label].format(n=n) for n, label in enumerate(chosen)]
            ids = [f"{split}-{n}" for n in range(count)]
            targets = chosen if kind == "classify" else [text.split(".")[0] for text in inputs]
            rows = {"id": ids, "input": inputs, "target": targets, "group": ids, "split": split, "meta": "{}"}
            pandas.DataFrame(rows).to_parquet(folder / "data" / f"{split}.parquet", index=False)
        (folder / "task.json").write_text(json.dumps(task_of(kind, labels)), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def task():
    """What stands in `task.json` of the examples and in the settings of the model."""
    return task_of


def task_of(kind, labels=tuple(TOPICS)):
    return {"type": kind, "name": kind, "max_new_tokens": 8} | ({"labels": list(labels)} if kind == "classify" else {})
