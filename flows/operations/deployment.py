"""What Prefect's server is told beside the flows: work pools, deployments, automations, and what was missed.

    python -m flows.operations.deployment prepare        pools, automations, missed runs; before a worker starts

It needs Prefect's address in the environment, and is a process of its own, so that whoever keeps the services together never
has to import Prefect.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tzlocal

from flows.operations.runs import is_local_server
from gptcore.config import load_config
from gptcore.errors import GptcoreError, SettingsError
from gptcore.training.process import has_card

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

CPU_POOL, GPU_POOL = "gptcore-cpu", "gptcore-gpu"
NIGHTLY = "0 3 * * *"
"""When a pipeline runs, unless somebody says another time."""
NOTIFY = "GPTCORE_NOTIFY"
"""Where failures are told: an http(s) webhook, or any other address that apprise knows, such as `mailtos://…`."""
_AT_ONCE = {CPU_POOL: 2, GPU_POOL: 1}
"""Runs of a pool at the same time: a card serves one, and on a CPU something small may pass a long training."""
_HEARTBEAT = timedelta(minutes=5)
"""A run that says nothing for this long is taken for dead, when nobody on its machine could tell."""
_TELL = "gptcore: tell of runs that failed"


class DeploymentError(GptcoreError):
    """Prefect refused what it was to be told."""


def settings_of(path: str) -> dict[str, Any]:
    """A build step of prefect.yaml: the settings of a file, checked, as the parameter that flows take."""
    return {"config": load_config(path).model_dump(mode="json")}


# ---------------------------------------------------------------------------------------------------- deployments --


def check_cron(cron: str) -> None:
    """Raise `SettingsError` unless Prefect will understand it."""
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        CronSchedule(cron=cron)
    except (ValidationError, ValueError) as error:
        raise SettingsError(f'--cron {cron!r} is no schedule: five fields such as "0 3 * * *", every night at three') from error


def deploy(file: Path, working_dir: Path, cron: str = NIGHTLY) -> str:
    """Deploy every flow of prefect.yaml with the settings of `file`; returns the name they share.

    Raises `SettingsError` for settings that are wrong, `DeploymentError` with Prefect's words when it refuses.
    """
    name = load_config(file).name
    environment = {
        **os.environ,
        "GPTCORE_CONFIG": str(file.absolute()),
        "GPTCORE_NAME": name,
        "GPTCORE_TRAINING_POOL": GPU_POOL if has_card() else CPU_POOL,
        "GPTCORE_WORKING_DIR": str(working_dir.absolute()),
        "GPTCORE_CRON": cron,
        "GPTCORE_TIMEZONE": os.environ.get("GPTCORE_TIMEZONE") or tzlocal.get_localzone_name() or "UTC",
        "PREFECT_LOGGING_LEVEL": "ERROR",
    }
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(prefect_yaml())]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if result.returncode != 0:
        said = [line.strip() for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        raise DeploymentError(f"Prefect did not take the deployments of {file}: {' '.join(said[-3:])}")
    return name


def prefect_yaml() -> Path:
    """In the wheel inside `flows`, in a checkout under deployments/."""
    flows = Path(__file__).parents[1]
    packed = flows / "prefect.yaml"
    return packed if packed.exists() else flows.parent / "deployments" / "prefect.yaml"


# -------------------------------------------------------------------------------------------------------- prepare --


def prepare() -> None:
    """Pools, automations, and what became of the runs that were due while nobody was there. May be done again."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for pool, at_once in _AT_ONCE.items():
            _ensure_pool(client, pool, at_once)
        for name in skip_missed(client):
            print(f"skipped a run of {name} that was missed; the newest one catches up")
        _ensure_automations(client)


def _ensure_pool(client: "SyncPrefectClient", name: str, at_once: int) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        if client.read_work_pool(name).concurrency_limit is None:
            client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=at_once))
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        pool = WorkPoolCreate(name=name, type="process", base_job_template=template, concurrency_limit=at_once)
        client.create_work_pool(pool)


def skip_missed(client: "SyncPrefectClient") -> list[str]:
    """Of the runs of a deployment that were due and never began, keep the newest; returns the names of the others."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.states import Cancelled

    scheduled = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
    now, seen, skipped = datetime.now(UTC), set(), []
    for run in client.read_flow_runs(flow_run_filter=scheduled, sort=FlowRunSort.EXPECTED_START_TIME_DESC):
        due = run.next_scheduled_start_time or run.expected_start_time
        if not run.auto_scheduled or due is None or due > now:
            continue
        if run.deployment_id in seen:
            message = "Missed while no worker was there; a later run of this deployment catches up."
            client.set_flow_run_state(run.id, Cancelled(name="Missed", message=message), force=True)
            skipped.append(run.name)
        seen.add(run.deployment_id)
    return skipped


# ---------------------------------------------------------------------------------------------------- automations --


def _ensure_automations(client: "SyncPrefectClient") -> None:
    """Those that are wanted and none of ours that is not; one that a person changed or switched off stays as it is."""
    known = {automation.name: automation for automation in client.read_automations()}
    # On this machine the supervisor sees at once that a process is gone, and a machine that slept wakes without false alarm.
    wanted = [*_notifications(), *([] if is_local_server() else [_heartbeat()])]
    for automation in wanted:
        there = known.get(automation.name)
        if there is not None and _address_of(there) != _address_of(automation):
            client.delete_automation(there.id)
            there = None
        if there is None:
            client.create_automation(automation)
    if not any(automation.name == _TELL for automation in wanted) and _TELL in known:
        client.delete_automation(known[_TELL].id)  # GPTCORE_NOTIFY is not set any more


def _address_of(automation: "AutomationCore") -> Any:
    """The block that a notification goes through."""
    return next((action.block_document_id for action in automation.actions if action.type == "send-notification"), None)


def _heartbeat() -> "AutomationCore":
    """A run on a machine that went away is set to Crashed. On this machine `gptcore up` sees it at once."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    alive = {"prefect.flow-run.heartbeat"}
    ended = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    return AutomationCore(
        name="gptcore: a run that is silent has crashed",
        trigger=EventTrigger(
            after=alive, expect=alive | ended, match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            for_each={"prefect.resource.id"}, posture=Posture.Proactive, threshold=1, within=_HEARTBEAT,
        ),
        actions=[ChangeFlowRunState(
            state=StateType.CRASHED, name="Crashed", force=False, message="Silent for five minutes: its machine is gone.",
        )],
    )  # fmt: skip


def _notifications() -> "list[AutomationCore]":
    """A message for every run that failed or crashed, if `GPTCORE_NOTIFY` says where to."""
    address = os.environ.get(NOTIFY)
    if not address:
        return []
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    return [AutomationCore(
        name=_TELL,
        trigger=EventTrigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            for_each={"prefect.resource.id"}, posture=Posture.Reactive, threshold=1,
        ),
        actions=[SendNotification(
            block_document_id=_notification_block(address),
            subject="gptcore: {{ flow.name }} of {{ flow_run.name }} ended as {{ flow_run.state.name }}",
            body="{{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
        )],
    )]  # fmt: skip


def _notification_block(address: str) -> Any:
    """The block that Prefect keeps the address in, encrypted; its id."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook
    from pydantic import SecretStr

    scheme = address.partition("://")[0].lower()
    if scheme not in _schemes():
        raise SettingsError(f"{NOTIFY} begins with {scheme!r}, which is neither a webhook (https://…) nor known to apprise")
    block: Any
    if scheme in ("http", "https"):
        block = CustomWebhookNotificationBlock(
            name="gptcore", url=address, method="POST", headers=None, cookies=None,
            json_data={"subject": "{{subject}}", "body": "{{body}}"},
        )  # fmt: skip
    else:
        # Of Prefect's blocks it is the plain one: it hands its address to apprise as it is, mail and all others included.
        block = SlackWebhook(url=SecretStr(address))
    return block.save("gptcore-notify", overwrite=True)


def _schemes() -> set[str]:
    from apprise import Apprise

    known: list[Mapping[str, Any]] = Apprise().details()["schemas"]
    return {"http", "https"} | {
        str(protocol) for entry in known for kind in ("protocols", "secure_protocols") for protocol in entry[kind] or ()
    }


def main() -> None:
    """See the module's docstring."""
    try:
        prepare()
    except GptcoreError as error:
        print(f"gptcore: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
