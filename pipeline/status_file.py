"""The status of a run in its folder, for whoever looks from elsewhere.

Runs in: supervisor (writes), the command line and the status server (read).

    runs/<name>/status.json      replaced as a whole, once a second; it says who wrote it and when
"""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from pipeline.errors import ConfigError, ExitCode
from pipeline.status import Status

FILE = "status.json"
MAX_BYTES = 1 << 16  # twice while it is replaced: part of what is set aside for small files
WRITE_EVERY_S = 1.0
_SILENT_S = 15.0  # a run whose file is older does not go on as it should

State = Literal["running", "silent", "done", "stopped", "failed", "dead"]


class Ended(msgspec.Struct, frozen=True):
    """How a run has ended, in its own words."""

    exit_code: int
    what: str = ""
    remedy: str = ""


class Writer(msgspec.Struct, frozen=True):
    """The process that writes the file. Its start tells it from a later one of the same number."""

    host: str
    pid: int
    started_s: float  # seconds since 1970


class Recorded(msgspec.Struct, frozen=True):
    """What the file holds."""

    writer: Writer
    written_s: float  # seconds since 1970
    status: Status
    ended: Ended | None = None


def this_process() -> Writer:
    """Who we are."""
    me = psutil.Process()
    return Writer(socket.gethostname(), me.pid, me.create_time())


def write(folder: Path, recorded: Recorded) -> None:
    """Replace the file as a whole. A disk that refuses it costs the run nothing; what stands
    there then grows old, and is told from a run that goes on by its time."""
    data = msgspec.json.encode(recorded)
    partial = folder / f"{FILE}.partial"
    try:
        if len(data) <= MAX_BYTES:
            partial.write_bytes(data)
            partial.replace(folder / FILE)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def read(folder: Path) -> Recorded:
    """What the folder's file says.

    Raises:
        ConfigError: there is none, or another version has written it.
    """
    path = folder / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Recorded)
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} has no {FILE}: no run has been started there",
            "give a run's folder, or its name in runs/ (or in --runs-dir)",
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}", "another version of the program has written it"
        ) from None


def state(recorded: Recorded, now_s: float | None = None) -> State:
    """Whether the run goes on, has ended, or was cut off.

    A process of this machine is looked at; of one elsewhere (a shared disk) only the file's age
    tells.
    """
    if recorded.ended is not None:
        code = recorded.ended.exit_code
        return {int(ExitCode.OK): "done", int(ExitCode.RESUME): "stopped"}.get(code, "failed")  # type: ignore[return-value]
    if recorded.writer.host == socket.gethostname() and not _lives(recorded.writer):
        return "dead"
    age_s = (time.time() if now_s is None else now_s) - recorded.written_s
    return "silent" if age_s > _SILENT_S else "running"


def _lives(writer: Writer) -> bool:
    try:
        process = psutil.Process(writer.pid)
        same = abs(process.create_time() - writer.started_s) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # somebody else's, and there
        return True
