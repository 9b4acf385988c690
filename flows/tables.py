"""Tables for people: what commands answer, on whatever console shows them."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pandas
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from gptcore.artifacts import Artifact, Decision
from gptcore.cost import card_rows
from gptcore.room import amount

if TYPE_CHECKING:
    from tasks.promotion import Outcome
    from tasks.sweep import SweepOutcome


def closing(outcome: "Outcome", seconds: float) -> Group:
    """What a run ends with: its stages, the numbers beside their baselines, a sample, the registered models."""
    artifacts, sample = outcome.artifacts, outcome.sample
    parts: list[Any] = [_stages(artifacts), _numbers(outcome.summary)]
    if sample is not None:
        prompt, answer = sample
        text = Text.assemble((prompt, "bold"), answer)
        parts.append(Panel(text, title="a sample of the base", title_align="left", border_style="dim"))
    parts.append(_models(outcome.models))
    if outcome.results is not None and outcome.models:
        parts.append(Text(f"Everything on one page: {outcome.results}", overflow="fold"))
        parts.append(Text(f'Use it: gptcore generate {outcome.models[0]["name"]} "…"'))
    reused = sum(artifact.reused for artifact in artifacts.values())
    built = len(artifacts) - reused
    if built == 0:
        parts.append(Text(f"Nothing changed: all {reused} stages were reused. {duration(seconds)}.", style="bold"))
    else:
        parts.append(Text(f"{built} stage(s) built, {reused} reused, in {duration(seconds)}.", style="bold"))
    return Group(*parts)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _stages(artifacts: Mapping[str, Artifact]) -> Table:
    table = _table("stage", "", "seconds", "what it is")
    for stage, artifact in artifacts.items():
        how = Text("reused", "cyan") if artifact.reused else Text("built", "green")
        table.add_row(stage, how, "" if artifact.reused else f"{artifact.seconds:.0f}", Text(some(artifact.numbers), "dim"))
    return table


def _numbers(rows: pandas.DataFrame) -> Table:
    table = _table("model", "metric", "value", "95 % interval", "beside it", "", "")
    for row in rows.to_dict("records"):
        beside = isinstance(row["baseline"], str)
        against, verdict = (f"{row['baseline_value']:.3f}", str(row["verdict"])) if beside else ("", "")
        style = {"better": "green", "worse": "red"}.get(verdict, "yellow")
        ours = (str(row["model"]), str(row["metric"]), f"{row['value']:.3f}", f"{row['low']:.3f} – {row['high']:.3f}")
        table.add_row(*ours, str(row["baseline"]) if beside else "", against, Text(verdict, style))
    return table


def _models(models: list[dict[str, Any]]) -> Table:
    table = _table("registered", "version", "aliases", "")
    for model in models:
        table.add_row(model["name"], str(model["version"]), ", ".join(model["aliases"]), Text(model.get("verdict", ""), "dim"))
    return table


def plan_table(decisions: Mapping[str, Decision]) -> Table:
    """What a run would do."""
    table = _table("stage", "", "why")
    for stage, decision in decisions.items():
        style = {"reuse": "cyan", "resume": "yellow"}.get(decision.action, "green")
        table.add_row(stage, Text(decision.action, style), Text(decision.reason, "dim"))
    return table


def sweep_closing(outcome: "SweepOutcome", seconds: float) -> Group:
    """What a sweep ends with: its trials, the best first, and what to do with the best settings."""
    sweep, best = outcome.sweep, outcome.best
    table = _table("trial", *sweep.space, sweep.number, "", "seconds", "")
    for row in outcome.table.to_dict("records"):
        model = next(trial.model for trial in outcome.trials if trial.number == row["trial"])
        how = Text("") if model is None else Text("reused", "cyan") if model.reused else Text("trained", "green")
        settings = (f"{row[key]:.5g}" if isinstance(row[key], float) else str(row[key]) for key in sweep.space)
        value = Text("failed", "red") if model is None else Text(f"{row[sweep.number]:.4f}")
        took = "" if model is None or model.reused else f"{model.seconds:.0f}"
        mark = Text("best", "bold green") if row["trial"] == best.number else Text(row["error"], "dim")
        table.add_row(str(row["trial"]), *settings, value, how, took, mark)
    return Group(
        table,
        Text(f"Judged on validation text; pictures and table: {outcome.folder}", overflow="fold"),
        Text(f"Evaluate and register the best: gptcore run {outcome.config}", overflow="fold"),
        Text(f"{len(outcome.trials)} trial(s) in {duration(seconds)}.", style="bold"),
    )


def models_table(rows: list[dict[str, Any]]) -> Table:
    """Registered versions, newest first."""
    table = _table("model", "version", "aliases", "headline", "", "registered", "digest")
    for row in rows:
        table.add_row(
            row["name"], str(row["version"]), ", ".join(row["aliases"]), str(row.get("headline", "")),
            Text(str(row.get("verdict", "")), "dim"), str(row.get("created", "")), Text(row["digest"][:12], "dim"),
        )  # fmt: skip
    return table


def history_table(changes: list[dict[str, Any]]) -> Table:
    """Changes of champion, oldest first."""
    table = _table("when (UTC)", "from", "to", "why", "by")
    for change in changes:
        why = ("forced: " if change["forced"] else "") + change["reason"]
        names = (str(change[key]) if change[key] is not None else "" for key in ("from", "to"))
        table.add_row(change["time"][:19].replace("T", " "), *names, why, change["user"] or "")
    return table


def lineage_tree(found: Mapping[str, Any]) -> Tree:
    """What something was made of, and what depends on it."""
    tree = Tree(Text(f"{found['what']}, {found['is']}", style="bold"))
    for title, key in (("made of", "made_of"), ("read by", "read_by"), ("stands in", "stands_in"), ("used by", "used_by")):
        if found.get(key):
            branch, seen = tree.add(Text(title, style="dim")), set[str]()
            for node in found[key]:
                _grow(branch, node, seen)
    versions = tree.add(Text("registered versions that depend on it", style="dim"))
    for version in found["versions"]:
        aliases = "".join(f" @{alias}" for alias in version["aliases"])
        versions.add(Text(f"{version['name']}/{version['version']}{aliases}"))
    if not found["versions"]:
        versions.add(Text("none"))
    return tree


def _grow(branch: Tree, node: Mapping[str, Any], seen: set[str]) -> None:
    inner, again = node.get("made_of", ()), node["digest"] in seen
    where = "" if node["path"] else ", a source or gone from the store"
    note = ", as above" if node.get("above") or (again and inner) else where
    twig = branch.add(Text.assemble(node["stage"], (f" {node['digest'][:12]}{note}", "dim")))
    seen.add(node["digest"])
    for part in () if again else inner:
        _grow(twig, part, seen)


def status_tables(status: Mapping[str, Any]) -> Group:
    """Services and runs, as `gptcore status` shows them."""
    if not status["up"]:
        parts: list[Any] = [Text("The services are down; gptcore up starts them.")]
    else:
        table = _table("service", "", "address", "process", "since", "restarts", "memory")
        for name, row in status["services"].items():
            well = row["alive"] and row["answers"] is not False
            table.add_row(
                name, Text("well" if well else "starting or dead", "green" if well else "red"), status.get(name) or "",
                str(row["pid"]), _moment(row["since"]), str(row["restarts"]), f"{row['memory_mb']:.0f} MB",
            )  # fmt: skip
        parts = [table, Text(f"user and password: {status['password']}", "dim")]
    running = _table("running", "model", "process", "since")
    for row in status["running"]:
        running.add_row(str(row["run"] or "")[-8:], row["name"], str(row["pid"]), _moment(row["since"]))
    parts += [running] if status["running"] else []
    for when, title in (("last", "last runs"), ("next", "next runs")):
        if rows := status.get(when):
            table = _table(title, "flow", "model", "state", "at")
            for row in rows:
                table.add_row(row["run"][-8:], row["flow"], row["name"], row["state"], _moment(row["at"]))
            parts.append(table)
    return Group(*parts)


def _moment(text: str) -> str:
    return f"{datetime.fromisoformat(text).astimezone():%Y-%m-%d %H:%M:%S}"


def reproduction_table(found: Mapping[str, Any]) -> Group:
    """What a reproduction found: digest by digest, number by number, and the verdict."""
    parts: list[Any] = []
    if found["stages"]:
        stages = _table("stage", "recorded", "rebuilt", "")
        for row in found["stages"]:
            same = row["recorded"] == row["rebuilt"]
            told = Text("equal", "green") if same else Text(row["differs"], "red")
            stages.add_row(row["stage"], row["recorded"][:12], row["rebuilt"][:12], told)
        parts.append(stages)
    if found["metrics"]:
        numbers = _table("metric", "recorded", "rebuilt", "95 % interval", "beside it", "")
        for row in found["metrics"]:
            ours = [f"{row[key]:.4f}" for key in ("recorded", "rebuilt")]
            beside = (row["baseline"], f"{row['baseline_value']:.4f}") if row["baseline"] else ("", "")
            numbers.add_row(row["metric"], *ours, f"{row['low']:.4f} – {row['high']:.4f}", *beside)
        parts.append(numbers)
    for change in () if found["stages"] else found["changed"]:  # told before the long work
        parts.append(Text(f"changed since: {change['what']}", "dim" if change["weight"] == "note" else "yellow"))
    if found["scratch"]:
        parts.append(Text(f"What was rebuilt is kept: GPTCORE_HOME={found['scratch']}", overflow="fold"))
    parts.append(Text(found["verdict"], "bold green" if found["equal"] else "bold"))
    return Group(*parts)


def removals_table(answer: Mapping[str, Any], *, done: bool) -> Group:
    """What `clean` would remove or has removed, and how to go on."""
    gone = set(answer["removed"])
    table = _table("", "", "size", "days", "why")
    for item in answer["items"]:
        what = Text(item["what"], "cyan" if item["path"] in gone or not done else "yellow")
        why = item["why"] if item["path"] in gone or not done else "left: taken into use meanwhile"
        table.add_row(what, item["label"], amount(item["bytes"]), f"{item['age_days']:.0f}", Text(why, "dim"))
    needed = f"{answer['artifacts_needed_by_aliases']} of them for versions under an alias"
    stays = f"{answer['artifacts_kept']} artifacts stay, {needed}."
    if not answer["items"]:
        return Group(Text(f"Nothing may go that is older than {answer['keep_days']:g} days; {stays}"))
    freed = amount(answer["frees_bytes"])
    if done:
        return Group(table, Text(f"{len(gone)} removed, {freed} freed; {stays}", "bold"))
    return Group(table, Text(f"This frees {freed}; {stays} Nothing was removed. Remove it: {answer['command']}", "bold"))


def forgetting_table(rows: pandas.DataFrame) -> Table:
    """Champion and candidate on old and new text."""
    table = _table("model", "test set", "documents", "bits per byte", "95 % interval", "change", "")
    for row in rows.to_dict("records"):
        change = "" if pandas.isna(row["change"]) else f"{row['change']:+.2%}"
        style = {"better": "green", "worse": "red"}.get(row["verdict"], "yellow")
        between = f"{row['low']:.3f} – {row['high']:.3f}"
        numbers = (f"{row['documents']:,}", f"{row['bits_per_byte']:.3f}", between, change)
        table.add_row(row["model"], row["test_set"], *numbers, Text(row["verdict"], style))
    return table


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Nested facts, a line each."""
    table = _table("", "")
    table.show_header = False
    for key, value in facts.items():
        if key == "cost" and (rows := card_rows(value)):
            for title, text in rows:
                table.add_row(Text(f"cost, {title}" if title else "", "dim"), Text(text))
        elif isinstance(value, Mapping):
            for inner, entry in _flat(value):
                table.add_row(Text(f"{key}.{inner}", "dim"), str(entry))
        else:
            table.add_row(Text(key, "dim"), str(value))
    return table


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            yield from _flat(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", entry


def some(numbers: Mapping[str, float | int | str], most: int = 4) -> str:
    """The first few numbers of an artifact, in words."""
    shown = [f"{key.replace('_', ' ')} {figure(value)}" for key, value in list(numbers.items())[:most]]
    return ", ".join(shown)


def figure(value: float | int | str) -> str:
    """A number as people write it."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value


def count(value: float) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def forecast_table(rows: Sequence[Mapping[str, Any]], currency: str) -> Group:
    """What training each shape would take in each place."""
    priced = any(row["money"] is not None for row in rows)
    columns = ("shape", "parameters", "FLOP/token", "on", "tokens", "time", "tokens/s", "micro-batch", "memory", "energy")
    table = _table(*columns, *([currency] if priced else []))
    for row in rows:
        need, there = (f"{row[key] / 1024:.1f}" for key in ("memory_mb", "memory_there_mb"))
        missing = Text(f"does not fit, {row['missing_mb'] / 1024:.1f} GiB are missing", "red")
        memory = Text(f"{need} of {there} GiB") if row["fits"] else missing
        energy = "" if row["kwh"] is None else f"{row['kwh']:.3g} kWh"
        money = "" if row["money"] is None else f"{row['money']:,.2f}"
        table.add_row(
            row["shape"], f"{row['parameters'] / 1e6:,.1f} M", f"{row['flops_per_token'] / 1e9:.3g} G", row["on"],
            f"{row['tokens'] / 1e6:,.1f} M", duration(row["seconds"]), count(row["tokens_per_second"]),
            str(row["micro_batch"] or ""), memory, energy, *([money] if priced else []),
        )  # fmt: skip
    assumed = {
        row["on"]: f"{row['on']}: {row['mfu']:g} of {row['peak_tflops']:.3g} TFLOP/s in {row['precision']}"
        + (f" ({row['device']}, measured)" if row["device"] != row["on"] else " (data sheet)")
        for row in rows
    }
    told = (
        f"Assumed speed (--mfu): {'; '.join(assumed.values())}. Pretraining and its evaluations alone; memory of eager steps."
    )
    return Group(table, Text(told, "dim"))


def bench_table(answer: Mapping[str, Any]) -> Group:
    """Every contender of `gptcore bench train` in a line."""
    table = _table("", "tokens/s", "against the peer", "GFLOP/s", "of the peak", "memory", "setting")
    rows = [("gptcore", answer, answer["ratio"]), (answer["peer"]["name"], answer["peer"], 1.0)]
    if "muon" in answer:
        rows.insert(1, ("gptcore, Muon", answer["muon"], answer["muon"]["ratio"]))
    for name, row, ratio in rows:
        table.add_row(
            name, f"{row['tokens_per_second']:,.0f}", f"{ratio:.2f} x", f"{row['gflops']:.0f}", f"{row['mfu']:.0%}",
            amount(row["memory_mb"] << 20), row["setting"],
        )  # fmt: skip
    shape = answer["shape"]
    what = f"{shape['layers']} layers x {shape['width']}, vocabulary {shape['vocabulary']:,}, context {shape['context']}"
    peak = f"{what}, batch {shape['batch']}; peak {answer['peak_gflops']:.0f} GFLOP/s ({answer['peak_setting']})"
    return Group(table, Text(peak, "dim"))


def generation_table(answer: Mapping[str, Any]) -> Group:
    """Every case of `gptcore bench generate` and its peer in a line."""
    table = _table("", "tokens/s", "against the peer", "first token", "of the reading", "memory", "setting")
    for case, row in answer["cases"].items():
        peers = [] if case.endswith("int8") else [(f"{case}, {row['peer']['name']}", row["peer"], 1.0)]
        for name, one, ratio in [(f"{case}, gptcore", row, row["ratio"]), *peers]:
            share = f"{one['bandwidth_share']:.0%}" if "bandwidth_share" in one else ""
            table.add_row(
                name, f"{one['tokens_per_second']:,.1f}", f"{ratio:.2f} x", f"{one['first_token_seconds']:.3f} s", share,
                amount(one["memory_mb"] * 1e6), one["setting"],
            )  # fmt: skip
    shape = answer["shape"]
    what = f"{shape['layers']} layers x {shape['width']}, vocabulary {shape['vocabulary']:,}, prompt {shape['prompt']}"
    read = f"{what}, {shape['new_tokens']} new tokens; memory is read at {answer['read_gb_per_second']:.1f} GB/s"
    return Group(table, Text(read, "dim"))
