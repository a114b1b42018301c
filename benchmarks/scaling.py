"""What several hosts bring, from measured parts: the efficiency of 1 … 64 hosts by network.

    python -m benchmarks.scaling [--parameters N] [--tokens N] [--tokens-per-s X] [--overlap 0…1]
    python -m benchmarks.scaling --run runs/NAME      the same with what a run has logged
    python -m benchmarks.scaling --measure            and the ring on this machine's loopback

An update of W tokens takes one host c = W / (tokens per second). On R hosts, with the same W:

    step(R) = c / R + (1 − overlap) · a(R)
    a(R) = 2 · (R − 1) / R · bytes / bandwidth + 2 · (R − 1) · latency
    efficiency(R) = c / (R · step(R))

a(R) is a ring's all-reduce: every host sends and receives 2 · (R − 1) / R of the gradients' bytes,
in 2 · (R − 1) turns. 'Weak' keeps each host's tokens as they are on one (W grows with R), so that
its step is c + (1 − overlap) · a(R). overlap = 0 is what is promised; MLX may do better. The
network is taken at --share of its nominal rate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from pipeline.launch import free_ports

_HOSTS = (1, 2, 4, 8, 16, 32, 64)
_GBITS = (1, 10, 25, 100)
_PARAMETERS = 174_351_360  # model-config-80m-fineweb at its vocabulary of 32,000
_TOKENS = 64 * 2048  # of its update
_RATES = {"a Mac that makes 4,000 tokens/s": 4_000.0, "an H200 (0.43 s an update)": _TOKENS / 0.43}


class Job(NamedTuple):
    """What decides: gradients' bytes, tokens of an update, tokens/s of one host, and the rest."""

    gradient_bytes: float
    tokens: float
    tokens_per_s: float
    overlap: float
    latency_s: float
    share: float


def all_reduce_s(job: Job, hosts: int, gbits: float) -> float:
    """Seconds of a ring's all-reduce over so many hosts."""
    bandwidth = gbits * 1e9 / 8 * job.share
    turns = 2 * (hosts - 1)
    return turns / hosts * job.gradient_bytes / bandwidth + turns * job.latency_s


def efficiency(job: Job, hosts: int, gbits: float, *, weak: bool = False) -> float:
    """The part of hosts × one host's speed that they reach together."""
    one = job.tokens / job.tokens_per_s
    own = one if weak else one / hosts
    return own / (own + (1 - job.overlap) * all_reduce_s(job, hosts, gbits))


def table(job: Job, *, weak: bool) -> str:
    """Efficiency in per cent, and the speed-up, for every network."""
    lines = ["| hosts | " + " | ".join(f"{gbits} Gbit/s" for gbits in _GBITS) + " |"]
    lines.append("|---" * (1 + len(_GBITS)) + "|")
    for hosts in _HOSTS:
        found = [efficiency(job, hosts, gbits, weak=weak) for gbits in _GBITS]
        cells = [f"{100 * one:.0f} % ({one * hosts:.1f} ×)" for one in found]
        lines.append(f"| {hosts} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ── what a run has logged, and this machine's loopback ──────────────────────────────────────


def logged(run: Path) -> tuple[float, float, float]:
    """Gradients' bytes, tokens of an update, and tokens/s of one rank alone, without its waits."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [one for one in records if one.get("all_reduce_s") is not None][5:]
    if not last:
        raise SystemExit(f"{run} has no update of several ranks")
    middle = sorted(last, key=lambda one: one["step_s"])[len(last) // 2]
    alone = middle["step_s"] - middle["all_reduce_s"] - middle["ranks_sync_s"]
    tokens = records[-1]["total_tokens"] / records[-1]["step"]
    return middle["all_reduce_bytes"], tokens, tokens / alone


_CHILD = """
import sys, time
import mlx.core as mx
group = mx.distributed.init(strict=True, backend="ring")
array = mx.ones((int(sys.argv[1]) // 4,))
mx.eval(array)
seconds = []
for _ in range(7):
    mx.eval(mx.distributed.all_sum(mx.array([1.0]), group=group))
    begin = time.perf_counter()
    mx.eval(mx.distributed.all_sum(array, group=group))
    seconds.append(time.perf_counter() - begin)
if group.rank() == 0:
    print(sorted(seconds)[3])
"""


def measure(size_bytes: int, ranks: int = 2) -> float:
    """Median seconds of MLX's ring for one bucket over the loopback address."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([[f"127.0.0.1:{port}"] for port in free_ports(ranks)], file)
        file.flush()
        children = [
            subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(size_bytes)],
                env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": file.name},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        outputs = [child.communicate(timeout=120)[0] for child in children]
        return float(outputs[0])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--parameters", type=float, default=_PARAMETERS)
    parser.add_argument("--gradient-bytes", type=int, choices=(2, 4), default=4)
    parser.add_argument("--tokens", type=float, default=_TOKENS, help="of an update")
    parser.add_argument("--tokens-per-s", type=float, help="of one host")
    parser.add_argument("--overlap", type=float, default=0.0)
    parser.add_argument("--latency-us", type=float, default=100.0, help="of one turn of the ring")
    parser.add_argument("--share", type=float, default=0.9, help="of the nominal bandwidth")
    parser.add_argument("--weak", action="store_true", help="every host keeps its tokens")
    parser.add_argument("--run", type=Path, help="take bytes, tokens and speed from its metrics")
    parser.add_argument("--measure", action="store_true")
    args = parser.parse_args()
    size, tokens = args.parameters * args.gradient_bytes, args.tokens
    rates = {"one host": args.tokens_per_s} if args.tokens_per_s else _RATES
    if args.run:
        size, tokens, rate = logged(args.run)
        rates = {str(args.run): rate}
    for name, rate in rates.items():
        job = Job(size, tokens, rate, args.overlap, args.latency_us * 1e-6, args.share)
        print(f"{name}: {tokens:,.0f} tokens an update, {size / 1e6:,.1f} MB of gradients, "
              f"overlap {args.overlap:g}{', weak' if args.weak else ''}\n")  # fmt: skip
        print(table(job, weak=args.weak), end="\n\n")
    if args.measure:
        for mb in (1, 32):
            seconds = measure(mb << 20)
            print(f"ring, 2 ranks, loopback: {mb} MiB in {1e3 * seconds:.1f} ms, "
                  f"{(mb << 20) / seconds / 1e6:.0f} MB/s")  # fmt: skip


if __name__ == "__main__":
    main()
