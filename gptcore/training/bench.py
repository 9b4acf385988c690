"""`gptcore bench train`: this engine beside transformers' GPT-2 on the same machine, in turns.

    ours     a step of the training loop, as it is
    muon     the same with Muon
    peer     transformers, at its best setting here
    matrix   the machine's matrix product

Text is random tokens: speed does not depend on it.
"""

import sys
from collections.abc import Callable
from typing import Any

from gptcore.config import Count, ModelConfig, Section, TrainingConfig, preset
from gptcore.turns import Measured, serve, take_turns

GPT2_BLOCK = preset("gpt2").model_copy(update={"layers": 6, "width": 384, "heads": 6, "context": 256})
"""The GPT-2 block at a size that two cores train: 13.9 M parameters with 8,192 pieces."""
_MATRIX = 2048
_WARM = 3
"""Steps before anything is timed; compiling happens in the first."""


class BenchConfig(Section):
    """What is measured."""

    model: ModelConfig = GPT2_BLOCK
    """The shape of both; the peer is built of the GPT-2 block's settings only."""
    vocabulary: Count = 8192
    """Pieces."""
    training: TrainingConfig = TrainingConfig(
        steps=1000, batch=8, optimizer={"algorithm": "adamw"},  # type: ignore[arg-type]
    )  # fmt: skip
    """Batch, optimizer, precision and compile of ours."""
    rounds: Count = 7
    """Turns of everybody."""
    steps: Count = 4
    """Steps of a turn."""


def bench_train(config: BenchConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure all contenders in turns; the object that `gptcore bench train --json` prints."""
    names = ["ours", "peer", "matrix"] + (["muon"] if config.training.optimizer.algorithm != "muon" else [])
    found = take_turns(__spec__.name, names, config.model_dump_json(), config.rounds, config.steps, say)
    ours, peer, matrix = found["ours"], found["peer"], found["matrix"]
    tokens = config.training.batch * config.model.context
    flops = flops_per_token(config.model, config.vocabulary)
    shared = {name: getattr(config.model, name) for name in ("layers", "width", "heads", "context")}
    block = GPT2_BLOCK.model_copy(update={**shared, "ffn_width": config.model.inner_width})  # what the peer is built of
    peak = 2 * _MATRIX**3 / matrix.median / 1e9

    def told(who: Measured, flops: int = flops) -> dict[str, Any]:
        speed = tokens / who.median
        gflops = speed * flops / 1e9
        return {
            "setting": who.setting, "tokens_per_second": round(speed, 1), "step_seconds": round(who.median, 4),
            "gflops": round(gflops, 1), "mfu": round(gflops / peak, 4), "memory_mb": round(who.memory_mb),
        }  # fmt: skip

    answer = {
        **told(ours), "flops_per_token": flops, "peak_gflops": round(peak, 1), "peak_setting": matrix.setting,
        "ratio": round(peer.median / ours.median, 3), "memory_ratio": round(ours.memory_mb / peer.memory_mb, 3),
        "peer": {"name": "transformers GPT2LMHeadModel", **told(peer, flops_per_token(block, config.vocabulary))},
        "shape": {"vocabulary": config.vocabulary, "batch": config.training.batch, **config.model.model_dump()},
    }  # fmt: skip
    if "muon" in found:
        answer["muon"] = told(found["muon"]) | {"ratio": round(peer.median / found["muon"].median, 3)}
    return answer


def flops_per_token(model: ModelConfig, vocabulary: int) -> int:
    """Forward and backward: 6 N + 12 layers context width (Chowdhery et al. 2022, appendix B).

    N are all weights but those that are only looked up: value embeddings, and the embedding where the head has its own. A block
    with a window counts with that and not with the context.
    """
    from gptcore.model import GPT

    looked_up = ("values", "embedding.") if not model.tied else ("values",)
    weights = GPT(model, vocabulary, device="meta").named_parameters()
    parameters = sum(weight.numel() for name, weight in weights if not name.startswith(looked_up))
    seen = sum(min(model.window(block) or model.context, model.context) for block in range(model.layers))
    return 6 * parameters + 12 * seen * model.heads * model.size_of_head


if __name__ == "__main__":
    from gptcore.training import contenders

    serve(lambda: contenders.make(sys.argv[1], BenchConfig.model_validate_json(sys.argv[2])), _WARM)
