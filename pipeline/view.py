"""Where the user looks: one live screen on a terminal, plain lines elsewhere.

Runs in: supervisor. Everything goes to standard error; standard output is for results.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

import structlog
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.log import step_line
from pipeline.status import DiskStatus, Status, View

_LINE_S = 2.0  # between step lines off a terminal
_CURVE = "▁▂▃▄▅▆▇█"
_BAR_CELLS = 24
_NOTED = 4  # newest events under the picture
# Events that a person wants to see; log.txt has all.
_SHOWN = {
    "workers_chosen", "consumer_ready", "resuming", "shard_evicted", "checkpoint_written",
    "worker_died", "worker_hangs", "trainer_died", "writer_died", "worker_killed", "bad_record",
    "shard_skipped", "block_skipped", "disk_full", "stopping", "stream_ended", "worker_stderr",
    "cached_shard_damaged", "fetch_tried_again", "worker_failed", "listing_shards",
    "checkpoint_waits_for_disk",
}  # fmt: skip


def make_view(*, live: bool | None = None, stream: TextIO = sys.stderr) -> View:
    """The live screen if the stream is a terminal, plain lines otherwise.

    Args:
        live: Force the one or the other; None decides by the stream.
        stream: Where to write.
    """
    on_terminal = stream.isatty() if live is None else live
    return LastingView(LiveView(stream) if on_terminal else PlainView(stream))


def human(count: float, unit: str) -> str:
    """A number with three digits and the right prefix: 12.3 MB/s."""
    for prefix in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.3g} {prefix}{unit}" if count < 100 else f"{count:.0f} {prefix}{unit}"
        count /= 1000
    return f"{count:.3g} T{unit}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def curve(values: list[float], width: int) -> str:
    """A line of bars: the mean of each of width stretches of the values."""
    if not values:
        return ""
    width = min(width, len(values))
    bounds = [len(values) * n // width for n in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_CURVE[int((value - low) / span * (len(_CURVE) - 1))] for value in means)


class PlainView:
    """structlog lines: events as they come, a step line every few seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._logger = structlog.wrap_logger(
            structlog.PrintLogger(stream),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
                structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=20),
            ],
        )
        self._stream = stream
        self._disk: DiskStatus | None = None
        self._last: Status | None = None
        self._step_at = self._status_at = 0.0
        self._step: dict[str, Any] = {}

    def event(self, level: str, event: str, **fields: Any) -> None:
        """See View."""
        if event == "step_done":
            self._take_step(fields)
        elif event in _SHOWN or level in ("error",):
            getattr(self._logger, level)(event, **fields)

    def _take_step(self, metrics: dict[str, Any]) -> None:
        self._step = metrics
        now = time.monotonic()
        if self._disk is not None and now - self._step_at >= _LINE_S:
            self._step_at = now
            print(step_line(metrics, self._disk), file=self._stream, flush=True)
            self._step = {}

    def update(self, status: Status) -> None:
        """See View."""
        self._disk, self._last = status.disk, status
        now = time.monotonic()
        if status.kind == "tokenize" and now - self._status_at >= _LINE_S:
            self._status_at = now
            tokens = int(status.metrics.get("total_tokens", 0))
            rate = next((s.rate for s in status.stages if s.name == "tokenize"), 0.0)
            disk = status.disk
            print(
                f"{clock(status.elapsed_s)} | {human(tokens, 'tokens')} | {human(rate, 'tok/s')} | "
                f"disk {disk.used_bytes / 1e9:.3f}/{disk.budget_bytes / 1e9:.3f} GB | "
                f"{status.limiting}",
                file=self._stream,
                flush=True,
            )

    def close(self) -> None:
        """See View."""
        if self._step and self._disk is not None:  # the last update is always shown
            print(step_line(self._step, self._disk), file=self._stream, flush=True)


class LiveView:
    """One calm screen that fits 80 columns."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._live.start()
        self._losses: list[float] = []
        self._notes: deque[str] = deque(maxlen=_NOTED)

    def event(self, level: str, event: str, **fields: Any) -> None:
        """See View."""
        if event == "step_done":
            self._losses.append(float(fields["loss"]))
        elif event in _SHOWN or level == "error":
            said = "  ".join(f"{key} {value}" for key, value in fields.items())
            self._notes.append(f"{event.replace('_', ' ')}: {said}"[:160])

    def update(self, status: Status) -> None:
        """See View."""
        self._live.update(self._picture(status), refresh=True)

    def close(self) -> None:
        """See View."""
        self._live.stop()

    def _picture(self, status: Status) -> Group:
        lines = [self._headline(status)]
        if status.kind == "train":
            lines.append(self._loss(status))
        lines += [self._disk(status.disk), Text(f"limit   {status.limiting}", style="bold")]
        notes = [
            Text(f"  {n}", style="dim", no_wrap=True, overflow="ellipsis") for n in self._notes
        ]
        return Group(*lines, self._stages(status), *notes)

    @staticmethod
    def _headline(status: Status) -> Text:
        text = Text(f"{status.name}  ", style="bold cyan")
        text.append(f"{status.phase}  {clock(status.elapsed_s)}", style="default")
        if status.total_steps:
            text.append(f"  step {status.step}/{status.total_steps}", style="default")
            step_s = status.metrics.get("step_s")
            if step_s:
                left = (status.total_steps - status.step) * float(step_s)
                text.append(f"  {clock(left)} to go", style="default")
        if status.restarts or status.bad_records:
            said = f"  restarts {status.restarts}  bad records {status.bad_records}"
            text.append(said, style="yellow")
        return text

    def _loss(self, status: Status) -> Text:
        metrics = status.metrics
        if "loss" not in metrics:
            return Text("loss    waiting for the first update")
        return Text(
            f"loss    {metrics['loss']:.3f}  ppl {metrics['ppl']:.1f}  "
            f"{human(float(metrics['tokens_per_s']), 'tok/s')}  "
            f"{human(float(metrics['total_tokens']), 'tokens')}  {curve(self._losses, _BAR_CELLS)}"
        )

    @staticmethod
    def _disk(disk: DiskStatus) -> Text:
        full = min(_BAR_CELLS, round(_BAR_CELLS * disk.used_bytes / max(1, disk.budget_bytes)))
        text = Text("disk    ")
        text.append("█" * full + "░" * (_BAR_CELLS - full), style="green")
        text.append(
            f" {disk.used_bytes / 1e9:.3f}/{disk.budget_bytes / 1e9:.3f} GB, "
            f"{disk.cached_shards} shards, {disk.evicted_shards} evicted"
        )
        return text

    @staticmethod
    def _stages(status: Status) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("stage")
        for name in ("workers", "busy", "rate", "queue"):
            table.add_column(name, justify="right")
        for stage in status.stages:
            table.add_row(
                stage.name,
                str(stage.workers),
                f"{100 * stage.busy:.0f} %",
                human(stage.rate, stage.unit),
                f"{stage.queue}/{stage.capacity}",
            )
        table.add_row("ring", "", "", "", f"{100 * status.ring_fill:.0f} % full")
        return table


class LastingView:
    """A view whose terminal may go away: then nothing is shown any more, and the run decides.

    Args:
        view: The one that shows.
    """

    def __init__(self, view: View) -> None:
        self._view: View | None = view

    def update(self, status: Status) -> None:
        """See View."""
        self._show(lambda view: view.update(status))

    def event(self, level: str, event: str, **fields: Any) -> None:
        """See View."""
        self._show(lambda view: view.event(level, event, **fields))

    def close(self) -> None:
        """See View."""
        self._show(lambda view: view.close())

    def _show(self, action: Callable[[View], None]) -> None:
        if self._view is not None:
            try:
                action(self._view)
            except OSError:  # the terminal was closed, or the reader of the pipe is gone
                self._view = None
