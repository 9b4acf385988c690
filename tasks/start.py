"""start: a finished base into the store, for another to be trained on from."""

from gptcore.artifacts import Artifact, Recipe
from gptcore.record import START
from gptcore.start import FinishedBase
from tasks.run import Run, stage_task


@stage_task("start")
def take_start(run: Run, name: str, finished: FinishedBase) -> Artifact:
    """A finished base as it is. Its files lie flat: below `model/` they would have the digest of that base, not of a copy."""
    return run.stage(Recipe(START, name, 1, {}, {"model": finished.digest}), finished.copy)
