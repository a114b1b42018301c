"""The command line: parse, load, check, call.

Runs in: supervisor.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from pipeline import checkpoints, cli_runs, cli_shards, cli_where, config, supervisor
from pipeline.config import Config
from pipeline.errors import ConfigError, ExitCode, FinewebError
from pipeline.redaction import scrub
from pipeline.supervisor import Job, Outcome
from pipeline.view import make_view

_EXIT_CODES = (
    "\b\nExit codes: 0 done · 2 wrong option or configuration · 3 bad shard or records\n"
    "4 disk or budget · 5 source · 6 crashed too often · 75 stopped: the same command resumes"
)


class _Workers(click.ParamType):
    """A positive number, or auto."""

    name = "N|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        if value == "auto" or isinstance(value, int):
            return value  # type: ignore[no-any-return]
        if str(value).isdigit() and int(value) > 0:
            return int(value)
        self.fail(f"{value!r} is neither a positive number nor auto", param, ctx)


# Option → key of the configuration. An option that is not given changes nothing.
_KEYS = {
    "shards": "data.stream.shards",
    "manifest": "data.stream.manifest",
    "max_disk": "data.stream.max_disk_gb",
    "workers": "data.stream.workers",
    "fetchers": "data.stream.fetchers",
    "decompressors": "data.stream.decompressors",
    "prefetch": "data.stream.prefetch",
    "lanes": "data.stream.lanes",
    "epochs": "data.stream.epochs",
    "shuffle": "data.stream.shuffle",
    "text_field": "data.stream.text_field",
    "min_chars": "data.filter.min_chars",
    "max_chars": "data.filter.max_chars",
    "language": "data.filter.languages",
    "min_language_score": "data.filter.min_language_score",
    "dump": "data.filter.dumps",
    "from_date": "data.filter.from_date",
    "before_date": "data.filter.before_date",
    "where": "data.filter.where",
    "max_bad_records": "data.stream.max_bad_records",
    "max_bad_shards": "data.stream.max_bad_shards",
    "cache_dir": "data.stream.cache_dir",
    "tokenizer": "data.tokenizer.name",
    "vocab_size": "data.tokenizer.vocab_size",
    "steps": "training.hyperparameters.iters",
    "seed": "system.seed",
    "name": "name",
    "runs_dir": "logging.runs_dir",
}


def _stream_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of every command that streams shards."""
    options = [
        click.option("--shards", multiple=True, metavar="PATTERN",
                     help="Shards: URLs (http, https, hf, s3, gs, az) or paths, with {000..123} "
                     "braces, globs or a folder, quoted; or @FILE, a pattern a line. May be given "
                     "several times."),
        click.option("--manifest", type=click.Path(dir_okay=False), metavar="FILE",
                     help="Sizes and SHA-256 of the shards, which are then enforced; alone, it "
                     "names the shards as well."),
        click.option("--max-disk", type=float, metavar="GB",
                     help="Hard budget in GB (10⁹ bytes) for cached shards, partial files, "
                     "checkpoints and logs; 0 streams shards through memory, and only "
                     "checkpoints and logs take disk.  [default: 35]"),
        click.option("--workers", type=_Workers(),
                     help="Tokenizer processes; auto sizes every stage from the CPUs.  "
                     "[default: auto]"),
        click.option("--fetchers", type=click.IntRange(1), help="Fetcher processes."),
        click.option("--decompressors", type=click.IntRange(1), help="Decompressor processes."),
        click.option("--prefetch", type=click.IntRange(0), metavar="N",
                     help="Shards that each lane may fetch ahead.  [default: 2]"),
        click.option("--lanes", type=click.IntRange(1), metavar="N",
                     help="Ordered token streams that are read in turns."),
        click.option("--text-field", metavar="NAME",
                     help="JSON field or column that holds the text; /a/b/0 is what is nested.  "
                     "[default: text]"),
        click.option("--min-chars", type=click.IntRange(0), metavar="N",
                     help="Only documents of N characters or more."),
        click.option("--max-chars", type=click.IntRange(0), metavar="N",
                     help="Only documents of N characters or fewer."),
        click.option("--language", multiple=True, metavar="CODE",
                     help="Only documents whose column language is this; several times."),
        click.option("--min-language-score", type=float, metavar="X",
                     help="Only documents whose column language_score is X or more."),
        click.option("--dump", multiple=True, metavar="NAME",
                     help="Only documents of this crawl: CC-MAIN-2024-10; several times."),
        click.option("--from-date", metavar="DATE",
                     help="Only documents whose column date is this (2024-02) or later."),
        click.option("--before-date", metavar="DATE",
                     help="Only documents whose column date is earlier than this."),
        click.option("--where", metavar="CONDITION",
                     help="Only documents for which this holds: token_count < 4096 and not "
                     "'wiki' in url."),
        click.option("--max-bad-records", type=click.IntRange(0), metavar="N",
                     help="Records that may be skipped before the run ends.  [default: 1000]"),
        click.option("--max-bad-shards", type=click.IntRange(0), metavar="N",
                     help="Shards that may be skipped before the run ends.  [default: 0]"),
        click.option("--cache-dir", type=click.Path(file_okay=False), metavar="DIR",
                     help="Where shards are kept.  [default: cache/ in the run's folder]"),
        click.option("--seed", type=int, help="Decides the order of shards and the first weights."),
        click.option("--fresh", is_flag=True, help="Start over instead of resuming."),
        click.option("--yes", is_flag=True, help="With --fresh: do not ask."),
        click.option("--json", "as_json", is_flag=True,
                     help="Print the result as one JSON line on standard output."),
        click.option("--plain", is_flag=True, help="Plain lines instead of the live screen."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXIT_CODES)
@click.version_option(package_name="fineweb-pipeline")
def cli() -> None:
    """Pretrain a language model on FineWeb from a small disk.

    Shards stream from S3, HTTP or this disk through fetchers, decompressors and tokenizers into
    shared memory, where one MLX process trains on them. What has been used is deleted, so that a
    byte budget holds at every instant.

    \b
    fineweb-pipeline start                 a demonstration that needs nothing
    fineweb-pipeline start --shards PATTERN --config model-config-80m-fineweb
    fineweb-pipeline tokenize --shards PATTERN --out DIR
    fineweb-pipeline generate RUN "Once upon a time"
    fineweb-pipeline export RUN --out DIR
    fineweb-pipeline report RUN
    fineweb-pipeline shards list|make|verify PATTERN
    fineweb-pipeline where --run RUN --step S
    """


@cli.command(epilog=_EXIT_CODES)
@click.option(
    "--config",
    "config_path",
    metavar="FILE",
    help="YAML file, or the name of one that comes with the program: "
    "model-config-80m-fineweb, llama-80m, demo.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    metavar="N",
    help="Optimizer updates in all: shortens or lengthens the run.",
)
@click.option("--name", metavar="NAME", help="Name of the run: its folder is runs/NAME.")
@click.option("--runs-dir", metavar="DIR", help="Folder of all runs.  [default: runs]")
@_stream_options
def start(
    config_path: str | None, fresh: bool, yes: bool, as_json: bool, plain: bool, **options: Any
) -> None:
    """Train a model on shards; without --shards, run the demonstration.

    A run that has a checkpoint resumes by itself, at the exact token, also after a crash.

    \b
    Examples:
      fineweb-pipeline start
      fineweb-pipeline start --config model-config-80m-fineweb \\
          --shards 's3://my-bucket/fineweb/shard-{00000..01000}.tar.bz2' --max-disk 35
      fineweb-pipeline start --shards '/data/*.parquet' --steps 100 --workers 4
    """
    overrides = _overrides(options)
    given = bool({"data.stream.shards", "data.stream.manifest"} & overrides.keys())
    if config_path is None and given:
        overrides = {"name": "run", **overrides}
    loaded = config.load(config_path or (None if given else "demo"), overrides)
    if not given and not config.patterns(loaded.data.stream) and config_path is None:
        from pipeline import demo_run

        demo_run.run(loaded, fresh=fresh, plain=plain, as_json=as_json)
        return
    job = _job("train", loaded, Path(loaded.logging.runs_dir) / loaded.name, fresh)
    if fresh and checkpoints.whole(Path(job.run_dir)):
        _confirm(yes, f"{job.run_dir} has checkpoints")
    _finish(_run(job, plain), as_json)


@cli.command(epilog=_EXIT_CODES)
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Folder of the token files.",
)
@click.option("--config", "config_path", metavar="FILE", help="YAML file with defaults.")
@click.option("--tokenizer", metavar="NAME", help="A tiktoken encoding.  [default: gpt2]")
@click.option(
    "--vocab-size",
    type=click.IntRange(257),
    metavar="V",
    help="Keep only the encoding's first ranks, the end-of-text token included.",
)
@click.option("--limit-tokens", type=click.IntRange(1), metavar="N", help="Stop after N tokens.")
@click.option(
    "--file-tokens",
    type=click.IntRange(1),
    default=100_000_000,
    show_default=True,
    metavar="N",
    help="Tokens of one file.",
)
@click.option("--shuffle", is_flag=True, default=None, help="Permute the shards by --seed.")
@click.option(
    "--epochs", type=click.IntRange(1), metavar="N", help="Passes over the shards.  [default: 1]"
)
@_stream_options
def tokenize(
    out: str,
    config_path: str | None,
    limit_tokens: int | None,
    file_tokens: int,
    fresh: bool,
    yes: bool,
    as_json: bool,
    plain: bool,
    **options: Any,
) -> None:
    """Tokenize shards into files of llm.c's format, in order.

    Every document is preceded by the end-of-text token. Files hold a header of 256 int32 and
    then uint16 ids (uint32 where the vocabulary needs it), as llm.c and modded-nanogpt read them.

    \b
    Examples:
      fineweb-pipeline tokenize --shards '/data/*.parquet' --out tokens
      fineweb-pipeline tokenize --shards 'https://host/shard-{000..099}.jsonl.zst' --out tokens \\
          --max-disk 5 --json
    """
    defaults = {
        "name": Path(out).name,
        "data.stream.lanes": 1,
        "data.stream.shuffle": False,
        "data.stream.epochs": 1,
    }
    loaded = config.load(config_path, _overrides(options), defaults)
    job = _job("tokenize", loaded, Path(out), fresh)
    job = msgspec.structs.replace(job, limit_tokens=limit_tokens, file_tokens=file_tokens)
    if fresh and any(Path(out).glob("tokens_*.bin*")):
        _confirm(yes, f"{out} has token files")
    _finish(_run(job, plain), as_json)


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


# ── helpers ─────────────────────────────────────────────────────────────────────────────────


def _overrides(options: dict[str, Any]) -> dict[str, Any]:
    """Options that were given, by configuration key."""
    given = {
        _KEYS[name]: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value not in (None, ())
    }
    return given


def _job(kind: Any, loaded: Config, run_dir: Path, fresh: bool) -> Job:
    if not (config.patterns(loaded.data.stream) or loaded.data.stream.manifest):
        raise ConfigError("no shards are given", "name them with --shards or data.stream.shards")
    cache_dir = loaded.data.stream.cache_dir or str(run_dir / "cache")
    return Job(kind, loaded, str(run_dir), cache_dir, fresh=fresh)


def _run(job: Job, plain: bool) -> Outcome:
    view = make_view(live=False if plain else None)
    try:
        return supervisor.run(job, view)
    finally:
        view.close()


def _confirm(yes: bool, what: str) -> None:
    """Ask before something is destroyed; refuse where nobody can be asked."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"{what}: --fresh would delete them", "add --yes if that is meant")
    click.confirm(f"{what}. Delete them and start over?", abort=True, err=True)


def _finish(outcome: Outcome, as_json: bool) -> None:
    """Print the result and leave with its code, also where nobody can read it any more."""
    text = msgspec.json.encode(outcome.summary).decode() if as_json else describe(outcome)
    try:
        click.echo(text)
    except OSError:  # the terminal was closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(outcome.exit_code)


def describe(outcome: Outcome) -> str:
    """The result in a few lines for a person."""
    summary = outcome.summary
    head = "done" if outcome.complete else "stopped: the same command goes on from here"
    lines = [f"{head} after {summary['wall_s']:.0f} s, {summary['cpu_s']:.0f} s of CPU"]
    if "loss" in summary and summary["loss"] is not None:
        lines.append(
            f"  {summary['steps']} updates, {summary['tokens']:,} tokens, "
            f"loss {summary['first_loss']:.3f} → {summary['loss']:.3f}"
        )
        if summary.get("stream_ended"):
            lines.append("  the shards ended before the updates did: give more shards or epochs")
        if "sample" in summary:
            lines.append(f"  sample: {summary['sample']!r}")
    else:
        lines.append(
            f"  {summary['tokens']:,} tokens of {summary['documents']:,} documents, "
            f"sha256 {summary['sha256']}"
        )
    lines.append(
        f"  {summary['fetched_shards']} shards fetched, {summary['evicted_shards']} evicted; "
        f"peak disk {summary['peak_disk_bytes'] / 1e9:.4f} GB, peak memory "
        f"{summary['peak_rss_bytes'] / 1e9:.2f} GB; {summary['restarts']} restarts, "
        f"{summary['bad_records']} bad records, {summary['filtered']:,} documents filtered out"
    )
    return "\n".join(lines)


def main() -> None:
    """Console entry: errors are two lines and an exit code, never a traceback for a user's."""
    try:
        cli.main(standalone_mode=False)
    except FinewebError as error:
        with contextlib.suppress(OSError):  # the terminal may be gone; the code is what counts
            click.secho(f"error: {error.what}", fg="red", err=True)
            if error.remedy:
                click.echo(f"  {error.remedy}", err=True)
        sys.exit(int(error.exit_code))
    except click.exceptions.Abort:
        click.echo("nothing was changed", err=True)
        sys.exit(int(ExitCode.USAGE))
    except click.ClickException as error:
        error.show()
        sys.exit(int(ExitCode.USAGE))
    except Exception:  # a bug: its traceback may hold what the user's URLs do
        click.echo(scrub(traceback.format_exc()), err=True)
        click.echo("this is a bug: please report it with the traceback", err=True)
        sys.exit(int(ExitCode.BUG))
