import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcore.corpus import SPLITS
from gptcore.corpus.tables import write_parquet
from gptcore.downstream import answer_room, encode_examples, headline, prompt_ids
from gptcore.errors import ArtifactError, SettingsError
from gptcore.tokens import Shards, Tokenizer

ROWS = [
    ("the shape of the given array", "shape"),
    ("the mean of every column " * 20, "mean"),
    ("the sum", "the sum of every value of the given column " * 3),
    ("", "nothing"),
]


@pytest.fixture(scope="module")
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer.load(tiny.tokenizer / "tokenizer")


def write_examples(folder: Path, **task) -> Path:
    (folder / "data").mkdir(parents=True)
    for split in SPLITS:
        columns = {"input": [row[0] for row in ROWS], "target": [row[1] for row in ROWS]}
        write_parquet(folder / "data" / f"{split}.parquet", columns)
    task = {"type": "summarize", "name": "brief", "labels": [], "max_new_tokens": 12} | task
    (folder / "task.json").write_text(json.dumps(task))
    return folder


@settings(deadline=None)
@given(st.text(max_size=50), st.integers(4, 40))
def test_a_prompt_is_the_beginning_of_the_text_between_begin_user_and_assistant(tokenizer, text, room):
    ids = prompt_ids(tokenizer, text, room)
    assert len(ids) <= room
    assert ids[:2] == [tokenizer.begin_id, tokenizer.user_id]
    assert ids[-1] == tokenizer.assistant_id
    whole = tokenizer.encode(text)
    assert ids[2:-1] == whole[: len(ids) - 3]
    assert len(ids) == room or ids[2:-1] == whole


def test_every_row_is_prompt_answer_and_end_and_only_answer_and_end_are_learned(tokenizer, tmp_path):
    encode_examples(tmp_path / "out", write_examples(tmp_path / "rows"), tokenizer, context=32)
    shards = Shards.open(tmp_path / "out")
    assert (shards.masked, shards.tokenizer) == (True, tokenizer.digest)
    split = shards.split("train")
    assert split.documents == len(ROWS)
    for number, (text, answer) in enumerate(ROWS):
        ids, mask = split.document(number).tolist(), split.mask(number).tolist()
        prompt = prompt_ids(tokenizer, text, 32 - 12)
        kept = tokenizer.encode(answer)[:11]
        assert ids == [*prompt, *kept, tokenizer.end_id]
        assert mask == [0] * len(prompt) + [1] * (len(kept) + 1)
        assert len(ids) <= 32
        assert split.bytes(number) == len(tokenizer.decode(kept).encode())


def test_what_is_cut_is_counted(tokenizer, tmp_path):
    numbers = encode_examples(tmp_path / "out", write_examples(tmp_path / "rows"), tokenizer, context=32)
    assert (numbers["train_rows"], numbers["inputs_cut"], numbers["answers_cut"]) == (4, 3, 3)
    wide = encode_examples(tmp_path / "wide", write_examples(tmp_path / "more", max_new_tokens=200), tokenizer, context=600)
    assert (wide["inputs_cut"], wide["answers_cut"]) == (0, 0)
    report = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "Rows of brief as tokens" in report


def test_the_longest_label_decides_how_much_room_answers_take(tokenizer, tmp_path):
    task = {"type": "classify", "labels": ["shape", "the mean of every column"]}
    room = answer_room(tokenizer, task)
    assert room == len(tokenizer.encode("the mean of every column")) + 1
    assert answer_room(tokenizer, {"type": "summarize", "max_new_tokens": 7}) == 7


def test_a_context_without_room_for_the_input_is_one_clear_error(tokenizer, tmp_path):
    with pytest.raises(SettingsError, match=r"set model\.context to at least 20"):
        encode_examples(tmp_path / "out", write_examples(tmp_path / "rows"), tokenizer, context=19)


def test_a_folder_without_rows_is_one_clear_error(tokenizer, tmp_path):
    with pytest.raises(ArtifactError, match="holds no examples"):
        encode_examples(tmp_path / "out", tmp_path, tokenizer, context=32)


def test_every_task_has_a_number_that_decides():
    assert headline("summarize") == ("rouge_l", True)
    assert headline("classify") == ("accuracy", True)
