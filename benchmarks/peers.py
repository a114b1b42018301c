"""CPU seconds per million tokens of fineweb-pipeline and of what else reads the same shards.

    python -m benchmarks.peers [--docs FOLDER] [--megabytes N] [--rounds R] [--workers N...]

WebDataset + DataLoader on tar.bz2; Hugging Face datasets, SPDL and a plain loop on jsonl.zst and
parquet; all with tiktoken, each set up as its documentation says is fastest (benchmarks/peer_*.py
say how), in an environment of their own:

    python3 -m venv benchmarks/.peers-venv
    benchmarks/.peers-venv/bin/pip install -r benchmarks/peers-requirements.txt

Costs are marginal: a large run minus a small one on other text, so that start-up and imports
cancel; every run is new processes that have not seen the text. Contestants take turns; medians
over the rounds are printed, and beside each its floor: the bare decoder and its tokenizer on one
core (the same decoder for both sides). All ids are required to be the same: before the timed
runs by sha256 of the token stream with one worker, in them by their number. Peers neither write
nor hash their tokens in the timed runs; `tokenize` does both.

The picture is benchmarks/pictures/peers.png.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import corpus, measure, pictures
from benchmarks.measure import Costs, Run, Sets

PYTHON = measure.ROOT / "benchmarks" / ".peers-venv" / "bin" / "python"
OURS = "fineweb-pipeline"
PEERS = {
    "WebDataset + DataLoader": ("peer_webdataset", ("tar.bz2",)),
    "datasets + DataLoader": ("peer_datasets", ("jsonl.zst", "parquet")),
    "SPDL": ("peer_spdl", ("jsonl.zst", "parquet")),
    "plain loop": ("peer_loop", ("jsonl.zst", "parquet")),
}
GOALS = {"tar.bz2": 3.0, "jsonl.zst": 5.0, "parquet": 5.0}
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}
Key = tuple[str, str, int]  # contestant, format, workers


def peer(script: str, shards: list[Path], workers: int, *, digest: bool) -> Run:
    """One run of a peer in its own environment."""
    path = measure.ROOT / "benchmarks" / f"{script}.py"
    command = [PYTHON, path, workers, int(digest), *shards]
    with tempfile.TemporaryDirectory() as home:  # datasets keeps its notes under HF_HOME
        return measure.json_of([str(one) for one in command], _ENVIRONMENT | {"HF_HOME": home})


def contestant(name: str, shards: list[Path], workers: int, *, digest: bool = False) -> Run:
    """One run of anyone."""
    if name == OURS:
        return measure.tokenize(shards, workers)
    return peer(PEERS[name][0], shards, workers, digest=digest)


def contestants(formats: list[str], workers: list[int]) -> list[Key]:
    """Everyone who reads a format, ours first."""
    return [
        (name, form, count)
        for form in formats
        for count in workers
        for name in (OURS, *(name for name, (_, reads) in PEERS.items() if form in reads))
    ]


def check(keys: list[Key], sets: Sets) -> None:
    """Raises: AssertionError: someone's token stream is not ours."""
    want = ""
    for name, form in dict.fromkeys((name, form) for name, form, _ in keys):
        found = contestant(name, sets[form, "small"], 1, digest=True)["sha256"]
        want = want or found
        assert found == want, f"{name} on {form}: {found} instead of {want}"


def one_round(keys: list[Key], sets: Sets) -> dict[Key, Costs]:
    """Every contestant once."""
    costs: dict[Key, Costs] = {}
    counts: set[tuple[int, int]] = set()
    for key in keys:
        name, form, workers = key
        small, large = (contestant(name, sets[form, size], workers) for size in ("small", "large"))
        counts.add((small["tokens"], large["tokens"]))
        costs[key] = measure.marginal(large, small)
    assert len(counts) == 1, f"numbers of tokens differ: {counts}"
    return costs


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All rounds; medians by contestant, and floors by format."""
    keys, found, floors = contestants(args.formats, args.workers), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        sets = measure.shard_sets(Path(folder), args.docs, args.megabytes, args.formats)
        check(keys, sets)
        print("all token streams have the same sha256", flush=True)
        for number in range(args.rounds):
            for key, costs in one_round(keys, sets).items():
                found.setdefault(key, []).append(costs)
            for form in args.formats:
                floors.setdefault(form, []).append(measure.floor(form, sets))
            print(f"round {number + 1} of {args.rounds} done", flush=True)
    return {
        "machine": measure.machine(),
        "runs": [
            {"name": name, "format": form, "workers": workers, **measure.median(rounds)}
            for (name, form, workers), rounds in found.items()
        ],
        "floors": {form: measure.median(rounds) for form, rounds in floors.items()},
    }


def with_ratios(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs, each with its floor and with how many times our CPU seconds it takes."""
    ours = {(r["format"], r["workers"]): r for r in result["runs"] if r["name"] == OURS}
    rows = []
    for one in result["runs"]:
        floor = result["floors"][one["format"]]
        bare = floor["limit"]
        if one["name"] != OURS:
            bare = floor["decode"] + floor["parse"] + floor["tiktoken"]
        mine = ours[one["format"], one["workers"]]["cpu_s_per_mtok"]
        rows.append({**one, "floor": bare, "ratio": one["cpu_s_per_mtok"] / mine})
    return rows


def report(result: dict[str, Any]) -> None:
    """The table, and what was reached of the goals."""
    print(f"\n{result['machine']}\n")
    rows = with_ratios(result)
    header = [
        "shards",
        "contestant",
        "workers",
        "tokens/s",
        "CPU s per M tokens",
        "its floor",
        "× ours",
    ]
    print(
        measure.table(
            header,
            [[one["format"], one["name"], one["workers"], f"{one['tokens_per_s']:,.0f}",
              f"{one['cpu_s_per_mtok']:.4f}", f"{one['floor']:.4f}", f"{one['ratio']:.2f}"]
             for one in rows],
        )
    )  # fmt: skip
    print()
    for form in result["floors"]:
        for workers in sorted({one["workers"] for one in rows}):
            best = min(
                (one for one in rows
                 if (one["format"], one["workers"]) == (form, workers) and one["name"] != OURS),
                key=lambda one: one["ratio"],
            )  # fmt: skip
            print(
                f"{form}, {workers} workers: {best['ratio']:.2f} × fewer CPU seconds than "
                f"{best['name']}, the best of its peers (goal {GOALS[form]:.0f})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, help="folder of parquet files with a text column")
    parser.add_argument("--megabytes", type=int, default=192, help="text of the large run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--formats", nargs="*", default=list(corpus.FORMATS))
    args = parser.parse_args()
    if not PYTHON.exists():
        sys.exit("there is no benchmarks/.peers-venv: see the top of benchmarks/peers.py")
    result = run(args)
    report(result)
    measure.save("peers", result)
    pictures.draw("peers", result)


if __name__ == "__main__":
    main()
