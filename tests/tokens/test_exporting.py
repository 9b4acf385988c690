import json
import pkgutil
import random
import re
from pathlib import Path

import numpy
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptcore.config import TokenizerConfig
from gptcore.tokens import Tokenizer, export_tokenizer, import_tokenizer
from gptcore.tokens.learned import CONTROLS
from gptcore.tokens.learning import train

TRICKY = (
    "\u2581\u2585\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4 \t\n\r\v\f\0\x1f\x7f\x85\xa0\u2028\u2047\u3000\ufeff"
    "\ue000\uffff\U000e0001\U0010ffff\u0301e汉🙂a"
)
FORGED = st.lists(st.sampled_from([*CONTROLS, "<unk>", "<s>", "<0x41>", "<0x", "41>", "<", "|>", " ", "  ", "a"])).map("".join)
ANY = st.text() | st.text(st.sampled_from(TRICKY)) | st.text(st.sampled_from(" \na<")) | FORGED
CLASSIC = "话说天下大势分久必合合久必分周末七国分争并入于秦及秦灭之后楚汉分争又并入于汉汉朝自高祖斩白蛇而起义一统天下"
# Beside a qwen2 model transformers reads any file as one of Qwen's: such a model of our own is refused when it is exported.
KINDS = ("gpt2", "llama", "mistral", "qwen3", "gpt_neo", "gpt_neox", "bert", "roberta", "openai-gpt")


def english(count: int) -> list[str]:
    """Lines of the Python code that numpy and transformers are."""
    files = [
        Path(root) / f"{module}.py"
        for root in numpy.__path__
        for module in ("ma/core", "lib/_function_base_impl", "_core/fromnumeric")
    ]
    roots = [Path(path) for path in transformers.__path__]
    files += [
        root / "models" / name.name / f"modeling_{name.name}.py"
        for root in roots
        for name in pkgutil.iter_modules([str(root / "models")])
    ]
    lines = (line for file in files if file.is_file() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return [line for line, _ in zip(lines, range(count), strict=False)]


def chinese(count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(CLASSIC, k=draw.randint(4, 40))) + draw.choice("，。？！") for _ in range(count)]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def ours(request, tmp_path_factory) -> tuple[Tokenizer, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train([*english(3000), *chinese(500)], TokenizerConfig(vocabulary=1500, algorithm=request.param))
    tokenizer.save(folder / "ours")
    export_tokenizer(folder / "ours", folder / "theirs")
    return tokenizer, folder


@pytest.fixture(scope="module")
def theirs(ours):
    return transformers.AutoTokenizer.from_pretrained(ours[1] / "theirs")


def plain(theirs, text: str) -> list[int]:
    return theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@settings(max_examples=500, deadline=None)
@given(ANY)
@example("<0x41> <|begin|> \u2585 <\u2585>")
@example("\ufdd0\ufdd0\ufdd1  \ufdd0\ufdd2\ufdd3\u2581\u2585\u2585  ")
def test_transformers_gives_the_same_ids_for_every_text_and_the_text_back(ours, theirs, text):
    ids = plain(theirs, text)
    assert ids == ours[0].encode(text)
    assert theirs.decode(ids) == text


def test_without_a_piece_for_less_than_it_is_a_byte(tmp_path):
    tokenizer = train([line for line in english(2000) if "<" not in line], TokenizerConfig(vocabulary=400))
    tokenizer.save(tmp_path / "ours")
    export_tokenizer(tmp_path / "ours", tmp_path / "theirs")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    for text in ("<", "a<b", "<0x41><", "\u2585 <<a"):
        assert (plain(theirs, text), theirs.decode(plain(theirs, text))) == (tokenizer.encode(text), text)


def test_begin_comes_first_and_symbols_are_symbols(ours, theirs):
    tokenizer = ours[0]
    assert theirs("a b")["input_ids"] == [tokenizer.begin_id, *tokenizer.encode("a b")]
    spelled = theirs("<|user|>a b<|assistant|>", add_special_tokens=False)["input_ids"]
    assert spelled == [tokenizer.user_id, *tokenizer.encode("a b"), tokenizer.assistant_id]
    assert theirs.decode([tokenizer.begin_id, *spelled], skip_special_tokens=True) == "a b"
    found = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id)
    assert found == (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id, tokenizer.mask_id)
    assert len(theirs) == tokenizer.vocabulary


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_model_beside_it_changes_nothing(ours, kind):
    tokenizer, folder = ours
    (folder / "theirs" / "config.json").write_text(json.dumps({"model_type": kind}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "theirs")
    (folder / "theirs" / "config.json").unlink()
    assert plain(theirs, "  def f(x):\n    <a>") == tokenizer.encode("  def f(x):\n    <a>")


def test_what_was_exported_can_be_imported(ours, tmp_path):
    tokenizer, folder = ours
    again = import_tokenizer(folder / "theirs", tmp_path)
    assert (again.begin_id, again.end_id, again.pad_id, again.mask_id, again.user_id, again.assistant_id) == (
        tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id, tokenizer.mask_id, tokenizer.user_id, tokenizer.assistant_id,
    )  # fmt: skip
    assert again.control_ids == tokenizer.control_ids
    for text in (*english(50), *chinese(20), "<|user|> <0x41>"):
        assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.slow
def test_ten_thousand_lines_of_english_and_chinese_have_the_same_ids(ours, theirs):
    lines = [*english(8000), *chinese(2000)]
    assert len(lines) == 10_000
    assert len(re.findall(r"[\u4e00-\u9fff]", "".join(lines))) > 20_000
    expected = ours[0].encode_batch(lines)
    assert theirs(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"] == expected
    assert theirs.batch_decode(expected) == lines
