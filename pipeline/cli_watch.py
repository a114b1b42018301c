"""How looking for shards goes, for a person at a terminal.

Runs in: the command line's own process.
"""

from __future__ import annotations

import sys

import click

from pipeline.listing import Watch

_SAY_S = 0.2


def watch() -> Watch:
    """Progress on a terminal alone; attempts that are made again always, or a wait would be
    silent."""
    return Watch(_progress, _tried_again, _SAY_S)


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{done:,} of {total:,} shards\r", nl=False, err=True)


def _tried_again(why: str, wait_s: float) -> None:
    click.echo(f"{why}; tried again in {wait_s:.1f} s", err=True)
