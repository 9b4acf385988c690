import math

import numpy as np
import pandas
import pytest
import torch

from gptcore.config import EvaluationConfig
from gptcore.corpus import read_split
from gptcore.errors import CorpusError
from gptcore.evaluation import compare_evaluations, headline, read_results
from gptcore.evaluation.base import _hidden, evaluate_base, score_documents
from gptcore.evaluation.intervals import ratio_interval
from gptcore.evaluation.likelihood import stream_nats
from gptcore.evaluation.results import headline_sentence
from gptcore.evaluation.xz import xz_bits_per_byte
from gptcore.inference.predictor import MASK
from gptcore.model import GPT, load_model
from gptcore.tokens.objectives import Symbols

SYMBOLS = Symbols(mask=0, begin=1, end=2, pad=3, control=np.arange(7), vocabulary=50)


def by_hand(model, stream):
    """Token by token: the first context as a prefix each, then windows that advance by half a context."""
    context, step = model.config.context, model.config.context // 2
    nats = [0.0]
    for t in range(1, len(stream)):
        begin = 0
        if t > context:
            window = -(-(t - context) // step)
            begin = min(context + window * step, len(stream) - 1) - context
        logits = model(torch.tensor(stream[None, begin:t]))[0, -1].double()
        nats.append(-logits.log_softmax(-1)[stream[t]].item())
    return np.array(nats)


@pytest.mark.parametrize("length", [1, 2, 9, 16, 17, 18, 24, 25, 26, 100])
@pytest.mark.parametrize("context", [15, 16])
def test_every_token_of_a_stream_is_scored_once_and_as_by_hand(tiny, length, context):
    model = GPT(tiny.model(context=context), 50).initialise(1).eval().requires_grad_(False)
    stream = np.random.default_rng(length).integers(0, 50, length)
    assert stream_nats(model, stream, SYMBOLS, batch=3) == pytest.approx(by_hand(model, stream), abs=2e-5)


def test_the_batch_changes_nothing_but_rounding(tiny):
    model = GPT(tiny.model(), 50).initialise(1).eval()
    stream = np.random.default_rng(0).integers(0, 50, 700)
    assert stream_nats(model, stream, SYMBOLS, batch=1) == pytest.approx(
        stream_nats(model, stream, SYMBOLS, batch=64), abs=1e-5
    )


def test_results_follow_from_the_scores_of_the_documents(evaluated_base, tiny):
    numbers, results = evaluated_base.numbers, read_results(evaluated_base.folder)
    scores = pandas.read_parquet(evaluated_base.folder / "scores.parquet")
    documents = pandas.read_parquet(tiny.corpus / "data" / "test.parquet")
    assert list(scores.columns) == ["id", "source", "bytes", "bits", "tokens"]
    assert dict(zip(scores["id"], scores["bytes"], strict=True)) == {
        row.id: len(row.text.encode()) for row in documents.itertuples()
    }
    found = results["metrics"]["bits_per_byte"]
    expected = ratio_interval(scores["bits"], scores["bytes"], resamples=200)
    assert (found["value"], found["low"], found["high"]) == (expected.value, expected.low, expected.high)
    assert numbers["bits_per_byte"] == pytest.approx(scores["bits"].sum() / scores["bytes"].sum())
    per_token = scores["bits"].sum() / scores["tokens"].sum()
    assert results["metrics"]["perplexity"]["value"] == pytest.approx(2**per_token)
    assert results["sources"]["files"]["metrics"] == results["metrics"]
    train = pandas.read_parquet(tiny.corpus / "data" / "train.parquet")["text"].tolist()
    xz = xz_bits_per_byte(train, {"all": documents.sort_values("id")["text"].tolist()})["all"]
    assert found["baselines"]["xz -9 primed"]["value"] == pytest.approx(xz, rel=0.01)
    assert found["baselines"]["xz -9 primed"]["verdict"] == "worse"  # an untrained model
    assert [set(sample) for sample in results["samples"]] == [{"prompt", "likeliest", "drawn"}] * 2


def test_the_same_model_and_settings_give_the_same_bytes(evaluated_base, tiny, tmp_path):
    evaluate_base(tmp_path, evaluated_base.model, tiny.corpus, evaluated_base.config)
    content = [path for path in evaluated_base.folder.iterdir() if path.is_file()]
    assert sorted(path.name for path in content) == ["results.json", "scores.parquet"]
    assert all(path.read_bytes() == (tmp_path / path.name).read_bytes() for path in content)


def test_the_report_holds_page_card_and_pictures(evaluated_base):
    report = evaluated_base.folder / "report"
    assert {path.name for path in report.iterdir()} == {"results.md", "model_card.md", "bits_per_byte.png", "documents.png"}
    assert headline_sentence(read_results(evaluated_base.folder)) in (report / "results.md").read_text(encoding="utf-8")


def test_every_source_is_scored_for_itself_whatever_its_texts_are(model_of):
    loaded = load_model(model_of())
    long = "The array index returns the mean of the series. " * 40
    documents = pandas.DataFrame(
        {
            "id": ["b", "a", "c", "a"],
            "source": ["english", "english", "chinese", "chinese"],
            "text": [long, "sum of a", "话说天下大势，分久必合，合久必分。" * 20, "滚"],
        }
    )
    scores = score_documents(loaded, documents)
    assert scores[["source", "id"]].values.tolist() == [
        ["chinese", "a"], ["chinese", "c"], ["english", "a"], ["english", "b"]
    ]  # fmt: skip
    texts = documents["text"].tolist()[::-1]
    assert scores["tokens"].tolist() == [len(loaded.tokenizer.encode(text)) for text in texts]
    assert scores["bytes"].tolist() == [3, 20 * 17 * 3, 8, len(long)]
    alone = score_documents(loaded, documents[documents["source"] == "chinese"])
    assert alone["bits"].tolist() == pytest.approx(scores["bits"][:2].tolist())


def test_a_model_that_knows_nothing_spends_the_logarithm_of_the_vocabulary_on_every_token(model_of, tiny):
    loaded = load_model(model_of(lambda model, _: model.embedding.weight.data.zero_()))
    scores = score_documents(loaded, read_split(tiny.corpus, "test"))
    assert scores["bits"].tolist() == pytest.approx((scores["tokens"] * math.log2(loaded.tokenizer.vocabulary)).tolist())


def test_two_models_compare_document_by_document(evaluated_base, model_of, tiny, tmp_path):
    config = EvaluationConfig(resamples=20, prompts=("The array", ""))
    evaluate_base(tmp_path, model_of(lambda model, _: model.embedding.weight.data.zero_()), tiny.corpus, config)
    folders = (evaluated_base.folder, tmp_path)
    values = [headline(read_results(folder))[1] for folder in folders]
    found = compare_evaluations(*folders, resamples=200)
    assert (found.a, found.b) == pytest.approx(tuple(values))
    assert found.samples == len(read_split(tiny.corpus, "test"))
    assert found.low <= values[0] - values[1] <= found.high
    assert [sample["prompt"] for sample in read_results(tmp_path)["samples"]] == ["The array", ""]


def test_an_empty_test_split_is_one_clear_sentence(model_of, tiny, copy_of, tmp_path):
    corpus = copy_of(tiny.corpus)
    path = corpus / "data" / "test.parquet"
    pandas.read_parquet(path).iloc[:0].to_parquet(path)
    with pytest.raises(CorpusError, match=r"test split of .* is empty"):
        evaluate_base(tmp_path, model_of(), corpus, EvaluationConfig())


@pytest.mark.parametrize("objective", ["masked", "prefix"])
def test_a_base_of_another_objective_is_measured_and_has_a_page(model_of, tiny, tmp_path, objective):
    config = EvaluationConfig(resamples=20, samples=2, prompts=("The array",))
    numbers = evaluate_base(tmp_path, model_of(objective=objective), tiny.corpus, config)
    results, masked = read_results(tmp_path), objective == "masked"
    assert headline(results)[0] == ("masked_bits_per_byte" if masked else "bits_per_byte")
    assert ("xz_bits_per_byte" in numbers) == (not masked)
    assert headline_sentence(results) in (tmp_path / "report" / "results.md").read_text(encoding="utf-8")
    samples = results["samples"]
    assert samples
    if masked:  # the prompt hides nothing, so beginnings of documents are shown
        assert all(MASK in sample["prompt"] and MASK not in sample["likeliest"] for sample in samples)
    else:
        assert [sample["prompt"] for sample in samples] == ["The array"]


@pytest.mark.parametrize(("text", "hidden"), [
    ("one two three four five six seven", "one two three four <|mask|> six seven"),
    ("话说天下大势分久必合", "话说天下<|mask|>势分久必<|mask|>"),
    ("滚", "滚"),
])  # fmt: skip
def test_every_fifth_word_or_character_is_hidden(text, hidden):
    assert _hidden(text) == hidden
