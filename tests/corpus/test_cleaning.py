import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.corpus.cleaning import clean, cut, objection

# Texts with ends of paragraphs, lines, sentences and words in them, and with runs that have none.
PIECES = st.sampled_from(
    ["word", "x" * 30, " ", "\n", "\n\n", "\n \n\n", ". ", "? ", "。", "三国演义", "é", "\U0001f600", "\t"]
)
PROSE = st.lists(PIECES, max_size=60).map("".join)


@given(st.text())
def test_cleaning_twice_is_cleaning_once(text):
    assert clean(clean(text)) == clean(text)


@given(st.text())
def test_cleaned_text_is_nfc_and_has_no_carriage_return(text):
    assert unicodedata.is_normalized("NFC", clean(text))
    assert "\r" not in clean(text)


def test_every_kind_of_line_end_becomes_one_newline():
    assert clean("a\r\nb\rc\nd\r\r\ne") == "a\nb\nc\nd\n\ne"


def test_a_letter_and_its_accent_become_one_character():
    assert clean("cafe\u0301") == "caf\u00e9"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("PK\0\0 and more text", "binary"),
        ("half a pair \ud83d and no other half", "lone_surrogate"),
        (" \n\t\n                    ", "empty"),
        ("", "empty"),
        ("  short  \n\n\n\n\n", "too_short"),
        ("exactly 10", None),
        ("十个汉字就够了吗是的", None),
    ],
)
def test_a_text_that_cannot_be_used_has_its_reason(text, reason):
    assert objection(text, min_characters=10) == reason


@given(PROSE, st.integers(1, 50))
def test_cutting_loses_nothing_and_keeps_to_the_limit(text, most):
    parts = cut(text, most)
    assert "".join(parts) == text
    assert all(len(part) <= most for part in parts)
    assert text == "" or all(parts)


@given(PROSE, st.integers(8, 50))
def test_cutting_leaves_no_crumbs(text, most):
    *parts, last = cut(text, most)
    assert all(len(part) >= most // 2 for part in parts)
    assert not parts or len(last) >= most // 4


@pytest.mark.parametrize(
    "parts",
    [
        ["one one one.\n\n", "two. two\ntwo two"],
        ["one one. one\n", "two two. two two"],
        ['one one "one." ', "two two two two"],
        ["一二三四五六七八九十十一。", "一二三四五六七八九十一二三四"],
        ["one one one one ", "twotwo two two"],
        ["x" * 20, "x" * 10],
    ],
)
def test_a_text_is_cut_where_a_paragraph_else_a_line_else_a_sentence_else_a_word_ends(parts):
    assert cut("".join(parts), 20) == parts
