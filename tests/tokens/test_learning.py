import csv
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptcore.config import TokenizerConfig
from gptcore.corpus.tables import write_parquet
from gptcore.errors import ArtifactError, TokenizerError
from gptcore.tokens import Tokenizer, learn_tokenizer
from gptcore.tokens.learning import draw_documents, train

WORDS = re.findall(
    r"\w+", "rivers of the north run cold and hills above them are old where winter keeps its silver over every field"
)
PROSE = [" ".join(random.Random(n).choices(WORDS, k=12)) + f".\n    And {n} more:\n" + WORDS[n % 20] for n in range(200)]


def write_corpus(folder: Path, texts: list[str], source: str = "made", shuffled: bool = False) -> Path:
    (folder / "data").mkdir(parents=True)
    rows = [(f"row-{number}", text) for number, text in enumerate(texts)]
    if shuffled:
        random.Random(1).shuffle(rows)
    for split in ("train", "valid", "test"):
        ids, texts = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [])
        write_parquet(folder / "data" / f"{split}.parquet", {"id": ids, "text": texts, "source": [source] * len(ids)})
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_equal_text_gives_equal_bytes_in_another_folder_and_process(tmp_path, algorithm):
    corpus = write_corpus(tmp_path / "corpus", PROSE)
    config = TokenizerConfig(vocabulary=350, algorithm=algorithm)
    learn_tokenizer(tmp_path / "here", config, corpus)
    elsewhere = tmp_path / "else" / "where"
    code = (
        "import sys; from pathlib import Path; from gptcore.config import TokenizerConfig; "
        "from gptcore.tokens import learn_tokenizer; "
        "learn_tokenizer(Path(sys.argv[1]), TokenizerConfig.model_validate_json(sys.argv[2]), Path(sys.argv[3]))"
    )
    subprocess.run([sys.executable, "-c", code, elsewhere, config.model_dump_json(), corpus], check=True, cwd=tmp_path)
    assert files_in(tmp_path / "here" / "tokenizer") == files_in(elsewhere / "tokenizer")
    assert set(files_in(elsewhere / "tokenizer")) == {"tokenizer.model", "tokenizer.json"}


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_a_vocabulary_larger_than_the_text_allows_names_the_largest(algorithm):
    with pytest.raises(TokenizerError, match=r"a vocabulary of 8192 is larger than this text allows") as error:
        train(PROSE, TokenizerConfig(algorithm=algorithm))
    largest = int(re.search(r"at most (\d+)", str(error.value))[1])
    assert train(PROSE, TokenizerConfig(vocabulary=largest, algorithm=algorithm)).vocabulary == largest
    with pytest.raises(TokenizerError, match="larger than this text allows"):
        train(PROSE, TokenizerConfig(vocabulary=largest + 1, algorithm=algorithm))


def test_a_vocabulary_too_small_for_the_characters_names_the_smallest():
    text = ["".join(chr(0x4E00 + n) for n in range(200))]
    with pytest.raises(TokenizerError, match="too small for the 200 different characters") as error:
        train(text, TokenizerConfig(vocabulary=400))
    smallest = int(re.search(r"at least (\d+)", str(error.value))[1])
    assert train(text, TokenizerConfig(vocabulary=smallest)).vocabulary == smallest


@pytest.mark.parametrize("texts", [[], [""], [" \n", "\n"]])
def test_no_text_is_a_clear_error(texts, tmp_path):
    with pytest.raises(TokenizerError, match="no training text"):
        learn_tokenizer(tmp_path / "out", TokenizerConfig(), write_corpus(tmp_path / "corpus", texts))


def test_a_folder_that_is_no_corpus_is_a_clear_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"has no train\.parquet"):
        learn_tokenizer(tmp_path / "out", TokenizerConfig(), tmp_path)


def test_a_line_of_any_length_is_learned_from():
    lines = ["".join(random.Random(n).choices("山水火木", k=4000)) for n in range(5)]
    tokenizer = train([*lines, *PROSE], TokenizerConfig(vocabulary=350))
    assert not any(tokenizer.is_byte(token) for token in tokenizer.encode("山水火木"))


def test_the_sample_is_bounded_and_does_not_hang_on_the_order_of_rows(tmp_path):
    corpus = write_corpus(tmp_path / "a", PROSE)
    drawn = draw_documents(corpus, "train", 1000, seed=0)
    assert sum(len(document.text) for document in drawn) == 1000
    assert drawn == draw_documents(write_corpus(tmp_path / "b", PROSE, shuffled=True), "train", 1000, seed=0)
    assert drawn != draw_documents(corpus, "train", 1000, seed=1)
    assert {document.text for document in draw_documents(corpus, "train", 10**9, seed=0)} == set(PROSE)


def test_the_report_counts_what_the_tokenizer_does(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", [*PROSE, "龘" * 3])
    numbers = learn_tokenizer(tmp_path, TokenizerConfig(vocabulary=350, character_coverage=0.999), corpus)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    texts = [*PROSE, "龘" * 3]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert numbers["vocabulary"] == 350
    assert numbers["bytes_per_token"] == pytest.approx(sum(len(text.encode()) for text in texts) / tokens)
    assert numbers["byte_fallback_share"] == pytest.approx(9 / tokens)
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["sources"]["made"]["tokens"] == tokens
    with (tmp_path / "report" / "pieces.csv").open(encoding="utf-8", newline="") as file:
        pieces = list(csv.DictReader(file))
    assert [piece["piece"] for piece in pieces] == [tokenizer.piece(token) for token in range(350)]
    assert sum(int(piece["uses"]) for piece in pieces) == tokens
    assert "Longest pieces" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
