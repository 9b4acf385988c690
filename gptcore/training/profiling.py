"""`training.profile`: where the time of a few steps goes, as a trace for chrome://tracing or Perfetto and as a table."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

TRACE, TABLE = "trace.json.gz", "table.txt"
_WAIT, _WARM, _STEPS = 2, 1, 4
"""Steps that are left out, thrown away, and kept."""
_ROWS = 40


@contextmanager
def profiled(folder: Path | None, card: bool) -> Iterator[Callable[[], None]]:
    """What is to be called after every step; a few of them are written to `folder`. With None nothing happens."""
    if folder is None:
        yield lambda: None
        return

    def write(found: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(folder / TRACE))
        by = "self_device_time_total" if card else "self_cpu_time_total"
        (folder / TABLE).write_text(
            f"{_STEPS} steps\n{found.key_averages().table(sort_by=by, row_limit=_ROWS)}\n", encoding="utf-8"
        )

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card else [])]
    plan = schedule(wait=_WAIT, warmup=_WARM, active=_STEPS, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as running:
        yield running.step
