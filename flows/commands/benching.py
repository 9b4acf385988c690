"""bench: how fast this is, beside the peers, on this machine."""

import sys
from typing import Annotated

import typer

from flows.commands.common import Json, Overrides, tell

app = typer.Typer()
bench = typer.Typer(help="Measure this engine beside a peer, in turns, on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command()
def train(
    overrides: Overrides = None,
    preset: Annotated[str | None, typer.Option(help="Shape by name.", show_default="6 layers x 384 of GPT-2")] = None,
    as_json: Json = False,
) -> None:
    """Tokens per second of a training step, its share of the machine's matrix product, and transformers beside it.

    --set changes what is measured: model.layers=12, vocabulary=50257, training.batch=4, training.precision=float32,
    training.compile=true, training.optimizer.algorithm=muon, rounds=3, steps=2.
    """
    from flows.tables import bench_table
    from gptcore.training.bench import BenchConfig, bench_train
    from gptcore.turns import bench_config

    answer = bench_train(bench_config(BenchConfig, preset, overrides or ()), lambda text: print(text, file=sys.stderr))
    tell(answer, as_json, lambda: bench_table(answer))


@bench.command()
def generate(
    overrides: Overrides = None,
    preset: Annotated[str | None, typer.Option(help="Shape by name.", show_default="gpt2")] = None,
    as_json: Json = False,
) -> None:
    """Tokens per second of generation, in the hardware's type and with weights in eight bits, and transformers beside it.

    --set changes what is measured: prompt=64, new_tokens=96, batches=[1,8], precision=float32, model.layers=6, rounds=3.
    """
    from flows.tables import generation_table
    from gptcore.inference.bench import BenchConfig, bench_generate
    from gptcore.turns import bench_config

    answer = bench_generate(bench_config(BenchConfig, preset, overrides or ()), lambda text: print(text, file=sys.stderr))
    tell(answer, as_json, lambda: generation_table(answer))
