"""The command line: its commands, and what an error looks like.

Runs in: the command line's own process. Parse, load, check, call.
"""

from __future__ import annotations

import contextlib
import sys
import traceback

import click
import msgspec

from pipeline import (
    cli_bench,
    cli_doctor,
    cli_plan,
    cli_runs,
    cli_shards,
    cli_shell,
    cli_status,
    cli_stream,
    cli_where,
    settings,
)
from pipeline.cli_options import Commands
from pipeline.errors import MEANINGS, ExitCode, FinewebError
from pipeline.redaction import scrub

_EPILOG = f"""
Each option can also stand in the environment, as FINEWEB_START_MAX_DISK=20, and in the
configuration file; the option goes over the environment, and that over the file.

{cli_stream.EXIT_CODES}
"""


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(package_name="fineweb-pipeline")
def cli() -> None:
    """Pretrain a language model on FineWeb from a small disk.

    Shards stream from S3, HTTP or this disk through fetchers, decompressors and tokenizers into
    shared memory, where one MLX process trains on them. What has been used is deleted, so that a
    byte budget holds at every instant.

    \b
    fineweb-pipeline start                 a demonstration that needs nothing
    fineweb-pipeline doctor PATTERN        what this machine lacks for that
    fineweb-pipeline plan --shards PATTERN    what a run will need and how long it will take
    fineweb-pipeline bench                 how this machine scales, and the best settings
    fineweb-pipeline start --shards PATTERN --config model-config-80m-fineweb
    fineweb-pipeline tokenize --shards PATTERN --out DIR
    fineweb-pipeline status RUN --watch
    fineweb-pipeline generate RUN "Once upon a time"
    fineweb-pipeline export RUN --out DIR
    fineweb-pipeline report RUN
    fineweb-pipeline shards list|make|verify PATTERN
    fineweb-pipeline where --run RUN --step S
    """


cli.add_command(cli_stream.start)
cli.add_command(cli_stream.tokenize)
cli.add_command(cli_status.status)
cli.add_command(cli_plan.plan)
cli.add_command(cli_bench.bench)
cli.add_command(cli_doctor.doctor)
cli.add_command(cli_shell.completion)
cli.add_command(cli_runs.generate)
cli.add_command(cli_runs.export)
cli.add_command(cli_runs.report)
cli.add_command(cli_shards.shards)
cli.add_command(cli_where.where)


@cli.command(epilog="Exit codes: 0 every promise held · 6 one was broken")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides the faults.")
@click.option(
    "--minutes",
    type=click.FloatRange(0.05),
    default=3.0,
    show_default=True,
    help="How long faults are injected; the comparison comes on top.",
)
@click.option(
    "--kind",
    type=click.Choice(["tokenize", "train"]),
    default="tokenize",
    show_default=True,
    help="What runs under the faults.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON line.")
def chaos(seed: int, minutes: float, kind: str, as_json: bool) -> None:
    """Break everything at random and see whether the promises hold.

    Real processes stream a corpus that this machine's Python carries, from a web server of this
    machine. Workers, the consumer and the supervisor are killed, stopped, hung and starved of disk
    and memory; the server resets, stalls and refuses; cached files are damaged. In the end the
    stream must be that of an undisturbed run, the budget kept, and nothing left behind.

    \b
    Examples:
      fineweb-pipeline chaos --minutes 3
      fineweb-pipeline chaos --kind train --seed 7 --minutes 30 --json
    """
    from pipeline.chaos import command

    report = command.run(seed, minutes, kind)
    text = msgspec.json.encode(report).decode() if as_json else command.describe(report)
    click.echo(text)
    sys.exit(int(ExitCode.CRASHED if report.problems else ExitCode.OK))


# ── errors ──────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    """Console entry: every error is what happened and where, what to do, and an exit code; a
    traceback is for a bug."""
    try:
        settings.refuse_unknown_variables(cli.variables())
        cli.main(standalone_mode=False)
    except FinewebError as error:
        _fail(error.what, error.remedy, error.exit_code)
    except click.exceptions.Abort as error:
        interrupted = isinstance(error.__cause__, KeyboardInterrupt)
        code = ExitCode.INTERRUPTED if interrupted else ExitCode.USAGE
        _fail(MEANINGS[code] if interrupted else "nothing was changed", "", code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(int(ExitCode.USAGE))
    except click.ClickException as error:
        ctx = getattr(error, "ctx", None)
        command = ctx.command_path if ctx else "fineweb-pipeline"
        what, remedy = error.format_message(), f"see {command} --help"
        if "unexpected extra argument" in what:  # most often a pattern that the shell took apart
            remedy = f"quote patterns, so that the shell leaves them alone; {remedy}"
        _fail(what, remedy, ExitCode.USAGE)
    except Exception:  # a bug: its traceback may hold what the user's URLs do
        click.echo(scrub(traceback.format_exc()), err=True)
        click.echo("this is a bug: please report it with the traceback", err=True)
        sys.exit(int(ExitCode.BUG))


def _fail(what: str, remedy: str, code: ExitCode) -> None:
    """The one style of errors."""
    with contextlib.suppress(OSError):  # the terminal may be gone; the code is what counts
        click.secho(f"error: {what}", fg="red", err=True)
        if remedy:
            click.echo(f"  {remedy}", err=True)
    sys.exit(int(code))
