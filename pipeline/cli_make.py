"""The commands `shards make` and `shards verify`.

Runs in: the command line's own process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from pipeline.cli_watch import watch
from pipeline.errors import ExitCode, disk_error, exit_codes
from pipeline.sizes import usable_cpus

_SHOWN = 20  # problems, for a person
_PROCESSES = click.option("--processes", type=click.IntRange(1), metavar="N",
                          help="That read and write.  [default: one a CPU]")  # fmt: skip
_TEXT_FIELD = click.option("--text-field", default="text", show_default=True, metavar="NAME",
                           help="JSON field or column with the text.")  # fmt: skip
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON line.")


@click.command(epilog=exit_codes(
    ExitCode.OK, ExitCode.USAGE, ExitCode.DATA, ExitCode.DISK, ExitCode.SOURCE, ExitCode.RESUME
))  # fmt: skip
@click.argument("patterns", nargs=-1, required=True, metavar="PATTERN…")
@click.option("--out", required=True, type=click.Path(file_okay=False), metavar="DIR",
              help="Folder of the new shards.")  # fmt: skip
@click.option("--format", "form", default="tar.bz2", show_default=True, metavar="FORM",
              help="tar or jsonl, plain or with .bz2, .gz, .xz or .zst; or parquet.")  # fmt: skip
@click.option("--shard-size", "shard_bytes", type=click.IntRange(1), default=100_000_000,
              show_default=True, metavar="BYTES",
              help="A shard ends with the record that takes its file so far.")  # fmt: skip
@click.option("--max-bad-records", type=click.IntRange(0), default=1000, show_default=True,
              metavar="N", help="Records that may be left out, counted.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be read, and write nothing.")
@_TEXT_FIELD
@_PROCESSES
@_JSON
def make(processes: int | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Make shards of one form and size from other shards.

    All documents of PATTERNs, with all their fields. Inputs are of any form that a run reads,
    on this disk or not. The same inputs and options give the same bytes, whatever --processes
    is. What was stopped or killed goes on with the same command; a shard has its name only when
    it is whole. manifest.jsonl says size, sha256 and documents of each.

    \b
    Examples:
      fineweb-pipeline shards make '/data/*.parquet' --out shards --format tar.bz2
      fineweb-pipeline shards make 'https://host/part-{00..99}.jsonl.gz' \\
          --out shards --format jsonl.zst --shard-size 250000000 --json
    """
    from pipeline.making import make as making
    from pipeline.making.targets import FORMS

    if options["form"] not in FORMS:
        raise click.BadParameter(f"one of {', '.join(FORMS)}", param_hint="--format")
    order = making.Order(**options)
    shards = making.inputs(order, watch())
    if dry_run:
        _say(as_json, *_planned(order, making.groups(shards, order.shard_bytes), shards))
        return
    try:
        result = making.make(order, shards, processes or usable_cpus(), _tell)
    except OSError as error:
        known = disk_error(error, "shards make")
        raise error if known is None else known from error
    except KeyboardInterrupt:
        click.echo("stopped: the same command goes on from here", err=True)
        sys.exit(int(ExitCode.RESUME))
    text = (
        f"{order.out}: {result.shards} shards ({result.kept} of them from before), "
        f"{result.documents:,} documents, {result.size_bytes:,} bytes, "
        f"{result.bad_records} bad records left out"
    )
    _say(as_json, result, text)


def _planned(order: Any, groups: Any, shards: Any) -> tuple[dict[str, Any], str]:
    sizes = [shard.size_bytes or 0 for shard in shards]
    plan = {"inputs": len(shards), "input_bytes": sum(sizes), "groups": len(groups),
            "form": order.form, "shard_bytes": order.shard_bytes, "out": order.out}  # fmt: skip
    text = (
        f"{len(shards)} inputs of {sum(sizes):,} bytes in {len(groups)} groups would become "
        f"{order.form} shards of {order.shard_bytes:,} bytes in {order.out}"
    )
    return plan, text


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path), metavar="MANIFEST|DIR")
@_TEXT_FIELD
@_PROCESSES
@_JSON
def verify(path: Path, text_field: str, processes: int | None, as_json: bool) -> None:
    """Check shards against their manifest, and read every record.

    Size, sha256 and documents are compared. A folder without a manifest is only read. A manifest
    may name shards by their addresses, as `shards list --json` does: they are read where they
    lie. Every problem is named with its shard and record.

    \b
    Examples:
      fineweb-pipeline shards verify shards
      fineweb-pipeline shards verify shards/manifest.jsonl --json

    \b
    Exit codes: 0 all is well · 2 nothing to check · 3 there are problems
    """
    from pipeline.making import verify as verifying

    report = verifying.verify(path, text_field, processes or usable_cpus(), _tell_shard)
    lines = [f"{one.shard}{', ' if one.record else ''}{one.record}: {one.what}"
             for one in report.problems[:_SHOWN]]  # fmt: skip
    if report.num_problems > len(lines):
        lines.append(f"and {report.num_problems - len(lines)} more: --json has them")
    against = report.manifest or "no manifest: only read"
    lines.append(
        f"{report.shards} shards, {report.documents:,} documents, {report.size_bytes:,} bytes: "
        f"{report.num_problems or 'no'} problems ({against})"
    )
    _say(as_json, report, "\n".join(lines))
    sys.exit(int(ExitCode.DATA if report.num_problems else ExitCode.OK))


def _say(as_json: bool, result: Any, text: str) -> None:
    click.echo(msgspec.json.encode(result).decode() if as_json else text)


def _tell(done: int, total: int, shards: int, documents: int) -> None:
    if sys.stderr.isatty():
        click.echo(f"{done} of {total} groups: {shards} shards, {documents:,} documents", err=True)


def _tell_shard(done: int, total: int, one: Any) -> None:
    if sys.stderr.isatty():
        click.echo(f"{done} of {total}: {one.shard}, {one.documents:,} documents", err=True)
