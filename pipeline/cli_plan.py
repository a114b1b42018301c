"""`plan`: what a run will need and how long it will take, before anything is spent.

Runs in: the command line's own process.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from pipeline import budget, cli_options
from pipeline.cli_options import config_option, shard_options
from pipeline.cli_stream import EXIT_CODES, TOKENIZE_DEFAULTS
from pipeline.screen import clock, human

if TYPE_CHECKING:
    from pipeline.planning import Budget, Prediction
    from pipeline.scaling import Reached


@click.command(epilog=EXIT_CODES)
@config_option("YAML file, or the name of one that comes with the program.")
@click.option("--kind", type=click.Choice(["train", "tokenize"]), default="train",
              show_default=True, help="Plan `start`, or `tokenize`.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), metavar="N", help="Optimizer updates in all.")
@click.option("--tokenizer", metavar="NAME", help="A tiktoken encoding.  [default: gpt2]")
@click.option("--vocab-size", type=click.IntRange(257), metavar="V",
              help="Keep only the encoding's first ranks.")  # fmt: skip
@click.option("--name", metavar="NAME", help="Name of the run: its folder is runs/NAME.")
@click.option("--runs-dir", metavar="DIR", help="Folder of all runs.  [default: runs]")
@click.option("--calibrate-s", type=click.FloatRange(1), default=8.0, show_default=True,
              metavar="S", help="Seconds for measuring this machine, once: what was measured is "
              "kept.")  # fmt: skip
@click.option("--network", type=click.FloatRange(0, min_open=True), default=10.0,
              show_default=True, metavar="GBIT",
              help="Gbit/s between hosts, for the table of several.")  # fmt: skip
@shard_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON line.")
@click.pass_context
def plan(ctx: click.Context, /, config_path: str | None, **options: Any) -> None:
    """Say what a run will need and how long it takes; run nothing.

    The shards are looked up (8 MB of the first are read if they are remote), the pipeline and the
    trainer's step are measured here for a few seconds, and the real scheduler is simulated with
    what was measured. It prints the model's size, FLOPs and memory, tokens and time, bytes to be
    fetched, the smallest disk budget, workers, expected stalls, and what more cores and hosts
    would bring. A budget that is too small is refused as `start` would refuse it.

    \b
    Examples:
      fineweb-pipeline plan --config model-config-80m-fineweb \\
          --shards 's3://my-bucket/fineweb/s-{0000..1000}.tar' --max-disk 35
      fineweb-pipeline plan --kind tokenize --shards '/data/*.parquet' --json
    """
    from pipeline import planning
    from pipeline.cli_stream import job_of

    given = cli_options.given(ctx)
    kind = options["kind"]
    defaults = TOKENIZE_DEFAULTS if kind == "tokenize" else {}
    name = {} if config_path else {"name": "run"}
    config = given.resolve(config_path, {**name, **defaults}).config
    job = job_of(kind, config, Path(config.logging.runs_dir) / config.name, False)

    def say(what: str) -> None:
        click.echo(f"{what} …", err=True)

    found = planning.predict(
        job, network_gbit=options["network"], calibrate_s=options["calibrate_s"], say=say
    )
    if options["as_json"]:
        click.echo(msgspec.json.encode(found).decode())
    else:
        click.echo("\n".join(describe(found)))
    sys.exit(0)


# ── in words ────────────────────────────────────────────────────────────────────────────────


def describe(found: Prediction) -> Iterator[str]:
    """The plan for a person, at 80 columns."""
    yield from _data(found)
    yield from _model(found)
    yield from _memory(found)
    yield from _time(found)
    yield from _disk(found)
    yield from _tables(found)
    for note in found.notes:
        yield from textwrap.wrap(f"note: {note}", 79, subsequent_indent="      ")


def _row(head: str, *lines: str) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield f"{'' if number else head:<9}{line}"


def _data(found: Prediction) -> Iterator[str]:
    unknown = f", {found.unknown_sizes} of unknown size" if found.unknown_sizes else ""
    forecast = found.forecast
    fetched = "nothing is fetched: the shards are on this disk"
    if found.remote:
        fetched = f"{human(forecast.fetched_bytes, 'B')} in {forecast.fetched_shards:,} fetches"
        if found.network_bytes_per_s:
            fetched += f", at {human(found.network_bytes_per_s, 'B/s')} a connection"
    yield from _row(
        "shards",
        f"{found.shards:,} in {found.lanes} lanes, {human(found.shard_bytes, 'B')}{unknown}",
        fetched,
    )


def _model(found: Prediction) -> Iterator[str]:
    if found.model is None:
        return
    one = found.model
    on = one.calibration
    yield from _row(
        "model",
        f"{one.parameters / 1e6:.1f} M parameters, {human(one.flops_per_token, 'FLOP')} a token",
        f"{one.updates:,} updates of {one.tokens_per_update:,} tokens: "
        f"{human(found.forecast.tokens, 'tokens')}, {one.flops:.3g} FLOP",
        f"an update takes {_update_s(found):.3g} s on {on['device']} in {on['dtype']}",
    )


def _update_s(found: Prediction) -> float:
    assert found.model is not None
    return found.model.tokens_per_update / found.hosts[0].tokens_per_s


def _memory(found: Prediction) -> Iterator[str]:
    one = found.memory
    if found.model is not None:
        how = "measured" if one.measured else "estimated"
        yield from _row(
            "memory",
            f"weights {human(one.weights_bytes, 'B')}, gradients "
            f"{human(one.gradients_bytes, 'B')}, optimizer {human(one.optimizer_bytes, 'B')}",
            f"activations {human(one.activations_bytes, 'B')} ({how})",
        )
    head = "" if found.model else "memory"
    yield from _row(
        head,
        f"ring {human(one.ring_bytes, 'B')}, text slots {human(one.text_slots_bytes, 'B')}, "
        f"workers {human(one.workers_bytes, 'B')}",
        f"together {human(one.total_bytes, 'B')}; {human(one.available_bytes, 'B')} are free",
    )


def _time(found: Prediction) -> Iterator[str]:
    one, workers = found.forecast, found.workers
    yield from _row(
        "workers",
        f"{workers.fetchers} fetchers, {workers.decompressors} decompressors, "
        f"{workers.tokenizers} tokenizers:",
        *textwrap.wrap(workers.why, 70),
    )
    waits = []
    if one.wait_share is not None:
        waits = [f"expected stalls: the trainer waits {100 * one.wait_share:.1f} % of its time"]
    busy = ", ".join(f"{name} {100 * share:.0f} %" for name, share in one.busy.items())
    yield from _row(
        "time",
        f"{clock(found.wall_s)} for {human(one.tokens, 'tokens')}, start {found.start_s:.1f} s "
        f"included: {human(one.tokens_per_s, 'tok/s')}",
        f"busy: {busy}",
        *waits,
        f"verdict: {found.verdict}",
    )


def _disk(found: Prediction) -> Iterator[str]:
    if not found.budget_bytes:
        yield from _row("disk", "no shard comes onto the disk: checkpoints and logs alone")
        return
    exact = budget.as_gb(found.smallest_bytes)
    yield from _row(
        "disk",
        f"{found.smallest_bytes:,} bytes are the least: --max-disk {exact!r}",
        f"peak {human(found.forecast.peak_disk_bytes, 'B')} of {human(found.budget_bytes, 'B')}",
    )
    if found.budgets:
        yield f"{'':<9}{'budget':<10}{'bytes':>9}{'peak':>10}{'tokens/s':>13}{'waits':>8}"
        yield from map(_budget, found.budgets)


def _budget(one: Budget) -> str:
    said = one.forecast
    waits = "–" if said.wait_share is None else f"{100 * said.wait_share:.1f} %"
    return (
        f"{'':<9}{one.name:<10}{human(one.budget_bytes, 'B'):>9}"
        f"{human(said.peak_disk_bytes, 'B'):>10}{human(said.tokens_per_s, 'tok/s'):>13}{waits:>8}"
    )


def _tables(found: Prediction) -> Iterator[str]:
    yield ""
    yield "The pipeline alone on more cores: cores / (CPU seconds a MB of all stages), at"
    yield "most 1 / (those of the writer, or of the supervisor, one process each)."
    yield "Shared caches and memory make it less; so do fewer lanes than decompressors."
    yield from _table("cores", found.cores)
    if found.hosts:
        yield ""
        yield "Training on R hosts: compute / R + optimizer + ring all-reduce of"
        yield f"2 (R − 1) / R × the gradient over {found.network_gbit:g} Gbit/s, not overlapped."
        yield from _table("hosts", found.hosts)


def _table(head: str, rows: list[Reached]) -> Iterator[str]:
    yield f"  {head:>5}  {'tokens/s':>14}  {'efficiency':>10}  limited by"
    for one in rows:
        rate, share = human(one.tokens_per_s, "tok/s"), f"{100 * one.efficiency:.0f} %"
        yield f"  {one.count:>5}  {rate:>14}  {share:>10}  {one.limit}"
