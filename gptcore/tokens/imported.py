"""The tokenizer of an imported model: byte-level BPE, WordPiece and whatever else a `tokenizer.json` of Hugging Face says.

The file is kept as it came. What reads text is made of it in memory, where the control symbols have names that no text
spells: theirs would be found in a text that spells them out, be it as a piece or as the product of a merge.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from gptcore.artifacts import write_json
from gptcore.errors import TokenizerError
from gptcore.tokens.tokenizer import IMPORTED, MODEL, SETTINGS, Ids, Tokenizer

_HIDDEN = "\0"
"""Before the name of a control symbol, in memory."""


class ImportedTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library and which of its tokens mean what.

    `settings`: `vocabulary`, `controls` (begin, end, pad and, where there are, mask and roles -> id) and `transformers`, its
    settings there. It may lower letters, drop white space or turn signs into `[UNK]`, see `lossless`. Without roles, what a
    task asks stands between begin and end. Raises `TokenizerError` for what is no tokenizer.
    """

    def __init__(self, model: bytes, settings: Mapping[str, Any]) -> None:
        self.model, self.settings = model, {key: value for key, value in settings.items() if key != "digest"}
        """The file as it came, and what is written beside it."""
        described = read(model)
        try:
            self.vocabulary = int(settings["vocabulary"])
            ids: dict[str, int] = {name: int(token) for name, token in settings["controls"].items()}
            self.begin_id, self.end_id, self.pad_id = ids["begin"], ids["end"], ids["pad"]
        except (KeyError, TypeError, AttributeError) as error:
            raise TokenizerError(f"its settings lack {error}") from error
        self._mask_id = ids.get("mask")
        self.system_id, self.user_id = ids.get("system", self.begin_id), ids.get("user", self.begin_id)
        self.assistant_id = ids.get("assistant", self.end_id)
        special = {token["id"] for token in described["added_tokens"] if token["special"]}
        # A text may well hold what is unknown; where nothing else ends it, that symbol does, and is left out of texts.
        self.control_ids = frozenset(special - {unknown_id(described)} | set(ids.values()))
        self._leaves_out = unknown_id(described) in self.control_ids
        self._tokenizer = parse(json.dumps(_hidden(described, self.control_ids)).encode())
        # Neither of them adds anything: what is around a text is not the tokenizer's to decide.
        self._tokenizer.encode_special_tokens = True
        self.ends_texts = parse(model).encode("").ids == [self.begin_id, self.end_id]
        self._byte_level = _is_byte_level(described)
        self.lossless = self._byte_level and _keeps_all(described)
        self._plain = {token["id"] for token in described["added_tokens"]}
        self.digest = hashlib.sha256(model + json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def _encode(self, text: str) -> list[int]:
        return self._of_text(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _encode_arrays(self, texts: list[str]) -> list[Ids]:
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(self._of_text(each.ids), np.int32) for each in encoded]

    def _of_text(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token not in self.control_ids] if self._leaves_out else ids

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def piece(self, token: int) -> str:
        """What a token stands for: its text, `<0x41>` for a byte of a character, the name of a control symbol, or nothing."""
        name = self._tokenizer.id_to_token(token) or ""
        if token in self.control_ids or token in self._plain or not self._byte_level:
            return name.removeprefix(_HIDDEN).replace("\u2581", " ")
        spelled = bytes(_bytes_of_signs()[sign] for sign in name)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in spelled)

    def save(self, folder: Path) -> None:
        """Write a tokenizer folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL).write_bytes(self.model)
        write_json(folder / SETTINGS, {**self.settings, "backend": IMPORTED, "digest": self.digest})


@contextmanager
def refusing() -> Iterator[None]:
    """Make what the library raises inside of the block, panics of Rust among it, one `TokenizerError`."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"what it holds is no tokenizer ({' '.join(str(error).split())[:200]})") from error
        raise


def parse(model: bytes) -> tokenizers.Tokenizer:
    """A tokenizer of the library. Raises `TokenizerError`."""
    with refusing():
        tokenizer = tokenizers.Tokenizer.from_buffer(model)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def read(model: bytes) -> dict[str, Any]:
    """What a `tokenizer.json` says, with all that the library adds to it. Raises `TokenizerError` as `parse` does."""
    described: dict[str, Any] = json.loads(parse(model).to_str())
    return described


def unknown_id(described: Mapping[str, Any]) -> int | None:
    """What a text yields for what has no piece."""
    model = described["model"]
    known = isinstance(model["vocab"], dict)
    unknown: int | None = model["vocab"].get(model.get("unk_token")) if known else model.get("unk_id")
    return unknown


def _hidden(described: Mapping[str, Any], controls: Iterable[int]) -> dict[str, Any]:
    """The same tokenizer with control symbols that no text spells, and nothing put around a text."""
    controls = set(controls)
    model = dict(described["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [
            [_HIDDEN + piece if at in controls else piece, score] for at, (piece, score) in enumerate(model["vocab"])
        ]
    else:
        names = {piece for piece, at in model["vocab"].items() if at in controls}
        model["vocab"] = {_HIDDEN * (piece in names) + piece: at for piece, at in model["vocab"].items()}
        if model.get("unk_token") in names:
            model["unk_token"] = _HIDDEN + model["unk_token"]
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if not names & {*pair, "".join(pair)}]
    added = [
        {**each, "content": _HIDDEN + each["content"], "special": True} if each["id"] in controls else each
        for each in described["added_tokens"]
    ]
    return {**described, "model": model, "added_tokens": added, "post_processor": None}


def _parts(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A step of a tokenizer and those inside of it."""
    if step is None:
        return []
    inner: list[Mapping[str, Any]] = next(
        (step[key] for key in ("normalizers", "pretokenizers", "decoders") if key in step), []
    )
    return [step, *(part for each in inner for part in _parts(each))]


def _is_byte_level(described: Mapping[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(described["pre_tokenizer"]) + _parts(described["normalizer"]))


def _keeps_all(described: Mapping[str, Any]) -> bool:
    """Whether a byte-level tokenizer changes nothing before it and has all bytes."""
    pieces = described["model"]["vocab"]
    steps = _parts(described["pre_tokenizer"])
    return (
        described["normalizer"] is None
        and [part["type"] for part in _parts(described["decoder"])] == ["ByteLevel"]
        and {part["type"] for part in steps} <= {"ByteLevel", "Sequence", "Split", "Digits"}
        and not any(part.get("add_prefix_space") or part.get("behavior") == "Removed" for part in steps)
        and not any(token["lstrip"] or token["rstrip"] for token in described["added_tokens"] if not token["special"])
        and isinstance(pieces, dict)
        and _bytes_of_signs().keys() <= pieces.keys()
    )


@cache
def _bytes_of_signs() -> dict[str, int]:
    """The signs that byte-level pieces are written with: what can be printed is itself, the rest follows U+0100 (GPT-2)."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
