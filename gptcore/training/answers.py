"""What has to be tried before step 1: compile or not, and how many steps the minutes are worth. Written once."""

import time

import torch

from gptcore.tokens.batches import RowBatches
from gptcore.training.budget import decide_compile, pays, seconds_of, steps_in
from gptcore.training.job import Resolved
from gptcore.training.step import LossFunction
from gptcore.training.trainer import Trainer

_PROBE_STEPS = 8
_PROBE_FROM = 200
"""A run of at least this many steps is worth a probe to decide whether to compile."""


def answer(trainer: Trainer) -> None:
    """Complete resolved.json where it is not yet written: compile or not, and how many steps the minutes are worth."""
    if trainer.answered:
        if trainer.resolved.compiled:
            trainer.loss_function = _compiled(trainer)
        return
    training, started = trainer.job.training, time.perf_counter()
    step_seconds = _choose_compile(trainer)
    steps, evaluations = trainer.resolved.steps, training.evaluations
    if training.minutes is not None:
        assert step_seconds is not None
        evaluation_seconds = seconds_of(lambda _: trainer.evaluate(), 1)
        left = training.minutes * 60 - (time.perf_counter() - started)
        steps, evaluations = steps_in(left, step_seconds, evaluation_seconds, training.evaluations)
        steps = int(trainer.rank.same(steps))
    trainer.resolved = _with(
        trainer.resolved,
        steps=steps,
        tokens_per_second=step_seconds and trainer.resolved.tokens_per_step / step_seconds,
        evaluate_every=max(1, -(-steps // evaluations)),
    )
    trainer.reset()  # the probe's steps never happened
    if trainer.rank.first:
        trainer.run.write(trainer.resolved)
        trainer.journal.event(0, "resolved", _describe(trainer), **trainer.resolved.model_dump())


def _choose_compile(trainer: Trainer) -> float | None:
    """Decide between eager and compiled, by trying both where a run is long; seconds of a step, if they were measured."""
    training, resolved, eager = trainer.job.training, trainer.resolved, None
    seconds = None if training.minutes is None else training.minutes * 60
    if seconds is not None or (training.compile == "auto" and resolved.steps >= _PROBE_FROM):
        eager = trainer.rank.same(seconds_of(trainer.train_step, _PROBE_STEPS))
        seconds = seconds or eager * resolved.steps
    compiled, reason = decide_compile(training.compile, resolved.device, seconds)
    step_seconds = eager
    if compiled:
        try:
            trainer.loss_function = _compiled(trainer)
            trainer.train_step(0)
            if eager is not None:
                step_seconds = trainer.rank.same(seconds_of(trainer.train_step, _PROBE_STEPS))
                if training.compile == "auto":
                    compiled, reason = pays(eager, step_seconds)
        except Exception as error:
            compiled, reason = False, f"eager, because torch.compile failed: {str(error).strip().splitlines()[0][:200]}"
        if not compiled:
            trainer.loss_function, step_seconds = trainer.plain_loss, eager
            deterministic(False)
    trainer.resolved = _with(resolved, compiled=compiled, compile_reason=reason)
    return step_seconds


def compiled(loss: LossFunction, device: torch.device, dynamic: bool | None = None) -> LossFunction:
    """The loss, compiled when it is first called.

    On CPUs with deterministic algorithms, from here on: the threads of a compiled embedding add up its gradient in the order in
    which they come by, and no two runs were equal. Eager operations are equal without.
    """
    deterministic(device.type == "cpu")
    function: LossFunction = torch.compile(loss, dynamic=dynamic)
    return function


def _compiled(trainer: Trainer) -> LossFunction:
    return compiled(trainer.plain_loss, trainer.device, isinstance(trainer.batches, RowBatches))


def deterministic(wanted: bool) -> None:
    """Whether torch has to choose operations that give the same bits every time."""
    # Else every new tensor is written twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(wanted, warn_only=True)


def _with(resolved: Resolved, **answers: object) -> Resolved:
    return resolved.model_copy(update=answers)


def _describe(trainer: Trainer) -> str:
    resolved = trainer.resolved
    weights = sum(weight.numel() for weight in trainer.model.parameters())
    together = f" in each of {resolved.world} processes" if resolved.world > 1 else ""
    return (
        f"{weights / 1e6:.1f} M parameters, {resolved.steps} steps of {resolved.tokens_per_step:.0f} tokens, "
        f"{_rates(trainer)}, "
        f"{resolved.precision} on {resolved.device_name}, {resolved.threads} thread(s), about {resolved.memory_mb} MB with "
        f"{resolved.micro_batch} sequences at a time{together}; {resolved.compile_reason}"
    )


def _rates(trainer: Trainer) -> str:
    optimizer = trainer.job.training.optimizer.suited(trainer.job.model.width)
    if optimizer.algorithm == "muon":
        return f"Muon at {optimizer.matrix_rate:.2g} and AdamW at {optimizer.rate:.2g}"
    return f"{optimizer.algorithm} at {optimizer.rate:.2g}"
