"""What is read at a step follows from the seed and the step alone, in whatever shares the sources are mixed."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcore.errors import CorpusError, SettingsError
from gptcore.tokens import Shards, ShardWriter
from gptcore.tokens.batches import StreamBatches, Windows, dealt, held_out_stream
from gptcore.tokens.objectives import IGNORED, Causal, Symbols

CONTEXT, BATCH = 8, 5
SYMBOLS = Symbols(mask=0, begin=1, end=2, pad=0, control=np.array([0, 1007]), vocabulary=3000)
CAUSAL = Causal(CONTEXT, SYMBOLS)
SOURCES = ("books", "mails", "web")
MIXTURES = st.none() | st.fixed_dictionaries(dict.fromkeys(SOURCES, st.sampled_from([0, 0.01, 0.3, 2]))).filter(
    lambda mixture: any(mixture.values())
)
SHARES = st.lists(st.floats(0.001, 1), min_size=1, max_size=6).map(lambda given: [share / sum(given) for share in given])


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Shards:
    """Documents of three sources in turns; the n-th token of a source in a split is 1000 x its number + n."""
    folder: Path = tmp_path_factory.mktemp("mixed")
    with ShardWriter(folder, 3000, "digest", 40) as writer:
        for split in ("train", "valid"):
            places = dict.fromkeys(SOURCES, 0)
            for number in range(60):
                source, length = SOURCES[number % 7 % 3], 3 + number % 9
                first = 1000 * SOURCES.index(source) + places[source]
                writer.add(split, list(range(first, first + length)), 2 * length, source=source)
                places[source] += length
    return Shards.open(folder)


def bits_of(batch) -> bytes:
    return batch.tokens.tobytes() + batch.labels.tobytes()


def test_without_a_mixture_the_batches_stay_what_they_were(tmp_path):
    with ShardWriter(tmp_path, 1000, "digest", 100) as writer:
        for number in range(40):
            writer.add("train", [(37 * number + 11 * place * place) % 1000 for place in range(5 + number % 7)], 1)
    batches = StreamBatches(Shards.open(tmp_path).split("train"), CAUSAL, BATCH, 3)
    digest = hashlib.sha256(b"".join(bits_of(batches.at(step)) for step in range(40)))
    assert digest.hexdigest() == "6c5fe71d3b4d2c5201c9637b66be90c294db3f7b280d3af1a642d37e090242f5"


@given(MIXTURES, st.integers(0, 3), st.lists(st.integers(0, 400), min_size=1, max_size=6))
def test_a_batch_depends_on_seed_and_step_and_not_on_what_was_asked_before(shards, mixture, seed, steps):
    def fresh() -> StreamBatches:
        return StreamBatches(shards.split("train"), CAUSAL, BATCH, seed, mixture)

    asked = fresh()
    for step in steps:
        batch = asked.at(step)
        assert batch.tokens.shape == batch.labels.shape == (BATCH, CONTEXT)
        assert bits_of(batch) == bits_of(fresh().at(step))
        assert bits_of(batch) != bits_of(StreamBatches(shards.split("train"), CAUSAL, BATCH, seed + 1, mixture).at(step))


@given(SHARES, st.integers(0, 300), st.integers(1, 40))
def test_any_piece_of_the_deal_is_that_of_dealing_row_by_row(shares, first, count):
    had = [0] * len(shares)
    rows = []
    for _ in range(first + count):
        stream = min(range(len(shares)), key=lambda stream: (had[stream] + 0.5) / shares[stream])
        rows.append((stream, had[stream]))
        had[stream] += 1
    assert dealt(first, first + count, shares) == rows[first:]


@given(SHARES, st.integers(1, 1000))
def test_after_any_number_of_rows_each_stream_has_had_its_share(shares, rows):
    counts = np.bincount([stream for stream, _ in dealt(0, rows, shares)], minlength=len(shares))
    for share, count in zip(shares, counts, strict=True):
        assert abs(count - share * rows) <= 0.5 + len(shares) * share / 2 + 1e-9


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 1000))
def test_shares_that_divide_a_number_of_rows_are_met_exactly(parts, cycle):
    total = sum(parts)
    rows = dealt(cycle * total, (cycle + 1) * total, [part / total for part in parts])
    assert np.bincount([stream for stream, _ in rows], minlength=len(parts)).tolist() == parts


def test_shares_are_exact_and_even_far_into_a_training():
    rows = [stream for stream, _ in dealt(10**12, 10**12 + 10_000, [0.0001, 0.2999, 0.7])]
    assert np.bincount(rows).tolist() == [1, 2999, 7000]
    assert max(len(list(run)) for stream, run in itertools.groupby(rows) if stream == 2) <= 3


@given(st.integers(0, 5), st.integers(0, 3), st.sampled_from(SOURCES))
def test_every_window_of_a_source_is_read_once_in_each_of_its_epochs(shards, seed, epoch, source):
    mixture = {"books": 0.5, "mails": 0.3, "web": 0.2}
    split = shards.split("train")
    batches, windows = StreamBatches(split, CAUSAL, BATCH, seed, mixture), split.of(source).tokens // CONTEXT - 1
    rows = np.concatenate([np.c_[batch.tokens, batch.labels[:, -1]] for batch in map(batches.at, range(120))])
    number = SOURCES.index(source)
    own = rows[rows[:, 0] // 1000 == number] - 1000 * number
    assert (np.diff(own, axis=1) == 1).all(), "a window holds the text of one source, in its order"
    begins = np.sort(own[epoch * windows : (epoch + 1) * windows, 0])
    assert len(begins) == windows
    assert (np.diff(begins) == CONTEXT).all()
    assert 0 <= begins[0] < CONTEXT


def test_epochs_of_a_stream_differ_in_their_cut_and_order(shards):
    stream = shards.split("train").of("web")
    windows = Windows(stream, CONTEXT, [0, 1], "web")
    epochs = [
        [int(windows.at(epoch * windows.per_epoch + place)[0][0]) for place in range(windows.per_epoch)] for epoch in range(9)
    ]
    assert len({min(begins) for begins in epochs}) > 3
    assert len({tuple(np.argsort(begins)) for begins in epochs}) == 9


def test_the_order_in_which_a_mixture_is_written_and_its_scale_change_nothing(shards):
    split, mixture = shards.split("train"), {"books": 1, "mails": 2, "web": 1}
    written = [mixture, dict(reversed(mixture.items())), {source: share / 8 for source, share in mixture.items()}]
    batches = [StreamBatches(split, CAUSAL, BATCH, 0, given) for given in written]
    assert len({b"".join(bits_of(each.at(step)) for step in range(30)) for each in batches}) == 1


def test_a_source_that_cannot_be_mixed_is_one_clear_sentence(shards):
    split = shards.split("train")
    with pytest.raises(SettingsError, match=r"training\.mixture does not name mails, web: give every source a share"):
        StreamBatches(split, CAUSAL, BATCH, 0, {"books": 1})
    small = split.of("web").tokens
    with pytest.raises(CorpusError, match=f"the source web of training.mixture has {small} tokens, too few for one context"):
        StreamBatches(split, Causal(small // 2 + 1, SYMBOLS), BATCH, 0, {"books": 1, "mails": 0, "web": 1})
    with pytest.raises(CorpusError, match=r"the source attic of training\.mixture has 0 tokens"):
        StreamBatches(split, CAUSAL, BATCH, 0, {**dict.fromkeys(SOURCES, 1), "attic": 1})
    assert StreamBatches(split, CAUSAL, BATCH, 0, {**dict.fromkeys(SOURCES, 1), "attic": 0}).shares == [1 / 3] * 3


@given(st.integers(1, 500), st.integers(2, 20), st.integers(1, 6))
def test_what_is_measured_is_whole_documents_and_no_window_mixes_sources(shards, tokens, context, batch):
    split, control = shards.split("valid"), SYMBOLS.control
    parts = held_out_stream(split, Causal(context, SYMBOLS), batch, tokens)
    drawn = np.random.default_rng(0).permutation(split.documents)
    lengths = np.array([len(split.document(int(document))) for document in drawn])
    drawn = drawn[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]
    for number, source in enumerate(SOURCES):
        documents = [int(document) for document in drawn if split.source(int(document)) == source]
        assert (source in parts) == bool(documents)
        if not documents:
            continue
        stream = np.concatenate([split.document(document) for document in documents]).tolist()
        batches = parts[source].batches
        read = np.concatenate([each.tokens.ravel() for each in batches])[: len(stream) - 1].tolist()
        labels = np.concatenate([each.labels.ravel() for each in batches])
        assert read == stream[:-1]
        assert labels[labels != IGNORED].tolist() == [token for token in stream[1:] if token not in control]
        assert {token // 1000 for token in read} == {number}
        assert parts[source].text_bytes == 2 * len(stream)
        assert parts[source].labels == (labels != IGNORED).sum()
