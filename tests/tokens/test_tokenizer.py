import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptcore.config import TokenizerConfig
from gptcore.errors import ArtifactError, CorruptArtifactError, TokenizerError
from gptcore.tokens import Tokenizer
from gptcore.tokens.learned import CONTROLS, escape, unescape
from gptcore.tokens.learning import train

CODE = "def area{n}(width, height):\n    # {n} sides\n    if width < {n}:\n        return 0\n\treturn width * height"
TEXTS = [CODE.replace("{n}", str(n)) for n in range(40)]
TEXTS += ["话说天下大势，分久必合，合久必分。", "Ein schöner Tag, naïve café ▁ ▅ 🙂"] * 20

# What tokenizers stumble over: their own space and reserved signs, our stand-ins, white space, invisible and unassigned signs.
TRICKY = (
    "\u2581\u2585\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4 \t\n\r\v\f\0\x1f\x7f\x85\xa0\u2028\u2047\u3000\ufeff"
    "\ue000\uffff\U000e0001\U0010ffff\u0301e汉🙂a"
)
ANY = st.text() | st.text(st.sampled_from(TRICKY)) | st.text(st.sampled_from(" \na"))
FORGED = st.lists(st.sampled_from([*CONTROLS, "<unk>", "<s>", "</s>", "<0x41>", "<|", "|>", " ", "a"])).map("".join)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request) -> Tokenizer:
    return train(TEXTS, TokenizerConfig(vocabulary=370, algorithm=request.param))


@settings(max_examples=300, deadline=None)
@given(ANY)
@example("".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)])))
def test_decoding_what_was_encoded_gives_the_same_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(ANY, st.data())
def test_every_part_of_the_tokens_decodes(tokenizer, text, data):
    ids = tokenizer.encode(text)
    start = data.draw(st.integers(0, len(ids)))
    assert isinstance(tokenizer.decode(ids[start : data.draw(st.integers(start, len(ids)))]), str)


@settings(deadline=None)
@given(st.lists(ANY, max_size=5))
def test_a_batch_is_encoded_like_its_texts(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@settings(deadline=None)
@given(FORGED)
def test_no_text_yields_a_control_symbol(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not tokenizer.control_ids & set(ids)
    assert tokenizer.decode(ids) == text


@settings(deadline=None)
@given(st.text(st.sampled_from(TRICKY)))
def test_rewriting_is_undone_and_undoing_never_fails(text):
    assert unescape(escape(text)) == text
    assert isinstance(unescape(text), str)


def test_control_symbols_have_ids_of_their_own_and_no_text(tokenizer):
    names = (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id)
    roles = (tokenizer.system_id, tokenizer.user_id, tokenizer.assistant_id)
    assert len({*names, *roles}) == 6
    assert {*names, *roles} < tokenizer.control_ids
    assert tokenizer.decode([tokenizer.begin_id, *tokenizer.encode("a b"), tokenizer.end_id]) == "a b"
    assert tokenizer.decode(tokenizer.control_ids) == ""


def test_what_has_no_piece_is_spelled_in_its_utf8_bytes(tokenizer):
    ids = tokenizer.encode("龘")
    assert [tokenizer.piece(token) for token in ids] == [f"<0x{byte:02X}>" for byte in "龘".encode()]
    assert all(tokenizer.is_byte(token) for token in ids)


def test_a_line_end_and_its_indentation_can_be_one_token(tokenizer):
    assert any(
        tokenizer.piece(token).startswith(("\n  ", ":\n  ")) for token in tokenizer.encode("    if width:\n        return")
    )


def test_half_a_surrogate_pair_is_named_with_its_place(tokenizer):
    with pytest.raises(TokenizerError, match=r"character 3 is half a surrogate pair \(U\+D83D\)"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(TokenizerError, match=r"character 1 of text 2 of 2 is half"):
        tokenizer.encode_batch(["fine", "\udc80"])


@pytest.mark.parametrize("token", [-1, 370, 2**40])
def test_an_id_outside_the_vocabulary_is_an_error(tokenizer, token):
    with pytest.raises(TokenizerError, match="outside this tokenizer's vocabulary of 370"):
        tokenizer.decode([token])


def test_a_saved_tokenizer_is_the_same_after_loading(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.digest == tokenizer.digest
    assert loaded.vocabulary == tokenizer.vocabulary == 370
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_another_vocabulary_has_another_digest(tokenizer):
    assert train(TEXTS, TokenizerConfig(vocabulary=360)).digest != tokenizer.digest


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds no tokenizer: tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)


def test_a_damaged_or_exchanged_model_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    model = tmp_path / "tokenizer.model"
    train(TEXTS, TokenizerConfig(vocabulary=360)).save(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.model").replace(model)
    with pytest.raises(CorruptArtifactError, match=r"tokenizer\.model is not what tokenizer\.json describes"):
        Tokenizer.load(tmp_path)
    model.write_bytes(model.read_bytes()[:-100])
    with pytest.raises(CorruptArtifactError, match="rebuild or copy"):
        Tokenizer.load(tmp_path)
    model.write_bytes(b"")
    with pytest.raises(CorruptArtifactError, match="rebuild or copy"):
        Tokenizer.load(tmp_path)
