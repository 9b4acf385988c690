"""What a number must beat to mean something: the cheapest thing one could do instead of using the model."""

import re
from collections import Counter
from collections.abc import Sequence

from gptcore.corpus.contamination import words

# A sentence ends at a full stop before a space and a new beginning, at a CJK full stop, or with its paragraph.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[^a-z\s])|(?<=[。！？])[」』”’）]*|\n\s*\n")


def first_sentence(text: str) -> str:
    """The first sentence of a text, on one line: a summary that costs nothing."""
    begin = text.strip()
    found = _SENTENCE_END.search(begin)
    return " ".join((begin[: found.end()] if found else begin).split())


def majority_label(labels: Sequence[str]) -> str:
    """The label most rows have; of equally frequent ones the first in order."""
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


def naive_bayes(inputs: Sequence[str], labels: Sequence[str], tests: Sequence[str]) -> list[str]:
    """Labels of `tests` by multinomial naive Bayes on word counts, Laplace-smoothed, learned from the training rows."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    counter = CountVectorizer(analyzer=words)
    try:
        counts = counter.fit_transform(inputs)
    except ValueError:  # not one word in all training rows
        return [majority_label(labels)] * len(tests)
    return [str(label) for label in MultinomialNB().fit(counts, labels).predict(counter.transform(tests))]
