"""A Hugging Face folder -> a tokenizer folder. Files are data: nothing in them is executed, pickles and code are not opened."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from gptcore.errors import TokenizerError
from gptcore.tokens.exporting import bpe
from gptcore.tokens.imported import ImportedTokenizer, read, refusing, unknown_id
from gptcore.tokens.pieces import CONTROL, UNKNOWN, USER_DEFINED, read_pieces
from gptcore.tokens.tokenizer import IMPORTED, MODEL

_ENDS = ("<|endoftext|>", "<|end_of_text|>")
_KNOWN = {
    "begin": ("bos_token", "cls_token", ("<s>", "[CLS]", "<|begin_of_text|>", *_ENDS)),
    "end": ("eos_token", "sep_token", ("</s>", "[SEP]", *_ENDS)),
    "pad": ("pad_token", None, ("<pad>", "[PAD]")),
    "mask": ("mask_token", None, ("<mask>", "[MASK]")),
}
"""What settings call a symbol, what BERT's do, and how tokenizers that have no settings name it."""
_ROLES = ("system", "user", "assistant")
_UNKNOWN = ("<unk>", "[UNK]")
_PROBE = "A text 数 \U0010ffff\n"
"""Some faults show only when a text is read, such as a symbol for the unknown that is not there."""
_QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen cuts a text before its merges."""


def import_tokenizer(source: Path, target: Path) -> ImportedTokenizer:
    """Write the tokenizer of a Hugging Face folder into `target`.

    It is read from tokenizer.json, or else from vocab.json and merges.txt, vocab.txt or sentencepiece's tokenizer.model; what
    its symbols mean, from tokenizer_config.json, special_tokens_map.json and config.json. Raises `TokenizerError`.
    """
    settings = {**_settings(source / "special_tokens_map.json"), **_settings(source / "tokenizer_config.json")}
    settings.pop("auto_map", None)  # names code that lies beside
    config = _settings(source / "config.json")
    try:
        model = _read(source, settings, config)
        described = read(model)
        ids = _ids(described)
        controls = _controls(described, ids, settings, config)
        rows = config["vocab_size"] if isinstance(config.get("vocab_size"), int) else 0
        if 0 < rows <= max(ids.values()):
            raise TokenizerError(f"it has ids up to {max(ids.values())}, but the model's table has {rows} rows")
        written = {
            "backend": IMPORTED, "vocabulary": max(rows, 1 + max(ids.values())), "controls": controls, "transformers": settings,
        }  # fmt: skip
        with refusing():
            tokenizer = ImportedTokenizer(model, written)
            tokenizer.encode(_PROBE)
    except TokenizerError as error:
        raise TokenizerError(f"the tokenizer in {source} cannot be imported: {error}") from error
    tokenizer.save(target)
    return tokenizer


def _settings(file: Path) -> dict[str, Any]:
    """Settings in a JSON file; none where there is none. Raises `TokenizerError`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair could not be written again
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} cannot be read ({str(error).splitlines()[0]}): fetch it again") from error
    if not isinstance(found, dict):
        raise TokenizerError(f"{file} holds no settings: fetch it again")
    return found


def _ids(described: Mapping[str, Any]) -> dict[str, int]:
    """Every token and its id."""
    vocabulary = described["model"]["vocab"]
    pieces = dict(vocabulary) if isinstance(vocabulary, dict) else {piece: at for at, (piece, _) in enumerate(vocabulary)}
    return pieces | {token["content"]: token["id"] for token in described["added_tokens"]}


# ------------------------------------------------------------------------------------------------ what symbols mean --


def _controls(
    described: Mapping[str, Any], ids: Mapping[str, int], settings: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, int]:
    """Ids of begin, end and pad, and of mask and roles where there are some."""
    special = {token["content"]: token["id"] for token in described["added_tokens"] if token["special"]}
    found: dict[str, int] = {}
    for symbol, (called, otherwise, usual) in _KNOWN.items():
        named = [_name(settings.get(key)) for key in (called, otherwise) if key]
        given = config.get(f"{called}_id")
        given = given if isinstance(given, list) else [given]
        candidates = [ids.get(name) for name in named if name]
        candidates += [*(each for each in given if each in special.values()), *(special.get(name) for name in usual)]
        if (token := next((each for each in candidates if each is not None), None)) is not None:
            found[symbol] = token
    # What ends a text can begin the next one; GPT-1 has only its symbol for what is unknown.
    around = found.get("end", found.get("begin", unknown_id(described)))
    if around is None:
        raise TokenizerError("none of its symbols begins or ends a text: name eos_token in tokenizer_config.json")
    end = found.get("end", around)
    roles = {role: special[f"<|{role}|>"] for role in _ROLES if f"<|{role}|>" in special}
    return {**found, "begin": found.get("begin", end), "end": end, "pad": found.get("pad", end), **roles}


def _name(token: Any) -> str | None:
    """A token in settings is its text or says it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


# ------------------------------------------------------------------------------------------------- forms of the file --


def _read(source: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> bytes:
    """The tokenizer as a `tokenizer.json`."""
    forms: dict[tuple[str, ...], Callable[[Path, Mapping[str, Any], Mapping[str, Any]], bytes]] = {
        ("tokenizer.json",): lambda folder, *_: (folder / "tokenizer.json").read_bytes(),
        ("vocab.json", "merges.txt"): _from_merges,
        ("vocab.txt",): _from_words,
        (MODEL,): _from_sentencepiece,
    }
    for names, form in forms.items():
        if all((source / name).is_file() for name in names):
            try:
                return form(source, settings, config)
            except TokenizerError:
                raise
            except Exception as error:  # the library raises no other type
                raise TokenizerError(f"{' and '.join(names)} cannot be read ({' '.join(str(error).split())[:200]})") from error
    raise TokenizerError("there is no tokenizer.json, no vocab.json with merges.txt, no vocab.txt and no tokenizer.model")


def _from_merges(source: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> bytes:
    """vocab.json and merges.txt of GPT-1, of GPT-2 and RoBERTa, and of Qwen."""
    vocabulary, merges = models.BPE.read_file(str(source / "vocab.json"), str(source / "merges.txt"))
    if any(piece.endswith("</w>") for piece in vocabulary):
        made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.BPEDecoder(suffix="</w>")
        return _with_special(made, settings)
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    qwen = "qwen" in str(settings.get("tokenizer_class", config.get("model_type", ""))).lower()
    cuts = [pre_tokenizers.Split(Regex(_QWEN), "isolated")] if qwen else []
    prefix = bool(settings.get("add_prefix_space"))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=prefix and not qwen, use_regex=not qwen)
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, whole]) if cuts else whole
    if qwen:
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    if {"<s>", "</s>"} <= vocabulary.keys():
        begin, end = (("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"]))
        made.post_processor = processors.RobertaProcessing(end, begin, trim_offsets=True, add_prefix_space=prefix)
    else:
        made.post_processor = processors.ByteLevel(trim_offsets=False)
    return _with_special(made, settings)


def _from_words(source: Path, settings: Mapping[str, Any], _: Mapping[str, Any]) -> bytes:
    """vocab.txt of BERT, a word or the rest of one on every line."""
    vocabulary = models.WordPiece.read_file(str(source / "vocab.txt"))
    made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    made.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=settings.get("strip_accents"), lowercase=bool(settings.get("do_lower_case", True)),
    )  # fmt: skip
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(prefix="##")
    around = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", around)
    return _with_special(made, settings)


def _from_sentencepiece(source: Path, settings: Mapping[str, Any], _: Mapping[str, Any]) -> bytes:
    """tokenizer.model of sentencepiece, as Llama has it."""
    learned = read_pieces((source / MODEL).read_bytes())
    unknown = next((at for at, piece in enumerate(learned.pieces) if piece.type == UNKNOWN), None)
    if unknown is None:
        raise TokenizerError(f"{MODEL} has no piece for what is unknown")
    if learned.algorithm == "unigram":
        scored = [(piece.text, piece.score) for piece in learned.pieces]
        made = tokenizers.Tokenizer(models.Unigram(scored, unknown, learned.byte_fallback))
    else:
        made = tokenizers.Tokenizer(bpe(learned, learned.pieces[unknown].text))
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(learned.normalisation)] if learned.normalisation else []
    if learned.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend("\u2581")] if learned.add_dummy_prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    undone: list[decoders.Decoder] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*undone, decoders.Strip(" ", 1, 0)] if learned.add_dummy_prefix else undone)
    special = [piece.text for piece in learned.pieces if piece.type in (UNKNOWN, CONTROL)]
    made.add_tokens([AddedToken(piece.text, normalized=False) for piece in learned.pieces if piece.type == USER_DEFINED])
    return _with_special(made, settings, special)


def _with_special(made: tokenizers.Tokenizer, settings: Mapping[str, Any], more: Sequence[str] = ()) -> bytes:
    """The file of a tokenizer whose symbols are those of its settings, and of the usual names those that it has."""
    usual: Iterable[str] = (*(name for *_, names in _KNOWN.values() for name in names), *_UNKNOWN, *more)
    added = settings.get("added_tokens_decoder")
    ordered = sorted(added.items(), key=lambda each: int(each[0])) if isinstance(added, dict) else []
    for _, token in ordered:
        fields = {key: token[key] for key in ("lstrip", "rstrip", "single_word", "normalized", "special") if key in token}
        made.add_tokens([AddedToken(token["content"], **fields)])
    named = [_name(settings.get(key)) for key in (*(key for *keys, _ in _KNOWN.values() for key in keys if key), "unk_token")]
    known = [name for name in (*named, *usual) if name and made.token_to_id(name) is not None]
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in dict.fromkeys(known)])
    return made.to_str().encode()
