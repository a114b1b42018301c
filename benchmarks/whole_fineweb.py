"""What the whole of FineWeb would take, from what tokenizing costs here; and what Ray costs.

    python -m benchmarks.whole_fineweb --docs FOLDER [--megabytes N] [--rounds R]
    python -m benchmarks.whole_fineweb --cpu-s-per-mtok 0.06 [--range-cpu-s 3]

`tokenize` and `tokenize --ray local` on the same parquet shards, in turns. What a token costs is
marginal (benchmarks/measure.py), and measured without Ray: a task runs the same processes, and
beside Ray's own the difference would drown. What a range costs is what a range per shard costs
more than one range of all. CPU seconds are those of every process, Ray's included.

The forecast is arithmetic, not a run:

    core hours = tokens × cost per token + ranges × cost per range
    hours      = the longest of
                 core hours ÷ (hosts × cores × share of the cores that work)
                 shard bytes × 8 ÷ (hosts × link)
                 one range's own time on one task's cores
    price      = hours × hosts × cores × price of a core hour

It knows nothing of a hub that throttles, of a shared folder's speed, and of hosts that are taken
away; FineWeb's size is its authors' figure, and the price is an assumption.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks import measure
from benchmarks.measure import Costs, Run, Sets

# https://huggingface.co/spaces/HuggingFaceFW/blogpost-fineweb-v1: 15 trillion tokens of GPT-2's
# tokenizer, 44 TB of parquet
FINEWEB_TOKENS, FINEWEB_BYTES = 15e12, 44e12
_TOKEN_BYTES = 2
_ONE_RANGE, _A_SHARD_EACH = "1000", "1e-9"  # --range-gb


class Site(NamedTuple):
    """Machines, and what is assumed of them."""

    hosts: int
    cores: int = 16  # of a host
    gbit_s: float = 10.0  # of a host
    busy: float = 0.8  # share of the cores that work: 4 cores a task leave some waiting
    dollars: float = 0.05  # a core hour
    task_cores: int = 4
    range_bytes: float = 10e9


class Forecast(NamedTuple):
    """What it would take."""

    core_hours: float
    hours: float
    limit: str  # what decides about the hours
    dollars: float


def forecast(cpu_s_per_mtok: float, range_cpu_s: float, site: Site) -> Forecast:
    """See above. Pure."""
    ranges = FINEWEB_BYTES / site.range_bytes
    cpu_s = FINEWEB_TOKENS / 1e6 * cpu_s_per_mtok + ranges * range_cpu_s
    limits = {
        "cores": cpu_s / (site.hosts * site.cores * site.busy),
        "network": FINEWEB_BYTES * 8 / (site.hosts * site.gbit_s * 1e9),
        "one range": cpu_s / ranges / (site.task_cores * site.busy),
    }
    limit = max(limits, key=lambda name: limits[name])
    hours = limits[limit] / 3600
    price = hours * site.hosts * site.cores * site.dollars
    return Forecast(cpu_s / 3600, hours, limit, price)


# ── measured ────────────────────────────────────────────────────────────────────────────────


def one_run(shards: list[Path], ray: str | None) -> Run:
    """A run with one tokenizer, and the CPU seconds of everything in it.

    Args:
        shards: To read.
        ray: GB of a range, or None: without Ray.
    """
    more = [] if ray is None else ["--ray", "local", "--range-gb", ray, "--no-stream-sha256"]
    run = measure.tokenize(shards, 1, *more)
    return {**run, "cpu_s": sum(run["cpu_s_by_stage"].values())}


def one_round(sets: Sets) -> Costs:
    """CPU seconds: of a million tokens, of a start, of Ray's start with its first range, and of
    one more range."""
    small, large = one_run(sets["parquet", "small"], None), one_run(sets["parquet", "large"], None)
    one = one_run(sets["parquet", "large"], _ONE_RANGE)
    many = one_run(sets["parquet", "large"], _A_SHARD_EACH)
    assert (one["ranges"], many["ranges"]) == (1, len(sets["parquet", "large"]))
    assert large["tokens"] == one["tokens"] == many["tokens"]
    per_mtok = measure.marginal(large, small)["cpu_s_per_mtok"]
    return {
        "per_mtok": per_mtok,
        "start": small["cpu_s"] - per_mtok * small["tokens"] / 1e6,
        "ray_start": one["cpu_s"] - per_mtok * one["tokens"] / 1e6,
        "range": (many["cpu_s"] - one["cpu_s"]) / (many["ranges"] - 1),
    }


def measured(args: argparse.Namespace) -> tuple[float, float]:
    """Cost of a million tokens and of a range on Ray, in CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        sets = measure.shard_sets(Path(folder), args.docs, args.megabytes, ["parquet"])
        rounds = []
        for number in range(args.rounds):
            rounds.append(one_round(sets))
            print(f"round {number + 1} of {args.rounds}: {rounds[-1]}", flush=True)
    found = measure.median(rounds)
    print(f"\n{measure.machine()}\n")
    rows = [
        ("a million tokens", f"{found['per_mtok']:.4f}"),
        ("a start of tokenize", f"{found['start']:.1f}"),
        ("a start of Ray and its first range", f"{found['ray_start']:.1f}"),
        ("one more range", f"{found['range']:.1f}"),
    ]
    print(measure.table(("what", "CPU s"), rows))
    return found["per_mtok"], found["range"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, help="folder of parquet files with real documents")
    parser.add_argument("--megabytes", type=int, default=64, help="of text, of a large run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-s-per-mtok", type=float, help="instead of measuring")
    parser.add_argument("--range-cpu-s", type=float, default=3.0, help="with --cpu-s-per-mtok")
    for name, default in (("cores", 16), ("gbit-s", 10.0), ("busy", 0.8), ("dollars", 0.05)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    args = parser.parse_args()
    if args.cpu_s_per_mtok is None:
        per_mtok, per_range = measured(args)
    else:
        per_mtok, per_range = args.cpu_s_per_mtok, args.range_cpu_s
    print(
        f"\nAll of FineWeb ({FINEWEB_TOKENS / 1e12:g} T tokens, {FINEWEB_BYTES / 1e12:g} TB) at "
        f"{per_mtok:.4f} CPU s per M tokens and {per_range:.1f} per range of 10 GB; hosts of "
        f"{args.cores} cores and {args.gbit_s:g} Gbit/s, {args.busy:.0%} of the cores at work, "
        f"{args.dollars:g} $ a core hour (assumed); "
        f"{FINEWEB_TOKENS * _TOKEN_BYTES / 1e12:g} TB of tokens come out\n"
    )
    rows = []
    for hosts in args.hosts:
        site = Site(hosts, args.cores, args.gbit_s, args.busy, args.dollars)
        one = forecast(per_mtok, per_range, site)
        rows.append(
            (hosts, f"{one.core_hours:,.0f}", f"{one.hours:,.1f}", one.limit,
             f"{one.dollars:,.0f}")
        )  # fmt: skip
    print(measure.table(("hosts", "core hours", "hours", "decided by", "$"), rows))


if __name__ == "__main__":
    main()
