"""Deterministic simulation of the scheduler: many worlds, each from one seed.

Process: this one alone. The real scheduler (pipeline/scheduler.py) decides in a simulated world:
its workers, disk, ring, text slots, clock and consumer are models, and one seeded generator
chooses who acts next and what goes wrong. After every event the README's promises are checked.

    python -m tests.simulate --seeds 1000 --first 0

A seed that breaks a promise is made smaller, faults first, and its history is printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.simulation.shrink import failure, shrink, story
from tests.simulation.simulation import Simulation
from tests.simulation.worlds import draw

_REPORT_S = 10.0


def campaign(first: int, seeds: int, *, keep_going: bool = False, report: bool = True) -> int:
    """Run seeds from first on; returns how many broke a promise."""
    began = reported = time.monotonic()
    totals: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    broken = 0
    for number in range(first, first + seeds):
        sim = Simulation(draw(number))
        what = failure(sim)
        totals.update(sim.injected)
        totals["events"] += sim.events
        totals["generations"] += sim.generations
        ends[what.split(":")[0] if what else sim.outcome or "complete"] += 1
        if what:
            broken += 1
            print(f"seed {number}: {what}", flush=True)
            if not keep_going:
                print(story(shrink(draw(number))))
                break
        now = time.monotonic()
        if report and (now - reported >= _REPORT_S or number == first + seeds - 1):
            reported = now
            done = number - first + 1
            print(
                f"{done} seeds from {first} ({done / (now - began):.0f}/s), {broken} broken; "
                f"{_figures(totals)}; ended: {_figures(ends)}",
                flush=True,
            )
    return broken


def _figures(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1000, help="how many worlds (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument(
        "--keep-going", action="store_true", help="do not stop at the first broken promise"
    )
    parser.add_argument(
        "--story", action="store_true", help="print the whole history of the first seed, and end"
    )
    options = parser.parse_args()
    if options.story:
        print(story(draw(options.first)))
        return 0
    return int(campaign(options.first, options.seeds, keep_going=options.keep_going) > 0)


if __name__ == "__main__":
    sys.exit(main())
