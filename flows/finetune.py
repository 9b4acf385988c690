"""finetune: the task models, and before it whatever it is made of and is not there yet."""

from prefect import flow

from flows.session import open_run
from flows.start import open_chain
from gptcore.artifacts import Artifact
from gptcore.config import PipelineConfig


@flow(name="finetune", flow_run_name="{config.name}")
def finetune(config: PipelineConfig) -> dict[str, Artifact]:
    """Build or reuse everything up to the fine-tuned models, by name."""
    with open_run(config) as run:
        return open_chain(run, config).models
