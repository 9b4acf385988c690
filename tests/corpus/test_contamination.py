import os
import subprocess
import sys
import zipfile

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gptcore.corpus.contamination import Protected, ngram_hashes, shares_in_train, words

TEXTS = st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta", "曹", "操"]), max_size=30).map(" ".join)


def grams_of(text, n):
    """The n-grams of a text as tuples of words: what the hashes stand for."""
    found = words(text)
    size = min(n, len(found))
    return {tuple(found[place : place + size]) for place in range(len(found) - size + 1)} if found else set()


def test_words_are_lower_case_without_punctuation_and_every_han_character_or_kana_is_one():
    assert words("The U.S. isn't Zürich; x_1=3") == ["the", "u", "s", "isn", "t", "zürich", "x_1", "3"]
    assert words("曹操字孟德 (Cao Cao), すし 김치") == ["曹", "操", "字", "孟", "德", "cao", "cao", "す", "し", "김치"]


@given(TEXTS, st.integers(1, 14))
def test_there_is_one_hash_per_different_gram(text, n):
    hashes = ngram_hashes(text, n)
    assert hashes.dtype == np.uint64
    assert hashes.size == len(grams_of(text, n))
    assert (np.diff(hashes) > 0).all()


@given(TEXTS, TEXTS, st.integers(1, 4))
def test_two_texts_share_as_many_hashes_as_grams(one, other, n):
    shared = np.intersect1d(ngram_hashes(one, n), ngram_hashes(other, n))
    assert shared.size == len(grams_of(one, n) & grams_of(other, n))


@given(st.lists(TEXTS, max_size=5), st.lists(TEXTS, max_size=5))
def test_the_share_in_train_is_the_share_of_grams_that_any_train_text_holds(held_out, train):
    in_train = set().union(*(grams_of(text, 3) for text in train))
    expected = [len(grams_of(t, 3) & in_train) / len(grams_of(t, 3)) if t else 0.0 for t in held_out]
    shares = shares_in_train([ngram_hashes(t, 3) for t in held_out], [ngram_hashes(t, 3) for t in train])
    np.testing.assert_allclose(shares, expected)


@given(st.lists(TEXTS, max_size=6), TEXTS, st.sampled_from([0.0, 0.2, 0.5]))
def test_a_text_is_caught_when_it_holds_too_much_of_any_one_protected_row(rows, text, limit):
    protected = Protected.of("summarize", rows, 3)
    own = grams_of(text, 3)
    expected = any(len(own & grams_of(row, 3)) > limit * min(len(own), len(grams_of(row, 3))) for row in rows)
    assert protected.is_held_by(ngram_hashes(text, 3), limit) == expected


def test_every_part_of_a_long_protected_row_is_caught():
    row = [f"word{number}" for number in range(3000)]
    protected = Protected.of("summarize", [" ".join(row)], 13)
    parts = (" ".join(row[start : start + 200]) for start in range(0, 3000, 200))
    assert all(protected.is_held_by(ngram_hashes(part, 13), 0.2) for part in parts)


def test_hashes_are_the_same_in_another_process_with_another_hash_seed():
    text = "The romance of the three kingdoms: 話說天下大勢, 分久必合, 合久必分."
    code = f"from gptcore.corpus.contamination import ngram_hashes; print(ngram_hashes({text!r}, 5).tolist())"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONIOENCODING": "utf-8"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == str(ngram_hashes(text, 5).tolist())


def test_protected_rows_come_back_from_their_file_which_holds_no_time(tmp_path):
    protected = Protected.of("summarize", ["a row of words that is long enough", "", "another row of words that is long"], 3)
    protected.save(tmp_path / "protected.npz")
    loaded = Protected.load(tmp_path / "protected.npz", "summarize")
    for name in ("hashes", "rows", "sizes"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(protected, name))
    assert loaded.rows.dtype == loaded.sizes.dtype == np.int32
    with zipfile.ZipFile(tmp_path / "protected.npz") as file:
        assert {entry.date_time for entry in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
