import numpy as np
import pandas
import pytest
from sklearn.metrics import confusion_matrix, f1_score

from gptcore.config import EvaluationConfig
from gptcore.errors import ArtifactError, CorpusError
from gptcore.evaluation import compare_evaluations, headline, read_results
from gptcore.evaluation.task import evaluate_task
from gptcore.inference import exact_predictor

CONFIG = EvaluationConfig(resamples=200, samples=3)
FILES = {"results.md", "model_card.md", "metrics.png", "rows.png"}


def evaluate(tmp_path, model, examples, config=CONFIG, name="evaluation"):
    folder = tmp_path / name
    folder.mkdir()
    numbers = evaluate_task(folder, model, examples, config)
    return numbers, read_results(folder), pandas.read_parquet(folder / "predictions.parquet"), folder


def test_labels_are_the_likeliest_ones_and_their_numbers_are_scikit_learns(model_of, examples_of, task, tmp_path):
    model, examples = model_of(task=task("classify")), examples_of("classify")
    numbers, results, rows, folder = evaluate(tmp_path, model, examples)
    labels = task("classify")["labels"]
    scores = exact_predictor(model).label_scores(rows["input"].tolist())
    assert rows["output"].tolist() == [labels[best] for best in scores.argmax(axis=1)]
    assert np.stack(rows["log_likelihoods"].tolist()) == pytest.approx(scores)
    assert headline(results) == ("accuracy", pytest.approx((rows["output"] == rows["target"]).mean()), True)
    f1 = f1_score(rows["target"], rows["output"], labels=labels, average="macro", zero_division=0.0)
    assert results["metrics"]["macro_f1"]["value"] == pytest.approx(f1)
    assert results["confusion"]["labels"] == labels
    assert results["confusion"]["counts"] == confusion_matrix(rows["target"], rows["output"], labels=labels).tolist()
    assert numbers["majority_class_accuracy"] == pytest.approx((rows["target"] == "arrays").mean())
    assert numbers["naive_bayes_accuracy"] == 1.0  # the words of each topic are its own
    assert {path.name for path in (folder / "report").iterdir()} == FILES | {"confusion.png"}


def test_a_model_that_always_says_the_majority_label_does_not_differ_from_it(model_that_says, examples_of, task, tmp_path):
    model = model_that_says("arrays", task=task("classify"))
    _, results, rows, _ = evaluate(tmp_path, model, examples_of("classify"))
    assert set(rows["output"]) == {"arrays"}
    beside = results["metrics"]["accuracy"]["baselines"]
    assert beside["majority class"]["verdict"] == "no clear difference"
    assert beside["majority class"]["difference"] == 0.0
    assert beside["naive Bayes"]["verdict"] == "worse"


def test_a_task_of_one_label_is_always_right(model_of, examples_of, task, tmp_path):
    model = model_of(task=task("classify", ["only"]))
    _, results, rows, _ = evaluate(tmp_path, model, examples_of("classify", texts={"only": "A text of {n} words."}))
    assert [entry["value"] for entry in results["metrics"].values()] == [1.0, 1.0]
    assert rows["probability"].tolist() == [1.0] * len(rows)


def test_chinese_labels_and_texts_are_evaluated(model_of, examples_of, task, tmp_path):
    texts = {"魏": "曹操领兵{n}万南下。", "蜀": "刘备入川{n}年。"}
    model = model_of(task=task("classify", list(texts)))
    numbers, results, _, folder = evaluate(tmp_path, model, examples_of("classify", texts=texts))
    assert numbers["naive_bayes_accuracy"] == 1.0
    assert list(results["labels"]) == list(texts)
    assert "| #1 | 魏 |" in (folder / "report" / "results.md").read_text(encoding="utf-8")


def test_a_true_label_that_the_model_does_not_know_counts_as_wrong(model_of, examples_of, task, tmp_path):
    model = model_of(task=task("classify", ["arrays", "dates"]))
    _, results, rows, _ = evaluate(tmp_path, model, examples_of("classify"))
    assert not rows["score"][rows["target"] == "plots"].any()
    assert results["confusion"]["labels"] == ["arrays", "dates", "plots"]


def test_summaries_are_scored_beside_the_first_sentence(model_of, examples_of, task, tmp_path):
    model = model_of(task=task("summarize"))
    numbers, results, rows, folder = evaluate(tmp_path, model, examples_of("summarize"))
    assert rows["output"].tolist() == exact_predictor(model).predict(rows["input"].tolist())
    assert headline(results) == ("rouge_l", rows["score"].mean(), True)
    assert numbers["first_sentence_rouge_l"] == 1.0  # the true summary is the first sentence here
    assert results["metrics"]["rouge_l"]["baselines"]["first sentence"]["verdict"] == "worse"
    assert {path.name for path in (folder / "report").iterdir()} == FILES
    assert len(results["samples"]) == 3


def test_empty_summaries_score_zero_and_are_counted(model_that_says, examples_of, task, tmp_path):
    model = model_that_says("", task=task("summarize"))
    numbers, results, rows, _ = evaluate(tmp_path, model, examples_of("summarize"))
    assert set(rows["output"]) == {""}
    assert numbers["rouge_l"] == 0.0
    assert results["empty_outputs"] == len(rows)


def test_texts_longer_than_the_context_are_answered(model_of, examples_of, task, tmp_path):
    texts = {name: f"The {name} of {{n}} rows. " * 60 for name in ("array", "index")}
    model = model_of(task=task("summarize"))
    _, _, rows, _ = evaluate(tmp_path, model, examples_of("summarize", texts=texts))
    assert len(rows) == 12


def test_candidate_and_champion_compare_row_by_row(model_of, model_that_says, examples_of, task, tmp_path):
    examples = examples_of("classify")
    _, one, _, folder = evaluate(tmp_path, model_that_says("arrays", task=task("classify")), examples, name="one")
    _, two, _, other = evaluate(tmp_path, model_of(task=task("classify"), name="second"), examples, name="two")
    found = compare_evaluations(folder, other)
    assert (found.a, found.b, found.samples) == (headline(one)[1], headline(two)[1], 12)


def test_evaluations_of_different_test_sets_are_not_compared(model_that_says, examples_of, task, tmp_path):
    examples = examples_of("classify")
    model = model_that_says("arrays", task=task("classify"))
    *_, folder = evaluate(tmp_path, model, examples, name="one")
    path = examples / "data" / "test.parquet"
    pandas.read_parquet(path).iloc[:-1].to_parquet(path)
    *_, other = evaluate(tmp_path, model, examples, name="two")
    with pytest.raises(ArtifactError, match="share 11 of 12 and 11 samples"):
        compare_evaluations(folder, other)


def test_a_model_of_another_task_is_refused(model_of, examples_of, task, tmp_path):
    with pytest.raises(ArtifactError, match="was trained for summarize, not for classify"):
        evaluate_task(tmp_path, model_of(task=task("summarize")), examples_of("classify"), CONFIG)
    with pytest.raises(ArtifactError, match="was trained for continuing text, not for classify"):
        evaluate_task(tmp_path, model_of(name="base"), tmp_path / "examples", CONFIG)


def test_a_task_without_test_rows_is_one_clear_sentence(model_of, examples_of, task, tmp_path):
    with pytest.raises(CorpusError, match="the task classify has no test rows"):
        evaluate_task(tmp_path, model_of(task=task("classify")), examples_of("classify", test_rows=0), CONFIG)


@pytest.mark.parametrize("kind", ["summarize", "classify"])
def test_the_same_model_and_rows_give_the_same_bytes(model_of, examples_of, task, tmp_path, kind):
    model, examples = model_of(task=task(kind)), examples_of(kind)
    *_, first = evaluate(tmp_path, model, examples, name="first")
    *_, second = evaluate(tmp_path, model, examples, name="second")
    content = [path for path in first.iterdir() if path.is_file()]
    assert sorted(path.name for path in content) == ["predictions.parquet", "results.json"]
    assert all(path.read_bytes() == (second / path.name).read_bytes() for path in content)
