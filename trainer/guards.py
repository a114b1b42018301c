"""What is done about updates that look wrong: inside the graph, so that no update waits for it.

Runs in: trainer. Pure functions on arrays. The state is part of the optimizer's, so that a resumed
run judges as an uninterrupted one does.

A loss is a spike if it lies more than so many standard deviations above its running mean. The
statistic takes a spike in as a loss at the limit, so that it gets used to a new level.
"""

from __future__ import annotations

import mlx.core as mx

from pipeline.config import Guards
from trainer.optim import Arrays

_DECAY = 0.98  # of the running mean and variance: about the last fifty updates
_WARMUP = 20  # updates before anything counts as a spike


def init() -> Arrays:
    """Nothing seen yet; all float32 scalars."""
    names = ("updates", "mean", "variance", "skipped", "skipped_in_a_row", "spikes")
    return {name: mx.array(0.0) for name in names}


def judge(
    loss: mx.array, norm: mx.array, state: Arrays, config: Guards
) -> tuple[mx.array, Arrays, Arrays]:
    """Whether an update may be applied.

    Args:
        loss: Of the update, float32.
        norm: Of its gradient.
        state: From init, or the update before.
        config: Thresholds.

    Returns:
        Whether to apply it (bool scalar), the new state, and metrics.
    """
    finite = mx.isfinite(norm) & mx.isfinite(loss)
    mean, variance, seen = state["mean"], state["variance"], state["updates"]
    limit = mean + config.spike_sigmas * mx.sqrt(variance)
    spike = finite & (seen >= _WARMUP) & (loss > limit)
    apply = finite & ~spike if config.skip_spikes else finite
    taken = mx.where(spike, limit, loss)
    weight = mx.maximum(1 - _DECAY, 1 / (seen + 1))  # the plain mean at first
    off = taken - mean
    new = {
        "updates": seen + 1,
        "mean": mean + weight * off,
        "variance": (1 - weight) * (variance + weight * off * off),
    }
    kept = {name: mx.where(finite, array, state[name]) for name, array in new.items()}
    kept["skipped"] = state["skipped"] + ~apply
    kept["skipped_in_a_row"] = mx.where(apply, 0.0, state["skipped_in_a_row"] + 1)
    kept["spikes"] = state["spikes"] + spike
    metrics = {
        "finite": finite,
        "spike": spike,
        "skipped_updates": kept["skipped"],
        "skipped_in_a_row": kept["skipped_in_a_row"],
        "loss_spikes": kept["spikes"],
        "loss_limit": limit,
    }
    return apply, kept, metrics
