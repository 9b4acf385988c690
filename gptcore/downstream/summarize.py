"""Task `summarize`: a text -> its summary. Of a docstring the body -> the one-line summary above it (PEP 257)."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from gptcore.config import TaskConfig
from gptcore.corpus.contamination import words
from gptcore.corpus.document import Document
from gptcore.downstream.row import Found

HEADLINE = ("rouge_l", True)
"""The number that decides, and whether higher is better."""
REASONS = {
    "summary_not_one_line": "begins with a paragraph of several lines or over 200 characters, which is no summary",
    "summary_no_sentence": "begins with a line that is no sentence: a signature, a heading, a fragment",
    "body_too_short": "has under 200 characters below its summary",
    "no_answer": "has an empty summary",
}

_LONGEST_SUMMARY = 200
_SHORTEST_BODY = 200
_SHORTEST_SENTENCE = 3
_SIGNATURE = re.compile(r"\w\(.*\)\s*(->|=>|=|:|$)|->|=>|::|>>>")
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n\s*")


def find_rows(documents: Iterable[Document], _: TaskConfig) -> Found:
    """A row per document that has an answer or, without one, a summary above its body."""
    found = Found()
    for document in documents:
        if document.target is None:
            found.add(document, summary_and_body(document.text))
        elif not document.target.strip():
            found.add(document, "no_answer")
        else:
            found.add(document, (document.text.strip(), " ".join(document.target.split())))
    return found


def summary_and_body(text: str) -> tuple[str, str] | str:
    """(body, summary) of a docstring, or why it is no row: a key of `REASONS`."""
    summary, *rest = _PARAGRAPH_END.split(text.strip(), maxsplit=1)
    body = "".join(rest)
    if "\n" in summary or len(summary) > _LONGEST_SUMMARY:
        return "summary_not_one_line"
    if not summary.endswith((".", "!", "?", "。")) or len(words(summary)) < _SHORTEST_SENTENCE or _SIGNATURE.search(summary):
        return "summary_no_sentence"
    if len(body) < _SHORTEST_BODY:
        return "body_too_short"
    return body, summary


class _Words:
    """rouge-score's own words are [a-z0-9] only; these are the same in English and exist in every script."""

    def tokenize(self, text: str) -> list[str]:
        return words(text.replace("_", " "))


def rouge_l(outputs: Sequence[str], targets: Sequence[str]) -> NDArray[np.float64]:
    """ROUGE-L of every output against its target: F1 of their longest common subsequence of words, 0..1 (Lin 2004). (rows,)"""
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk, over a second

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    scores = [scorer.score(target, output)["rougeL"].fmeasure for output, target in zip(outputs, targets, strict=True)]
    return np.array(scores, np.float64)
