"""The lanes of a run: how many there are, and which shards each of them gets.

Runs in: supervisor and `where`. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.catalog import Shard
from pipeline.config import Config
from pipeline.lanes import LanePlan
from pipeline.turns import Group, one_group


def groups(config: Config, shards: Sequence[Shard]) -> tuple[Group, ...]:
    """The lanes: at most one a shard."""
    return one_group(min(config.data.stream.lanes, len(shards)))


def plan(config: Config, shards: Sequence[Shard], groups: Sequence[Group]) -> LanePlan:
    """Which shard comes when in which lane."""
    stream = config.data.stream
    return LanePlan(
        [shard.size_bytes for shard in shards],
        lanes=sum(group.lanes for group in groups),
        seed=config.system.seed if stream.shuffle else None,
        epochs=stream.epochs,
    )
