"""From a failing world to the smallest one that still fails, and to its history.

Pure but for the simulation itself.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import fields, replace

from tests.simulation.simulation import Simulation
from tests.simulation.worlds import World

_SMALLER = {
    "lanes": 1, "epochs": 1, "shuffle": None, "seq_len": 1, "slot_windows": 1, "ring_slots": 2,
    "fetchers": 1, "decompressors": 1, "tokenizers": 1, "prefetch": 0, "extra_bytes": 0,
    "fixed_bytes": 0, "checkpoint_bytes": 0, "kept": 1, "understated": 0, "update_windows": 1,
    "stop_after": None, "slow": (1, 1, 1, 1, 1),
}  # fmt: skip
_TRIES = 3000


def failure(sim: Simulation) -> str:
    """Run a simulation; returns what was broken, or nothing."""
    try:
        sim.run()
    except Exception as error:
        if isinstance(error, AssertionError) and error.args:
            return str(error)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {frame.name}, line {frame.lineno}: {error}"
    return ""


def shrink(world: World) -> World:
    """The smallest failing world that dropping faults, shards, blocks and sizes leads to."""
    tries = 0
    smaller = True
    while smaller and tries < _TRIES:
        smaller = False
        for candidate in _candidates(world):
            tries += 1
            if failure(Simulation(candidate)):
                world, smaller = candidate, True
                break
    return world


def _candidates(world: World) -> Iterator[World]:
    for n in range(len(world.faults)):
        yield replace(world, faults=world.faults[:n] + world.faults[n + 1 :])
    if world.mix:
        yield replace(world, mix=())
    if len(world.shards) > world.lanes and not world.mix:
        for n in range(len(world.shards)):
            yield replace(world, shards=world.shards[:n] + world.shards[n + 1 :])
    for name, value in _SMALLER.items():
        fixed = (name == "stop_after" and world.epochs is None) or (name == "lanes" and world.mix)
        if getattr(world, name) != value and not fixed:
            yield replace(world, **{name: value})
    for n, shard in enumerate(world.shards):
        plain = shard._replace(poison=None, unreadable=None, failures=0, end_bad=0)
        options = [plain, shard._replace(blocks=shard.blocks[:-1])]
        for smaller in options:
            if smaller != shard:
                yield replace(world, shards=(*world.shards[:n], smaller, *world.shards[n + 1 :]))


def story(world: World) -> str:
    """The world, and everything that happens in it."""
    trace: list[str] = []
    what = failure(Simulation(world, trace))
    lines = [f"  {field.name} = {getattr(world, field.name)!r}" for field in fields(world)]
    return "\n".join(["the world:", *lines, "its history:", *trace, what or "no promise is broken"])
