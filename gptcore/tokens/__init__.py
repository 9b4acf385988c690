"""Documents in, token ids out: the tokenizer, the shards on disk and the batches that are read from them. No torch."""

from gptcore.tokens.encoding import encode_corpus, encode_round
from gptcore.tokens.learning import learn_tokenizer
from gptcore.tokens.shards import Shards, ShardWriter, Split
from gptcore.tokens.tokenizer import Tokenizer

__all__ = ["ShardWriter", "Shards", "Split", "Tokenizer", "encode_corpus", "encode_round", "learn_tokenizer"]
