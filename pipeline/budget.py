"""The byte budget's arithmetic: what may be set aside on disk without ever getting stuck.

Runs in: supervisor. Pure.

Every byte is reserved before it is written. The shard that a lane reads, or needs next, is its
current one; each lane always keeps its floor, room for the largest shard there is, so a lane's
next shard can be fetched whatever the others hold: the budget cannot deadlock. Shards fetched
ahead share what is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from pipeline.errors import BudgetError


def floor_bytes(sizes_bytes: Iterable[int | None], step_bytes: int) -> int:
    """Bytes that each lane keeps for its current shard: the largest known size, and at least one
    grant where a size is unknown."""
    sizes = list(sizes_bytes)
    known = max((size for size in sizes if size is not None), default=0)
    return max(known, step_bytes) if None in sizes else known


def charge(
    fixed_bytes: int,
    floor: int,
    lanes: int,
    current_bytes: Iterable[int],
    ahead_bytes: Iterable[int],
) -> int:
    """Bytes taken from the budget.

    Args:
        fixed_bytes: Logs, small files and checkpoints (the one being written too).
        floor: From floor_bytes.
        lanes: Lanes that still read: each keeps its floor.
        current_bytes: Per shard that is some lane's current one and nobody's next, its reserved
            bytes: what is beyond the floor counts.
        ahead_bytes: Per other shard, its reserved bytes.
    """
    beyond = sum(max(0, have - floor) for have in current_bytes)
    return fixed_bytes + floor * lanes + beyond + sum(ahead_bytes)


def as_gb(size_bytes: int) -> float:
    """The smallest --max-disk, in GB, that is a budget of so many bytes."""
    gigabytes = size_bytes / 1e9
    while int(gigabytes * 1e9) < size_bytes:
        gigabytes = math.nextafter(gigabytes, math.inf)
    return gigabytes


def refuse_too_small(
    budget_bytes: int, *, fixed_bytes: int, checkpoint_bytes: int, floor: int, lanes: int
) -> None:
    """Refuse a budget that cannot hold what the run cannot do without.

    Raises:
        BudgetError: names the smallest budget that works.
    """
    smallest = fixed_bytes + checkpoint_bytes + floor * lanes
    if smallest > budget_bytes:
        raise BudgetError(
            f"the disk budget of {budget_bytes / 1e9:.3f} GB is too small: {lanes} lanes × "
            f"{floor / 1e9:.3f} GB (the largest shard) + {checkpoint_bytes / 1e9:.3f} GB of "
            f"checkpoints + {fixed_bytes / 1e9:.3f} GB of logs = {smallest / 1e9:.3f} GB",
            f"give --max-disk {smallest / 1e9 + 0.0005:.3f} or more, fewer --lanes, or smaller "
            "shards; or --max-disk 0, which streams shards through memory",
        )
