"""Documents in, token ids out: the tokenizer, the shards on disk and the batches that are read from them. No torch."""

from gptcore.tokens.encoding import encode_corpus, encode_round
from gptcore.tokens.exporting import export_tokenizer
from gptcore.tokens.importing import import_tokenizer
from gptcore.tokens.learning import learn_tokenizer
from gptcore.tokens.shards import Shards, ShardWriter, Split
from gptcore.tokens.tokenizer import Tokenizer

__all__ = [
    "ShardWriter", "Shards", "Split", "Tokenizer", "encode_corpus", "encode_round", "export_tokenizer", "import_tokenizer",
    "learn_tokenizer",
]  # fmt: skip
