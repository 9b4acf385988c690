"""evaluate: the evaluation of every model, and before it whatever it is made of and is not there yet."""

from prefect import flow

from flows.session import open_run
from flows.start import open_chain
from gptcore.artifacts import Artifact
from gptcore.config import PipelineConfig


@flow(name="evaluate", flow_run_name="{config.name}")
def evaluate(config: PipelineConfig) -> dict[str, Artifact]:
    """Build or reuse everything up to the evaluations, by the name of their model."""
    with open_run(config) as run:
        return open_chain(run, config).evaluations
