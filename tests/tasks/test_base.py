"""What of a training's settings enters its fingerprint."""

import pytest

from tasks.base import training_settings


@pytest.mark.parametrize(
    "changes", [{"processes": 2}, {"nodes": 2}, {"threads": 2}, {"micro_batch": 1}, {"restarts": 0}, {"keep": 5}]
)
def test_what_changes_a_result_by_rounding_only_is_in_no_fingerprint(tiny, changes):
    assert training_settings(tiny.training(**changes)) == training_settings(tiny.training())


@pytest.mark.parametrize("changes", [{"batch": 16}, {"steps": 7}, {"seed": 1}, {"precision": "float16"}])
def test_what_changes_more_is(tiny, changes):
    assert training_settings(tiny.training(**changes)) != training_settings(tiny.training())
