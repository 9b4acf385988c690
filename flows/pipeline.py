"""pipeline: from raw text to promoted models."""

from prefect import flow

from flows.session import open_run
from flows.start import open_chain
from gptcore.config import PipelineConfig
from tasks.promotion import Outcome


@flow(name="pipeline", flow_run_name="{config.name}")
def pipeline(config: PipelineConfig) -> Outcome:
    """Build or reuse every stage, then register and promote what is better."""
    with open_run(config) as run:
        return open_chain(run, config).promote()
