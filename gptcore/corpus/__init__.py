"""Text in, documents out: sources, cleaning, splitting, contamination, and the corpus they build."""

from gptcore.corpus.build import build_corpus, read_split
from gptcore.corpus.document import Document, SetAside
from gptcore.corpus.sources import identify, read_source
from gptcore.corpus.splitting import SPLITS, SplitName, split_of

__all__ = [
    "SPLITS",
    "Document",
    "SetAside",
    "SplitName",
    "build_corpus",
    "identify",
    "read_source",
    "read_split",
    "split_of",
]
