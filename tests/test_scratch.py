"""Scratch folders leave nothing behind: neither at their end nor after a kill."""

import subprocess
import sys

import pytest

from gptcore.scratch import scratch_folder, sweep_scratch

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom gptcore.scratch import scratch_folder\n"
    "with scratch_folder(Path(sys.argv[1]), 'work') as folder:\n    print(folder, flush=True)\n    time.sleep(600)\n"
)


def folders(home):
    return [path for path in (home / "scratch").iterdir() if path.is_dir()]


def test_a_scratch_folder_is_gone_at_the_end_also_after_an_error(tmp_path):
    def work():
        with scratch_folder(tmp_path, "work") as folder:
            (folder / "file").write_text("half done")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert folders(tmp_path) == []


def test_one_that_is_kept_stays(tmp_path):
    with scratch_folder(tmp_path, "work", keep=True) as folder:
        pass
    assert sweep_scratch(tmp_path) == []
    assert folders(tmp_path) == [folder]


def test_what_a_killed_process_left_is_swept_and_what_a_live_one_holds_is_not(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    held = process.stdout.readline().strip()
    with scratch_folder(tmp_path, "work"):
        assert held in map(str, folders(tmp_path)), "a live one was swept"
    process.kill()
    process.communicate()
    assert list(map(str, sweep_scratch(tmp_path))) == [held]
    assert folders(tmp_path) == []
