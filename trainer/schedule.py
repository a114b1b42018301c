"""Learning rates over the updates of a run.

Runs in: trainer. Pure.
"""

from __future__ import annotations

import math

from pipeline.config import Scheduler


def multiplier(config: Scheduler, step: int, total_steps: int) -> float:
    """The factor on the largest learning rate at one update.

    Args:
        config: Shape of the schedule.
        step: 0 for the first update. Warm-up takes it to 1 in warmup_steps updates, none at 0.
        total_steps: Updates of the whole run; the last one has exactly min_lr_ratio.

    Returns:
        Between min_lr_ratio and 1 after the warm-up.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    low, last = config.min_lr_ratio, total_steps - 1
    if config.type == "constant":
        return 1.0
    if config.type == "wsd":
        length = config.decay_steps or max(1, total_steps // 5)
        begin = max(config.warmup_steps, last - length)
    else:
        begin = config.warmup_steps
    if step >= last:
        return low
    if step <= begin:
        return 1.0
    progress = (step - begin) / (last - begin)
    if config.type == "wsd":
        return 1.0 - (1.0 - low) * progress
    return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
