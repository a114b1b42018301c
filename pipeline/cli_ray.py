"""`tokenize --ray`: its options, and how it is shown.

Runs in: the command line's own process, which becomes the driver.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from pipeline.cli_options import Given
from pipeline.errors import ConfigError, ExitCode
from pipeline.screen import clock, human

if TYPE_CHECKING:
    from pipeline.on_ray import Order, Progress, Result
    from pipeline.shard_ranges import Range
    from pipeline.supervisor import Job

_RANGE_GB = 10.0


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of tokenize that concern several machines."""
    every = [
        click.option("--ray", metavar="ADDRESS",
                     help="Make the stream in ranges of shards, as tasks of a Ray cluster: auto "
                     "(from a host of it), HOST:PORT, or local (this machine's CPUs). All hosts "
                     "must see --out, and shards that are files, under the same path. The tokens "
                     "are those of a run without --ray; they lie in DIR/range-*/tokens_*.bin, in "
                     "the order of the names. --max-disk is each host's, which its tasks share; "
                     "--cache-dir lies on each host's own disk.  [--cache-dir: in its temporary "
                     "folder]"),
        click.option("--range-gb", type=click.FloatRange(0, min_open=True), default=_RANGE_GB,
                     show_default=True, metavar="GB",
                     help="With --ray: shards of so many 10⁹ bytes are one task."),
        click.option("--task-cpus", type=click.IntRange(1), metavar="N",
                     help="With --ray: CPUs of a task.  [default: 4, or what a host has]"),
        click.option("--stream-sha256/--no-stream-sha256", default=True, show_default=True,
                     help="With --ray: the driver reads all tokens once for the sha256 of the "
                     "whole stream; each range has its own anyway."),
    ]  # fmt: skip
    for one in reversed(every):
        command = one(command)
    return command


def refuse_ranges(out: Path) -> None:
    """A run without --ray does not write between the ranges of one with it."""
    from pipeline import shard_ranges

    if (out / shard_ranges.CUT_FILE).exists():
        raise ConfigError(
            f"{out} holds a stream that is made in ranges",
            "go on with --ray (local needs no cluster), or give another --out",
        )


def tokenize(job: Job, given: Given, dry_run: bool, confirm: Callable[[str], None]) -> None:
    """Make the stream of a job in ranges, or say what would be done.

    Args:
        job: As for a run on this machine.
        given: The options.
        dry_run: Only say it.
        confirm: Asks before something is destroyed.
    """
    from pipeline import on_ray, range_task, shard_ranges

    _refuse_others(job, given)
    out = Path(job.run_dir)
    if job.config.data.stream.cache_dir is None:
        job = msgspec.structs.replace(job, cache_dir=range_task.default_cache(out))
    own = {name: one.value for name, one in given.own.items()}
    order = on_ray.Order(
        job=job,
        address=own["ray"],
        range_bytes=max(1, int(own["range_gb"] * 1e9)),
        task_cpus=own["task_cpus"],
        hash_whole=own["stream_sha256"],
    )
    shown = _Shown("plain" if own["plain"] else own["progress"])
    if dry_run:
        _say(own["json"], *_planned(order, on_ray.look(order, shown.note)[1]))
        return
    if job.fresh and shard_ranges.folders(out):
        confirm(f"{out} has ranges of tokens")
    try:
        result = on_ray.run(order, shown.progress, shown.note)
    except KeyboardInterrupt:
        click.echo("stopped: the same command goes on from here", err=True)
        sys.exit(int(ExitCode.RESUME))
    _say(own["json"], msgspec.to_builtins(result), _described(result))


def _refuse_others(job: Job, given: Given) -> None:
    """What decides about the whole stream at once cannot be done range by range."""
    stream = job.config.data.stream
    wrong = {
        "--limit-tokens": job.limit_tokens is not None,
        "--lanes": stream.lanes != 1,
        "--shuffle": stream.shuffle,
        "--epochs": stream.epochs != 1,
        "data.stream.mix": bool(stream.mix),
        "--http": job.config.logging.http_port is not None,
    }
    for name, given_wrongly in wrong.items():
        if given_wrongly:
            raise ConfigError(
                f"{name} does not go with --ray",
                "ranges are tokenized each by itself, in the order of the shards, once; leave "
                f"{name} or --ray out",
            )
    if not given.own["ray"].value:
        raise ConfigError("--ray needs an address", "give auto, HOST:PORT or local")


def _planned(order: Order, cut: list[Range]) -> tuple[dict[str, Any], str]:
    shards = sum(len(one.shards) for one in cut)
    size = sum(one.size_bytes for one in cut)
    plan = {"shards": shards, "shard_bytes": size, "ranges": len(cut),
            "out": order.job.run_dir, "cache_dir": order.job.cache_dir}  # fmt: skip
    text = (
        f"{shards} shards of {size / 1e9:.3f} GB in {len(cut)} ranges would become "
        f"{order.job.run_dir}/range-*/tokens_*.bin; hosts keep shards in {order.job.cache_dir}"
    )
    return plan, text


class _Shown:
    """Where a stream stands, on standard error: lines for a person, JSON lines, or nothing."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._first: Progress | None = None

    def progress(self, now: Progress) -> None:
        """See on_ray.run."""
        self._first = first = self._first or now
        if self._kind == "json":
            self._print(msgspec.json.encode({"progress": now}).decode())
            return
        rate = (now.tokens - first.tokens) / max(now.elapsed_s - first.elapsed_s, 1e-9)
        parts = [
            clock(now.elapsed_s),
            f"{now.done} of {now.ranges} ranges",
            human(now.tokens, "tokens"),
            human(rate, "tok/s") if now is not first else "",
        ]
        if now.worked_bytes:
            left_s = now.elapsed_s * (now.all_bytes - now.done_bytes) / now.worked_bytes
            parts.append(f"{clock(left_s)} left")
        self._print(" | ".join(part for part in parts if part))

    def note(self, text: str) -> None:
        """See on_ray.run."""
        self._print(msgspec.json.encode({"note": text}).decode() if self._kind == "json" else text)

    def _print(self, line: str) -> None:
        if self._kind != "none":
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(line, file=sys.stderr, flush=True)


def _described(result: Result) -> str:
    """The result in a few lines for a person."""
    hosts = f"{len(result.hosts)} host{'s' if len(result.hosts) > 1 else ''}"
    return (
        f"done after {result.wall_s:.0f} s, {result.cpu_s:.0f} s of CPU on {hosts}\n"
        f"  {result.tokens:,} tokens of {result.documents:,} documents, sha256 "
        f"{result.sha256 or 'not asked for'}\n"
        f"  {result.ranges} ranges ({result.kept} of them from before) of {result.shards} shards "
        f"in {result.files}; {result.deaths} tasks died and were done again, "
        f"{result.bad_records} bad records, {result.filtered:,} documents filtered out"
    )


def _say(as_json: bool, result: Any, text: str) -> None:
    click.echo(msgspec.json.encode(result).decode() if as_json else text)
