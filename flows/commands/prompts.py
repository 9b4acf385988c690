"""The prompts of generate: arguments, the lines of a file, JSON Lines or standard input."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptcore.errors import GptcoreError


def read_prompts(prompts: list[str], file: Path | None, jsonl: bool) -> list[dict[str, Any]]:
    """Every prompt as `{"prompt": …}`, with what else its line of JSON holds. Raises `GptcoreError` for one that is empty."""
    if file is not None and prompts:
        raise GptcoreError(f"prompts come from --file {file} or from the command line, not from both")
    if prompts and prompts != ["-"]:
        lines = [{"prompt": text} for text in prompts]
    else:
        path = None if file is None or str(file) == "-" else file
        where, text = ("standard input", _standard_input()) if path is None else (str(path), _text_of(path))
        if jsonl:
            lines = [_record(line, where, number) for number, line in _filled_lines(text)]
        elif file is not None:
            lines = [{"prompt": line} for _, line in _filled_lines(text)]
        else:
            lines = [{"prompt": text.removesuffix("\n")}]
    if not lines or not all(line["prompt"].strip() for line in lines):
        raise GptcoreError("the prompt is empty: give a text, as an argument, in a file or on standard input")
    return lines


def _filled_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with something in them, and their numbers from 1."""
    return ((number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _record(line: str, where: str, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise GptcoreError(f'{where}, line {number} is not valid JSON ({error}): expected {{"prompt": "a text"}}') from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise GptcoreError(f'{where}, line {number} holds no prompt: expected {{"prompt": "a text"}}')
    if not record["prompt"].strip():
        raise GptcoreError(f"{where}, line {number}: the prompt is empty")
    return record


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors of Windows put a mark before it
    except UnicodeDecodeError as error:
        raise GptcoreError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise GptcoreError(f"cannot read the prompts in {path}: {error.strerror or error}") from error


def _standard_input() -> str:
    """All of it."""
    if sys.stdin.isatty():
        raise GptcoreError("there is no prompt: give a text as an argument, --file with one a line, or pipe one in")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GptcoreError(f"standard input is not UTF-8 text (byte {error.start}); convert it first") from error
