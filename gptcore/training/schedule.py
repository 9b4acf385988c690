"""The learning rate over the run, as a share of its peak."""

from gptcore.config import OptimizerConfig


def rate_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """Share of the peak rate for the step with number `step` (from 0) of `steps`: linear up, flat, linear down.

    The trapezoid of Zhai et al. 2022 and Hägele et al. 2024; with `decay: 1` a plain triangle.
    """
    warmup, decay = config.warmup * steps, config.decay * steps
    rising = (step + 1) / warmup if warmup > 0 else 1.0
    falling = (steps - step) / decay if decay > 0 else 1.0
    falling = config.final_rate + (1.0 - config.final_rate) * min(1.0, falling)
    return min(1.0, rising) * falling
