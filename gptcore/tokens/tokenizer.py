"""The tokenizer: any Unicode text into token ids and back, without loss.

sentencepiece (Kudo and Richardson 2018) cuts text into pieces and spells what it has no piece for in UTF-8 bytes. It writes a
space as U+2581 and reserves U+2585, so a text that holds these would not come back; and it lets a space begin a piece only,
so a line end and the indentation after it would never be one piece. Therefore text is rewritten on the way in and back on
the way out, with noncharacters, which Unicode sets apart for use inside a program:

    a space before another space   INDENT
    U+2581, U+2585                 their stand-ins
    one of these noncharacters     ESCAPE and itself
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import sentencepiece

from gptcore.artifacts import write_json
from gptcore.errors import ArtifactError, CorruptArtifactError, TokenizerError

MODEL, SETTINGS = "tokenizer.model", "tokenizer.json"

UNKNOWN, BEGIN, END, PAD = "<|unknown|>", "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# sentencepiece wants one for what has no piece; with all 256 bytes at hand it is never produced.
CONTROLS = (UNKNOWN, BEGIN, END, PAD, *ROLES)
BYTES = 256

_REWRITING = 1
"""Version of the rewriting; a part of the digest."""
_ESCAPE, _INDENT, _LOW_BLOCK, _HIGH_BLOCK = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_STAND_INS = {_INDENT: " ", _LOW_BLOCK: "\u2581", _HIGH_BLOCK: "\u2585"}
_ORIGINALS = _STAND_INS | {_ESCAPE + each: each for each in (_ESCAPE, *_STAND_INS)}
_IN = str.maketrans({original: written for written, original in _ORIGINALS.items() if original != " "})
_RESERVED = re.compile("[\u2581\u2585\ufdd0-\ufdd3]")
_WRITTEN = re.compile(f"{_ESCAPE}[\ufdd0-\ufdd3]|[\ufdd1-\ufdd3]")
_SPACE_BEFORE_SPACE = re.compile(" (?= )")
_SURROGATE = re.compile("[\ud800-\udfff]")


def escape(text: str) -> str:
    """`text` as sentencepiece reads it."""
    if _RESERVED.search(text):
        text = text.translate(_IN)
    return _SPACE_BEFORE_SPACE.sub(_INDENT, text)


def unescape(text: str) -> str:
    """`unescape(escape(x)) == x`; an ESCAPE that stands alone, as at a cut, stays."""
    return _WRITTEN.sub(lambda match: _ORIGINALS[match.group()], text)


class Tokenizer:
    """A learned tokenizer. `decode(encode(text)) == text` for every string that UTF-8 can carry.

    Begin, end, padding and the roles are control symbols: no text, not even one that spells them out, yields their ids.
    """

    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocabulary: int = self._processor.vocab_size()
        self.begin_id, self.end_id, self.pad_id = (self._processor.piece_to_id(name) for name in (BEGIN, END, PAD))
        self.mask_id: int = self._processor.piece_to_id(UNKNOWN)
        """What hides a token from a masked or prefix model."""
        self.system_id, self.user_id, self.assistant_id = (self._processor.piece_to_id(name) for name in ROLES)
        self.control_ids: frozenset[int] = frozenset(self._processor.piece_to_id(name) for name in CONTROLS)
        """What no text yields; `decode` leaves it out."""
        self.digest: str = _digest(self._processor)
        """sha256 over pieces, scores, their types and the rewriting; not over the file, which tells how it was made."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open a tokenizer folder. Raises `ArtifactError` when there is none, `CorruptArtifactError` when it was changed."""
        folder = Path(folder)
        try:
            settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            tokenizer = cls((folder / MODEL).read_bytes())
        except FileNotFoundError as error:
            raise ArtifactError(f"{folder} holds no tokenizer: {Path(error.filename).name} is missing") from None
        except (ValueError, RuntimeError) as error:
            raise CorruptArtifactError(
                f"the tokenizer in {folder} cannot be read ({' '.join(str(error).split())}): rebuild or copy it again"
            ) from error
        if not isinstance(settings, dict) or settings.get("digest") != tokenizer.digest:
            raise CorruptArtifactError(
                f"{folder / MODEL} is not what {SETTINGS} describes: rebuild or copy the tokenizer again"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises `TokenizerError` for half a surrogate pair, which has no UTF-8."""
        try:
            ids: list[int] = self._processor.encode(escape(text))
        except (RuntimeError, TypeError):
            _refuse_surrogates([text])
            raise
        return ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of many texts, computed in parallel. Raises as `encode` does."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Iterable[str]) -> list[npt.NDArray[np.int32]]:
        """As `encode_batch`, with an array per text."""
        texts = list(texts)
        try:
            arrays: list[npt.NDArray[np.int32]] = self._processor.encode([escape(text) for text in texts], out_type="numpy")
        except (RuntimeError, TypeError):
            _refuse_surrogates(texts)
            raise
        return arrays

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; U+FFFD for bytes that are no UTF-8, as at a cut. Raises `TokenizerError` for unknown ids."""
        spelled = [int(token) for token in ids if token not in self.control_ids]
        for token in spelled:
            if not 0 <= token < self.vocabulary:
                raise TokenizerError(
                    f"token id {token} is outside this tokenizer's vocabulary of {self.vocabulary}: "
                    "decode with the tokenizer that made it"
                )
        return unescape(self._processor.decode(spelled))

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
    digest = hashlib.sha256(f"rewriting {_REWRITING}".encode())
    for token in range(processor.vocab_size()):
        piece = processor.id_to_piece(token).encode()
        kind = (processor.is_unknown(token), processor.is_control(token), processor.is_unused(token), processor.is_byte(token))
        digest.update(struct.pack("<I4?f", len(piece), *kind, processor.get_score(token)) + piece)
    return digest.hexdigest()


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for number, text in enumerate(texts):
        if match := _SURROGATE.search(text):
            where = f" of text {number + 1} of {len(texts)}" if len(texts) > 1 else ""
            raise TokenizerError(
                f"character {match.start() + 1}{where} is half a surrogate pair (U+{ord(match.group()):04X}), "
                "which has no UTF-8: remove or replace it"
            ) from None
