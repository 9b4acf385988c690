"""generate and chat: a model at work in the terminal, on files and in pipes."""

import io
import json
import re
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.common import Json, Model, Seed, folder_of
from flows.commands.prompts import read_prompts
from gptcore.errors import GptcoreError

if TYPE_CHECKING:
    from gptcore.inference import Answer, Predictor

app = typer.Typer()

_CHUNK = 256
"""Prompts that are answered before their lines are written."""

NewTokens = Annotated[int | None, typer.Option(help="Longest answer in tokens.", show_default=False)]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Draw from the likeliest k tokens; 0: from all.")]
TopP = Annotated[float, typer.Option(help="Draw from the smallest set of this probability.")]
MinP = Annotated[float, typer.Option(help="Draw from those at least this share as likely as the likeliest.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Makes so many times less likely what was said.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.", show_default=False)]
Verbose = Annotated[bool, typer.Option("--verbose", help="Tell on standard error how fast it was.")]


@app.command()
def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Texts; without any or with -, the whole of standard input is one.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Prompts, one a line; a .jsonl file as --jsonl says; - is standard input.")
    ] = None,
    max_new_tokens: NewTokens = None, temperature: Temperature = 0.0, top_k: TopK = 0, top_p: TopP = 1.0, min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0, stop: Stop = None,
    samples: Annotated[int, typer.Option(help="Answers to each prompt.")] = 1,
    choose: Annotated[
        list[str] | None, typer.Option(help="Answer with the likeliest of these texts; repeat it for each.", show_default=False)
    ] = None,
    seed: Seed = 0,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Add every token and its log-probability to the JSON.")] = False,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help='Lines {"prompt": …} in, from --file or standard input, lines {…, "text": …} out.')
    ] = False,
    as_json: Json = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Let a model continue, summarise or classify texts: whatever it was trained for."""
    jsonl = jsonl or (file is not None and file.suffix == ".jsonl")
    if logprobs and not (as_json or jsonl):
        raise GptcoreError("--logprobs go into JSON: add --json or --jsonl")
    if logprobs and choose:
        raise GptcoreError("--logprobs are of tokens that are written: --choose tells how likely every choice is without it")
    folder = folder_of(model)
    lines = read_prompts(prompts or [], file, jsonl)
    texts = [line["prompt"] for line in lines]
    from gptcore.inference import Predictor, Request

    request: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "stop": tuple(stop or ()), "samples": samples, "seed": seed,
    }  # fmt: skip
    asked = Request.of(**request)  # what makes no sense is said before the model is opened
    if choose:
        asked.check_choosing()
    predictor = Predictor(folder)
    _tell_what_is_cut(predictor, texts, request, choose or ())
    if not (as_json or jsonl):
        _aloud(predictor, texts, request, choose or (), verbose)
    else:
        _as_data(predictor, lines, request, choose or (), logprobs, jsonl, verbose)


def _as_data(
    predictor: "Predictor", lines: list[dict[str, Any]], request: dict[str, Any], choose: Sequence[str],
    logprobs: bool, jsonl: bool, verbose: bool,
) -> None:  # fmt: skip
    """Answers for programs: a line of JSON each as soon as its chunk is done, or one object in the end."""
    texts = [line["prompt"] for line in lines]
    started, tokens, outputs = time.perf_counter(), 0, []
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        if choose:
            rows = _chosen(predictor, chunk, choose, start, request)
        else:
            rows = _answered(predictor, chunk, start, request, logprobs)
        tokens += sum(answer.pop("new_tokens", 0) for answers in rows for answer in answers)
        if jsonl:
            _write_lines(lines[start:], rows)
        outputs += rows
    if not jsonl:
        print(json.dumps(_as_one(texts, outputs, bool(logprobs or choose)), ensure_ascii=False))
    if verbose:
        read = sum(predictor.tokens_read(text, choose, **request)[0] for text in texts)
        seconds = time.perf_counter() - started
        _say(f"{len(texts):,} prompts of {read:,} tokens; {tokens:,} new ones in {seconds:.2f} s: "
             f"{tokens / seconds:,.1f} tokens/s; {predictor.memory_mb():,.0f} MB")  # fmt: skip


@app.command()
def chat(
    model: Model, max_new_tokens: NewTokens = None, temperature: Temperature = 0.7, top_k: TopK = 50, top_p: TopP = 1.0,
    min_p: MinP = 0.0, repetition_penalty: Penalty = 1.0, stop: Stop = None, seed: Seed = 0, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Talk with a model, a line at a time. A base goes on with the text so far; a task model answers each line for itself.

    /reset forgets what was said, /help tells the commands, /exit or the end of input ends it.
    """
    folder = folder_of(model)
    from gptcore.inference import Predictor, Request

    request: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "stop": tuple(stop or ()), "seed": seed,
    }  # fmt: skip
    Request.of(**request)
    predictor, interactive = Predictor(folder), sys.stdin.isatty()
    _say(f"{model} {_manner(predictor)} {_COMMANDS}")
    so_far, failed = "", False
    for turn, line in enumerate(_lines("> " if interactive else "")):
        if re.fullmatch(r"/[a-z]+", line):  # a path is no command
            if line == "/exit":
                break
            so_far = "" if line == "/reset" else so_far
            _say({"/reset": "forgotten", "/help": _COMMANDS}.get(line, f"{line} is no command. {_COMMANDS}"))
            continue
        prompt = f"{so_far}{line}" if predictor.continues else line
        try:
            if any("\udc80" <= character <= "\udcff" for character in line):
                raise GptcoreError("this line is not UTF-8 text")
            _tell_what_is_cut(predictor, [prompt], request)
            (answer,) = _shown(predictor, prompt, predictor.stream(prompt, number=turn, **request), request, verbose)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()  # of the answer that was broken off nothing is remembered
        except GptcoreError as error:  # of this line: the next one may be answered
            _say(f"gptcore: {error}")
            failed = True
        else:
            so_far = f"{prompt}{answer.text}\n"
    if failed and not interactive:
        raise typer.Exit(1)


_COMMANDS = "/reset forgets what was said, /help tells the commands, /exit or Ctrl-D ends it."


def _manner(predictor: "Predictor") -> str:
    """How a model that was trained so takes part in a conversation."""
    if predictor.continues:
        return "is a base: it was trained on text and not on conversations, so it goes on with what was said so far."
    if predictor.task is None:
        return "is a masked model: it fills in what <|mask|> hides in a line, and remembers none."
    return f"was trained to {predictor.task['type']}: it answers each line for itself, as in training, and remembers none."


def _lines(prompt: str) -> Iterator[str]:
    """Lines that are not empty, until the end of standard input. Bytes that are no UTF-8 come as half surrogate pairs."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


# ------------------------------------------------------------------------------------------------------ answers --


def _aloud(predictor: "Predictor", texts: list[str], request: dict[str, Any], choose: Sequence[str], verbose: bool) -> None:
    """Answers for people, after the prompt where they go on from it: the first as it comes, other samples when all ended."""
    chosen = _chosen(predictor, texts, choose, 0, request) if choose else []
    for number, text in enumerate(texts):
        before = text if predictor.continues else ""
        if number:
            _apart(1, request["samples"])
        print(before, end="", flush=True)
        if choose:
            said = [answer["text"] for answer in chosen[number]]
            print(said[0])
        else:
            pieces = predictor.stream(text, number=number, **request)
            said = [answer.text for answer in _shown(predictor, text, pieces, request, verbose)]
        for sample, answer in enumerate(said[1:], 2):
            _apart(sample, len(said))
            print(before + answer)


def _apart(sample: int, samples: int) -> None:
    """The line before an answer where there are several to a prompt."""
    from flows.terminal import Terminal

    if samples > 1:
        Terminal(sys.stdout).console.print(f"sample {sample} of {samples}", style="dim")


def _shown(
    predictor: "Predictor", text: str, pieces: "Generator[str, None, list[Answer]]", request: dict[str, Any], verbose: bool
) -> "list[Answer]":
    """Print an answer while it comes, and how fast all came."""
    started = time.perf_counter()
    first = 0.0
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            answers: list[Answer] = end.value
            break
        first = first or time.perf_counter() - started
        print(piece, end="", flush=True)
    print()
    if verbose:
        seconds, count = time.perf_counter() - started, sum(len(answer.ids) for answer in answers)
        after = count - len(answers)
        rate = f", {after / (seconds - first):,.1f} tokens/s after it" if after > 0 and seconds > first else ""
        read, _ = predictor.tokens_read(text, **request)
        _say(f"prompt of {read:,} tokens; first text after {first:.3f} s; {count:,} new tokens in {seconds:.2f} s{rate}; "
             f"{predictor.memory_mb():,.0f} MB")  # fmt: skip
    return answers


def _answered(
    predictor: "Predictor", texts: list[str], first: int, request: dict[str, Any], logprobs: bool
) -> list[list[dict[str, Any]]]:
    """Every answer to every text, as plain values."""
    piece = predictor.loaded.tokenizer.piece

    def plain(answer: "Answer") -> dict[str, Any]:
        told: dict[str, Any] = {"text": answer.text, "ended": answer.ended, "new_tokens": len(answer.ids)}
        if predictor.draws:
            told["logprob"] = answer.logprob
        if logprobs:
            told |= {"tokens": [piece(token) for token in answer.ids], "ids": answer.ids, "logprobs": answer.logprobs}
        return told

    return [[plain(answer) for answer in answers] for answers in predictor.answers(texts, first=first, **request)]


def _chosen(
    predictor: "Predictor", texts: list[str], choices: Sequence[str], first: int, request: dict[str, Any]
) -> list[list[dict[str, Any]]]:
    """The choices that were made for every text, and how likely each was."""
    made = predictor.choose(texts, choices, first=first, **request)
    return [
        [{"text": text, "logprob": choice.scores[text], "choices": choice.scores} for text in choice.texts] for choice in made
    ]


def _write_lines(lines: list[dict[str, Any]], rows: list[list[dict[str, Any]]]) -> None:
    for line, answers in zip(lines, rows, strict=False):
        for sample, answer in enumerate(answers):
            which = {"sample": sample} if len(answers) > 1 else {}
            print(json.dumps({**line, **which, **answer}, ensure_ascii=False))
    sys.stdout.flush()


def _as_one(texts: list[str], rows: list[list[dict[str, Any]]], details: bool) -> dict[str, Any]:
    """`{"prompts": […], "outputs": […]}`: a text for each prompt, a list of them with several samples; `answers` tell more."""
    several = any(len(answers) > 1 for answers in rows)
    outputs = [[answer["text"] for answer in answers] if several else answers[0]["text"] for answers in rows]
    return {"prompts": texts, "outputs": outputs, **({"answers": rows} if details else {})}


def _tell_what_is_cut(predictor: "Predictor", texts: list[str], request: dict[str, Any], choices: Sequence[str] = ()) -> None:
    which = "first" if predictor.task is not None else "newest"
    for number, text in enumerate(texts, 1):
        read, there = predictor.tokens_read(text, choices, **request)
        if read < there:
            name = f"prompt {number}" if len(texts) > 1 else "the prompt"
            _say(f"{name} has {there:,} tokens, more than fit into the context: the model reads the {which} {read:,}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
