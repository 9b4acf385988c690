"""`gptcore explain` as a person types it."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    from gptcore.model import GPT, save_model

    folder = tmp_path_factory.mktemp("explained") / "model"
    save_model(folder, GPT(tiny.model(), 400).initialise(0), tiny.tokenizer / "tokenizer")
    return folder


@pytest.fixture
def explain(model, tmp_path):
    """A function that runs the command in an empty folder with an empty home."""

    def run(*arguments, of=model, stdin=b""):
        command = [sys.executable, "-c", "from flows.cli import main; main()", "explain", str(of), *map(str, arguments)]
        environment = {**os.environ, "GPTCORE_HOME": str(tmp_path / "home")}
        return subprocess.run(command, env=environment, cwd=tmp_path, input=stdin, capture_output=True, check=False)

    return run


def told(result) -> str:
    assert result.returncode == 1, result.stderr.decode()
    text = result.stderr.decode().strip()
    assert text.startswith("gptcore: ")
    assert "\n" not in text
    return text


def test_it_leaves_a_page_and_prints_its_numbers(explain, tmp_path):
    result = explain("The array sorts.", "--json", "--points", "2")
    assert result.returncode == 0, result.stderr.decode()
    answer = json.loads(result.stdout)
    assert answer["page"] == str(tmp_path / "explain.html")
    assert answer["bits"] == pytest.approx(sum(token.get("bits", 0) for token in answer["tokens"]))
    assert answer["bits_per_byte"] == pytest.approx(answer["bits"] / 16)
    assert {"probability", "rank", "likeliest", "carried"} <= answer["tokens"][-1].keys()
    assert (tmp_path / "explain.html").read_text().startswith("<!doctype html>")


def test_a_text_comes_from_a_file_or_from_standard_input_and_a_page_is_replaced(explain, tmp_path):
    (tmp_path / "text.txt").write_text("The array sorts.\n")
    assert explain("--file", "text.txt", "--out", "x.html").returncode == 0
    page = (tmp_path / "x.html").read_text()
    (tmp_path / "x.html").write_text("another page")
    assert explain("--out", "x.html", stdin=b"The array sorts.\n").returncode == 0
    assert (tmp_path / "x.html").read_text() == page


def test_what_is_left_out_is_said(explain):
    result = explain("word " * 100, "--points", "0")
    assert "longer than the context of 32 tokens: its newest 31 of" in result.stderr.decode()
    assert result.stdout.decode().startswith("explain.html: ")


def test_a_model_in_eight_bits_is_explained_without_attributions(explain, model, tmp_path):
    from gptcore.inference.export import export_int8

    export_int8(model, tmp_path / "int8")
    said = told(explain("The array sorts.", of=tmp_path / "int8"))
    assert said == "gptcore: weights in eight bits have no gradients: take --points 0, or the model that they were made of"
    assert not (tmp_path / "explain.html").exists()
    result = explain("The array sorts.", "--points", "0", "--json", of=tmp_path / "int8")
    assert result.returncode == 0, result.stderr.decode()
    assert not any(token.get("carried") for token in json.loads(result.stdout)["tokens"])
    assert (tmp_path / "explain.html").is_file()


def test_mistakes_end_in_one_sentence(explain, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    assert "the text is empty" in told(explain(stdin=b"\n"))
    assert "were both given" in told(explain("a", "--file", "text.txt"))
    assert "cannot be read (No such file" in told(explain("--file", "nowhere.txt"))
    assert "is not UTF-8 text (byte 0)" in told(explain("--file", "bytes.txt"))
    assert "is a folder" in told(explain("a", "--out", tmp_path))
    assert "there is no folder" in told(explain("a", "--out", "nowhere/page.html"))
    assert "there is no model" in told(explain("a", of="nobody@champion"))
    assert "is not registered, so MLflow has no run of it" in told(explain("a", "--log"))
    assert not (tmp_path / "explain.html").exists()
