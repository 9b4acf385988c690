"""Text that is shown while it is written is the text in the end: whole characters, and nothing of a stop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.inference.writing import Writing
from gptcore.tokens import Tokenizer


def shown(writing, ids):
    """The pieces that are shown after each token, and in the end."""
    pieces = []
    for token in ids:
        writing.ids.append(token)
        pieces.append(writing.read())
        if writing.stopped:
            break
    return [*pieces, writing.finish()]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return Tokenizer.load(tiny.tokenizer / "tokenizer")


@given(data=st.data())
def test_the_pieces_of_any_tokens_are_their_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary - 1), max_size=30))
    writing = Writing(tokenizer.decode)
    assert "".join(shown(writing, ids)) == writing.text == tokenizer.decode(ids)
    assert writing.ids == ids


@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=20))
def test_no_piece_of_a_text_holds_half_a_character(tokenizer, text):
    pieces = shown(Writing(tokenizer.decode), tokenizer.encode(text))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_an_emoji_and_chinese_come_out_whole_as_soon_as_they_are_there(tokenizer):
    ids = tokenizer.encode("好🦊!")
    assert len(ids) >= 8, "spelled in bytes"
    pieces = [piece for piece in shown(Writing(tokenizer.decode), ids) if piece]
    assert pieces == ["好", "🦊", "!"]


@given(
    text=st.text(alphabet="ab c", max_size=24),
    stops=st.lists(st.text(alphabet="ab c", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_text_ends_where_the_first_stop_is_complete_and_nothing_of_it_was_shown(tokenizer, text, stops):
    writing = Writing(tokenizer.decode, stops)
    pieces = shown(writing, tokenizer.encode(text))
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    assert writing.stopped == bool(found)
    assert "".join(pieces) == writing.text == text[: min(found)[1] if found else None]
    assert tokenizer.decode(writing.ids).startswith(writing.text)
    assert not found or not writing.ids or not tokenizer.decode(writing.ids[:-1]).startswith(writing.text)


def test_what_could_begin_a_stop_is_held_back_until_it_is_none():
    writing = Writing(lambda ids: "".join(map(chr, ids)), ["###"])
    assert shown(writing, map(ord, "a#b##c##")) == ["a", "", "#b", "", "", "##c", "", "", "##"]
