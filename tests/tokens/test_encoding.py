import csv
import json

from gptcore.config import ShardsConfig
from gptcore.corpus import SPLITS, read_split
from gptcore.tokens import Shards, Tokenizer, encode_corpus


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
