"""The data sets of a run: their shards, their lanes, and which shard comes when in which lane.

Runs in: supervisor and `where`. Decides, reads only the catalog.

Without `data.stream.mix` there is one data set, and all lanes are its own. With it every data set
has lanes of its own, at least one, and the others by weight; pipeline/turns.py then takes windows
from the data sets in the exact proportion of the weights, however few the lanes are. So the number
of lanes decides only how many shards a data set's part of a batch is mixed from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import msgspec

from pipeline import catalog
from pipeline.catalog import Shard
from pipeline.config import Config, DataSet, Stream
from pipeline.errors import ConfigError
from pipeline.lanes import LanePlan, Lanes, Turn
from pipeline.listing import QUIET, Watch
from pipeline.turns import Group

_ONE = "all"  # the name of the only data set


def data_sets(stream: Stream) -> dict[str, DataSet]:
    """By name, in the order in which they are given."""
    return stream.mix or {_ONE: DataSet(shards=stream.shards, epochs=stream.epochs)}


def read(
    stream: Stream,
    options: dict[str, Any],
    known: catalog.Known,
    watch: Watch = QUIET,
) -> tuple[tuple[Shard, ...], tuple[int, ...]]:
    """The shards of all data sets, one after the other, and how many each has.

    Raises:
        ConfigError: a shard is in two of them.
        SourceError: a shard cannot be had; says which and why.
    """
    shards: list[Shard] = []
    counts: list[int] = []
    owners: dict[str, str] = {}
    for name, one in data_sets(stream).items():
        found = catalog.build(one.shards, options, known, watch)
        for shard in found:
            if owners.setdefault(shard.name, name) != name:
                raise ConfigError(
                    f"data.stream.mix: {shard.name} is in {owners[shard.name]} and in {name}",
                    "a shard belongs to one data set",
                )
            shards.append(msgspec.structs.replace(shard, index=len(shards)))
        counts.append(len(found))
    return tuple(shards), tuple(counts)


def groups(config: Config, counts: Sequence[int]) -> tuple[Group, ...]:
    """The data sets' lanes.

    Args:
        config: The run's.
        counts: Shards of every data set: it has no more lanes than shards.
    """
    sets = data_sets(config.data.stream)
    exact = [Fraction(str(one.weight)) for one in sets.values()]
    scale = math.lcm(*(weight.denominator for weight in exact))
    weights = [int(weight * scale) for weight in exact]
    lanes = [1] * len(weights)
    while sum(lanes) < config.data.stream.lanes:
        free = [n for n in range(len(weights)) if lanes[n] < counts[n]]
        if not free:
            break
        lanes[max(free, key=lambda n: (Fraction(weights[n], 2 * lanes[n] + 1), -n))] += 1
    firsts = [sum(lanes[:n]) for n in range(len(lanes))]
    return tuple(map(Group, sets, firsts, lanes, weights))


def plan(
    config: Config, shards: Sequence[Shard], counts: Sequence[int], groups: Sequence[Group]
) -> Lanes:
    """Which shard comes when in which lane."""
    stream = config.data.stream
    seed = config.system.seed if stream.shuffle else None
    plans, first = [], 0
    for group, count, one in zip(groups, counts, data_sets(stream).values(), strict=True):
        sizes = [shard.size_bytes for shard in shards[first : first + count]]
        dealt = LanePlan(sizes, lanes=group.lanes, seed=seed, epochs=one.epochs)
        plans.append((first, dealt))
        first += count
    return plans[0][1] if len(plans) == 1 else _SideBySide(plans)


class _SideBySide:
    """The lanes of several data sets, numbered through.

    Args:
        plans: (first shard, lanes) of every data set.
    """

    def __init__(self, plans: Sequence[tuple[int, LanePlan]]) -> None:
        self._plans = plans
        self._lanes = [(plan, lane) for plan in plans for lane in range(plan[1].lanes)]
        self.lanes = len(self._lanes)

    @property
    def endless(self) -> bool:
        """Whether one of them is: only such a lane can be read for ever."""
        return any(plan.endless for _, plan in self._plans)

    def turn(self, lane: int, sequence: int) -> Turn | None:
        """See LanePlan."""
        (first, plan), inside = self._lanes[lane]
        turn = plan.turn(inside, sequence)
        return None if turn is None else Turn(turn.epoch, first + turn.shard)


def described(groups: Sequence[Group]) -> str:
    """Of a mix, what the stream depends on; nothing where there is one data set."""
    if len(groups) == 1 and groups[0].name == _ONE:
        return ""
    return "; ".join(f"{one.name}: weight {one.weight}, {one.lanes} lanes" for one in groups)
