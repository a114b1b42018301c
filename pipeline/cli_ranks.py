"""Options of `start` for several ranks, and what they lead to.

Runs in: the command line's own process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from pipeline import ranks
from pipeline.errors import ConfigError
from pipeline.view import make_view

if TYPE_CHECKING:
    from pipeline.cli_options import Given
    from pipeline.supervisor import Job, Outcome


def rank_options(command: Callable[..., None]) -> Callable[..., None]:
    """How many processes or hosts train together."""
    options = [
        click.option("-n", "--ranks", type=click.IntRange(1), metavar="N",
                     help="Train with N ranks on this machine, one a GPU; with --hostfile, N on "
                     "each host.  [default: 1]"),
        click.option("--hostfile", type=click.Path(dir_okay=False), metavar="FILE",
                     help="Train on these hosts, through ssh: MLX's JSON, "
                     '[{"ssh": "mac-1", "ips": ["10.0.0.1"]}, …]. The same program and folder '
                     "must be on each of them."),
        click.option("--backend", type=click.Choice(["auto", "ring", "nccl"]), default="auto",
                     show_default=True,
                     help="What carries the gradients; auto: NCCL on NVIDIA, else MLX's ring over "
                     "TCP. For JACCL and MPI use mlx.launch."),
        click.option("--port", type=click.IntRange(1024, 65000), default=32300, show_default=True,
                     help="First of the ports that hosts of a hostfile use."),
        click.option("--max-restarts", type=click.IntRange(0), default=0, show_default=True,
                     metavar="N", help="Start all ranks again from the last checkpoint when one "
                     "is lost, without the hosts that do not answer, N times at most."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def run(job: Job, given: Given, progress: str) -> Outcome | None:
    """Run a job as a launcher, or as one rank of another launcher's; None: it has one rank.

    Raises:
        ConfigError: both at once.
        FinewebError: of the rank that failed.
    """
    from pipeline import launch, rank_process, supervisor

    if job.kind != "train":
        return None
    own = {name: setting.value for name, setting in given.own.items()}
    rank = ranks.of_environment(os.environ, job.config.ranks.meeting)
    wanted = launch.layout(
        own.get("ranks"),
        own.get("hostfile"),
        own.get("backend") or "auto",
        own.get("port") or 0,
        own.get("max_restarts") or 0,
    )
    if rank.size == 1 and wanted is None:
        return None
    if rank.size > 1:
        if wanted is not None:
            raise ConfigError(
                f"a launcher has already made this rank {rank.number} of {rank.size}",
                "leave -n and --hostfile out, or start without the launcher",
            )
        rank_process.stop_with_parent()
        view = make_view("none" if rank.number else progress)
        try:
            return supervisor.run(launch.for_rank(job, rank), view)
        finally:
            view.close()
    assert wanted is not None
    teller = make_view("plain" if progress in ("auto", "live") else progress)
    return launch.run(job, wanted, progress, teller.event)
