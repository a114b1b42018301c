"""The demonstration: what `start` does when it is given nothing.

Runs in: supervisor.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec

from pipeline import checkpoints, cli_stream, demo
from pipeline.cli_options import Given
from pipeline.config import Config
from pipeline.errors import ExitCode
from pipeline.supervisor import Job, Outcome

_COLUMNS = 79


def run(config: Config, given: Given, *, dry: bool) -> None:
    """Make and serve the corpus, stream it, train on it, and say what happened.

    Args:
        config: The demonstration's.
        given: The command's options.
        dry: Say what would be done, and do nothing.
    """
    runs_dir = Path(config.logging.runs_dir)
    run_dir = runs_dir / config.name
    corpus_dir = runs_dir / f"{config.name}-corpus"
    fresh = given.own["fresh"].value or _finished(run_dir, config)
    if dry:
        click.echo(_before())
        click.echo(f"Nothing was done. It would write {corpus_dir}/ and {run_dir}/.")
        return
    click.echo(_before(), err=True)
    facts = demo.make_corpus(corpus_dir)
    click.echo(_corpus(facts, config), err=True)
    with demo.served(corpus_dir) as (url, same):
        last = facts["shards"] - 1
        pattern = f"{url}/shard-{{00000..{last:05d}}}.tar.bz2"
        stream = msgspec.structs.replace(config.data.stream, shards=[pattern])
        data = msgspec.structs.replace(config.data, stream=stream)
        job = Job(
            "train",
            msgspec.structs.replace(config, data=data),
            str(run_dir),
            stream.cache_dir or str(run_dir / "cache"),
            fresh=fresh or not same,
        )
        outcome = cli_stream.run(job, given)
    if given.own["json"].value:
        click.echo(msgspec.json.encode(outcome.summary).decode())
    else:
        click.echo(_after(outcome, facts, run_dir, config))
    timed_out = "stopped" in outcome.summary
    sys.exit(int(ExitCode.OK) if timed_out else outcome.exit_code)


def _finished(run_dir: Path, config: Config) -> bool:
    """A demonstration that is complete is simply run again; one that was cut off resumes."""
    latest = checkpoints.latest(run_dir)
    return latest is not None and latest.state.step >= config.training.hyperparameters.iters


def _before() -> str:
    return (
        "No --shards given: this is the demonstration. It needs no network and no data.\n"
        "  1. It makes a corpus from this Python's own documentation and library sources,\n"
        "     as tar.bz2 shards like FineWeb's.\n"
        "  2. A web server on this machine stands for the remote side.\n"
        "  3. Fetchers, decompressors and tokenizers stream the shards to a small Llama, under\n"
        "     a disk budget that cannot hold them all: used shards are deleted, and fetched again."
    )


def _corpus(facts: dict[str, int], config: Config) -> str:
    return (
        f"Corpus: {facts['documents']:,} documents, {facts['text_bytes'] / 1e6:.1f} MB of text, "
        f"{facts['shards']} shards of {facts['shard_bytes'] / facts['shards'] / 1e6:.2f} MB.\n"
        f"Disk budget: {config.data.stream.max_disk_gb * 1e3:.1f} MB for cached shards, "
        f"checkpoints and logs together.\n"
    )


def _after(outcome: Outcome, facts: dict[str, int], run_dir: Path, config: Config) -> str:
    summary = outcome.summary
    lines = [""]
    if summary.get("loss") is not None and summary.get("first_loss") is not None:
        lines += [
            f"The loss fell from {summary['first_loss']:.2f} to {summary['loss']:.2f} nats in "
            f"{summary['steps']} updates ({summary['tokens']:,} tokens), "
            f"{summary['wall_s']:.0f} s.",
        ]
    lines += [
        f"{summary['fetched_shards']} shards were fetched and {summary['evicted_shards']} "
        f"deleted again; the disk never held more than {summary['peak_disk_bytes'] / 1e6:.2f} MB "
        f"of the {config.data.stream.max_disk_gb * 1e3:.1f} MB allowed.",
    ]
    lines.append(f"What limited it: {summary['verdict']}.")
    if "sample" in summary:
        lines.append(f"The model goes on: {summary['sample']!r}")
    if not outcome.complete:
        lines.append("It was stopped before its end; the same command goes on from here.")
    lines = [click.wrap_text(line, _COLUMNS) for line in lines]
    lines += [
        f"Left in {run_dir}/: log.txt, metrics.jsonl, checkpoints/.",
        "",
        "Next, on FineWeb itself (shards from S3, a web server or a folder):",
        "  bin/fineweb-pipeline start --config model-config-80m-fineweb --max-disk 35 \\",
        "      --shards 's3://YOUR-BUCKET/fineweb/shard-{00000..01000}.tar.bz2'",
    ]
    return "\n".join(lines)
