import csv
import json

import pytest

from gptcore.config import ShardsConfig
from gptcore.corpus import SPLITS, Document, read_split
from gptcore.corpus.build import write_split
from gptcore.tokens import Shards, Tokenizer, encode_corpus, encode_round


def test_every_document_becomes_begin_its_ids_and_end(tiny):
    tokenizer = Tokenizer.load(tiny.tokenizer / "tokenizer")
    shards = Shards.open(tiny.shards)
    assert (shards.tokenizer, shards.vocabulary) == (tokenizer.digest, tokenizer.vocabulary)
    for name in SPLITS:
        split, texts = shards.split(name), read_split(tiny.corpus, name)["text"].tolist()
        assert split.documents == len(texts)
        for index, text in enumerate(texts):
            ids = split.document(index).tolist()
            assert (ids[0], ids[-1]) == (tokenizer.begin_id, tokenizer.end_id)
            assert tokenizer.decode(ids) == text
            assert split.bytes(index) == len(text.encode())
            assert split.source(index) == "files"


def test_the_same_corpus_gives_the_same_shards_and_numbers_that_add_up(tiny, tmp_path):
    tokenizer = Tokenizer.load(tiny.tokenizer / "tokenizer")
    numbers = encode_corpus(tmp_path, ShardsConfig(), tiny.corpus, tokenizer)
    assert (tmp_path / "index.json").read_bytes() == (tiny.shards / "index.json").read_bytes()
    assert (tmp_path / "train" / "00000.tokens").read_bytes() == (tiny.shards / "train" / "00000.tokens").read_bytes()
    splits = json.loads((tmp_path / "index.json").read_text())["splits"]
    assert all(numbers[f"{name}_tokens"] == splits[name]["tokens"] for name in SPLITS)
    with (tmp_path / "report" / "tokens.csv").open() as file:
        rows = list(csv.DictReader(file))
    for key in ("documents", "tokens", "bytes"):
        assert sum(int(row[key]) for row in rows) == sum(splits[name][key] for name in SPLITS)


def test_small_shards_hold_the_same_stream(tiny, tmp_path):
    tokenizer = Tokenizer.load(tiny.tokenizer / "tokenizer")
    encode_corpus(tmp_path, ShardsConfig(tokens_per_shard=500), tiny.corpus, tokenizer)
    many, one = (Shards.open(folder).split("train") for folder in (tmp_path, tiny.shards))
    assert len(list((tmp_path / "train").glob("*.tokens"))) > 1
    assert many.window(0, many.tokens).tolist() == one.window(0, one.tokens).tolist()


def write_corpus(folder, **splits):
    for split in ("train", "valid", "test"):
        write_split(folder / "data" / f"{split}.parquet", splits.get(split, []), split)
    return folder


@pytest.mark.parametrize(("replay", "expected"), [(0.0, 0), (0.5, 40), (0.8, 160), (0.9, 200)])
def test_a_round_reads_the_new_text_and_its_share_of_the_old(tiny, tmp_path, replay, expected):
    tokenizer = Tokenizer.load(tiny.tokenizer / "tokenizer")
    old = [Document(f"old-{n}", f"the index {n:03d} of the array", "texts", f"old-{n}") for n in range(200)]
    new = [Document(f"new-{n}", f"the value {n:03d} of the array", "fresh", f"new-{n}") for n in range(40)]
    held = [Document("held", "a column of the matrix", "texts", "held")]
    corpus = write_corpus(tmp_path / "all", train=old + new, valid=held, test=held)
    added = write_corpus(tmp_path / "new", train=new)
    numbers = encode_round(tmp_path / "shards", ShardsConfig(), added, corpus, tokenizer, replay=replay, seed=0)
    shards = Shards.open(tmp_path / "shards")
    assert numbers["replayed_bytes"] == expected * len(old[0].text)
    train = shards.split("train")
    texts = [tokenizer.decode(train.document(place)[1:-1].tolist()) for place in range(train.documents)]
    assert texts[:40] == [document.text for document in new]
    assert len(set(texts)) == len(texts) == 40 + expected
    assert {text[4:9] for text in texts[40:]} <= {"index"}
    assert [train.source(place) for place in range(train.documents)] == ["fresh"] * 40 + ["texts"] * expected
    assert shards.split("valid").documents == shards.split("test").documents == 1
