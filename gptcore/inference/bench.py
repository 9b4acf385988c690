"""`gptcore bench generate`: this engine beside transformers' `generate` on the same machine and the same model, in turns.

    ours-B   B prompts continued greedily
    int8-B   the same with weights in eight bits
    peer-B   transformers, at its best setting here
    read     how fast the machine reads memory: what a token costs at least

The model has random weights, and prompts are random tokens: speed does not depend on them.
"""

import sys
from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import model_validator

from gptcore.config import Count, ModelConfig, Section, preset
from gptcore.model import GPT
from gptcore.model.transformer import Linear
from gptcore.turns import Measured, serve, take_turns

_WARM = 1


class BenchConfig(Section):
    """What is measured."""

    model: ModelConfig = preset("gpt2")
    """The shape; the peer is the same model, exported."""
    vocabulary: Count = 50_257
    """Pieces."""
    prompt: Count = 64
    """Tokens of a prompt."""
    new_tokens: Count = 96
    """Tokens that it is continued by."""
    batches: tuple[Count, ...] = (1, 8)
    """Prompts at once."""
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Of ours; `auto` as everywhere: bfloat16 where the hardware multiplies it."""
    rounds: Count = 5
    """Turns of everybody."""
    steps: Count = 1
    """Continuations of a turn."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.prompt + self.new_tokens > self.model.context:
            raise ValueError(f"prompt + new_tokens is more than the context of {self.model.context}, which the peer cannot do")
        return self


def bench_generate(config: BenchConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure all contenders in turns; the object that `gptcore bench generate --json` prints, its first case on top."""
    names = ["read", *(f"{who}-{batch}" for batch in config.batches for who in ("peer", "ours", "int8"))]
    found = take_turns(__spec__.name, names, config.model_dump_json(), config.rounds, config.steps, say)
    read = found["read"].facts["bytes"] / found["read"].median  # bytes a second
    weights = weights_read(config)

    def told(name: str, batch: int) -> dict[str, Any]:
        who: Measured = found[name]
        speed = batch * config.new_tokens / who.median
        row = {
            "setting": who.setting, "tokens_per_second": round(speed, 1), "memory_mb": round(who.facts["memory_mb"]),
            "first_token_seconds": round(who.facts["first_token_seconds"], 4),
        }  # fmt: skip
        if batch == 1:  # with more, one reading of the weights serves several tokens
            row["bandwidth_share"] = round(who.facts["bytes_per_weight"] * weights * speed / read, 3)
        return row

    cases = {}
    for batch in config.batches:
        peer = {"name": "transformers generate", **told(f"peer-{batch}", batch)}
        for who, label in (("ours", ""), ("int8", ", int8")):
            ratio = found[f"peer-{batch}"].median / found[f"{who}-{batch}"].median
            cases[f"batch {batch}{label}"] = {**told(f"{who}-{batch}", batch), "ratio": round(ratio, 3), "peer": peer}
    shape = {"vocabulary": config.vocabulary, "prompt": config.prompt, "new_tokens": config.new_tokens}
    first = cases[f"batch {config.batches[0]}"]
    return {
        **first,
        "read_gb_per_second": round(read / 1e9, 1),
        "cases": cases,
        "shape": {**shape, **config.model.model_dump()},
    }


def weights_read(config: BenchConfig) -> int:
    """How many weights a token meets: all matrices and the head; of the other tables it takes a row."""
    model = GPT(config.model, config.vocabulary, device="meta")
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, Linear))
    return matrices + (model.embedding.weight.numel() if model.head is None else 0)


if __name__ == "__main__":
    from gptcore.inference import contenders

    serve(lambda: contenders.make(sys.argv[1], BenchConfig.model_validate_json(sys.argv[2])), _WARM)
