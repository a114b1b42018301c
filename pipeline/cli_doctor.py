"""`doctor`: what this machine lacks for a run.

Runs in: the command line's own process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from pipeline.errors import ExitCode

_SIGNS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "red")}


@click.command(epilog="Exit codes: 0 a run can start, warnings or not · 2 something must be done")
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option(
    "--max-disk",
    type=click.FloatRange(0),
    default=35.0,
    show_default=True,
    metavar="GB",
    help="The budget that a run would have.",
)
@click.option(
    "--runs-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    metavar="DIR",
    help="Where the run would be.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all findings as one JSON line.")
def doctor(patterns: tuple[str, ...], max_disk: float, runs_dir: Path, as_json: bool) -> None:
    """Say what this machine lacks, and what to do about it.

    It looks at Python, MLX, processors, memory, disk and limits. With PATTERNs as for --shards
    it also looks whether the shards can be listed and read, with which credentials, and how
    soon the first byte comes. It writes nothing.

    \b
    Examples:
      fineweb-pipeline doctor
      fineweb-pipeline doctor 's3://bucket/shard-{000..009}.tar.bz2' --max-disk 20
    """
    from pipeline import doctor as examination

    findings = []
    for finding in examination.examine(list(patterns), runs_dir, max_disk):
        findings.append(finding)
        if not as_json:
            sign, colour = _SIGNS[finding.level]
            click.secho(f"{sign} ", fg=colour, nl=False)
            click.echo(f"{finding.subject:<16} {finding.what}")
            if finding.remedy:
                click.echo(f"{'':<18} → {finding.remedy}")
    if as_json:
        click.echo(msgspec.json.encode(findings).decode())
    failed = any(finding.level == "error" for finding in findings)
    sys.exit(int(ExitCode.USAGE if failed else ExitCode.OK))
