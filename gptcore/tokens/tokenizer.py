"""The tokenizer: text into token ids and back, whatever cuts the text.

    LearnedTokenizer    sentencepiece, learned from a corpus: every text comes back
    ImportedTokenizer   what an imported model came with: byte-level BPE, WordPiece and others (library: tokenizers)

A tokenizer folder is two files: `tokenizer.json` says what it is, `tokenizer.model` holds it.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptcore.errors import ArtifactError, CorruptArtifactError, TokenizerError

MODEL, SETTINGS = "tokenizer.model", "tokenizer.json"
IMPORTED = "tokenizers"
"""The `backend` in the settings of an imported one; those of a learned one have none."""
Ids = npt.NDArray[np.int32]
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer(ABC):
    """A tokenizer, opened with `Tokenizer.load`.

    Begin, end, padding and the roles are control symbols: no text, not even one that spells them out, yields their ids.
    """

    vocabulary: int
    """Number of ids. Of an imported one that is the rows of its model's table, the last of which may stand for nothing."""
    begin_id: int
    end_id: int
    pad_id: int
    system_id: int
    user_id: int
    assistant_id: int
    control_ids: frozenset[int]
    """What no text yields; `decode` leaves it out."""
    digest: str
    """sha256 over all that decides which ids a text has."""
    ends_texts: bool = False
    """Whether a text that stands alone is read with `end_id` behind it, as BERT's tokenizer does."""
    lossless: bool
    """Whether `decode(encode(text)) == text` for every string that UTF-8 can carry."""
    _mask_id: int | None

    @staticmethod
    def load(folder: Path) -> "Tokenizer":
        """Open a tokenizer folder. Raises `ArtifactError` when there is none, `CorruptArtifactError` when it was changed."""
        folder = Path(folder)
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            tokenizer = _open((folder / MODEL).read_bytes(), settings if isinstance(settings, dict) else {})
        except FileNotFoundError as error:
            raise ArtifactError(f"{folder} holds no tokenizer: {Path(error.filename).name} is missing") from None
        except (ValueError, RuntimeError, TokenizerError) as error:
            raise CorruptArtifactError(
                f"the tokenizer in {folder} cannot be read ({' '.join(str(error).split())}): rebuild or copy it again"
            ) from error
        if not isinstance(settings, dict) or settings.get("digest") != tokenizer.digest:
            raise CorruptArtifactError(
                f"{folder / MODEL} is not what {SETTINGS} describes: rebuild or copy the tokenizer again"
            )
        return tokenizer

    @property
    def has_mask(self) -> bool:
        """Whether there is a `mask_id`."""
        return self._mask_id is not None

    @property
    def mask_id(self) -> int:
        """What hides a token from a masked or prefix model. Raises `TokenizerError` where nothing does."""
        if self._mask_id is None:
            raise TokenizerError(
                "this tokenizer has no symbol that hides a token, which the masked and the prefix objective need: "
                "take the causal objective, or a model with a mask"
            )
        return self._mask_id

    def document(self, ids: Iterable[int]) -> list[int]:
        """Ids of a text among others, with what begins and what ends it. Where that is one symbol, as GPT-2 has it, it stands
        before the text only: that of the next text ends this one."""
        return [self.begin_id, *ids, *([self.end_id] if self.end_id != self.begin_id else [])]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises `TokenizerError` for half a surrogate pair, which has no UTF-8."""
        try:
            return self._encode(text)
        except (RuntimeError, TypeError, UnicodeError):
            _refuse_surrogates([text])
            raise

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of many texts, computed in parallel. Raises as `encode` does."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Iterable[str]) -> list[Ids]:
        """As `encode_batch`, with an array per text."""
        texts = list(texts)
        try:
            return self._encode_arrays(texts)
        except (RuntimeError, TypeError, UnicodeError):
            _refuse_surrogates(texts)
            raise

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; U+FFFD for bytes that are no UTF-8, as at a cut. Raises `TokenizerError` for unknown ids."""
        spelled = [int(token) for token in ids if token not in self.control_ids]
        for token in spelled:
            if not 0 <= token < self.vocabulary:
                raise TokenizerError(
                    f"token id {token} is outside this tokenizer's vocabulary of {self.vocabulary}: "
                    "decode with the tokenizer that made it"
                )
        return self._decode(spelled)

    @abstractmethod
    def piece(self, token: int) -> str:
        """What a token stands for: its text, `<0x41>` for a byte, the name of a control symbol."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a tokenizer folder; equal pieces give equal bytes."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _encode_arrays(self, texts: list[str]) -> list[Ids]: ...

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


def _open(model: bytes, settings: dict[str, Any]) -> Tokenizer:
    # Each loads the library that only it needs.
    if settings.get("backend") == IMPORTED:
        from gptcore.tokens.imported import ImportedTokenizer

        return ImportedTokenizer(model, settings)
    from gptcore.tokens.learned import LearnedTokenizer

    return LearnedTokenizer(model)


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for number, text in enumerate(texts):
        if match := _SURROGATE.search(text):
            where = f" of text {number + 1} of {len(texts)}" if len(texts) > 1 else ""
            raise TokenizerError(
                f"character {match.start() + 1}{where} is half a surrogate pair (U+{ord(match.group()):04X}), "
                "which has no UTF-8: remove or replace it"
            ) from None
