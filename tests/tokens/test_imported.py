import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from gptcore.config import MaskingConfig, ModelConfig
from gptcore.errors import ArtifactError, CorruptArtifactError, TokenizerError
from gptcore.tokens import Tokenizer, export_tokenizer, import_tokenizer
from gptcore.tokens.objectives import Symbols, objective

TEXTS = [
    f"The {n}th river runs cold; it's the old one's bed.\n\tdef area{n}(width):\n        return {n} * width" for n in range(60)
]
TEXTS += ["话说天下大势，分久必合，合久必分。", "Ein schöner Tag, naïve café ▁ ▅ 🙂 <0x41> a</w>"] * 20
SIGNS = "\u2581\u2585\ufdd0 \t\n\r\0\x7f\xa0\u2028\u3000\ufeff\U0010ffff\u0301e\u0130汉🙂aA'"
NAMES = ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "<0x41>")
ANY = st.text() | st.text(st.sampled_from(SIGNS)) | st.lists(st.sampled_from([*NAMES, "<", "s>", " ", "a"])).map("".join)


@dataclass
class Family:
    """A tokenizer of Hugging Face, made on the spot, and what opens it there."""

    folder: Path
    theirs: Callable[[str], list[int]]
    controls: dict[str, str | None]
    """What begin, end, pad and mask are."""
    lossless: bool


def byte_level(folder: Path, special: list[str], cls: type, config: dict, **controls: str | None) -> Family:
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS, vocab_size=400, special_tokens=special, show_progress=False)
    made.save_model(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Family(folder, reference(cls.from_pretrained(folder)), controls, not config)


def reference(theirs) -> Callable[[str], list[int]]:
    return lambda text: theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def gpt2(folder: Path) -> Family:
    end = "<|endoftext|>"
    return byte_level(folder, [end], transformers.GPT2Tokenizer, {}, begin=end, end=end, pad=end, mask=None)


def roberta(folder: Path) -> Family:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    return byte_level(folder, special, transformers.RobertaTokenizer, {}, begin="<s>", end="</s>", pad="<pad>", mask="<mask>")


def qwen(folder: Path) -> Family:
    end, config = "<|endoftext|>", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    return byte_level(folder, [end], transformers.Qwen2Tokenizer, config, begin=end, end=end, pad=end, mask=None)


def neox(folder: Path) -> Family:
    """A tokenizer.json with tokens of spaces, which are no symbols, after its symbols."""
    made = byte_level(folder, ["<|endoftext|>", "<|padding|>"], transformers.GPT2Tokenizer, {})
    theirs = transformers.GPTNeoXTokenizer.from_pretrained(made.folder)
    theirs.add_tokens([tokenizers.AddedToken(" " * n, normalized=False) for n in (8, 4, 2)])
    for file in folder.iterdir():
        file.unlink()
    theirs.save_pretrained(folder)
    return Family(folder, reference(theirs), {"begin": "<|endoftext|>", "end": "<|endoftext|>", "mask": None}, False)


def bert(folder: Path) -> Family:
    made = tokenizers.BertWordPieceTokenizer()
    made.train_from_iterator(TEXTS, vocab_size=300, show_progress=False)
    made.save_model(str(folder))
    controls = {"begin": "[CLS]", "end": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
    return Family(folder, reference(transformers.BertTokenizer.from_pretrained(folder)), controls, False)


def gpt1(folder: Path) -> Family:
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    made.model.save(str(folder))
    theirs = reference(transformers.OpenAIGPTTokenizer.from_pretrained(folder))
    # Its only symbol is that for the unknown: it ends a text, and is left out of one.
    unknown = made.token_to_id("<unk>")
    known = {"begin": "<unk>", "end": "<unk>", "pad": "<unk>", "mask": None}
    return Family(folder, lambda text: [token for token in theirs(text) if token != unknown], known, False)


def pieces(folder: Path, **options) -> Family:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, pad_id=3, byte_fallback=True, minloglevel=3, **options
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return Family(folder, processor.encode, {"begin": "<s>", "end": "</s>", "pad": "<pad>", "mask": None}, False)


def llama(folder: Path) -> Family:
    return pieces(
        folder, model_type="bpe", vocab_size=420, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip


def unigram(folder: Path) -> Family:
    return pieces(folder, model_type="unigram", vocab_size=380)


FAMILIES = {made.__name__: made for made in (gpt2, roberta, qwen, neox, bert, gpt1, llama, unigram)}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Family:
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tokenizer(family, tmp_path_factory) -> Tokenizer:
    target = tmp_path_factory.mktemp("imported")
    import_tokenizer(family.folder, target)
    return Tokenizer.load(target)


def names(tokenizer: Tokenizer) -> dict[str, str | None]:
    symbols = {"begin": tokenizer.begin_id, "end": tokenizer.end_id, "pad": tokenizer.pad_id}
    return {
        **{name: tokenizer.piece(token) for name, token in symbols.items()},
        "mask": tokenizer.piece(tokenizer.mask_id) if tokenizer.has_mask else None,
    }


def test_the_ids_are_those_of_transformers_and_sentencepiece(family, tokenizer):
    # With the unigram algorithm the library finds the name of a byte in a text that spells it, sentencepiece does not.
    named = "<0x41>" if family.folder.name.startswith("unigram") else "nothing"
    for text in [
        *(text.replace(named, "") for text in TEXTS),
        "",
        " ",
        "two  spaces\n\n\tand a tab\n",
        "NAÏVE, 12,345.67 €",
        "龘 ab",
    ]:
        assert tokenizer.encode(text) == family.theirs(text), text


def test_only_berts_end_a_text_that_stands_alone(family, tokenizer):
    """What transformers puts around a text, where the folder says it."""
    assert tokenizer.ends_texts == (family.folder.name.rstrip("0123456789") in ("bert", "roberta"))


def test_documents_are_told_apart_by_one_symbol_where_there_is_one(family, tokenizer):
    first, second = (tokenizer.encode(text) for text in ("a text", "another"))
    stream = [*tokenizer.document(first), *tokenizer.document(second)]
    between = (
        [tokenizer.begin_id] if family.controls["begin"] == family.controls["end"] else [tokenizer.end_id, tokenizer.begin_id]
    )
    assert stream == [tokenizer.begin_id, *first, *between, *second, *between[:-1]]


def test_begin_end_pad_and_mask_are_those_of_the_family(family, tokenizer):
    assert names(tokenizer).items() >= family.controls.items()
    assert (tokenizer.user_id, tokenizer.assistant_id) == (tokenizer.begin_id, tokenizer.end_id)
    assert tokenizer.lossless == family.lossless


@settings(max_examples=200, deadline=None)
@given(ANY)
@example("".join(NAMES))
@example(" ".join(NAMES))
def test_no_text_yields_a_control_symbol(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not tokenizer.control_ids & set(ids)
    assert all(0 <= token < tokenizer.vocabulary for token in ids)
    if tokenizer.lossless:
        assert tokenizer.decode([tokenizer.begin_id, *ids, tokenizer.end_id]) == text


@settings(max_examples=30, deadline=None)
@given(st.lists(ANY, max_size=4))
def test_a_batch_is_encoded_like_its_texts(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_every_token_has_a_name_and_decodes(tokenizer):
    for token in range(tokenizer.vocabulary):
        assert tokenizer.piece(token)
        assert isinstance(tokenizer.decode([token]), str)


def test_half_a_surrogate_pair_and_a_foreign_id_are_named(tokenizer):
    with pytest.raises(TokenizerError, match=r"character 3 is half a surrogate pair"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(TokenizerError, match=r"character 1 of text 2 of 2"):
        tokenizer.encode_batch(["fine", "\udc80"])
    with pytest.raises(TokenizerError, match="outside this tokenizer's vocabulary"):
        tokenizer.decode([tokenizer.vocabulary])


def test_exported_again_it_is_the_same_file_and_transformers_gives_the_same_ids(family, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "ours")
    export_tokenizer(tmp_path / "ours", tmp_path / "theirs")
    came = family.folder / "tokenizer.json"
    if came.exists():
        assert (tmp_path / "theirs" / "tokenizer.json").read_bytes() == came.read_bytes()
    again = import_tokenizer(tmp_path / "theirs", tmp_path / "again")
    assert again.model == (tmp_path / "theirs" / "tokenizer.json").read_bytes()
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "theirs")
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.encode(text) == again.encode(text) == [token for token in ids if token not in tokenizer.control_ids]


def test_a_table_larger_than_the_tokenizer_counts_and_a_smaller_one_is_refused(tmp_path):
    folder = gpt2(tmp_path).folder
    (folder / "config.json").write_text('{"vocab_size": 512, "bos_token_id": 0, "eos_token_id": [0, 1]}')
    tokenizer = import_tokenizer(folder, tmp_path / "ours")
    assert tokenizer.vocabulary == 512
    assert (tokenizer.piece(511), tokenizer.decode([511])) == ("", "")
    (folder / "config.json").write_text('{"vocab_size": 300}')
    with pytest.raises(TokenizerError, match=r"has ids up to 399, but the model's table has 300 rows"):
        import_tokenizer(folder, tmp_path / "other")


def test_what_hides_a_token_is_asked_for_in_a_sentence_where_there_is_none(tmp_path):
    tokenizer = import_tokenizer(gpt2(tmp_path).folder, tmp_path / "ours")
    with pytest.raises(TokenizerError, match="no symbol that hides a token"):
        _ = tokenizer.mask_id
    symbols = Symbols.of(tokenizer)
    assert objective(ModelConfig(), MaskingConfig(), symbols, 0).symbols == symbols
    with pytest.raises(TokenizerError, match=r"the prefix objective hides tokens.*set model\.objective to causal"):
        objective(ModelConfig(objective="prefix"), MaskingConfig(), symbols, 0)


def test_a_changed_folder_is_refused(tmp_path):
    import_tokenizer(gpt2(tmp_path).folder, tmp_path / "ours")
    file = tmp_path / "ours" / "tokenizer.model"
    file.write_text(file.read_text().replace('"add_prefix_space":false', '"add_prefix_space":true'))
    with pytest.raises(CorruptArtifactError, match=r"tokenizer\.model is not what tokenizer\.json describes"):
        Tokenizer.load(tmp_path / "ours")
    file.write_text("{}")
    with pytest.raises(CorruptArtifactError, match=r"cannot be read .*no tokenizer"):
        Tokenizer.load(tmp_path / "ours")
    file.unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.model is missing"):
        Tokenizer.load(tmp_path / "ours")


BROKEN = [
    ({}, "there is no tokenizer.json"),
    ({"tokenizer.json": "{"}, "no tokenizer"),
    ({"tokenizer.json": "[]"}, "no tokenizer"),
    ({"tokenizer.json": '{"model": {"type": "Neural"}}'}, "no tokenizer"),
    ({"vocab.json": "[]", "merges.txt": "a b"}, "cannot be read"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "a b"}, "cannot be read"),
    ({"vocab.txt": ""}, "cannot be read"),
    ({"tokenizer.model": "AAAB 0\n"}, "no unigram or bpe model"),
    ({"tokenizer.model": ""}, "no pieces"),
    ({"vocab.txt": "[UNK]\n[CLS]\n[SEP]\na", "tokenizer_config.json": "{"}, "tokenizer_config.json cannot be read"),
    ({"vocab.txt": "[UNK]\n[CLS]\n[SEP]\na", "config.json": "[]"}, "config.json holds no settings"),
    ({"vocab.txt": "[CLS]\n[SEP]\na"}, "no tokenizer .*UNK"),
    ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "none of its symbols begins or ends a text"),
]


@pytest.mark.parametrize(("files", "reason"), BROKEN)
def test_a_broken_folder_is_one_sentence(tmp_path, files, reason):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(TokenizerError, match=reason) as error:
        import_tokenizer(tmp_path, tmp_path / "ours")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_code_and_pickles_in_the_folder_are_left_alone(tmp_path):
    folder = gpt2(tmp_path).folder
    (folder / "tokenization.py").write_text("raise SystemExit")
    (folder / "tokenizer.pkl").write_bytes(b"cbuiltins\nexit\n(tR.")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization.X", null]}}')
    import_tokenizer(folder, tmp_path / "ours")
    export_tokenizer(tmp_path / "ours", tmp_path / "theirs")
    assert "auto_map" not in (tmp_path / "theirs" / "tokenizer_config.json").read_text()
