"""Every trainer process is remembered, whatever became of it."""

import pytest

from gptcore.training.attempts import Recorder, read_attempts, training_cost
from gptcore.training.energy import Counter, Source


def line(number: int, **facts) -> str:
    return "{" + f'"attempt": {number}, ' + ", ".join(f'"{key}": {value}' for key, value in facts.items()) + "}\n"


def test_an_attempt_tells_how_far_it_got_and_how_it_ended(tmp_path):
    file, energy = tmp_path / "attempts.jsonl", [0.0]
    with Recorder(file, Source("a meter", [Counter(lambda: energy[0])])) as recorder:
        recorder.begin(0, 100.0, "a machine")
        recorder.step, energy[0] = 7, 12.5
        recorder.ended = "stopped"
    with pytest.raises(ZeroDivisionError), Recorder(file):
        raise ZeroDivisionError
    first, second = read_attempts(file)
    assert (first.ended, first.steps, first.joules, first.device) == ("stopped", 7, 12.5, "a machine")
    assert (second.ended, second.from_step, second.steps, second.joules) == ("failed", None, 0, None)
    cost = training_cost([first, second])
    assert (cost["attempts"], cost["failed_attempts"], cost["tokens"], cost["energy_joules"]) == (2, 2, 700, 12.5)
    assert cost["energy_missing"] == "1 of 2 attempts told none"


def test_an_attempt_that_only_began_was_killed_and_a_line_that_was_cut_off_harms_no_other(tmp_path):
    file = tmp_path / "attempts.jsonl"
    file.write_text(line(1, started=5.0) + line(1, seconds=2.5, step=4, from_step=0) + '{"attempt": 1, "seco')
    with Recorder(file) as recorder:
        recorder.ended = "finished"
    first, second = read_attempts(file)
    assert (first.ended, first.seconds, first.steps) == ("killed", 2.5, 4)
    assert second.ended == "finished"


def test_what_was_done_twice_is_counted_and_earlier_runs_are_told_apart(tmp_path):
    file = tmp_path / "attempts.jsonl"
    file.write_text(
        line(1, started=0, seconds=10, from_step=0, step=28, tokens_per_step=10)
        + line(2, started=20, seconds=1)  # killed before it got to its first step
        + line(3, started=30, seconds=5, from_step=20, step=22, tokens_per_step=10)
        + line(4, started=40, seconds=20, from_step=20, step=60, tokens_per_step=10, ended='"finished"')
    )
    cost = training_cost(read_attempts(file), before=2)
    assert (cost["seconds"], cost["seconds_of_earlier_runs"]) == (36, 11)
    assert (cost["attempts"], cost["failed_attempts"]) == (4, 3)
    assert (cost["repeated_steps"], cost["repeated_tokens"]) == (8 + 2, 100)
    assert cost["tokens"] == (60 + 8 + 2) * 10


def test_recording_never_fails_what_is_recorded(tmp_path):
    def broken() -> float:
        if reads:
            raise OSError("the driver is gone")
        reads.append(1)
        return 0.0

    reads: list[int] = []
    with Recorder(tmp_path / "no folder" / "attempts.jsonl", Source("broken", [Counter(broken)])) as recorder:
        recorder.begin(0, 1.0, "")
        recorder.note()
    assert read_attempts(tmp_path / "no folder" / "attempts.jsonl") == []
    assert training_cost([])["seconds"] == 0
