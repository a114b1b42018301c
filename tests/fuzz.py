"""Fuzzing of every parser that reads foreign bytes (tests/fuzz_targets.py).

    python -m tests.fuzz --count 20000 --seed 1                 every target, 20,000 inputs each
    python -m tests.fuzz --count 1 --seed 1 --target tar --first 4711 --show     one of them again
    python -m tests.fuzz --count 20000 --seed 1 --guided        by coverage, with atheris

Input number i of a target depends on the seed and on i alone. The inputs run in a process of its
own with a limit on memory; one that takes too long, needs too much or kills the process is found
like one that raises. Exit code 1 if anything was found. atheris is no dependency of the project:
`--guided` needs an environment with tests/fuzz-requirements.txt beside the project's own.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fuzz_targets import TARGETS, Target

LIMIT_S = 10.0  # for one input
_MEMORY_BYTES = 3 << 30  # address space that a process may add to what it has at its start
_MOST_FOUND = 10  # of one target, before it is given up
LARGEST_BYTES = 1 << 16
_NUMBERS = (0, 1, 127, 128, 255, 0x7FFF, 0xFFFF, (1 << 31) - 1, (1 << 32) - 1, 1 << 62, -1)
_WORDS = (
    b"\0", b"\n", b"{", b"[" * 50, b'"', b"\\ud800", b"null", b"-1", b"9" * 40, b"1e999",
    b"\xff\xfe", b"\xed\xa0\x80", b": ", b"\r\n", b"%", b"..", b"&a *a", b"ustar",
)  # fmt: skip


# ── inputs ──────────────────────────────────────────────────────────────────────────────────


def make(target: str, seeds: Sequence[bytes], seed: int, index: int) -> bytes:
    """Input number index: one of the seeds after a few random changes."""
    random_ = random.Random(f"{seed} {target} {index}")
    data = bytearray(random_.choice(seeds))
    for _ in range(min(1 + int(random_.expovariate(0.5)), 12)):
        _change(data, random_, seeds)
    return bytes(data[:LARGEST_BYTES])


def _change(data: bytearray, random_: random.Random, seeds: Sequence[bytes]) -> None:
    at = random_.randrange(len(data) + 1)
    length = min(int(random_.expovariate(0.05)) + 1, len(data) - at)
    match random_.randrange(9):
        case 0 if at < len(data):
            data[at] ^= 1 << random_.randrange(8)
        case 1 if at < len(data):
            data[at] = random_.randrange(256)
        case 2:
            del data[at : at + length]
        case 3:
            data[at:at] = data[at : at + length] * random_.choice([1, 2, 30])
        case 4:
            data[at:at] = random_.choice(_WORDS)
        case 5:
            number, size = random_.choice(_NUMBERS), random_.choice([1, 2, 4, 8])
            order: Any = random_.choice(["little", "big"])
            data[at : at + size] = (number & ((1 << 8 * size) - 1)).to_bytes(size, order)
        case 6:
            del data[at:]
        case 7:
            other = random_.choice(seeds)
            start = random_.randrange(len(other) + 1)
            data[at : at + length] = other[start : start + length]
        case _:
            digits = [n for n, byte in enumerate(data[:4096]) if 48 <= byte < 58]
            if digits:
                data[random_.choice(digits)] = random_.choice(b"0123456789-x")


# ── the process that runs them ──────────────────────────────────────────────────────────────


def _find(target: str) -> Target:
    """A target by its name, or by module:NAME (for tests of this program)."""
    if ":" not in target:
        return TARGETS[target]
    module, name = target.split(":")
    found: Target = getattr(importlib.import_module(module), name)
    return found


def _serve(target: str, limit_s: float, seed: int, first: int, count: int, marker: int) -> None:
    """Run inputs; the descriptor marker always holds the number of the one at work."""
    faulthandler.enable()
    chosen = _find(target)
    seeds = chosen.seeds()
    with tempfile.TemporaryDirectory(dir=fast_folder()) as name:
        folder = Path(name)
        if sys.platform == "linux":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + _MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        found = 0
        for index in range(first, first + count):
            if found == _MOST_FOUND:
                break
            os.pwrite(marker, index.to_bytes(8, "little"), 0)
            data = make(target, seeds, seed, index)
            signal.setitimer(signal.ITIMER_REAL, limit_s)  # SIGALRM ends the process
            try:
                chosen.check(data, folder)
            except Exception:
                signal.setitimer(signal.ITIMER_REAL, 0)
                found += 1
                print(json.dumps({"index": index, "what": traceback.format_exc()}), flush=True)
            signal.setitimer(signal.ITIMER_REAL, 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_bytes": peak * (1 if sys.platform == "darwin" else 1024)}), flush=True)
    os._exit(0)  # servers of the target may still run


def fast_folder() -> str | None:
    """Files in memory where the system has such a folder."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def campaign(
    target: str, seed: int, first: int, count: int, limit_s: float = LIMIT_S
) -> dict[str, Any]:
    """Run inputs first … first + count − 1 of a target.

    Returns:
        Their number, what was found (index and description each), seconds, peak memory.
    """
    begin, at, end, peak = time.monotonic(), first, first + count, 0
    found: list[dict[str, Any]] = []
    while at < end and len(found) < _MOST_FOUND:
        with tempfile.TemporaryFile() as marker:
            numbers = (limit_s, seed, at, end - at, marker.fileno())
            arguments = [target, *map(str, numbers)]
            child = subprocess.run(
                [sys.executable, "-m", "tests.fuzz", "--serve", *arguments],
                check=False, capture_output=True, pass_fds=[marker.fileno()],
            )  # fmt: skip
            said = [json.loads(line) for line in child.stdout.splitlines()]
            found += [one for one in said if "index" in one]
            peak = max([peak, *(one["peak_bytes"] for one in said if "peak_bytes" in one)])
            if child.returncode == 0:
                at = end
                break
            index = int.from_bytes(os.pread(marker.fileno(), 8, 0), "little")
            how = "took too long" if child.returncode == -signal.SIGALRM else "died"
            tail = child.stderr.decode(errors="replace")[-3000:]
            found.append({"index": index, "what": f"{how} ({child.returncode})\n{tail}"})
            at = index + 1
    seconds = round(time.monotonic() - begin, 1)
    return {"target": target, "inputs": at - first, "found": found, "seconds": seconds,
            "peak_bytes": peak}  # fmt: skip


# ── by coverage ─────────────────────────────────────────────────────────────────────────────


def _guided(target: str, seed: int, count: int) -> dict[str, Any]:
    begin = time.monotonic()
    child = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_guided", target, str(seed), str(count)],
        check=False, capture_output=True,
    )  # fmt: skip
    said = child.stderr.decode(errors="replace")
    lines = [line for line in said.splitlines() if " cov: " in line]
    what = child.stdout.decode(errors="replace")[-3000:] + said[-3000:]
    found = [{"index": None, "what": what}] if child.returncode else []
    seconds = round(time.monotonic() - begin, 1)
    return {"target": target, "inputs": count, "found": found, "seconds": seconds,
            "coverage": " ".join(lines[-1].split()[2:6]) if lines else ""}  # fmt: skip


# ── the command ─────────────────────────────────────────────────────────────────────────────


def main(arguments: Sequence[str] | None = None) -> int:
    summary, *rest = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz", description=summary, epilog="".join(rest),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--count", type=int, default=1000, help="inputs of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one")
    parser.add_argument("--guided", action="store_true", help="by coverage, with atheris")
    parser.add_argument("--show", action="store_true", help="print the inputs, run nothing")
    parser.add_argument("--json", action="store_true", help="one JSON line for each target")
    parser.add_argument("--serve", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        target, limit_s, *numbers = options.serve
        _serve(target, float(limit_s), *map(int, numbers))
    total = 0
    for target in options.target or TARGETS:
        if options.show:
            seeds = TARGETS[target].seeds()
            for index in range(options.first, options.first + options.count):
                print(index, make(target, seeds, options.seed, index))
            continue
        if options.guided:
            done = _guided(target, options.seed, options.count)
        else:
            done = campaign(target, options.seed, options.first, options.count)
        total += len(done["found"])
        if options.json:
            print(json.dumps(done), flush=True)
            continue
        rate = done["inputs"] / max(done["seconds"], 0.1)
        print(f"{target:<11} {done['inputs']:>8} inputs {rate:>7.0f}/s, {len(done['found'])} found"
              + (f", {done['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in done else "")
              + (f", {done['coverage']}" if "coverage" in done else ""),
              flush=True)  # fmt: skip
        for one in done["found"]:
            print(f"  --seed {options.seed} --target {target} --first {one['index']} --count 1")
            print("    " + one["what"].strip().replace("\n", "\n    "))
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
