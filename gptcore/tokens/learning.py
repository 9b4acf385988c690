"""Learn a tokenizer from the training documents of a corpus: the same corpus and settings give the same bytes."""

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from gptcore.config import TokenizerConfig
from gptcore.corpus.splitting import SplitName
from gptcore.errors import TokenizerError
from gptcore.tokens.documents import read_documents
from gptcore.tokens.learned import BEGIN, BYTES, CONTROLS, END, PAD, ROLES, UNKNOWN, LearnedTokenizer, escape
from gptcore.tokens.pieces import with_rounded_scores
from gptcore.tokens.report import Drawn, write_tokenizer_report

# Sums are made per thread, so their number decides the last bits of the scores: it is fixed, whatever the machine has.
_THREADS = 4
# At most 4 UTF-8 bytes each: below the 4,192 bytes over which sentencepiece leaves a line out without a word.
_PART = 1000
# The unigram algorithm starts from many candidates and keeps a share of them, again and again, until `vocabulary` are left.
# From fewer and with a smaller share than sentencepiece's own (a million, 0.75) it takes a third of the time and its pieces
# spell docstrings in fewer tokens: 4.43 bytes each against 4.35.
_CANDIDATES_PER_PIECE = 6
_FEWEST_CANDIDATES = 20_000
_KEPT_SHARE = 0.5


def learn_tokenizer(folder: Path, config: TokenizerConfig, corpus: Path) -> dict[str, float | int | str]:
    """Fill `folder` with `tokenizer/` and `report/`; returns vocabulary, bytes per token and the share of byte tokens.

    Raises `TokenizerError` when there is no text, and for a vocabulary that the text does not allow.
    """
    sample = draw_documents(corpus, "train", config.sample_characters, config.seed)
    tokenizer = train([document.text for document in sample], config)
    tokenizer.save(folder / "tokenizer")
    held_out = draw_documents(corpus, "valid", config.sample_characters, config.seed)
    return write_tokenizer_report(folder / "report", tokenizer, sample, held_out)


def draw_documents(corpus: Path, split: SplitName, characters: int, seed: int) -> list[Drawn]:
    """Documents of a split in the order of a hash of seed, source and id, until `characters`; the last one is cut there."""
    keys: list[bytes] = []
    lengths: list[int] = []
    for batch in read_documents(corpus, split, ["source", "id", "text"]):
        for source, name, text in zip(*batch, strict=True):
            keys.append(hashlib.sha256(f"{seed}:{source}:{name}".encode()).digest())
            lengths.append(len(text))
    wanted: dict[int, int] = {}
    left = characters
    for row in sorted(range(len(keys)), key=keys.__getitem__):
        if left <= 0:
            break
        wanted[row] = min(left, lengths[row])
        left -= wanted[row]
    drawn: dict[int, Drawn] = {}
    row = 0
    for sources, texts in read_documents(corpus, split, ["source", "text"]):
        for source, text in zip(sources, texts, strict=True):
            if row in wanted:
                drawn[row] = Drawn(source, text[: wanted[row]])
            row += 1
    return [drawn[row] for row in wanted]


def train(texts: Sequence[str], config: TokenizerConfig) -> LearnedTokenizer:
    """Learn pieces from texts. Raises `TokenizerError` as `learn_tokenizer` does."""
    parts = [part for text in texts for part in _parts(escape(text))]
    if not any(part.strip() for part in parts):
        raise TokenizerError("there is no training text to learn a tokenizer from: give more text")
    try:
        return _train(parts, config, exact=True)
    except RuntimeError as error:
        raise _explain(parts, config, error) from error


def _train(parts: Iterable[str], config: TokenizerConfig, *, exact: bool) -> LearnedTokenizer:
    """`exact=False` takes as many pieces as there are when the vocabulary is larger than the text allows."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(parts),
        model_writer=model,
        model_type=config.algorithm,
        vocab_size=config.vocabulary,
        hard_vocab_limit=exact,
        character_coverage=config.character_coverage,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        byte_fallback=True,
        split_by_unicode_script=False,
        seed_sentencepiece_size=max(_FEWEST_CANDIDATES, _CANDIDATES_PER_PIECE * config.vocabulary),
        shrinking_factor=_KEPT_SHARE,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece=UNKNOWN,
        bos_piece=BEGIN,
        eos_piece=END,
        pad_piece=PAD,
        control_symbols=list(ROLES),
        num_threads=_THREADS,
        minloglevel=3,
    )
    return LearnedTokenizer(with_rounded_scores(model.getvalue()))


def _parts(text: str) -> Iterator[str]:
    """Cut a text before white space into parts that sentencepiece reads; it would drop line ends at the end of a part."""
    start = 0
    while len(text) - start > _PART:
        end = start + _PART
        while end > start and not (text[end].isspace() and not text[end - 1].isspace()):
            end -= 1
        end = end if end > start else start + _PART
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _explain(parts: Sequence[str], config: TokenizerConfig, error: RuntimeError) -> TokenizerError:
    """What a user can do about a vocabulary that sentencepiece refused."""
    characters = _required_characters(parts, config.character_coverage)
    smallest = len(CONTROLS) + BYTES + characters
    if config.vocabulary < smallest:
        return TokenizerError(
            f"a vocabulary of {config.vocabulary} is too small for the {characters} different characters of this text: "
            f"set tokenizer.vocabulary to at least {smallest} or lower tokenizer.character_coverage"
        )
    try:
        largest = _train(parts, config, exact=False).vocabulary
    except RuntimeError:
        largest = config.vocabulary
    if largest < config.vocabulary:
        return TokenizerError(
            f"a vocabulary of {config.vocabulary} is larger than this text allows: "
            f"set tokenizer.vocabulary to at most {largest} or give more text"
        )
    return TokenizerError(f"sentencepiece cannot learn from this text with these settings: {' '.join(str(error).split())}")


def _required_characters(parts: Iterable[str], coverage: float) -> int:
    """How many of the most frequent characters it takes to cover the text."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part)
    total, covered, number = counts.total(), 0, 0
    for _, count in counts.most_common():
        if covered >= coverage * total:
            break
        covered += count
        number += 1
    return number
