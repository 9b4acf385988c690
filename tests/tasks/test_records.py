"""The record of an artifact is found in the store and, when its folder is gone from there, in MLflow."""

import shutil

from gptcore.artifacts import read_manifest
from gptcore.record import read_record
from tasks.records import Records


def test_what_is_in_the_store_comes_from_there(bench):
    made = bench.chain()
    records = Records(bench.home)
    assert records.find(made["corpus"].digest) == made["corpus"].path
    record = read_record(made["base"].path, records.find)
    assert list(record.manifests) == ["base", "shards", "corpus"]
    assert records.find_evaluation(*record.evaluated_by()) == made["evaluation-base"].path


def test_what_is_gone_from_the_store_comes_from_mlflow(bench):
    made = bench.chain()
    manifests = {stage: read_manifest(artifact.path) for stage, artifact in made.items()}
    shutil.rmtree(bench.home / "store")
    records = Records(bench.home)
    record = read_record(records.find(made["base"].digest), records.find)
    record = record.with_evaluation(records.find_evaluation(*record.evaluated_by()))
    assert record.manifests == manifests
    assert (record.target, record.last) == ("base", "evaluation-base")


def test_what_nobody_has_is_not_found(bench):
    made = bench.chain()
    assert Records(bench.home).find("0" * 64) is None
    assert Records(bench.home).find_evaluation("evaluation-base", {"base": made["corpus"].digest}) is None
