"""Commands on shards: what is there, making them, checking them.

Runs in: the command line's own process.
"""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from pipeline import catalog, cli_make, manifest
from pipeline.catalog import Shard
from pipeline.cli_watch import watch
from pipeline.config import Stream
from pipeline.errors import ExitCode, exit_codes


@click.group()
def shards() -> None:
    """Look at shards, wherever they are; make and verify them.

    \b
    Examples:
      fineweb-pipeline shards list '/data/*.parquet'
      fineweb-pipeline shards verify /data
    """


shards.add_command(cli_make.make)
shards.add_command(cli_make.verify)


@shards.command(
    name="list", epilog=exit_codes(ExitCode.OK, ExitCode.USAGE, ExitCode.DISK, ExitCode.SOURCE)
)
@click.argument("patterns", nargs=-1, metavar="PATTERN...")
@click.option("--manifest", "manifest_path", type=click.Path(dir_okay=False), metavar="FILE",
              help="Compare with this manifest; without PATTERN, list its shards.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True,
              help="Print one JSON object a line: a manifest.")  # fmt: skip
def list_shards(patterns: tuple[str, ...], manifest_path: str | None, as_json: bool) -> None:
    """List the shards that patterns name.

    Each with its name, bytes and version; in the end the totals.

    \b
    A PATTERN is
      a path or URL (http, https, hf, s3, gs, az), with {000..123} or {a,b}
      a glob, where the store can list:    's3://bucket/fineweb/**/*.parquet'
      a folder, all that lies in it:       gs://bucket/fineweb/   /data/fineweb
      @FILE                                a file, a pattern a line; # comments

    Quote patterns, so that the shell leaves them alone. Credentials come from the variables that
    each store's own tools use: AWS_…, GOOGLE_…, AZURE_…, HF_TOKEN.

    \b
    Examples:
      fineweb-pipeline shards list \\
          'hf://datasets/HuggingFaceFW/fineweb/sample/10BT/*.parquet'
      fineweb-pipeline shards list 'https://host/shard-{000..099}.tar.bz2' \\
          --json > manifest.jsonl
    """
    stream = Stream()
    options = {"max_retries": stream.max_retries, "timeout_s": stream.timeout_s}
    given = None if manifest_path is None else manifest.read(Path(manifest_path))
    found = catalog.build(patterns, options, catalog.Known(given, ask=bool(patterns)), watch())
    if as_json:
        encoder = msgspec.json.Encoder()
        for entry in catalog.to_entries(found, with_local=True):
            local = entry.name.startswith("file:")  # its time of change is none anywhere else
            version = "" if local else entry.version
            line = msgspec.structs.replace(entry, url="", pattern="", version=version)
            click.echo(encoder.encode(line))
        click.echo(_totals(found), err=True)
    else:
        width = max(len(shard.name) for shard in found)
        for shard in found:
            size = "unknown" if shard.size_bytes is None else f"{shard.size_bytes:,}"
            click.echo(f"{shard.name:{width}}  {size:>15}  {shard.version}".rstrip())
        click.echo(_totals(found))


def _totals(found: tuple[Shard, ...]) -> str:
    known = [shard.size_bytes for shard in found if shard.size_bytes is not None]
    text = f"{len(found):,} shards, {sum(known):,} bytes ({sum(known) / 1e9:.3f} GB)"
    unknown = len(found) - len(known)
    return f"{text} and {unknown:,} of unknown size" if unknown else text
