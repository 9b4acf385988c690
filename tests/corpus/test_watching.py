import subprocess
import sys

from gptcore.config import CorpusConfig, FilesSource, PipelineConfig, TrainingConfig
from gptcore.corpus.watching import Watch, changed_sources, source_digests


def pipeline(folder):
    source = FilesSource(paths=(str(folder),))
    return PipelineConfig(corpus=CorpusConfig(sources=(source,)), training=TrainingConfig(steps=1))


def test_a_change_is_told_of_once_when_it_has_come_to_rest(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("one")
    watch = Watch(tmp_path, pipeline(texts))
    assert [watch.look() for _ in range(3)] == [[], [], []]
    (texts / "b.txt").write_text("half of")
    assert watch.look() == [], "it may still be written"
    (texts / "b.txt").write_text("half of it")
    assert watch.look() == []
    assert watch.look() == ["files"]
    assert watch.look() == ["files"], "nobody said that it was passed on"
    watch.told()
    assert watch.look() == []
    (texts / "b.txt").unlink()
    later = Watch(tmp_path, pipeline(texts))  # nobody watched when it happened
    assert [later.look(), later.look()] == [[], ["files"]]


def test_a_source_that_is_away_for_a_moment_is_no_change(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("one")
    watch = Watch(tmp_path, pipeline(texts))
    watch.look()
    texts.rename(tmp_path / "away")
    assert [watch.look(), watch.look()] == [[], []]
    (tmp_path / "away").rename(texts)
    assert [watch.look(), watch.look()] == [[], []]


def test_sources_are_held_against_what_a_champion_has_seen(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    config = pipeline(tmp_path / "a.txt").corpus
    seen = source_digests(config, tmp_path)
    assert changed_sources(config, tmp_path, seen) == []
    assert changed_sources(config, tmp_path, {}) == ["files"]


def test_looking_needs_neither_torch_nor_prefect_nor_mlflow():
    code = "import sys, gptcore.corpus.watching\nassert not {'torch', 'prefect', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
