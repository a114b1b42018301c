"""What the user sees of a campaign.

Runs in: chaos.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import click

from pipeline.chaos.campaign import Campaign, Report

_BYTES = ("memory of all processes", "memory of the supervisor", "disk")


def run(seed: int, minutes: float, kind: str) -> Report:
    """Run a campaign in a folder of its own, which stays only if something was wrong."""
    folder = Path(tempfile.mkdtemp(prefix="fineweb-chaos-"))
    begin = time.monotonic()

    def tell(line: str) -> None:
        click.echo(f"{time.monotonic() - begin:7.1f} s  {line}", err=True)

    try:
        report = Campaign(folder, seed, minutes, kind, tell).run()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if report.problems:
        report.folder = str(folder)
    else:
        shutil.rmtree(folder)
    return report


def describe(report: Report) -> str:
    """The report for a person."""
    width = max(map(len, report.faults), default=0)
    faults = [f"  {what:<{width}}  {count:>6}" for what, count in report.faults.items()]
    work = f"{report.rounds} {'rounds' if report.kind == 'tokenize' else 'updates'}"
    extra = report.fetched_bytes - report.undisturbed_bytes
    share = extra / report.undisturbed_bytes if report.undisturbed_bytes else 0.0
    lines = [
        f"chaos --kind {report.kind} --seed {report.seed} --minutes {report.minutes:g}",
        f"faults injected: {sum(report.faults.values())}",
        *faults,
        f"kills by the campaign: {report.kills}; deaths that supervisors saw: {report.deaths}",
        f"supervisors started: {report.supervisors}; ended by themselves: {_endings(report)}",
        f"work done: {work}, {report.tokens:,} tokens, all compared with an undisturbed run",
        f"bytes fetched: {report.fetched_bytes:,}, {extra:,} more than undisturbed ({share:.0%})",
        f"budget: {report.budget_bytes:,} bytes",
        *(_series(name, series) for name, series in report.observed.items() if series),
    ]
    lines += [f"PROBLEM: {problem}" for problem in report.problems]
    if report.folder:
        lines.append(f"logs are kept in {report.folder}")
    return "\n".join([*lines, f"verdict: {report.verdict}"])


def _endings(report: Report) -> str:
    return ", ".join(f"{how} × {count}" for how, count in report.endings.items()) or "none"


def _series(name: str, series: dict[str, float]) -> str:
    scale, unit = (1e6, " MB") if name in _BYTES else (1, "")
    said = "  ".join(
        f"{label} {series[key] / scale:.1f}{unit}"
        for label, key in (
            ("first", "first"),
            ("last", "last"),
            ("max", "max"),
            ("median of the 2nd quarter", "second_quarter"),
            ("of the last", "last_quarter"),
        )
    )
    return f"{name}: {said}"
