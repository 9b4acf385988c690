"""Nothing that an alias needs is ever in the plan, whatever was made of what."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from gptcore.lineage import Node
from gptcore.retention import Workspace, idle, kept, made_of, pinned, removable

DAY = 86_400.0


@st.composite
def graphs(draw):
    """Artifacts of a few stages and names, each made of some before it; now and then two have one digest."""
    nodes = []
    for number in range(draw(st.integers(0, 12))):
        stage, name = draw(st.sampled_from("abc")), draw(st.sampled_from("xy"))
        made_from = draw(st.lists(st.sampled_from(nodes), max_size=3)) if nodes else []
        digest = draw(st.sampled_from([str(number), *(node.digest for node in nodes)]))
        inputs = {f"in{i}": node.digest for i, node in enumerate(made_from)} | {"source": f"source {number}"}
        nodes.append(Node(stage, name, digest, Path(f"/{stage}/{name}/{number}"), f"2026-01-{number + 1:02d}", inputs))
    return nodes


def chosen(draw, nodes):
    return draw(st.lists(st.sampled_from(nodes), max_size=4)) if nodes else []


def ancestors(nodes, node):
    """The plain definition: it, its inputs, their inputs, each as every artifact that has the digest."""
    found, pending = set(), [node.digest]
    while pending:
        digest = pending.pop()
        if digest not in found:
            found.add(digest)
            pending += [value for other in nodes if other.digest == digest for value in other.inputs.values()]
    return {other.path for other in nodes if other.digest in found}


@given(st.data(), graphs())
def test_nothing_that_an_alias_needs_is_ever_in_the_plan(data, nodes):
    versions, evaluations = chosen(data.draw, nodes), chosen(data.draw, nodes)
    used = {node.path: data.draw(st.floats(0, 100)) * DAY for node in nodes}
    since = data.draw(st.floats(0, 101)) * DAY
    pins = pinned(nodes, {node.digest for node in versions}, {node.path for node in evaluations})
    plan = {node.path for node in removable(nodes, kept(nodes, pins, used, since))}
    for node in [*versions, *evaluations]:
        assert not plan & ancestors(nodes, node)
    workspaces = [Workspace(node.path.with_name(f"{node.path.name}.run"), 0.0) for node in nodes]
    going = {workspace.path.with_suffix("") for workspace in idle(workspaces, nodes, pins, since)}
    for node in [*versions, *evaluations]:
        assert not going & ancestors(nodes, node)


@given(st.data(), graphs())
def test_the_newest_of_every_stage_and_name_and_what_was_used_lately_stay_with_all_they_were_made_of(data, nodes):
    used = {node.path: data.draw(st.floats(0, 100)) * DAY for node in nodes}
    plan = {node.path for node in removable(nodes, kept(nodes, (), used, 50 * DAY))}
    newest = {(node.stage, node.name): node for node in nodes}
    for node in [*newest.values(), *(node for node in nodes if used[node.path] >= 50 * DAY)]:
        assert not plan & ancestors(nodes, node)


def test_what_nothing_needs_goes_and_what_is_made_of_it_does_not_bring_it_back():
    corpora = [Node("corpus", "a", f"c{i}", Path(f"/corpus/a/{i}"), f"2026-01-0{i}", {"books": "b"}) for i in (1, 2, 3)]
    bases = [Node("base", "a", f"b{i}", Path(f"/base/a/{i}"), f"2026-01-0{i}", {"corpus": f"c{i}"}) for i in (1, 2, 3)]
    nodes = [*corpora, *bases]
    used = {node.path: 0.0 for node in nodes}
    pins = pinned(nodes, {"b2"}, ())
    assert pins == {"b2", "c2", "b"}
    assert [str(node.path) for node in removable(nodes, kept(nodes, pins, used, DAY))] == ["/corpus/a/1", "/base/a/1"]
    assert made_of(nodes, {"unknown"}) == {"unknown"}


def test_the_checkpoints_of_what_an_alias_needs_stay_and_those_of_other_finished_or_given_up_trainings_go_when_old():
    nodes = [Node("base", "a", digest, Path(f"/base/a/{digest}"), "2026-01-01", {}) for digest in ("used", "other")]
    old = [Workspace(Path(f"/base/a/{name}.run"), 0.0) for name in ("used", "other", "unfinished")]
    young = Workspace(Path("/base/a/young.run"), 2 * DAY)
    reasons = {workspace.path.name: why for workspace, why in idle([*old, young], nodes, {"used"}, DAY).items()}
    assert reasons == {
        "other.run": "the training is finished, the model stays",
        "unfinished.run": "the training never finished",
    }
