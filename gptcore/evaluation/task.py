"""A fine-tuned model on the test rows of its task, beside what one could do without it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from numpy.typing import NDArray

from gptcore.config import EvaluationConfig
from gptcore.corpus import read_split
from gptcore.downstream import classify, summarize
from gptcore.errors import ArtifactError, CorpusError
from gptcore.evaluation import report
from gptcore.evaluation.baselines import first_sentence, majority_label, naive_bayes
from gptcore.evaluation.comparison import compare_statistics
from gptcore.evaluation.facts import model_facts
from gptcore.evaluation.intervals import Statistic, bootstrap, macro_f1_of, mean_of
from gptcore.evaluation.results import METRICS, Results, beside_model, headline, measured, write_results
from gptcore.inference import Predictor, exact_predictor

BASELINES = {"first_sentence": "first sentence", "naive_bayes": "naive Bayes", "majority_class": "majority class"}
"""Column of `predictions.parquet` -> how reports call it."""
_SHOWN_CHARACTERS = 600


@dataclass(frozen=True)
class Answers:
    """What the model and its baselines answered, a row per test row, and what follows from it."""

    rows: pandas.DataFrame
    headline: str
    metrics: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)


def evaluate_task(folder: Path, model: Path, examples: Path, config: EvaluationConfig) -> dict[str, float | int | str]:
    """Measure a task model folder on the test rows of an examples folder; fills `folder`, returns the main numbers.

    Writes `results.json`, `predictions.parquet` (a row per test row: id, input, target, output, score and the answers
    of the baselines) and `report/`. Raises `ArtifactError` when the model was fine-tuned for another type of task and
    `CorpusError` when there are no test rows.
    """
    train, test = read_split(examples, "train"), read_split(examples, "test")
    task = json.loads((examples / "task.json").read_text(encoding="utf-8"))
    if test.empty:
        raise CorpusError(f"the task {task['name']} has no test rows: raise split.test or give more rows")
    predictor = exact_predictor(model)
    trained_for = predictor.task["type"] if predictor.task else "continuing text"
    if trained_for != task["type"]:
        raise ArtifactError(f"{model} was trained for {trained_for}, not for {task['type']}: evaluate it on its task")
    with_labels = task["type"] == "classify"
    answers = _labels(predictor, train, test, config) if with_labels else _summaries(predictor, test, config)
    results: Results = {
        "kind": task["type"],
        "name": task["name"],
        "headline": answers.headline,
        "metrics": answers.metrics,
        **answers.details,
        "data": {"train": {"rows": len(train)}, "test": {"rows": len(test)}},
        "model": model_facts(predictor.loaded),
        "samples": _samples(answers.rows, config),
        "settings": config.model_dump(mode="json"),
    }
    answers.rows.to_parquet(folder / "predictions.parquet", index=False)
    write_results(folder, results)
    report.write_task_report(folder, results, answers.rows)
    return _numbers(results)


def _summaries(predictor: Predictor, test: pandas.DataFrame, config: EvaluationConfig) -> Answers:
    """Greedy summaries against the true ones; the baseline is the first sentence of the text."""
    targets = test["target"].tolist()
    outputs = {"output": predictor.predict(test["input"].tolist())}
    outputs["first_sentence"] = [first_sentence(text) for text in test["input"]]
    scores = {name: summarize.rouge_l(answers, targets) for name, answers in outputs.items()}
    rows = test[["id", "input", "target"]].assign(
        output=outputs["output"],
        score=scores["output"],
        first_sentence=outputs["first_sentence"],
        first_sentence_score=scores["first_sentence"],
    )
    statistics = {name: mean_of(values) for name, values in scores.items()}
    metrics = {"rouge_l": _beside("rouge_l", statistics, len(rows), config)}
    return Answers(rows, summarize.HEADLINE[0], metrics, {"empty_outputs": sum(not text.strip() for text in outputs["output"])})


def _labels(predictor: Predictor, train: pandas.DataFrame, test: pandas.DataFrame, config: EvaluationConfig) -> Answers:
    """The likeliest label against the true one; baselines are the most frequent label and naive Bayes on words."""
    assert predictor.task is not None
    names, targets = list(predictor.task["labels"]), test["target"].tolist()
    likelihoods = predictor.label_scores(test["input"].tolist())  # (rows, labels)
    answers = {
        "output": [names[best] for best in likelihoods.argmax(axis=1)],
        "naive_bayes": naive_bayes(train["input"].tolist(), train["target"].tolist(), test["input"].tolist()),
        "majority_class": [majority_label(train["target"].tolist())] * len(test),
    }
    labels = list(dict.fromkeys([*names, *sorted({*targets, *answers["naive_bayes"], *answers["majority_class"]})]))
    number = {label: index for index, label in enumerate(labels)}
    true = np.array([number[label] for label in targets])
    given = {name: np.array([number[label] for label in chosen]) for name, chosen in answers.items()}
    correct = {name: classify.accuracy(chosen, targets) for name, chosen in answers.items()}
    rows = test[["id", "input", "target"]].assign(
        output=answers["output"],
        score=correct["output"],
        probability=_probabilities(likelihoods).max(axis=1),
        log_likelihoods=list(likelihoods),
        naive_bayes=answers["naive_bayes"],
        majority_class=answers["majority_class"],
    )
    accuracy = {name: mean_of(right) for name, right in correct.items()}
    macro_f1 = {name: macro_f1_of(true, chosen, len(labels)) for name, chosen in given.items()}
    metrics = {
        "accuracy": _beside("accuracy", accuracy, len(rows), config),
        "macro_f1": _beside("macro_f1", macro_f1, len(rows), config),
    }
    return Answers(rows, classify.HEADLINE[0], metrics, _by_label(labels, true, given["output"]))


def _beside(metric: str, statistics: dict[str, Statistic], rows: int, config: EvaluationConfig) -> dict[str, Any]:
    """One metric of the model (`output`) with its interval, and the same of every baseline, compared row by row."""
    draws = {"resamples": config.resamples, "seed": config.seed}
    ours, baselines = statistics["output"], {}
    for name, theirs in statistics.items():
        if name == "output":
            continue
        higher = METRICS[metric].higher_is_better
        found = compare_statistics(ours, theirs, rows, higher_is_better=higher, **draws)
        baselines[BASELINES[name]] = beside_model(bootstrap(theirs, rows, **draws), found)
    return measured(bootstrap(ours, rows, **draws), baselines)


def _by_label(labels: Sequence[str], true: NDArray[np.int64], given: NDArray[np.int64]) -> dict[str, Any]:
    """The confusion matrix (a line per true label, a column per answer) and what it says about each label."""
    size = len(labels)
    counts = np.bincount(true * size + given, minlength=size * size).reshape(size, size)
    hit, wanted, answered = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    table = {
        label: {
            "rows": int(wanted[index]),
            "precision": float(hit[index] / max(1, answered[index])),
            "recall": float(hit[index] / max(1, wanted[index])),
            "f1": float(2 * hit[index] / max(1, wanted[index] + answered[index])),
        }
        for index, label in enumerate(labels)
    }
    return {"labels": table, "confusion": {"labels": list(labels), "counts": counts.tolist()}}


def _probabilities(likelihoods: NDArray[np.float64]) -> NDArray[np.float64]:
    """Likelihoods in nats (rows, labels) as probabilities among the labels."""
    shares: NDArray[np.float64] = np.exp(likelihoods - likelihoods.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares


def _samples(rows: pandas.DataFrame, config: EvaluationConfig) -> list[dict[str, Any]]:
    """Some rows as they are, drawn from the seed; long inputs are cut."""
    order = np.sort(np.random.default_rng(config.seed).permutation(len(rows))[: config.samples])
    columns = [name for name in ("input", "target", "output", "score", "first_sentence", "naive_bayes") if name in rows]
    shown = rows.iloc[order][columns].to_dict("records")
    return [{**{str(name): value for name, value in row.items()}, "input": _cut(row["input"])} for row in shown]


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"


def _numbers(results: Results) -> dict[str, float | int | str]:
    """The main numbers, flat: every metric, and every baseline as `<baseline>_<metric>`."""
    numbers: dict[str, float | int | str] = {"rows": results["data"]["test"]["rows"], "headline": headline(results)[0]}
    for metric, entry in results["metrics"].items():
        numbers[metric] = entry["value"]
        for baseline, other in entry["baselines"].items():
            numbers[f"{baseline.replace(' ', '_').lower()}_{metric}"] = other["value"]
    return numbers
