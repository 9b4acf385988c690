"""Rows as token ids: begin, user, the input, assistant, the answer, end; learned are the answer and its end only."""

import csv
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptcore.artifacts import REPORT
from gptcore.corpus import SPLITS, SplitName, read_split
from gptcore.corpus.report import table
from gptcore.errors import ArtifactError, SettingsError
from gptcore.tokens import ShardWriter, Tokenizer

_BATCH = 2000
_AROUND = 3
"""begin, user and assistant."""
_SMALLEST_PROMPT = 8
_COUNTED = ("rows", "tokens", "learned_tokens", "inputs_cut", "answers_cut")


def prompt_ids(tokenizer: Tokenizer, text: str, room: int) -> list[int]:
    """What stands before the answer: begin, user, the text's ids, assistant. At most `room` (4 or more) ids; the text is cut
    at its end."""
    return _prompt(tokenizer, tokenizer.encode(text), room)


def chat_template(symbols: Mapping[str, str]) -> str:
    """What `prompt_ids` puts around a text, as a chat template (Jinja) of transformers; after an answer comes its end.

    `symbols`: how begin, end, system, user and assistant are written. A template cannot say that a long text is cut so that its
    answer fits, and of a text that spells a symbol it makes one, unless `apply_chat_template` is asked for
    `sanitize_control_tokens=True`.
    """
    written = {name: json.dumps(symbol, ensure_ascii=False) for name, symbol in symbols.items()}
    roles = ", ".join(f"'{role}': {written[role]}" for role in ("system", "user", "assistant"))
    return (
        f"{{% set roles = {{{roles}}} %}}{{{{ {written['begin']} }}}}"
        "{% for message in messages %}{{ roles[message['role']] + message['content'] }}"
        f"{{% if message['role'] == 'assistant' %}}{{{{ {written['end']} }}}}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ roles['assistant'] }}{% endif %}"
    )


def answer_room(tokenizer: Tokenizer, task: Mapping[str, Any]) -> int:
    """Tokens that the longest answer of a task (`task.json`) takes, its end included."""
    if task["type"] == "classify":
        return max(len(tokenizer.encode(label)) for label in task["labels"]) + 1
    return int(task["max_new_tokens"])


def encode_examples(folder: Path, examples: Path, tokenizer: Tokenizer, context: int) -> dict[str, float | int | str]:
    """Write the rows of an examples artifact as masked shards into `folder`; returns counts.

    Every row is kept. An answer longer than `answer_room` is cut, an input longer than the rest of the context too, both at
    their end; both are counted. A document's bytes are those of its answer as far as it is kept.
    Raises `SettingsError` when a context of `context` tokens leaves no room for an input beside the answer.
    """
    task = _read_task(examples)
    room = answer_room(tokenizer, task)
    if context - room < _SMALLEST_PROMPT:
        raise SettingsError(
            f"a context of {context} tokens leaves no room for the input of task {task['name']} beside an answer of up to "
            f"{room} tokens: set model.context to at least {room + _SMALLEST_PROMPT} or lower max_new_tokens of the task"
        )
    counts: dict[SplitName, Counter[str]] = {}
    with ShardWriter(folder, tokenizer.vocabulary, tokenizer.digest, 100_000_000, masked=True) as writer:
        for split in SPLITS:
            counts[split] = _encode_split(writer, split, examples, tokenizer, context - room, room)
    _write_report(folder / REPORT, task, counts)
    total = sum(counts.values(), Counter())
    numbers: dict[str, float | int | str] = {f"{split}_rows": counts[split]["rows"] for split in SPLITS}
    return numbers | {key: total[key] for key in _COUNTED[1:]}


def _encode_split(
    writer: ShardWriter, split: SplitName, examples: Path, tokenizer: Tokenizer, prompt_room: int, room: int
) -> Counter[str]:
    rows = read_split(examples, split)
    count: Counter[str] = Counter()
    for start in range(0, len(rows), _BATCH):
        part = rows.iloc[start : start + _BATCH]
        inputs, targets = part["input"].tolist(), part["target"].tolist()
        encoded = zip(targets, tokenizer.encode_batch(inputs), tokenizer.encode_batch(targets), strict=True)
        for target, input_ids, answer in encoded:
            prompt = _prompt(tokenizer, input_ids, prompt_room)
            kept = answer[: room - 1]
            learned = [*kept, tokenizer.end_id]
            text = target if len(kept) == len(answer) else tokenizer.decode(kept)
            mask = [0] * len(prompt) + [1] * len(learned)
            writer.add(split, prompt + learned, len(text.encode()), mask)
            count.update(
                rows=1,
                tokens=len(mask),
                learned_tokens=len(learned),
                inputs_cut=int(len(input_ids) + _AROUND > prompt_room),
                answers_cut=int(len(kept) < len(answer)),
            )
    return count


def _prompt(tokenizer: Tokenizer, ids: list[int], room: int) -> list[int]:
    assert room > _AROUND
    return [tokenizer.begin_id, tokenizer.user_id, *ids[: room - _AROUND], tokenizer.assistant_id]


def _read_task(examples: Path) -> dict[str, Any]:
    try:
        task: dict[str, Any] = json.loads((examples / "task.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{examples} holds no examples: task.json cannot be read ({error}); rebuild them") from error
    return task


def _write_report(folder: Path, task: Mapping[str, Any], counts: Mapping[SplitName, Mapping[str, int]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    header = ("split", *_COUNTED)
    lines = [[split, *(count[key] for key in _COUNTED)] for split, count in counts.items()]
    with (folder / "tokens.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)
    shown = [[value if isinstance(value, str) else f"{value:,}" for value in line] for line in lines]
    page = [f"# Rows of {task['name']} as tokens", "Every row is kept; what was too long was cut.", table(header, shown)]
    (folder / "report.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
