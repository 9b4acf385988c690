"""The base model on the corpus' test split: bits per byte and perplexity per source, `xz -9` beside them, samples.

Bits per byte compares models whatever their tokenizers: the bits the model spends on a text, over the UTF-8 bytes it is
long. Perplexity is per token of the model's own tokenizer and compares only models that share one. A masked model sees what
stands around a token, so its numbers have names of their own and no `xz` beside them.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from gptcore.config import EvaluationConfig
from gptcore.corpus import read_split
from gptcore.errors import CorpusError
from gptcore.evaluation import report
from gptcore.evaluation.comparison import compare
from gptcore.evaluation.facts import model_facts
from gptcore.evaluation.intervals import ratio_interval
from gptcore.evaluation.likelihood import stream_nats
from gptcore.evaluation.results import Results, beside_model, beside_number, measured, write_results
from gptcore.evaluation.xz import xz_bits_per_byte
from gptcore.inference import Predictor, exact_predictor
from gptcore.inference.predictor import MASK
from gptcore.model import LoadedModel, load_model
from gptcore.tokens.objectives import Symbols

XZ, START = "xz -9 primed", "the model it began as"
_SAMPLE_TOKENS = 64
_PROMPT_CHARACTERS = 80
_TEMPERATURE, _TOP_K = 0.8, 50
_HIDDEN = 5


def evaluate_base(
    folder: Path, model: Path, corpus: Path, config: EvaluationConfig, start: Path | None = None
) -> dict[str, float | int | str]:
    """Measure a base model folder on a corpus' test split; fills `folder` and returns the main numbers.

    Writes `results.json`, `scores.parquet` (a row per document: id, source, bytes, bits, tokens) and `report/`. `start`, the
    model folder that it was trained on from, is measured on the same documents; its bits are another column, `start_bits`.
    Raises `CorpusError` when the test split is empty.
    """
    test, train = read_split(corpus, "test"), read_split(corpus, "train")
    if test.empty:
        raise CorpusError(f"the test split of {corpus} is empty: raise split.test or give more text")
    predictor = exact_predictor(model)
    masked = predictor.loaded.model.config.objective == "masked"
    with ThreadPoolExecutor(1) as beside:
        # xz is a process of its own: it takes what the model leaves of the machine.
        pending = None if masked else beside.submit(_xz, train["text"].tolist(), test)
        scores = score_documents(predictor.loaded, test, config.batch)
        if start is not None:
            scores["start_bits"] = score_documents(load_model(start), test, config.batch)["bits"]
        samples = _fillings(predictor, test, config) if masked else _continuations(predictor, test, config)
        xz = {} if pending is None else pending.result()
    results: Results = {
        "kind": "base",
        "name": "base",
        "headline": "masked_bits_per_byte" if masked else "bits_per_byte",
        "metrics": _metrics(scores, xz.get(""), config),
        "sources": {
            source: {**_size(rows), "metrics": _metrics(rows, xz.get(str(source)), config)}
            for source, rows in scores.groupby("source", sort=True)
        },
        "data": {"train": _text_size(train), "test": _size(scores)},
        "model": model_facts(predictor.loaded),
        "samples": samples,
        "settings": config.model_dump(mode="json"),
    }
    scores.to_parquet(folder / "scores.parquet", index=False)
    write_results(folder, results)
    report.write_base_report(folder, results, scores)
    numbers: dict[str, float | int | str] = {name: metric["value"] for name, metric in results["metrics"].items()}
    return numbers | ({"xz_bits_per_byte": xz[""]} if xz else {}) | {"documents": len(scores)}


def score_documents(loaded: LoadedModel, documents: pandas.DataFrame, batch: int = 32) -> pandas.DataFrame:
    """What each document costs the model: a row with id, source, bytes, bits and tokens per row of id, source and text.

    The documents of a source are read as one stream, [begin] text [end] each, as in training, and every token is scored once
    (`gptcore.evaluation.likelihood`). Control tokens are read but neither they nor their bits are counted (nanochat's
    convention): the model is told where documents end.
    """
    tables = [_score_source(loaded, rows, batch) for _, rows in documents.groupby("source", sort=True)]
    return pandas.concat(tables, ignore_index=True)


def _score_source(loaded: LoadedModel, rows: pandas.DataFrame, batch: int) -> pandas.DataFrame:
    rows = rows.sort_values("id")
    tokenizer = loaded.tokenizer
    encoded = [tokenizer.document(ids) for ids in tokenizer.encode_batch(rows["text"].tolist())]
    stream = np.concatenate(encoded).astype(np.int64)
    owner = np.repeat(np.arange(len(rows)), [len(ids) for ids in encoded])
    counted = ~np.isin(stream, sorted(tokenizer.control_ids))
    bits = stream_nats(loaded.model, stream, Symbols.of(tokenizer), batch) / math.log(2)
    return pandas.DataFrame(
        {
            "id": rows["id"].to_numpy(),
            "source": rows["source"].to_numpy(),
            "bytes": np.array([len(text.encode()) for text in rows["text"]], dtype=np.int64),
            "bits": np.bincount(owner[counted], weights=bits[counted], minlength=len(rows)),
            "tokens": np.bincount(owner[counted], minlength=len(rows)),
        }
    )


def _metrics(scores: pandas.DataFrame, xz: float | None, config: EvaluationConfig) -> dict[str, Any]:
    """The numbers of some documents; without `xz` they are those of hidden tokens."""
    draws = {"resamples": config.resamples, "seed": config.seed}
    per_byte = ratio_interval(scores["bits"], scores["bytes"], **draws)
    per_token = ratio_interval(scores["bits"], scores["tokens"], **draws)
    perplexity = measured(per_token.transformed(lambda bits: 2.0 ** min(bits, 1000.0)))
    baselines = {}
    if "start_bits" in scores:
        before = ratio_interval(scores["start_bits"], scores["bytes"], **draws)
        change = compare(scores["bits"], scores["start_bits"], sizes=scores["bytes"], higher_is_better=False, **draws)
        baselines[START] = beside_model(before, change)
    if xz is None:
        return {"masked_bits_per_byte": measured(per_byte, baselines), "masked_perplexity": perplexity}
    baselines = {XZ: beside_number(per_byte, xz, higher_is_better=False), **baselines}
    return {"bits_per_byte": measured(per_byte, baselines), "perplexity": perplexity}


def _xz(train: list[str], test: pandas.DataFrame) -> dict[str, float]:
    """`xz -9` on all test documents, under the empty name, and on those of every source."""
    tests = {str(source): rows["text"].tolist() for source, rows in test.groupby("source", sort=True)}
    return xz_bits_per_byte(train, {"": [text for texts in tests.values() for text in texts], **tests})


def _size(scores: pandas.DataFrame) -> dict[str, int]:
    return {"documents": len(scores), "bytes": int(scores["bytes"].sum()), "tokens": int(scores["tokens"].sum())}


def _text_size(documents: pandas.DataFrame) -> dict[str, int]:
    return {"documents": len(documents), "bytes": sum(len(text.encode()) for text in documents["text"])}


def _continuations(predictor: Predictor, test: pandas.DataFrame, config: EvaluationConfig) -> list[dict[str, str]]:
    """The model's likeliest continuation of each prompt, and a drawn one."""
    prompts = list(config.prompts) or _beginnings(test, config)
    likeliest = predictor.predict(prompts, max_new_tokens=_SAMPLE_TOKENS)
    drawn = predictor.predict(prompts, max_new_tokens=_SAMPLE_TOKENS, temperature=_TEMPERATURE, top_k=_TOP_K, seed=config.seed)
    return [
        {"prompt": prompt, "likeliest": greedy, "drawn": warm}
        for prompt, greedy, warm in zip(prompts, likeliest, drawn, strict=True)
    ]


def _fillings(predictor: Predictor, test: pandas.DataFrame, config: EvaluationConfig) -> list[dict[str, str]]:
    """What a masked model makes of the prompts that hide something, or of beginnings of test documents."""
    prompts = [prompt for prompt in config.prompts if MASK in prompt]
    prompts = prompts or [hidden for text in _beginnings(test, config) if MASK in (hidden := _hidden(text))]
    return [{"prompt": prompt, "likeliest": filled} for prompt, filled in zip(prompts, predictor.predict(prompts), strict=True)]


def _hidden(text: str) -> str:
    """A text with every fifth word hidden, or every fifth character where its script has no spaces."""
    between = " " if text.count(" ") >= _HIDDEN else ""
    parts = text.split(between) if between else list(text)
    return between.join(MASK if number % _HIDDEN == _HIDDEN - 1 else part for number, part in enumerate(parts))


def _beginnings(test: pandas.DataFrame, config: EvaluationConfig) -> list[str]:
    """Beginnings of test documents, drawn from the seed."""
    order = np.random.default_rng(config.seed).permutation(len(test))[: config.samples]
    return [_beginning(text) for text in test["text"].iloc[order]]


def _beginning(text: str) -> str:
    """At most the first half of a text, cut between two words where its script has spaces."""
    flat = " ".join(text.split())
    cut = flat[: min(_PROMPT_CHARACTERS, len(flat) // 2)]
    return cut.rsplit(" ", 1)[0]
