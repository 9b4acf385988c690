"""promote: a version that is registered already becomes champion, from Prefect's pages or on a schedule."""

from typing import Any

from prefect import flow

from flows.session import recorded
from gptcore.artifacts import home_folder, open_home
from tasks.promotion import promote_version


@flow(name="promote", flow_run_name="{model}")
def promote(model: str, force: str | None = None) -> dict[str, Any]:
    """Put `model` (name/version or name@alias) through the gate; `force` is a reason to skip it. Returns the verdict."""
    home = open_home(home_folder())
    with recorded(home, model):
        return promote_version(home, model, force)
