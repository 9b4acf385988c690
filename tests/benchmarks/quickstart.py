"""Time the main job from nothing, and once more when everything is there: `python tests/benchmarks/quickstart.py`.

Prints one JSON object. A benchmark, not a test: machines differ, and nothing fails on time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any


def timed_run(home: str) -> dict[str, Any]:
    """Seconds of one `gptcore run` as a whole process, and of its stages."""
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", "run", "--json"],
        env={**os.environ, "GPTCORE_HOME": home}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    printed = json.loads(result.stdout)
    return {"wall": round(time.monotonic() - started, 1), "stages": printed["seconds"], "metrics": printed["metrics"]}


def main() -> None:
    """Run twice in a new home."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = timed_run(f"{folder}/home"), timed_run(f"{folder}/home")
    print(json.dumps({"first": first, "second_wall": second["wall"]}, indent=2))


if __name__ == "__main__":
    main()
