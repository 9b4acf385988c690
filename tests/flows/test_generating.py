"""generate and chat as a person runs them, on a tiny model folder made on the spot."""

import io
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

from flows.cli import main
from gptcore.inference import Predictor
from gptcore.model import GPT, load_model, save_model
from gptcore.tokens import Tokenizer

FEW = {"max_new_tokens": 6, "temperature": 1.0, "seed": 2}
OPTIONS = ("--max-new-tokens", "6", "--temperature", "1", "--seed", "2")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    tokenizer = tiny.tokenizer / "tokenizer"
    model = GPT(tiny.model(), Tokenizer.load(tokenizer).vocabulary).initialise(0)
    folder = tmp_path_factory.mktemp("base")
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def predictor(folder):
    return Predictor(folder, "cpu")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def gptcore(tmp_path, folder, monkeypatch, capsys):
    """A function that runs a command: (command, *arguments, stdin=…, model=…) -> what it did."""
    monkeypatch.setenv("GPTCORE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)

    def run(command, *arguments, stdin="", model=folder):
        monkeypatch.setattr(sys, "argv", ["gptcore", command, str(model), *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode(errors="surrogateescape"))))
        try:
            main()
        except SystemExit as end:
            return Done(int(end.code or 0), *capsys.readouterr())
        raise AssertionError("a command ends with an exit code")

    return run


def test_prompts_come_as_arguments_lines_of_a_file_or_standard_input(gptcore, predictor, tmp_path):
    texts = ["The array", "Return 好"]
    expected = "".join(f"{text}{said}\n" for text, said in zip(texts, predictor.predict(texts, **FEW), strict=True))
    assert gptcore("generate", *texts, *OPTIONS).stdout == expected
    (tmp_path / "prompts.txt").write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    assert gptcore("generate", "--file", "prompts.txt", *OPTIONS).stdout == expected
    (one,) = predictor.predict(["two\nlines"], **FEW)
    assert gptcore("generate", *OPTIONS, stdin="two\nlines\n").stdout == f"two\nlines{one}\n"
    assert gptcore("generate", "-", *OPTIONS, stdin="two\nlines\n").stdout == f"two\nlines{one}\n"


def test_samples_are_told_apart_where_there_are_several(gptcore, predictor):
    texts = ["The array", "Return"]
    (a, b), (c, d) = predictor.answers(texts, samples=2, **FEW)
    expected = (
        f"The array{a.text}\nsample 2 of 2\nThe array{b.text}\nsample 1 of 2\nReturn{c.text}\nsample 2 of 2\nReturn{d.text}\n"
    )
    done = gptcore("generate", *texts, "--samples", "2", "--verbose", *OPTIONS)
    assert done.stdout == expected
    assert done.stderr.count(f"{len(a.ids) + len(b.ids)} new tokens in ") == 2


def test_json_lines_come_in_and_go_out_with_what_else_they_hold(gptcore, predictor, tmp_path):
    lines = [{"id": number, "prompt": f"The array {number}"} for number in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    done = gptcore("generate", "--file", "prompts.jsonl", "--samples", "2", "--logprobs", "--verbose", *OPTIONS)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    answers = predictor.answers([line["prompt"] for line in lines], samples=2, **FEW)
    flat = [answer for row in answers for answer in row]
    assert [line["text"] for line in found] == [answer.text for answer in flat]
    assert [(line["id"], line["prompt"], line["sample"]) for line in found] == [
        (line["id"], line["prompt"], sample) for line in lines for sample in range(2)
    ]
    for line, answer in zip(found, flat, strict=True):
        assert (line["ids"], line["ended"]) == (list(answer.ids), answer.ended)
        assert line["logprobs"] == pytest.approx(answer.logprobs, abs=1e-4)
        assert line["logprob"] == pytest.approx(sum(line["logprobs"]))
        assert len(line["tokens"]) == len(line["ids"])
    assert "3 prompts of " in done.stderr
    assert "tokens/s" in done.stderr
    assert gptcore("generate", "--jsonl", *OPTIONS, stdin='{"prompt": "The"}\n').stdout.startswith('{"prompt": "The", "text": ')


def test_json_is_one_object_and_stops_and_choices_hold(gptcore, predictor):
    (free,) = predictor.predict(["The array"], **FEW)
    stop = free[3:5]
    done = json.loads(gptcore("generate", "The array", "--stop", stop, "--json", *OPTIONS).stdout)
    assert done == {"prompts": ["The array"], "outputs": [free[: free.index(stop)]]}
    done = json.loads(gptcore("generate", "The array", "--choose", " sum", "--choose", " of", "--json").stdout)
    scores = predictor.choice_scores(["The array"], [" sum", " of"])[0]
    assert done["outputs"] == [[" sum", " of"][int(scores.argmax())]]
    assert done["answers"][0][0]["choices"] == pytest.approx(dict(zip([" sum", " of"], scores, strict=True)), abs=1e-4)


def test_choices_are_drawn_with_a_temperature_as_often_as_there_are_samples(gptcore, predictor):
    options = ("--choose", " sum", "--choose", " of", "--temperature", "20", "--samples", "5", "--seed", "3")
    made = predictor.choose(["The", "Return"], [" sum", " of"], temperature=20.0, samples=5, seed=3)
    assert len({text for choice in made for text in choice.texts}) == 2
    done = json.loads(gptcore("generate", "The", "Return", *options, "--json").stdout)
    assert done["outputs"] == [list(choice.texts) for choice in made]
    assert done["answers"][1][4]["logprob"] == pytest.approx(made[1].scores[made[1].texts[4]], abs=1e-4)
    shown = gptcore("generate", "The", "Return", *options).stdout.splitlines()
    assert shown[::2] == [
        f"{text}{said}" for text, choice in zip(("The", "Return"), made, strict=True) for said in choice.texts
    ]
    assert shown[1::2] == [f"sample {sample} of 5" for sample in (2, 3, 4, 5, 1, 2, 3, 4, 5)]
    lines = gptcore("generate", "--jsonl", *options, stdin='{"prompt": "The"}\n{"prompt": "Return"}\n').stdout.splitlines()
    assert [json.loads(line)["text"] for line in lines] == [text for choice in made for text in choice.texts]


def test_verbose_tells_the_speed_on_standard_error(gptcore):
    done = gptcore("generate", "The array", "--verbose", *OPTIONS)
    assert done.returncode == 0
    for part in ("prompt of ", "first text after ", "6 new tokens", "tokens/s", " MB"):
        assert part in done.stderr
    assert "tokens/s" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        ((), "  \n", "the prompt is empty"),
        (("",), "", "the prompt is empty"),
        (("--temperature", "-1", "The"), "", "temperature is -1.0"),
        (("--top-p", "0", "The"), "", "top_p is 0.0"),
        (("--top-k", "-1", "The"), "", "top_k is -1"),
        (("--samples", "0", "The"), "", "samples is 0"),
        (("--stop", "", "The"), "", "a text to stop at has one character or more"),
        (("--logprobs", "The"), "", "add --json or --jsonl"),
        (("--file", "nowhere.txt"), "", "cannot read the prompts in nowhere.txt"),
        (("--file", "nowhere.txt", "The"), "", "not from both"),
        (("--jsonl",), '{"prompt": "a"}\n\n{"prompt": \n', "standard input, line 3 is not valid JSON"),
        (("--jsonl",), '{"prompt": "a"}\n{"text": "b"}\n', "standard input, line 2 holds no prompt"),
        (("--jsonl",), '{"prompt": " "}\n', "standard input, line 1: the prompt is empty"),
        (("--choose", "", "The"), "", "a choice is empty"),
        (("--choose", "a", "--choose", "a", "The"), "", "the choice 'a' is given twice"),
        (("--choose", "a", "--top-k", "3", "--stop", "b", "The"), "", "stop, top_k: among given texts temperature,"),
        (("--choose", "a", "--max-new-tokens", "3", "The"), "", "max_new_tokens: among given texts temperature,"),
        (("--choose", "a", "--json", "--logprobs", "The"), "", "--logprobs are of tokens that are written"),
        (("--max-new-tokens", "0", "The"), "", "max_new_tokens is 0"),
    ],
)
def test_bad_input_is_one_sentence(gptcore, arguments, stdin, said):
    done = gptcore("generate", *arguments, stdin=stdin)
    assert done.returncode == 1
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_prompt_longer_than_the_context_is_continued_and_said(gptcore):
    done = gptcore("generate", "The array " * 60, *OPTIONS)
    assert done.returncode == 0
    assert "more than fit into the context: the model reads the newest" in done.stderr


def test_a_closed_pipe_ends_quietly(folder, tmp_path):
    command = (
        f'{sys.executable} -c "from flows.cli import main; main()" generate {folder} a b c d --max-new-tokens 64 | head -c 1'
    )
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert done.stdout == "a"
    assert done.stderr == ""


def test_a_base_goes_on_with_the_conversation_and_forgets_it_when_told(gptcore, predictor):
    done = gptcore(
        "chat", *OPTIONS, "--top-k", "0", stdin="The array\nReturn\n/help\n/nonsense\n/reset\nReturn\n/exit\nnever\n"
    )
    assert done.returncode == 0, done.stderr
    so_far, expected = "", []
    for turn, line in ((0, "The array"), (1, "Return"), (5, "Return")):
        so_far = "" if turn == 5 else so_far
        (said,) = predictor.predict([so_far + line], first=turn, **FEW)
        expected.append(said)
        so_far += f"{line}{said}\n"
    assert done.stdout == "".join(f"{said}\n" for said in expected)
    assert "is a base: it was trained on text and not on conversations" in done.stderr
    assert "/nonsense is no command" in done.stderr
    assert "forgotten" in done.stderr


def test_a_task_model_answers_each_line_as_in_training(gptcore, folder, tmp_path, tiny):
    model, task = load_model(folder).model, {"type": "summarize", "name": "s", "max_new_tokens": 5}
    save_model(tmp_path / "task", model, tiny.tokenizer / "tokenizer", task)
    done = gptcore("chat", "--temperature", "0", stdin="The array\nThe array\n", model=tmp_path / "task")
    (said,) = Predictor(tmp_path / "task", "cpu").predict(["The array"])
    assert done.stdout == f"{said}\n{said}\n"
    assert "was trained to summarize: it answers each line for itself" in done.stderr


@pytest.fixture(scope="module")
def masked(tiny, tmp_path_factory):
    tokenizer = tiny.tokenizer / "tokenizer"
    folder = tmp_path_factory.mktemp("masked")
    save_model(folder, GPT(tiny.model(objective="masked"), Tokenizer.load(tokenizer).vocabulary).initialise(0), tokenizer)
    return folder


def test_a_line_that_cannot_be_answered_is_one_sentence_and_the_conversation_goes_on(gptcore, masked):
    lines = ("the array of", "no \udcff UTF-8", "the <|mask|> of", "/reset")
    done = gptcore("chat", stdin="\n".join(lines), model=masked)
    (filled,) = Predictor(masked, "cpu").predict([lines[2]])
    assert done.stdout == f"{filled}\n"
    assert "\ngptcore: nothing is hidden in the text: write <|mask|>" in done.stderr
    assert "\ngptcore: this line is not UTF-8 text" in done.stderr
    assert done.stderr.endswith("forgotten\n")
    assert done.returncode == 1
    assert gptcore("chat", stdin="\n".join((lines[0], "/exit")), model=masked).returncode == 1
    assert gptcore("chat", stdin=lines[2], model=masked).returncode == 0
