"""`status`: what a run that was started elsewhere is doing, or how it has ended.

Runs in: the command line's own process. Reads the file that the run keeps in its folder.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.live import Live

from pipeline import status_file
from pipeline.cli_shell import complete_run
from pipeline.errors import ConfigError, ExitCode
from pipeline.screen import clock, left_s, picture
from pipeline.status_file import Recorded, State
from pipeline.view import line_every_s

_LOOK_S = 0.5
_EXIT_CODES = (
    "Exit codes: 0 it goes on, or is done · 6 it was killed, or is silent · 75 it was stopped; "
    "else the run's own"
)


@click.command(epilog=_EXIT_CODES)
@click.argument("run", required=False, shell_complete=complete_run)
@click.option("--watch", is_flag=True, help="Go on looking until the run ends, or Ctrl-C.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Everything, as one JSON line; with --watch a line for every change.",
)
@click.option(
    "--runs-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    metavar="DIR",
    help="Folder of all runs.",
)
@click.option(
    "--http",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Serve a live page and Prometheus metrics on this port (0: a free one) until Ctrl-C.",
)
@click.option(
    "--http-host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="With --http: the address to listen on.",
)
def status(
    run: str | None, watch: bool, as_json: bool, runs_dir: Path, http: int | None, http_host: str
) -> None:
    """Show what a run is doing, or how it ended.

    RUN is a run's folder, its name, or the --out folder of tokenize. It reads what the run
    writes once a second, disturbs nothing, and works for a run on another machine whose folder
    is on a shared disk. Without RUN: a line for each run there is.

    \b
    Examples:
      fineweb-pipeline status
      fineweb-pipeline status demo --watch
      fineweb-pipeline status tokens --json
      fineweb-pipeline status fineweb-80m --http 8080
    """
    if run is None:
        _list(runs_dir, as_json)
        return
    folder = Path(run) if Path(run).is_dir() else runs_dir / run
    recorded = status_file.read(folder)
    if http is not None:
        from pipeline import web

        with web.listen(http_host, http) as listening:
            click.echo(f"{web.address(listening)}  (Ctrl-C ends it)", err=True)
            web.serve(folder, listening)
    elif watch:
        recorded = _watch(folder, as_json)
    elif as_json:
        _print_json(recorded)
    else:
        _print(recorded)
    sys.exit(exit_code(recorded))


def exit_code(recorded: Recorded) -> int:
    """What a script is told: the run's own code, and that of a crash for one that was killed."""
    if recorded.ended is not None:
        return recorded.ended.exit_code
    running = status_file.state(recorded) == "running"
    return int(ExitCode.OK if running else ExitCode.CRASHED)


# ── one look ────────────────────────────────────────────────────────────────────────────────


def describe(recorded: Recorded, state: State) -> str:
    """What else there is to say about a run's state, and what to do; nothing while it runs."""
    age = clock(max(0.0, time.time() - recorded.written_s))
    process = f"process {recorded.writer.pid} on {recorded.writer.host}"
    match state:
        case "running":
            return ""
        case "silent":
            return f"{process} has said nothing for {age}: it is stopped, or waits for its disk"
        case "dead":
            return f"{process} is gone since {age}: it was killed; the same command resumes"
        case "stopped":
            return "the same command resumes"
        case _:
            ended = recorded.ended
            return f"{ended.what}\n  {ended.remedy}".rstrip() if ended else ""


def _print(recorded: Recorded) -> None:
    state = status_file.state(recorded)
    Console().print(picture(recorded.status, state))
    if said := describe(recorded, state):
        click.echo(said)


def _print_json(recorded: Recorded) -> None:
    known = {"state": status_file.state(recorded), **msgspec.to_builtins(recorded)}
    click.echo(msgspec.json.encode(known).decode())


def _list(runs_dir: Path, as_json: bool) -> None:
    """One line a run, the newest last."""
    found = []
    for path in runs_dir.glob(f"*/{status_file.FILE}"):
        try:
            found.append(status_file.read(path.parent))
        except ConfigError as error:  # another version's: the others are still told of
            click.echo(error.what, err=True)
    found.sort(key=lambda one: one.written_s)
    if not found:
        raise ConfigError(f"there is no run in {runs_dir}", "name its folder, or give --runs-dir")
    for recorded in found:
        if as_json:
            _print_json(recorded)
        else:
            click.echo(one_line(recorded))


def one_line(recorded: Recorded) -> str:
    """A run in one line."""
    seen, state = recorded.status, status_file.state(recorded)
    parts = [f"{seen.name:<20} {state:<8} {clock(seen.elapsed_s)}"]
    if seen.total_steps:
        parts.append(f"step {seen.step:,}/{seen.total_steps:,}")
    elif "total_tokens" in seen.metrics:
        parts.append(f"{int(seen.metrics['total_tokens']):,} tokens")
    if "loss" in seen.metrics:
        parts.append(f"loss {seen.metrics['loss']:.3f}")
    left = left_s(seen)
    if state == "running" and left is not None:
        parts.append(f"{clock(left)} to go")
    return "  ".join([*parts, seen.verdict])


# ── many looks ──────────────────────────────────────────────────────────────────────────────


def _watch(folder: Path, as_json: bool) -> Recorded:
    """Look again and again until the run has ended or is gone; the last look."""
    if as_json or not sys.stdout.isatty():
        return _follow(folder, as_json)
    console = Console()
    try:
        with Live(console=console, auto_refresh=False, screen=True) as live:
            while True:
                recorded = status_file.read(folder)
                state = status_file.state(recorded)
                live.update(picture(recorded.status, state), refresh=True)
                if state not in ("running", "silent"):
                    break
                time.sleep(_LOOK_S)
    except KeyboardInterrupt:
        pass
    _print(recorded)
    return recorded


def _follow(folder: Path, as_json: bool) -> Recorded:
    """Lines instead of a screen: JSON whenever the file has changed, or a line now and then."""
    said_at, written_s = 0.0, 0.0
    while True:
        recorded = status_file.read(folder)
        over = status_file.state(recorded) not in ("running", "silent")
        due = time.monotonic() - said_at >= line_every_s(recorded.status.elapsed_s)
        if as_json and recorded.written_s != written_s:
            _print_json(recorded)
        elif not as_json and (due or over):
            said_at = time.monotonic()
            click.echo(one_line(recorded))
        written_s = recorded.written_s
        if over:
            return recorded
        sys.stdout.flush()
        time.sleep(_LOOK_S)
