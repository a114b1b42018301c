"""Where the user looks: one live screen on a terminal, plain lines or JSON elsewhere.

Runs in: supervisor. Everything goes to standard error; standard output is for results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import msgspec
import structlog
from rich.console import Console
from rich.live import Live

from pipeline.log import step_line
from pipeline.screen import clock, human, picture
from pipeline.status import DiskStatus, Status, View, is_shown

_VERDICT_EVERY = 10  # plain lines of progress between two that say what limits


def make_view(progress: str = "auto", stream: TextIO = sys.stderr) -> View:
    """Where the user looks.

    Args:
        progress: live, plain, json or none; auto: live if the stream is a terminal, else plain.
        stream: Where to write.
    """
    if progress == "auto":
        progress = "live" if stream.isatty() else "plain"
    kinds: dict[str, Callable[[TextIO], View]] = {
        "live": LiveView,
        "plain": PlainView,
        "json": JsonView,
        "none": SilentView,
    }
    return LastingView(kinds[progress](stream))


def line_every_s(elapsed_s: float) -> float:
    """Seconds between two lines: the first minute is watched, the third day is read."""
    return 2.0 if elapsed_s < 60 else 10.0 if elapsed_s < 3600 else 60.0


class PlainView:
    """structlog lines: events as they come, and progress now and then."""

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
        self._began = time.monotonic()
        self._disk: DiskStatus | None = None
        self._step: dict[str, Any] = {}  # of an update that no line has shown yet
        self._verdict = ""
        self._said_at = 0.0
        self._lines = 0

    def event(self, level: str, event: str, **fields: Any) -> None:
        """See View."""
        if event == "step_done":
            self._step = fields
            if self._disk is not None and self._due():
                self._progress(step_line(fields, self._disk))
        elif is_shown(level, event):
            getattr(self._logger, level)(event, **fields)

    def update(self, status: Status) -> None:
        """See View."""
        self._disk, self._verdict = status.disk, status.verdict
        if status.kind == "tokenize" and self._due():
            self._progress(written_line(status))

    def _due(self) -> bool:
        now = time.monotonic()
        return now - self._said_at >= line_every_s(now - self._began)

    def _progress(self, line: str) -> None:
        self._said_at, self._step = time.monotonic(), {}
        self._print(line)
        self._lines += 1
        if self._lines % _VERDICT_EVERY == 0:
            self._print(f"verdict | {self._verdict}")

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """See View."""
        if self._step and self._disk is not None:  # the last update is always shown
            self._print(step_line(self._step, self._disk))
        if self._verdict:
            self._print(f"verdict | {self._verdict}")


def written_line(status: Status) -> str:
    """Where a tokenize run stands, in one line."""
    tokens = int(status.metrics.get("total_tokens", 0))
    rate = next((one.rate for one in status.stages if one.name == "tokenize"), 0.0)
    disk = status.disk
    return (
        f"{clock(status.elapsed_s)} | {human(tokens, 'tokens')} | {human(rate, 'tok/s')} | "
        f"disk {disk.used_bytes / 1e9:.3f}/{disk.budget_bytes / 1e9:.3f} GB"
    )


class JsonView:
    """JSON lines: {"event": …} as events come, {"status": …} now and then and at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._began = time.monotonic()
        self._said_at = 0.0
        self._last: Status | None = None
        self._encode = msgspec.json.Encoder(enc_hook=str).encode

    def event(self, level: str, event: str, **fields: Any) -> None:
        """See View."""
        if is_shown(level, event):
            self._print({"event": event, "level": level, **fields})

    def update(self, status: Status) -> None:
        """See View."""
        self._last = status
        now = time.monotonic()
        if now - self._said_at >= line_every_s(now - self._began):
            self._said_at, self._last = now, None
            self._print({"status": status})

    def _print(self, line: dict[str, Any]) -> None:
        print(self._encode(line).decode(), file=self._stream, flush=True)

    def close(self) -> None:
        """See View."""
        if self._last is not None:
            self._print({"status": self._last})


class SilentView:
    """Shows nothing."""

    def __init__(self, stream: TextIO) -> None:
        del stream

    def event(self, level: str, event: str, **fields: Any) -> None:
        """See View."""

    def update(self, status: Status) -> None:
        """See View."""

    def close(self) -> None:
        """See View."""


class LiveView:
    """One calm screen, on the terminal's second page: a resize only draws it again, and what was
    there before comes back in the end, with the last picture below it."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._live = Live(console=self._console, auto_refresh=False, screen=True)
        self._live.start()
        self._last: Status | None = None

    def event(self, level: str, event: str, **fields: Any) -> None:
        """See View: the status has the notes."""

    def update(self, status: Status) -> None:
        """See View."""
        self._last = status
        self._live.update(picture(status), refresh=True)

    def close(self) -> None:
        """See View."""
        self._live.stop()
        if self._last is not None:
            self._console.print(picture(self._last))


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
