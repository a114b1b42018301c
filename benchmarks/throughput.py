"""Tokens per second, CPU seconds per million tokens, and how close that is to the bare libraries.

    python -m benchmarks.throughput [--docs FOLDER] [--megabytes N] [--rounds R]

`fineweb-pipeline tokenize --json`, as a user runs it, by format, from files and over HTTP (the
server is a process of its own whose CPU is not counted), with 1 … all CPUs: N tokenizers are
pinned to N CPUs, with everything that the run starts. Beside it the limit: the sum of the bare
library calls that nobody can avoid, timed on one core in the same round (benchmarks/floor.py).

Costs are marginal: a large run minus a small one on other text, so that start-up and imports
cancel. All contestants take turns; medians over the rounds are printed. The picture is
benchmarks/pictures/throughput.png.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import corpus, measure, pictures
from benchmarks.measure import Costs, Sets
from pipeline import demo

Key = tuple[str, str, int]  # format, from where, tokenizers
_GOAL_LIMIT = 0.85
_GOAL_TWO = 1.85


def contestants(formats: list[str]) -> list[Key]:
    """Files with every number of tokenizers, HTTP with the most."""
    counts = measure.worker_counts()
    return [(form, "files", count) for form in formats for count in counts] + [
        (form, "HTTP", counts[-1]) for form in formats
    ]


def one_round(keys: list[Key], sets: Sets, urls: dict[tuple[str, str], str]) -> dict[Key, Costs]:
    """Every contestant once.

    Raises:
        AssertionError: the ids of a large run differ between contestants.
    """
    costs: dict[Key, Costs] = {}
    hashes: set[str] = set()
    for key in keys:
        form, source, workers = key
        runs = {}
        for size in ("small", "large"):
            paths: list[Any] = list(sets[form, size])
            if source == "HTTP":
                paths = [f"{urls[form, size]}/{path.name}" for path in paths]
            with measure.pinned(workers):
                runs[size] = measure.tokenize(paths, workers)
        hashes.add(runs["large"]["sha256"])
        costs[key] = measure.marginal(runs["large"], runs["small"])
    assert len(hashes) == 1, f"ids differ: {hashes}"
    return costs


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All rounds; the medians by contestant and the floors by format."""
    keys, found, floors = contestants(args.formats), {}, {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sets = measure.shard_sets(Path(folder), args.docs, args.megabytes, args.formats)
        urls = {
            key: stack.enter_context(demo.served(paths[0].parent))[0] for key, paths in sets.items()
        }
        for number in range(args.rounds):
            for key, costs in one_round(keys, sets, urls).items():
                found.setdefault(key, []).append(costs)
            for form in args.formats:
                floors.setdefault(form, []).append(measure.floor(form, sets))
            print(f"round {number + 1} of {args.rounds} done", flush=True)
    return {
        "machine": measure.machine(),
        "runs": [
            {"format": form, "from": source, "workers": workers, **measure.median(rounds)}
            for (form, source, workers), rounds in found.items()
        ],
        "floors": {form: measure.median(rounds) for form, rounds in floors.items()},
    }


def report(result: dict[str, Any]) -> None:
    """The tables, and what was reached of the goals."""
    floors, runs = result["floors"], result["runs"]
    print(f"\n{result['machine']}\n")
    header = [
        "shards",
        "from",
        "CPUs",
        "tokens/s",
        "MB/s",
        "CPU s per M tokens",
        "limit / CPU",
        "memory",
    ]
    rows = []
    for one in runs:
        share = floors[one["format"]]["limit"] / one["cpu_s_per_mtok"]
        rows.append(
            [one["format"], one["from"], one["workers"], f"{one['tokens_per_s']:,.0f}",
             f"{one['mb_per_s']:.1f}", f"{one['cpu_s_per_mtok']:.4f}", f"{share:.2f}",
             f"{one['memory_gb']:.2f} GB"]
        )  # fmt: skip
    print(measure.table(header, rows))
    print("\nThe limit, bare library calls on one core, CPU s per M tokens:\n")
    names = ("decode", "parse", "encode", "limit", "tiktoken")
    print(
        measure.table(
            ["shards", *names],
            [[form, *(f"{one[name]:.4f}" for name in names)] for form, one in floors.items()],
        )
    )
    if all("stages" in one for one in runs):
        print("\nCPU s per M tokens by stage:\n")
        stages = list(runs[0]["stages"])
        print(
            measure.table(
                ["shards", "from", "CPUs", *stages],
                [[one["format"], one["from"], one["workers"],
                  *(f"{one['stages'].get(s, 0.0):.4f} "
                    f"({100 * one['stages'].get(s, 0.0) / one['cpu_s_per_mtok']:.0f} %)"
                    for s in stages)] for one in runs],
            )
        )  # fmt: skip
    _goals(floors, runs)


def _goals(floors: dict[str, Costs], runs: list[Costs]) -> None:
    local = {(one["format"], one["workers"]): one for one in runs if one["from"] == "files"}
    print()
    for form, floor in floors.items():
        share = floor["limit"] / local[form, 1]["cpu_s_per_mtok"]
        print(f"{form}: limit / CPU {share:.2f} (goal {_GOAL_LIMIT})", end="")
        if (form, 2) in local:
            ratio = local[form, 2]["tokens_per_s"] / local[form, 1]["tokens_per_s"]
            print(f"; two CPUs {ratio:.2f} × one (goal {_GOAL_TWO})", end="")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, help="folder of parquet files with a text column")
    parser.add_argument("--megabytes", type=int, default=256, help="text of the large run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", nargs="*", default=list(corpus.FORMATS))
    result = run(parser.parse_args())
    report(result)
    measure.save("throughput", result)
    pictures.draw("throughput", result)


if __name__ == "__main__":
    main()
