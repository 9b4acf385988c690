import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from gptcore.config import FilesSource, TaskConfig, TrainingConfig
from gptcore.corpus import Document
from gptcore.downstream.summarize import find_rows, rouge_l, summary_and_body

BODY = "It walks through the whole of the list once and keeps what it has seen. " * 4
TASK = TaskConfig(type="summarize", source=FilesSource(paths=("a",), target="summary"), training=TrainingConfig(steps=1))


def test_a_docstring_is_its_first_line_and_what_stands_below():
    assert summary_and_body(f"Return the unique values.\n\n{BODY}") == (BODY.strip(), "Return the unique values.")
    assert summary_and_body(f"\n  Return the unique values.\n  \n\n{BODY}")[1] == "Return the unique values."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"Return the unique values\nof a list.\n\n{BODY}", "summary_not_one_line"),
        (f"{'Return the unique values ' * 9}.\n\n{BODY}", "summary_not_one_line"),
        (f"unique(values, sort=True)\n\n{BODY}", "summary_no_sentence"),
        (f"unique(values, sort=True) -> list of values.\n\n{BODY}", "summary_no_sentence"),
        (f"Unique values\n\n{BODY}", "summary_no_sentence"),
        (f"The example::\n\n{BODY}", "summary_no_sentence"),
        (f"Docstring.\n\n{BODY}", "summary_no_sentence"),
        ("Return the unique values.\n\nIn their order.", "body_too_short"),
        ("Return the unique values.", "body_too_short"),
        ("", "summary_no_sentence"),
    ],
)
def test_what_has_no_summary_is_set_aside_with_its_reason(text, reason):
    assert summary_and_body(text) == reason


def test_a_row_with_an_answer_is_taken_as_it_is_and_without_one_set_aside():
    rows = [
        Document("1", " A short text. ", "made", "1", target=" In\nshort. "),
        Document("2", "Another.", "made", "2", target=" "),
    ]
    found = find_rows(rows, TASK)
    assert [(row.input, row.target) for row in found.rows] == [("A short text.", "In short.")]
    assert [(item.id, item.reason) for item in found.aside] == [("2", "no_answer")]


ENGLISH = st.text(st.sampled_from("abc ABC_.,-'1\n"), max_size=60)


@settings(deadline=None)
@given(ENGLISH, ENGLISH)
def test_in_english_rouge_l_is_that_of_rouge_score(output, target):
    expected = RougeScorer(["rougeL"]).score(target, output)["rougeL"].fmeasure
    assert rouge_l([output], [target]) == pytest.approx([expected])


def test_rouge_l_reads_every_script():
    # By hand: the longest common subsequence has 3 of 4 and of 5 characters, F1 = 2 * 3 / (4 + 5).
    assert rouge_l(["山高水长"], ["山青水又长"]) == pytest.approx([6 / 9])
    assert rouge_l(["Москва большая"], ["москва"]) == pytest.approx([2 / 3])


def test_rouge_l_has_a_value_per_row():
    scores = rouge_l(["the cat sat", "", "same words here"], ["the cat ran", "a target", "same words here"])
    assert scores.dtype == np.float64
    assert scores == pytest.approx([2 / 3, 0, 1])
