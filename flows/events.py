"""New text as a Prefect event. A deployment of `continual` starts on it with this trigger:

triggers:
  - type: event
    expect: [gptcore.new-data]
    match: {prefect.resource.id: gptcore.sources.docs-gpt}
    posture: Reactive
    threshold: 1
"""

from collections.abc import Sequence

NEW_DATA = "gptcore.new-data"


def announce(name: str, sources: Sequence[str]) -> None:
    """Tell Prefect that `sources` of the pipeline `name` hold something new. Its server must be reachable."""
    from prefect.events import emit_event

    emit_event(
        event=NEW_DATA,
        resource={"prefect.resource.id": f"gptcore.sources.{name}", "prefect.resource.name": f"sources of {name}"},
        payload={"pipeline": name, "sources": list(sources)},
    )
