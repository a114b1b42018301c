"""The command `where`: what an update was trained on.

Runs in: the command line's own process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from pipeline.cli_shell import complete_run
from pipeline.cli_watch import watch
from pipeline.sizes import usable_cpus


@click.command()
@click.option("--run", required=True, metavar="RUN", shell_complete=complete_run,
              help="A run's folder, or its name.")  # fmt: skip
@click.option("--step", required=True, type=click.IntRange(1), metavar="S",
              help="The update, as in log.txt.")  # fmt: skip
@click.option("--row", type=click.IntRange(0), metavar="I",
              help="One row of its batch, from 0.  [default: all]")  # fmt: skip
@click.option("--shards", multiple=True, metavar="PATTERN",
              help="The run's shards, where their addresses held secrets: those are not stored.  "
              "[default: of the run]")  # fmt: skip
@click.option("--cache-dir", type=click.Path(file_okay=False), metavar="DIR",
              help="Where shards are fetched to; --max-disk then counts that folder alone. For a "
              "run that is going on.  [default: the run's]")  # fmt: skip
@click.option("--max-disk", "max_disk_gb", type=click.FloatRange(0, min_open=True), metavar="GB",
              help="Hard budget in GB (10⁹ bytes).  [default: the run's]")  # fmt: skip
@click.option("--processes", type=click.IntRange(1), metavar="N",
              help="That read and encode.  [default: one a CPU]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the answer as one JSON line.")
def where(run: str, processes: int | None, as_json: bool, **options: Any) -> None:
    """Print which documents an update was trained on.

    Each with its shard, record, id, and which of its bytes. The lanes are read again from the
    nearest earlier checkpoint on, without training; shards that are no longer on the disk are
    fetched again within the budget. The batch found must have the hash that the run has logged,
    or this is an error. A run that is going on owns its cache: if its shards are not on this disk,
    give --cache-dir.

    \b
    Examples:
      fineweb-pipeline where --run demo --step 40
      fineweb-pipeline where --run runs/fineweb-80m --step 7313 --row 12 --json

    \b
    Exit codes: 0 found · 2 no such run, step or row · 3 another batch than was
    logged, or a shard that cannot be read · 4 disk or budget · 5 a shard that
    cannot be fetched
    """
    from pipeline import where as search

    folder = Path(run) if Path(run).is_dir() else Path("runs") / run
    quiet = as_json or not sys.stderr.isatty()
    answer = search.find(
        search.Request(folder, processes=processes or usable_cpus(), **options),
        (lambda text: None) if quiet else (lambda text: click.echo(text, err=True)),
        watch(),
    )
    click.echo(msgspec.json.encode(answer).decode() if as_json else describe(answer))


def describe(answer: Any) -> str:
    """The answer in lines for a person."""
    said = {True: "as the run has logged", None: "the run has logged none for this update"}
    begin = f"checkpoint {answer.from_step}" if answer.from_step else "the run's beginning"
    lines = [
        f"update {answer.step} of {answer.run}, read from {begin} on",
        f"batch hash {answer.batch_hash}: {said[answer.verified]}",
    ]
    for row in answer.rows:
        lines.append(f"row {row.row}: lane {row.lane}, from position {row.position}")
        for one in row.documents:
            known = one.id or one.url or ""
            lines.append(
                f"  tokens {one.tokens[0]:>5}–{one.tokens[1]:<5} {one.shard} record {one.record} "
                f"bytes {one.bytes[0]}–{one.bytes[1]} {known}".rstrip()
            )
    return "\n".join(lines)
