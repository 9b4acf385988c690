"""Excerpts of text in, what is learned from them out: everything that was hidden is asked for once, nothing else is touched."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.config import MaskingConfig
from gptcore.tokens.objectives import IGNORED, Causal, Excerpts, Masked, Prefix, Symbols, documents, infilled

UNKNOWN, BEGIN, END, PAD = range(4)
SYMBOLS = Symbols(mask=UNKNOWN, begin=BEGIN, end=END, pad=PAD, control=np.arange(7), vocabulary=500)


def windows(ids, start=0, epoch=0):
    ids = np.atleast_2d(np.asarray(ids, np.int64))
    starts = start + np.arange(len(ids)) * (ids.shape[1] - 1)
    return Excerpts(ids, starts, np.full(len(ids), epoch))


def text(length, rows=1, seed=0):
    """Documents of 3 to 30 tokens, each token another id as far as there are any."""
    random = np.random.default_rng(seed)
    ids = []
    while len(ids) < rows * length:
        ids += [BEGIN, *random.integers(7, 500, random.integers(3, 30)), END]
    return np.array(ids[: rows * length]).reshape(rows, length)


def test_the_example_of_the_docstring():
    the, cat, sat, on, mat = 10, 11, 12, 13, 14
    row = infilled(np.array([the, cat, sat, on, the, mat]), [(1, 3)], SYMBOLS)
    assert row.tokens.tolist() == [[the, UNKNOWN, on, the, mat, BEGIN, cat, sat]]
    assert row.labels.tolist() == [[*[IGNORED] * 5, cat, sat, END]]
    assert row.places.tolist() == [[0, 1, 3, 4, 5, 1, 1, 1]]
    assert row.spans.tolist() == [[0, 0, 0, 0, 0, 1, 2, 3]]
    assert row.exposed.tolist() == [[True] * 5 + [False] * 3]


def test_at_the_end_of_a_text_a_span_has_no_end():
    row = infilled(np.array([10, 11, 12]), [(1, 3)], SYMBOLS)
    assert (row.tokens.tolist(), row.labels.tolist()) == ([[10, UNKNOWN, BEGIN, 11]], [[IGNORED, IGNORED, 11, 12]])


def restored(row):
    """The text behind a row of the prefix objective, read back from its tokens and labels."""
    tokens, labels, exposed = row.tokens[0], row.labels[0], row.exposed[0]
    spans = []
    for token, label in zip(tokens[~exposed], labels[~exposed], strict=True):
        if label == IGNORED:
            break  # padding
        if token == BEGIN:
            spans.append([])
        spans[-1].append(int(label))
    places = iter(row.places[0][~exposed][row.spans[0][~exposed] == 1].tolist())
    filling = {next(places): [label for label in span if label != END] for span in spans}
    result = []
    for token, place in zip(tokens[exposed], row.places[0][exposed], strict=True):
        result += filling[place] if token == UNKNOWN else [int(token)]
    return result


@given(st.integers(8, 200), st.floats(0.02, 0.5), st.floats(0, 1), st.integers(0, 50), st.integers(0, 9))
def test_a_row_of_the_prefix_objective_holds_its_text_and_fits_the_context(context, share, short, seed, epoch):
    masking = MaskingConfig(share=share, short=short)
    objective = Prefix(context, SYMBOLS, False, masking, seed)
    ids = np.random.default_rng(seed).integers(7, 500, (2, objective.reads + 1))
    batch = objective.of_text(windows(ids, epoch=epoch))
    assert batch.tokens.shape == batch.labels.shape == (2, context)
    for row in range(2):
        one = type(batch)(*(None if a is None else a[row : row + 1] for a in vars(batch).values()))
        assert restored(one) == ids[row, :-1].tolist()
        assert (one.labels != IGNORED).any()


def test_short_spans_hide_the_share_that_was_asked_for_in_pieces_of_three():
    objective = Prefix(256, SYMBOLS, False, MaskingConfig(short=1.0), 0)
    batch = objective.of_text(windows(np.random.default_rng(0).integers(7, 500, (200, objective.reads + 1))))
    learned = (batch.labels != IGNORED) & (batch.labels != END)
    spans = (batch.spans == 1).sum()
    assert learned.sum() / (200 * objective.reads) == pytest.approx(0.15, abs=0.01)
    assert learned.sum() / spans == pytest.approx(3.0, abs=0.4)


def test_long_spans_reach_from_somewhere_in_the_first_half_to_the_end():
    objective = Prefix(64, SYMBOLS, False, MaskingConfig(short=0.0), 0)
    batch = objective.of_text(windows(np.random.default_rng(0).integers(7, 500, (100, objective.reads + 1))))
    lengths = (batch.labels != IGNORED).sum(1)
    assert lengths.min() >= objective.reads - objective.reads // 2
    assert lengths.max() == objective.reads


def test_a_document_mask_keeps_spans_inside_of_their_document():
    objective = Prefix(128, SYMBOLS, True, MaskingConfig(short=0.5), 0)
    ids = text(objective.reads + 1, rows=40)
    batch = objective.of_text(windows(ids))
    for row in range(40):
        number = documents(ids[row : row + 1, :-1], BEGIN)[0][0]
        begins = np.flatnonzero(batch.spans[row] == 1)
        for begin, end in zip(begins, [*begins[1:], objective.context], strict=True):
            span = [label for label in batch.labels[row, begin:end].tolist() if label != IGNORED]
            document = ids[row, :-1][number == batch.parts[row, begin]].tolist()
            cuts = [document[at : at + len(span)] for at in range(len(document))]
            # Only at the end of the window has a span no END of its own.
            assert span in cuts or (span[-1] == END and span[:-1] in [cut[: len(span) - 1] for cut in cuts])
            assert (batch.parts[row, begin : begin + len(span)] == batch.parts[row, begin]).all()


@given(st.integers(0, 1000), st.integers(0, 5), st.integers(2, 64))
def test_masked_labels_are_the_text_and_hidden_are_words_only(seed, epoch, length):
    ids = text(length + 1, rows=3, seed=seed)
    batch = Masked(length, SYMBOLS, False, MaskingConfig(), seed).of_text(windows(ids, epoch=epoch))
    learned = batch.labels != IGNORED
    assert (batch.labels[learned] == ids[:, :-1][learned]).all()
    assert (batch.tokens[~learned] == ids[:, :-1][~learned]).all()
    assert not np.isin(batch.labels[learned], SYMBOLS.control).any()
    assert not np.isin(batch.tokens[learned], SYMBOLS.control[1:]).any()
    words = ~np.isin(ids[:, :-1], SYMBOLS.control)
    assert (learned.any(1) == words.any(1)).all()


def test_of_the_hidden_tokens_eight_in_ten_are_masked_one_is_replaced_and_one_stays():
    ids = np.random.default_rng(0).integers(7, 500, (400, 257))
    batch = Masked(256, SYMBOLS, False, MaskingConfig(), 0).of_text(windows(ids))
    learned = batch.labels != IGNORED
    assert learned.mean() == pytest.approx(0.15, abs=0.005)
    tokens, labels = batch.tokens[learned], batch.labels[learned]
    assert (tokens == UNKNOWN).mean() == pytest.approx(0.8, abs=0.01)
    assert ((tokens != UNKNOWN) & (tokens != labels)).mean() == pytest.approx(0.1, abs=0.01)
    replaced = tokens[(tokens != UNKNOWN) & (tokens != labels)]
    assert len(np.unique(replaced)) > 450
    assert replaced.min() >= 7


def test_masks_are_anew_in_every_epoch_or_always_the_same_whatever_the_window():
    ids = np.random.default_rng(0).integers(7, 500, 400)
    anew, same = (Masked(256, SYMBOLS, False, MaskingConfig(anew=value), 0) for value in (True, False))

    def hidden(objective, start, epoch):
        batch = objective.of_text(windows(ids[start : start + 257], start, epoch))
        return {start + int(place) for place in np.flatnonzero(batch.labels[0] != IGNORED)}

    assert hidden(anew, 0, 0) == hidden(anew, 0, 0) != hidden(anew, 0, 1)
    first, shifted = hidden(same, 0, 0), hidden(same, 100, 1)
    assert {place for place in first if place >= 100} == {place for place in shifted if place < 256}


def test_documents_are_counted_and_places_begin_anew_with_each():
    parts, places = documents(np.array([[8, 9, BEGIN, 8, BEGIN, BEGIN, 9]]), BEGIN)
    assert parts.tolist() == [[0, 0, 1, 1, 2, 3, 3]]
    assert places.tolist() == [[0, 1, 0, 1, 0, 0, 1]]


def test_a_tasks_rows_are_a_question_that_sees_itself_and_an_answer_that_follows():
    row = (np.array([BEGIN, 5, 20, 21, 6, 30, 31, END]), np.array([0, 0, 0, 0, 0, 1, 1, 1], bool))
    other = (np.array([BEGIN, 5, 6, 30, END]), np.array([0, 0, 0, 1, 1], bool))
    causal = Causal(16, SYMBOLS).of_rows([row, other])
    assert causal.tokens.shape == (2, 16)
    assert causal.labels[0].tolist() == [IGNORED] * 4 + [30, 31, END] + [IGNORED] * 9
    prefix = Prefix(16, SYMBOLS, False, MaskingConfig(), 0).of_rows([row, other])
    assert prefix.tokens[0, :9].tolist() == [BEGIN, 5, 20, 21, 6, UNKNOWN, BEGIN, 30, 31]
    assert prefix.labels[0, :9].tolist() == [IGNORED] * 6 + [30, 31, END]
    assert prefix.exposed[1].tolist() == [True] * 4 + [False] * 12
