import lzma
import random

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.evaluation.baselines import first_sentence, majority_label, naive_bayes
from gptcore.evaluation.xz import primed, xz_bits_per_byte

TRAIN = [f"The function number {n} returns the sum of its arguments and raises ValueError. " * 3 for n in range(200)]
TEST = {
    "docs": [f"The function number {n} returns the mean of its arguments. " * 2 for n in range(900, 930)],
    "chinese": ["话说天下大势，分久必合，合久必分。" * 5, "滚滚长江东逝水，浪花淘尽英雄。" * 5],
}


def separate_runs(train, test):
    """The definition: compress both, compress the one, subtract."""
    before = "".join(text + "\0" for text in train).encode()
    after = "".join(text + "\0" for text in test).encode()
    extra = len(lzma.compress(before + after, preset=9)) - len(lzma.compress(before, preset=9))
    return 8 * extra / sum(len(text.encode()) for text in test)


def test_primed_xz_is_the_difference_of_two_separate_runs():
    found = xz_bits_per_byte(TRAIN, TEST)
    assert found == {name: separate_runs(TRAIN, documents) for name, documents in TEST.items()}


def test_priming_with_text_of_the_same_kind_saves_bits():
    primed, alone = xz_bits_per_byte(TRAIN, TEST), xz_bits_per_byte([], TEST)
    assert primed["docs"] < 0.6 * alone["docs"]


def test_the_training_text_is_worked_through_before_the_first_copy():
    noise = random.Random(0).randbytes(1_000_000)
    assert len(lzma.compress(noise, preset=9)) > 1_000_000
    assert len(primed(noise).flush()) < 150_000


def test_xz_leaves_no_process_behind():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    xz_bits_per_byte(["a b c"], {"x": ["a b c d"], "y": ["e"]})
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return the sum. Then do more.", "Return the sum."),
        ("Compute e.g. the mean of x. More.", "Compute e.g. the mean of x."),
        ("Version 3.11 is out! New things.", "Version 3.11 is out!"),
        ("A title without a stop\n\nA paragraph. Another.", "A title without a stop"),
        ("One line\nand the next. End", "One line and the next."),
        ("话说天下大势。分久必合。", "话说天下大势。"),
        ("“真的？”他问。", "“真的？”"),
        ("No stop at all", "No stop at all"),
        ("  \n ", ""),
    ],
)
def test_the_first_sentence_ends_where_a_reader_would_end_it(text, expected):
    assert first_sentence(text) == expected


@settings(deadline=None)
@given(st.text())
def test_the_first_sentence_is_the_beginning_of_its_text(text):
    assert " ".join(text.split()).startswith(first_sentence(text))


def test_the_majority_label_is_the_most_frequent_and_of_equals_the_first():
    assert majority_label(["b", "a", "b"]) == "b"
    assert majority_label(["b", "a"]) == "a"


def test_naive_bayes_is_the_formula_by_hand():
    # Laplace: P(word | label) = (count + 1) / (words + vocabulary); vocabulary is {ham, free, win}.
    # "free win" for spam: 1/3 * 3/6 * 2/6 = 1/18; for mail: 2/3 * 1/6 * 1/6 = 1/54.
    inputs, labels = ["ham ham", "ham", "free free win"], ["mail", "mail", "spam"]
    assert naive_bayes(inputs, labels, ["free win", "ham", "unseen"]) == ["spam", "mail", "mail"]


def test_naive_bayes_reads_chinese_by_the_character():
    inputs = ["曹操起兵", "刘备入川", "曹操南征", "刘备称帝"]
    assert naive_bayes(inputs, ["wei", "shu", "wei", "shu"], ["操败走", "备东进"]) == ["wei", "shu"]


def test_naive_bayes_without_words_falls_back_to_the_majority():
    assert naive_bayes(["!", "?", "…"], ["b", "b", "a"], ["x"]) == ["b"]


def test_naive_bayes_of_one_label_answers_with_it():
    assert naive_bayes(["a word", "another"], ["only", "only"], ["a", ""]) == ["only", "only"]
