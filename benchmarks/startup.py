"""From `start` to the first batch on a warm installation with local shards, and where it goes.

    python -m benchmarks.startup [--docs FOLDER] [--rounds R]

The demonstration's model on local tar.bz2 shards, two updates, a new run each time; one run that
is not counted warms the page cache and what the program keeps for the user. Milestones are taken
from outside, when a line appears in the run's log.txt, looked at 100 times a second. The first
batch is there when the trainer, once ready, has waited as long as its first update says that it
waited for data. Medians over the rounds.

The picture is benchmarks/pictures/startup.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import corpus, measure, pictures

_GOAL_S = 2.0
_UPDATES = 2
_TEXT_BYTES = 16_000_000
_LOOK_S = 0.01
# Lines of log.txt, in the order in which they come.
_EVENTS = {
    "workers_chosen": "catalog_and_sizes",
    "worker_started": "processes_started",
    "consumer_ready": "trainer_ready",
}


def one_start(shards: list[Path], folder: Path) -> dict[str, float]:
    """Milestones of one run, in seconds since the command was given, in order of time."""
    arguments = [part for shard in shards for part in ("--shards", str(shard))]
    command = [Path(sys.executable).parent / "fineweb-pipeline", "start", "--config", "demo"]
    command += [*arguments, "--max-disk", "1", "--steps", str(_UPDATES), "--plain"]
    begin, found = time.perf_counter(), dict[str, float]()
    process = subprocess.Popen(
        [*map(str, command), "--runs-dir", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = folder / "demo" / "log.txt"
    while process.poll() is None:
        text = log.read_text() if log.exists() else ""
        for event, milestone in _EVENTS.items():
            if event in text:
                found.setdefault(milestone, time.perf_counter() - begin)
        time.sleep(_LOOK_S)
    if process.returncode:
        raise RuntimeError(f"start ended with exit code {process.returncode}: see {log}")
    first = json.loads((folder / "demo" / "metrics.jsonl").read_text().splitlines()[0])
    waited_s = first["data_wait_share"] * first["step_s"]
    return {**found, "first_batch": found["trainer_ready"] + waited_s}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds."""
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        texts = list(corpus.documents(corpus.source_documents(args.docs), _TEXT_BYTES, 1))
        shards = corpus.write(Path(scratch), texts, 8, "tar.bz2")
        for number in range(args.rounds + 1):
            found = one_start(shards, Path(scratch) / f"runs-{number}")
            if number:
                rounds.append(found)
    return {
        "machine": measure.machine(),
        "milestones": measure.median(rounds),
        "rounds": rounds,
        "goal_s": _GOAL_S,
    }


def report(result: dict[str, Any]) -> None:
    """The milestones, and the time between each and the one before."""
    print(f"\n{result['machine']}\n")
    rows, before = [], 0.0
    for name, at in result["milestones"].items():
        each = [one[name] for one in result["rounds"]]
        spread = f"{min(each):.2f} to {max(each):.2f}"
        rows.append([name.replace("_", " "), f"{at:.2f} s", f"{at - before:.2f} s", spread])
        before = at
    print(measure.table(["milestone", "at", "since the last", "all rounds"], rows))
    print(f"\nfirst batch after {before:.2f} s (goal {_GOAL_S:.0f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, help="folder of parquet files with a text column")
    parser.add_argument("--rounds", type=int, default=7)
    result = run(parser.parse_args())
    report(result)
    measure.save("startup", result)
    pictures.draw("startup", result)


if __name__ == "__main__":
    main()
