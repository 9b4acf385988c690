"""The learning rate over the run, as a share of its peak."""

import math

from gptcore.config import OptimizerConfig


def rate_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """Share of the peak rate for the step with number `step` (from 0) of `steps`: linear up, then down to `final_rate`.

    `wsd` is the trapezoid of Zhai et al. 2022 and Hägele et al. 2024, with `decay: 1` a plain triangle; `cosine` is half a
    period (Loshchilov and Hutter 2017), `linear` falls from the end of the warm-up on.
    """
    warmup = config.warmup * steps
    rising = (step + 1) / warmup if warmup > 0 else 1.0
    decay = config.decay * steps if config.schedule == "wsd" else steps - warmup
    left = min(1.0, (steps - step) / decay) if decay > 0 else 1.0
    if config.schedule == "cosine":
        left = (1.0 - math.cos(math.pi * left)) / 2
    return min(1.0, rising) * (config.final_rate + (1.0 - config.final_rate) * left)
