"""The commands that stream shards: start and tokenize.

Runs in: the command line's own process, which becomes the supervisor.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from pipeline import checkpoints, cli_options, cli_ranks, cli_ray
from pipeline.cli_options import Given, config_option, stream_options
from pipeline.errors import ConfigError, exit_codes
from pipeline.view import make_view

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.supervisor import Job, Outcome

EXIT_CODES = exit_codes()
TOKENIZE_DEFAULTS = {
    "data.stream.lanes": 1,
    "data.stream.shuffle": False,
    "data.stream.epochs": 1,
}


@click.command(epilog=EXIT_CODES)
@config_option(
    "YAML file, or the name of one that comes with the program: "
    "model-config-80m-fineweb, llama-80m, demo."
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    metavar="N",
    help="Optimizer updates in all: shortens or lengthens the run.",
)
@click.option("--name", metavar="NAME", help="Name of the run: its folder is runs/NAME.")
@click.option("--runs-dir", metavar="DIR", help="Folder of all runs.  [default: runs]")
@cli_ranks.rank_options
@stream_options
@click.pass_context
def start(ctx: click.Context, /, config_path: str | None, **options: Any) -> None:
    """Train a model on shards, or run the demonstration.

    Without --shards and --config it is the demonstration. A run that has a checkpoint resumes
    by itself, at the exact token, also after a crash.

    \b
    Examples:
      fineweb-pipeline start
      fineweb-pipeline start --config model-config-80m-fineweb \\
          --shards 's3://my-bucket/shard-{00000..01000}.tar.bz2' --max-disk 35
      fineweb-pipeline start --shards '/data/*.parquet' --steps 100 --workers 4
      fineweb-pipeline start -n 4 --max-restarts 3 --shards '/data/*.parquet'
      fineweb-pipeline start --hostfile macs.json --shards '/data/*.parquet'
    """
    given = cli_options.given(ctx)
    resolved = given.resolve(config_path, {} if config_path else {"name": "run"})
    stream = resolved.config.data.stream
    demonstration = config_path is None and not (stream.patterns() or stream.manifest)
    if demonstration:
        resolved = given.resolve("demo", {})
    if options["print_config"]:
        cli_options.print_config(resolved, "start", given.own)
        return
    config = resolved.config
    run_dir = Path(config.logging.runs_dir) / config.name
    if demonstration:
        from pipeline import demo_run

        demo_run.run(config, given, dry=options["dry_run"])
        return
    job = job_of("train", config, run_dir, options["fresh"])
    if options["dry_run"]:
        _dry_run(job, options["as_json"])
        return
    if job.fresh and checkpoints.whole(run_dir):
        _confirm(options["yes"], f"{run_dir} has checkpoints")
    _finish(run(job, given), options["as_json"])


@click.command(epilog=EXIT_CODES)
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Folder of the token files.",
)
@config_option("YAML file with defaults.")
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
@cli_ray.options
@stream_options
@click.pass_context
def tokenize(ctx: click.Context, /, out: str, config_path: str | None, **options: Any) -> None:
    """Tokenize shards into files that llm.c reads.

    Every document is preceded by the end-of-text token. Files hold a header of 256 int32 and
    then uint16 ids (uint32 where the vocabulary needs it), as llm.c and modded-nanogpt read them.

    \b
    Examples:
      fineweb-pipeline tokenize --shards '/data/*.parquet' --out tokens
      fineweb-pipeline tokenize --shards 'https://host/s-{000..099}.jsonl.zst' \\
          --out tokens --max-disk 5 --json
      fineweb-pipeline tokenize --shards @shards.txt --out /nfs/tokens --ray auto
    """
    given = cli_options.given(ctx)
    resolved = given.resolve(config_path, {"name": Path(out).name, **TOKENIZE_DEFAULTS})
    if options["print_config"]:
        cli_options.print_config(resolved, "tokenize", given.own)
        return
    job = job_of("tokenize", resolved.config, Path(out), options["fresh"])
    limits = {name: options[name] for name in ("limit_tokens", "file_tokens")}
    job = msgspec.structs.replace(job, **limits)
    if options["ray"] is not None:
        cli_ray.tokenize(
            job, given, options["dry_run"], lambda what: _confirm(options["yes"], what)
        )
        return
    cli_ray.refuse_ranges(Path(out))
    if options["dry_run"]:
        _dry_run(job, options["as_json"])
        return
    if job.fresh and any(Path(out).glob("tokens_*.bin*")):
        _confirm(options["yes"], f"{out} has token files")
    _finish(run(job, given), options["as_json"])


# ── helpers ─────────────────────────────────────────────────────────────────────────────────


def job_of(kind: Any, config: Config, run_dir: Path, fresh: bool) -> Job:
    """The job of a configuration. Raises: ConfigError, where no shards are named."""
    from pipeline.supervisor import Job

    stream = config.data.stream
    if not (stream.patterns() or stream.manifest):
        raise ConfigError("no shards are given", "name them with --shards or data.stream.shards")
    cache_dir = stream.cache_dir or str(run_dir / "cache")
    return Job(kind, config, str(run_dir), cache_dir, fresh=fresh)


def run(job: Job, given: Given) -> Outcome:
    """Run a job with the view that its options ask for."""
    from pipeline import supervisor

    progress = "plain" if given.own["plain"].value else given.own["progress"].value
    outcome = cli_ranks.run(job, given, progress)
    if outcome is not None:
        return outcome
    view = make_view(progress)
    try:
        return supervisor.run(job, view)
    finally:
        view.close()


def _dry_run(job: Job, as_json: bool) -> None:
    from pipeline import dry_run

    facts = dry_run.look(job)
    click.echo(msgspec.json.encode(facts).decode() if as_json else dry_run.describe(facts))


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
    lines.append(f"  {summary['verdict']}")
    return "\n".join(lines)
