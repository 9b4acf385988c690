"""The results page and the model card of one evaluation, as Markdown."""

from collections.abc import Mapping
from typing import Any

from gptcore.evaluation.markdown import fenced, page, table
from gptcore.evaluation.results import METRICS, Results, headline_sentence

OURS = "this model"


def results_page(results: Results) -> str:
    """What was measured, beside what, on what and how; the one sentence that matters comes first."""
    return _base_page(results) if results["kind"] == "base" else _task_page(results)


def model_card(results: Results) -> str:
    """What somebody must know who is to use the model: what it is, how good it is, what it must not be used for."""
    data, kind = results["data"], results["kind"]
    facts = [(name, f"{value:,}" if isinstance(value, int) else value) for name, value in results["model"].items()]
    return page(
        f"# Model card: {_called(results)}",
        headline_sentence(results),
        "## What it is",
        _USES[kind],
        f"Its labels: {', '.join(f'`{label}`' for label in results['labels'])}." if kind == "classify" else "",
        table(("fact", "value"), facts),
        "## How good it is",
        _base_table(results) if kind == "base" else _task_table(results),
        f"Measured on {_size(data['test'])}; trained on {_size(data['train'])}, none of which are in the test. "
        "`results.md` says how it was measured and shows samples.",
        "## What it must not be used for",
        _LIMITS[kind],
        "## How to use it",
        _SNIPPET,
        "The weights are safetensors and the settings JSON: opening them executes nothing.",
    )


def parts_of_the_text(results: Results) -> dict[str, Mapping[str, Any]]:
    """The whole test split of a base evaluation and, where there are several, each of its sources."""
    everything = {"metrics": results["metrics"], **results["data"]["test"]}
    return {"all text": everything, **(results["sources"] if len(results["sources"]) > 1 else {})}


# ---------------------------------------------------------------------------------------------------------- base --


def _base_page(results: Results) -> str:
    return page(
        "# Results: the base model",
        headline_sentence(results),
        _base_table(results),
        "![bits per byte of the text and its sources](bits_per_byte.png)",
        "![bits per byte of each document](documents.png)",
        "## Samples",
        _SAMPLES[results["headline"]],
        *(_continuation(number, sample) for number, sample in enumerate(results["samples"], 1)),
        "## How it was measured",
        _HOW.get(results["headline"], _HOW["base"]),
        _intervals(results, "documents"),
        f"Trained on {_size(results['data']['train'])}; measured on {_size(results['data']['test'])}.",
    )


def _base_table(results: Results) -> str:
    rows = []
    columns: list[str] = []
    for name, entry in parts_of_the_text(results).items():
        row, columns = [name, f"{entry['documents']:,}"], ["source", "documents"]
        for metric, found in entry["metrics"].items():
            text = METRICS[metric].text
            bold = "**" if metric == results["headline"] else ""
            row += [f"{bold}{text(found['value'])}{bold}", _range(metric, found)]
            columns += [METRICS[metric].title, "95 % interval"]
            for baseline, other in found["baselines"].items():
                row += [text(other["value"]), other["verdict"]]
                columns += [baseline, "model is"]
        rows.append(tuple(row))
    return table(columns, rows)


def _continuation(number: int, sample: Mapping[str, str]) -> str:
    parts = [(f"**{number}. {'Beginning' if 'drawn' in sample else 'Text'}**", sample["prompt"])]
    parts += [(name, sample[name]) for name in ("likeliest", "drawn") if name in sample]
    return "\n\n".join(f"{title}\n\n{fenced(text)}" for title, text in parts)


# ---------------------------------------------------------------------------------------------------------- task --


def _task_page(results: Results) -> str:
    rows, classify = results["data"], results["kind"] == "classify"
    return page(
        f"# Results: {_called(results)}",
        headline_sentence(results),
        _task_table(results),
        "![the model beside its baselines](metrics.png)",
        "![answers by true label](confusion.png)" if classify else "",
        _label_table(results) if classify else "",
        "![distribution over the rows](rows.png)",
        "## Samples",
        *(_answered(number, sample) for number, sample in enumerate(results["samples"], 1)),
        "## How it was measured",
        _HOW[results["kind"]],
        f"{_intervals(results, 'test rows')} Model and baselines answer the same rows and are compared row by row "
        "(paired bootstrap).",
        f"Training rows: {rows['train']['rows']:,}. Test rows: {rows['test']['rows']:,}, from groups of texts that "
        "neither the base nor the task was trained on.",
    )


def _task_table(results: Results) -> str:
    rows: list[tuple[str, ...]] = []
    for name, entry in results["metrics"].items():
        text, gain = METRICS[name].text, METRICS[name].gain
        rows.append((METRICS[name].title, f"**{OURS}**", f"**{text(entry['value'])}**", _range(name, entry), "", ""))
        for baseline, other in entry["baselines"].items():
            bounds = f"{gain(other['difference_low'])} to {gain(other['difference_high'])}"
            ahead = f"{gain(other['difference'])} ({bounds})"
            rows.append(("", baseline, text(other["value"]), _range(name, other), ahead, other["verdict"]))
    columns = ("value", "95 % interval", "model minus it (95 % interval)", "model is")
    return table(("metric", "who answers", *columns), rows, numbers_from=2)


def _label_table(results: Results) -> str:
    rows = []
    for number, (label, entry) in enumerate(results["labels"].items(), 1):
        shares = (f"{entry[name]:.2f}" for name in ("precision", "recall", "f1"))
        rows.append((f"#{number}", label, f"{entry['rows']:,}", *shares))
    return table(("", "label", "test rows", "precision", "recall", "F1"), rows, numbers_from=2)


def _answered(number: int, sample: Mapping[str, Any]) -> str:
    classify = "naive_bayes" in sample
    score = ("right" if sample["score"] else "wrong") if classify else f"ROUGE-L {sample['score']:.2f}"
    baseline = ("naive Bayes", sample["naive_bayes"]) if classify else ("first sentence", sample["first_sentence"])
    answers = [("true", sample["target"]), (f"{OURS} ({score})", sample["output"].strip() or "(nothing)"), baseline]
    return f"**{number}. Text**\n\n{fenced(sample['input'])}\n\n{table(('', 'answer'), answers, numbers_from=2)}"


# --------------------------------------------------------------------------------------------------------- words --

_USES = {
    "base": "It continues text like that of its corpus, and is what task models are fine-tuned from.",
    "summarize": "It writes a short summary of a text like those it was fine-tuned on.",
    "classify": "It picks one of its labels for a text like those it was fine-tuned on: the likeliest one.",
}
_CUT = "Texts longer than its context are cut before it reads them."
_LIMITS = {
    "base": (
        "It states falsehoods fluently, answers no question reliably and knows no text but its corpus. It may repeat "
        "passages of that corpus word for word, with whatever names, claims and bias they hold."
    ),
    "summarize": (f"Its summaries may say what the text does not: a person must check each one that matters. {_CUT}"),
    "classify": (
        "It answers with one of its labels also where none fits, and its probabilities are not calibrated: it must "
        f"not decide about people. {_CUT}"
    ),
}
_HOW = {
    "base": (
        "Bits per byte are the bits the model spends on the test documents over their UTF-8 bytes, so that models "
        "with different tokenizers compare. The documents of a source are read as one stream in windows that advance "
        "by half a context; every token is scored once. Control tokens are read, not counted. Perplexity is per "
        "token of the model's own tokenizer and compares only models that share one.\n\n"
        "`xz -9` primed is what the test text adds to the compressed training text: the size of both together minus "
        "that of the training text alone, in bits per byte of test text."
    ),
    "masked_bits_per_byte": (
        "Every token is hidden once, together with every seventh beside it, and predicted from all that stands around it. "
        "Bits per byte are the bits that all of them cost over the UTF-8 bytes of the text. They compare masked models with "
        "each other, not with models that see only what stands before a token."
    ),
    "summarize": (
        "Summaries are greedy. ROUGE-L is the F-measure of the longest common subsequence of words with the true "
        "summary, averaged over the rows. `first sentence` answers with the first sentence of the text."
    ),
    "classify": (
        "The answer is the label that is likeliest as the continuation. Macro-F1 is the mean F1 over the labels of "
        "the test rows, rare and frequent ones alike. `majority class` always answers with the most frequent label of "
        "the training rows; `naive Bayes` is multinomial on word counts, learned from the same training rows."
    ),
}
_SAMPLES = {
    "bits_per_byte": "The model continues each beginning: once with its likeliest words, once with drawn ones.",
    "masked_bits_per_byte": "The model fills in what `<|mask|>` hides, with its likeliest words.",
}
_SNIPPET = """\
```python
from pathlib import Path
from gptcore.inference import Predictor

print(Predictor(Path("model")).predict(["A text of yours."]))
```"""


def _intervals(results: Results, rows: str) -> str:
    settings = results["settings"]
    return (
        f"Intervals are 95 % percentile bootstrap over {rows}: {settings['resamples']:,} resamples, seed "
        f"{settings['seed']}. The model is called better or worse only where the interval of the difference does not "
        "hold zero."
    )


def _range(metric: str, entry: Mapping[str, Any]) -> str:
    text = METRICS[metric].text
    return f"{text(entry['low'])} to {text(entry['high'])}"


def _called(results: Results) -> str:
    return "the base model" if results["kind"] == "base" else f"the task `{results['name']}`"


def _size(data: Mapping[str, int]) -> str:
    if "rows" in data:
        return f"{data['rows']:,} rows"
    return f"{data['documents']:,} documents ({data['bytes'] / 1e6:,.2f} MB)"
