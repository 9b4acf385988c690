"""ingest: the rows of every task and the corpus, and before it whatever it is made of and is not there yet."""

from prefect import flow

from flows.session import open_run
from flows.start import open_chain
from gptcore.artifacts import Artifact
from gptcore.config import PipelineConfig


@flow(name="ingest", flow_run_name="{config.name}")
def ingest(config: PipelineConfig) -> Artifact:
    """Build or reuse the examples and the corpus."""
    with open_run(config) as run:
        return open_chain(run, config).corpus
