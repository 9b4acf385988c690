"""What is asked of an exported model through transformers is what it was asked in training."""

import json
import re

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from gptcore.config import TokenizerConfig
from gptcore.config.presets import PRESETS
from gptcore.downstream import prompt_ids
from gptcore.errors import ModelFormatError
from gptcore.inference import Predictor
from gptcore.inference.export import export
from gptcore.model import GPT, save_model
from gptcore.tokens import import_tokenizer
from gptcore.tokens.learned import CONTROLS
from gptcore.tokens.learning import train

TEXTS = ("The array sorts the index.", "  def f(x):\n    return {'a': x}\n", "话说天下大势，分久必合。", "数据 data 🦊", "")
TASK = {"type": "summarize", "name": "s", "max_new_tokens": 12}
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


def write_gpt2(folder, *symbols, **settings):
    """A tokenizer as GPT-2 has it, with symbols of its own."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([f"The {n} arrays sort the index." for n in range(50)], vocab_size=290)
    bpe.add_special_tokens(["<|endoftext|>", *symbols])
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """A function that writes a model and exports it: (tokenizer, task, **settings of the model) -> both folders, the record."""

    def make(tokenizer, task=None, **settings):
        folder = tmp_path_factory.mktemp("exported")
        tokenizer.save(folder / "tokenizer")
        model = GPT(tiny.model(**{"context": 64, **settings}), tokenizer.vocabulary)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(weight.numel()))
        # It never says single bytes: half characters are shown in more ways than one.
        model.embedding.weight.data[[tokenizer.piece(token).startswith("<0x") for token in range(tokenizer.vocabulary)]] = 0.0
        save_model(folder / "model", model, folder / "tokenizer", task)
        return folder / "model", folder / "out", export(folder / "model", folder / "out")

    return make


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def learned(request):
    lines = [f"The {n} arrays sort the index of data, <a>  given {n * 7}." for n in range(300)]
    lines += [f"话说天下大势，分久必合{n}，合久必分。" for n in range(300)]
    return train(lines, TokenizerConfig(vocabulary=420, algorithm=request.param))


@pytest.fixture(scope="module")
def task_model(exported, learned):
    return exported(learned, TASK)


@pytest.fixture(scope="module")
def theirs(task_model):
    return transformers.AutoTokenizer.from_pretrained(task_model[1])


def ids_of(theirs, text, **more):
    messages = [{"role": "user", "content": text}]
    return theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False, **more)


@pytest.mark.parametrize("task", [None, TASK])
def test_the_chat_template_gives_the_ids_of_the_prompt_in_english_and_chinese(exported, learned, task):
    _, folder, found = exported(learned, task)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert [ids_of(theirs, text) for text in TEXTS] == [prompt_ids(learned, text, 1000) for text in TEXTS]
    assert found["prompts_compared"] == 5


@given(text=st.text())
def test_any_text_that_spells_no_symbol_has_the_ids_of_the_prompt(theirs, learned, text):
    assert ids_of(theirs, text) == prompt_ids(learned, text, 1000)


@given(text=st.lists(st.sampled_from([*CONTROLS, "{{ x }}", "{% x", "a", " ", "\n"])).map("".join))
def test_a_text_that_spells_a_symbol_stays_a_text_where_that_is_asked_for(theirs, learned, text):
    ids = ids_of(theirs, text, sanitize_control_tokens=True)
    assert (ids[:2], ids[-1]) == ([learned.begin_id, learned.user_id], learned.assistant_id)
    assert not learned.control_ids.intersection(ids[2:-1])
    assert learned.decode(ids) == text


def test_an_answer_ends_as_in_training_and_an_unknown_role_is_refused(theirs, learned):
    turns = [{"role": "user", "content": "The array"}, {"role": "assistant", "content": " sorts"}]
    expected = [*prompt_ids(learned, "The array", 1000), *learned.encode(" sorts"), learned.end_id]
    assert theirs.apply_chat_template(turns, return_dict=False) == expected
    system = {"role": "system", "content": "Sort."}
    ids = theirs.apply_chat_template([system, *turns], return_dict=False)
    assert ids == [learned.begin_id, learned.system_id, *learned.encode("Sort."), *expected[1:]]
    with pytest.raises(Exception, match="tool"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}])


def test_the_lines_of_the_model_card_say_what_the_model_answers(task_model, monkeypatch, capsys):
    model, folder, _ = task_model
    (lines,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(folder)
    exec(lines, {})
    assert capsys.readouterr().out == Predictor(model, "cpu").predict(["A text of yours."])[0] + "\n"


def test_the_lines_of_the_card_of_a_base_go_on_with_a_text(exported, learned, monkeypatch, capsys):
    model, folder, _ = exported(learned)
    (lines,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(folder)
    exec(lines.replace("max_new_tokens=64", "max_new_tokens=8"), {})
    said = Predictor(model, "cpu").predict(["A text of yours"], max_new_tokens=8)[0]
    assert capsys.readouterr().out == f"A text of yours{said}\n"


def test_a_folder_that_cannot_be_made_is_one_sentence(exported, learned, tmp_path):
    model, _, _ = exported(learned)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelFormatError, match="cannot make the folder"):
        export(model, tmp_path / "file" / "x")


def test_a_masked_model_has_no_chat_template(exported, learned):
    small = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 4, "context": 64}
    _, folder, found = exported(learned, **{**PRESETS["bert-base"], **small})
    assert found["prompts_compared"] == 0
    assert "apply_chat_template" not in (folder / "README.md").read_text(encoding="utf-8")
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template is None


def test_a_task_of_an_imported_model_is_asked_as_it_was_trained_and_a_base_as_it_came(exported, tmp_path):
    came = "{{ messages[0]['content'] }}"
    plain = import_tokenizer(write_gpt2(tmp_path / "plain"), tmp_path / "a")
    roles = import_tokenizer(write_gpt2(tmp_path / "roles", *ROLES), tmp_path / "b")
    talks = import_tokenizer(write_gpt2(tmp_path / "talks", *ROLES, chat_template=came), tmp_path / "c")
    for tokenizer, task in ((plain, TASK), (roles, None), (roles, TASK), (talks, TASK)):
        theirs = transformers.AutoTokenizer.from_pretrained(exported(tokenizer, task)[1])
        assert [ids_of(theirs, text) for text in TEXTS] == [prompt_ids(tokenizer, text, 1000) for text in TEXTS]
    for tokenizer, template in ((plain, None), (talks, came)):
        assert transformers.AutoTokenizer.from_pretrained(exported(tokenizer)[1]).chat_template == template


def test_where_a_text_after_a_symbol_has_other_ids_there_is_no_template(exported, tmp_path):
    source = write_gpt2(tmp_path / "source", chat_template="{{ messages }}")
    described = json.loads((source / "tokenizer.json").read_text())
    end = next(token for token in described["added_tokens"] if token["content"] == "<|endoftext|>")
    end["rstrip"] = True  # it takes the spaces after it
    (source / "tokenizer.json").write_text(json.dumps(described))
    _, folder, found = exported(import_tokenizer(source, tmp_path / "ours"), TASK)
    assert found["prompts_compared"] == 0
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template is None
