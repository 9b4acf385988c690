"""The tokenizer that is learned from a corpus: any Unicode text into token ids and back, without loss.

sentencepiece (Kudo and Richardson 2018) cuts text into pieces and spells what it has no piece for in UTF-8 bytes. It writes a
space as U+2581 and reserves U+2585, so a text that holds these would not come back; and it lets a space begin a piece only,
so a line end and the indentation after it would never be one piece. Therefore text is rewritten on the way in and back on
the way out, with noncharacters, which Unicode sets apart for use inside a program:

    a space before another space   INDENT
    U+2581, U+2585                 their stand-ins
    one of these noncharacters     ESCAPE and itself
"""

import hashlib
import re
import struct
from pathlib import Path

import sentencepiece

from gptcore.artifacts import write_json
from gptcore.tokens.tokenizer import MODEL, SETTINGS, Ids, Tokenizer

UNKNOWN, BEGIN, END, PAD = "<|unknown|>", "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# sentencepiece wants one for what has no piece; with all 256 bytes at hand it is never produced.
CONTROLS = (UNKNOWN, BEGIN, END, PAD, *ROLES)
BYTES = 256

_REWRITING = 1
"""Version of the rewriting; a part of the digest."""
ESCAPE, INDENT, LOW_BLOCK, HIGH_BLOCK = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_STAND_INS = {INDENT: " ", LOW_BLOCK: "\u2581", HIGH_BLOCK: "\u2585"}
_ORIGINALS = _STAND_INS | {ESCAPE + each: each for each in (ESCAPE, *_STAND_INS)}
_IN = str.maketrans({original: written for written, original in _ORIGINALS.items() if original != " "})
_RESERVED = re.compile("[\u2581\u2585\ufdd0-\ufdd3]")
_WRITTEN = re.compile(f"{ESCAPE}[\ufdd0-\ufdd3]|[\ufdd1-\ufdd3]")
_SPACE_BEFORE_SPACE = re.compile(" (?= )")


def escape(text: str) -> str:
    """`text` as sentencepiece reads it."""
    if _RESERVED.search(text):
        text = text.translate(_IN)
    return _SPACE_BEFORE_SPACE.sub(INDENT, text)


def unescape(text: str) -> str:
    """`unescape(escape(x)) == x`; an ESCAPE that stands alone, as at a cut, stays."""
    return _WRITTEN.sub(lambda match: _ORIGINALS[match.group()], text)


class LearnedTokenizer(Tokenizer):
    """A learned tokenizer. `decode(encode(text)) == text` for every string that UTF-8 can carry."""

    lossless = True

    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocabulary = self._processor.vocab_size()
        self.begin_id, self.end_id, self.pad_id, self._mask_id = (
            self._processor.piece_to_id(name) for name in (BEGIN, END, PAD, UNKNOWN)
        )
        self.system_id, self.user_id, self.assistant_id = (self._processor.piece_to_id(name) for name in ROLES)
        self.control_ids = frozenset(self._processor.piece_to_id(name) for name in CONTROLS)
        self.digest = _digest(self._processor)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(escape(text))
        return ids

    def _encode_arrays(self, texts: list[str]) -> list[Ids]:
        arrays: list[Ids] = self._processor.encode([escape(text) for text in texts], out_type="numpy")
        return arrays

    def _decode(self, ids: list[int]) -> str:
        return unescape(self._processor.decode(ids))

    def piece(self, token: int) -> str:
        """What a token stands for: its text, `<0x41>` for a byte, the name of a control symbol."""
        return unescape(self._processor.id_to_piece(token).replace("\u2581", " "))

    def score(self, token: int) -> float:
        """Natural log-probability of a piece (unigram), or minus its rank (bpe)."""
        return float(self._processor.get_score(token))

    def is_byte(self, token: int) -> bool:
        """Whether a token spells one byte of a character without a piece of its own."""
        return bool(self._processor.is_byte(token))

    def save(self, folder: Path) -> None:
        """Write a tokenizer folder; equal pieces give equal bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL).write_bytes(self._processor.serialized_model_proto())
        names = {name.strip("<|>"): self._processor.piece_to_id(name) for name in CONTROLS}
        settings = {"vocabulary": self.vocabulary, "digest": self.digest, "rewriting": _REWRITING, "controls": names}
        write_json(folder / SETTINGS, settings)


def _digest(processor: sentencepiece.SentencePieceProcessor) -> str:
    """sha256 over pieces, scores, their types and the rewriting; not over the file, which tells how it was made."""
    digest = hashlib.sha256(f"rewriting {_REWRITING}".encode())
    for token in range(processor.vocab_size()):
        piece = processor.id_to_piece(token).encode()
        kind = (processor.is_unknown(token), processor.is_control(token), processor.is_unused(token), processor.is_byte(token))
        digest.update(struct.pack("<I4?f", len(piece), *kind, processor.get_score(token)) + piece)
    return digest.hexdigest()
