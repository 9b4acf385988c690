"""tokenizer: the tokenizer and the corpus as token ids, and before it whatever it is made of and is not there yet."""

from prefect import flow

from flows.session import open_run
from flows.start import open_chain
from gptcore.artifacts import Artifact
from gptcore.config import PipelineConfig


@flow(name="tokenizer", flow_run_name="{config.name}")
def tokenizer(config: PipelineConfig) -> Artifact:
    """Build or reuse everything up to the shards."""
    with open_run(config) as run:
        return open_chain(run, config).shards
