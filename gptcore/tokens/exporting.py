"""A tokenizer folder -> the files that `transformers.AutoTokenizer` opens, with the same ids for every text."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors

from gptcore.artifacts import write_json
from gptcore.tokens.imported import ImportedTokenizer
from gptcore.tokens.learned import BEGIN, CONTROLS, END, ESCAPE, HIGH_BLOCK, INDENT, LOW_BLOCK, PAD, ROLES, UNKNOWN
from gptcore.tokens.pieces import NORMAL, Pieces, read_pieces
from gptcore.tokens.tokenizer import MODEL, Tokenizer

_SPACE, _LESS = "\u2581", "\u2585"
"""A space in a piece; `<` in a piece of the unigram algorithm, which finds the names of bytes and control symbols in a text
that spells them, did the text not hold something else there. No rewritten text holds either sign."""


def export_tokenizer(folder: Path, target: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `target`; those of an imported tokenizer as they came.

    There, as is usual, a text that spells a control symbol yields it, unless it is asked for `split_special_tokens=True`, and
    begin is put before a text, unless it is asked for `add_special_tokens=False`. Raises as `Tokenizer.load` does.
    """
    tokenizer = Tokenizer.load(folder)
    target.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, ImportedTokenizer):
        (target / "tokenizer.json").write_bytes(tokenizer.model)
        write_json(target / "tokenizer_config.json", tokenizer.settings["transformers"])
        return
    exported = converted(read_pieces((folder / MODEL).read_bytes()))
    (target / "tokenizer.json").write_text(exported.to_str(pretty=True), encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END, "pad_token": PAD,
        "unk_token": UNKNOWN, "mask_token": UNKNOWN, "additional_special_tokens": list(ROLES),
        "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    write_json(target / "tokenizer_config.json", settings)


def converted(learned: Pieces) -> tokenizers.Tokenizer:
    """A learned tokenizer as one of the tokenizers library."""
    names = {piece.text for piece in learned.pieces if piece.type == NORMAL}
    less = _LESS if "<" in names else "<0x3C>"
    if learned.algorithm == "unigram":
        scored = [
            (piece.text.replace("<", less) if piece.type == NORMAL else piece.text, piece.score) for piece in learned.pieces
        ]
        model: models.Model = models.Unigram(scored, unk_id=0, byte_fallback=True)
    else:
        model = bpe(learned, UNKNOWN)
    exported = tokenizers.Tokenizer(model)
    exported.normalizer = normalizers.Sequence(_escaping(less if learned.algorithm == "unigram" else "<"))
    exported.decoder = decoders.Sequence(_unescaping())
    exported.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in CONTROLS])
    begin = exported.token_to_id(BEGIN)
    exported.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, begin)]
    )
    return exported


def bpe(learned: Pieces, unknown: str) -> models.BPE:
    """Merges of all pairs of pieces that make a piece, those of the better piece first."""
    normal = {piece.text: piece.score for piece in learned.pieces if piece.type == NORMAL}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(normal, key=lambda piece: -normal[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    vocabulary = {piece.text: token for token, piece in enumerate(learned.pieces)}
    return models.BPE(vocabulary, merges, unk_token=unknown, byte_fallback=learned.byte_fallback, fuse_unk=True)


def _escaping(less: str) -> list[normalizers.Normalizer]:
    """What `escape` does, then what sentencepiece does, then `<`."""
    steps = [(ESCAPE, ESCAPE * 2), *((sign, ESCAPE + sign) for sign in (INDENT, LOW_BLOCK, HIGH_BLOCK))]
    steps += [("\u2581", LOW_BLOCK), ("\u2585", HIGH_BLOCK)]
    rest = [(" ", _SPACE), ("<", less)] if less != "<" else [(" ", _SPACE)]
    return [
        *(normalizers.Replace(*step) for step in steps),
        normalizers.Replace(Regex(" (?= )"), INDENT),
        *(normalizers.Replace(*step) for step in rest),
    ]


def _unescaping() -> list[decoders.Decoder]:
    """What `unescape` does. Signs that are free by then keep escaped ones apart from those that are not."""
    return [
        decoders.Replace(_SPACE, " "), decoders.Replace(_LESS, "<"), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Replace(ESCAPE * 2, "\u2581\u2581"),
        decoders.Replace(Regex(f"(?<!{ESCAPE}){INDENT}"), " "),
        decoders.Replace(Regex(f"(?<!{ESCAPE}){LOW_BLOCK}"), "\u2581\u2585"),
        decoders.Replace(Regex(f"(?<!{ESCAPE}){HIGH_BLOCK}"), "\u2585\u2585"),
        decoders.Replace(Regex(f"{ESCAPE}(?=[{INDENT}{LOW_BLOCK}{HIGH_BLOCK}])"), ""),
        decoders.Replace("\u2581\u2581", ESCAPE), decoders.Replace("\u2581\u2585", "\u2581"),
        decoders.Replace("\u2585\u2585", "\u2585"),
    ]  # fmt: skip
