"""Every error a user can meet, as one tree, and the exit code of each.

Runs in: every process. Pure.

An error says what happened, where, and what to do. The supervisor prints it and exits with
its code; a traceback is for bugs only.
"""

from __future__ import annotations

import enum
import errno

from pipeline.redaction import scrub


class ExitCode(enum.IntEnum):
    """What the exit status of the command means."""

    OK = 0
    BUG = 1  # an unexpected exception: please report it
    USAGE = 2  # wrong option or configuration: correct it, starting again does not help
    DATA = 3  # a shard or record cannot be read and may not be skipped
    DISK = 4  # the byte budget or the disk is too small, or the cache folder is in use
    SOURCE = 5  # a shard cannot be fetched: network, permission, not found
    CRASHED = 6  # a worker or the trainer died too often
    RESUME = 75  # stopped as asked, or cut off: the same command goes on where it ended
    INTERRUPTED = 130  # Ctrl-C ended a command that is no run: nothing is left to resume


# As --help tells it: the number, and what it means to a user.
MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.BUG: "a bug",
    ExitCode.USAGE: "wrong option or configuration",
    ExitCode.DATA: "bad shard or records",
    ExitCode.DISK: "disk or budget",
    ExitCode.SOURCE: "source",
    ExitCode.CRASHED: "crashed too often",
    ExitCode.RESUME: "stopped: the same command resumes",
    ExitCode.INTERRUPTED: "interrupted",
}


def exit_codes(*codes: ExitCode) -> str:
    """The last lines of a command's --help. Without codes: all there are."""
    said = (f"{int(code)} {MEANINGS[code]}" for code in codes or MEANINGS)
    return "Exit codes: " + " · ".join(said)


class FinewebError(Exception):
    """Base of all errors that are not bugs.

    Its text never holds a secret, whoever made it.

    Args:
        what: What happened, and where: the shard, the record, the key.
        remedy: What the user can do about it.
    """

    exit_code = ExitCode.BUG

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what, self.remedy = scrub(what), scrub(remedy)
        super().__init__(self.what)

    def __str__(self) -> str:
        return f"{self.what}\n  {self.remedy}" if self.remedy else self.what


class ConfigError(FinewebError):
    """A configuration or an option that cannot be."""

    exit_code = ExitCode.USAGE


class CursorMismatchError(ConfigError):
    """A checkpoint belongs to other shards, another configuration or another seed."""


class SourceError(FinewebError):
    """A shard cannot be listed or fetched."""

    exit_code = ExitCode.SOURCE


class ShardError(FinewebError):
    """A fetched shard cannot be read: damaged, cut off, or of an unknown format."""

    exit_code = ExitCode.DATA


class BadRecordsError(FinewebError):
    """More records are bad than the run allows."""

    exit_code = ExitCode.DATA


class BudgetError(FinewebError):
    """The byte budget cannot hold what the run needs, or the disk is full."""

    exit_code = ExitCode.DISK


class DiskError(FinewebError):
    """A file or folder of the run cannot be read or written."""

    exit_code = ExitCode.DISK


class CacheInUseError(FinewebError):
    """Another run owns the cache folder."""

    exit_code = ExitCode.DISK


class WorkerCrashError(FinewebError):
    """A worker, or the trainer, died too often."""

    exit_code = ExitCode.CRASHED


class StoppedError(FinewebError):
    """The run was asked to stop, or its trainer was cut off: the same command resumes it."""

    exit_code = ExitCode.RESUME


class PeerLostError(StoppedError):
    """Another rank is gone: the same command resumes all of them from the last checkpoint."""


# What the file system says of a file, as opposed to a bug in the use of a descriptor or socket.
_OF_FILES = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOENT,
    errno.ENOTDIR, errno.EISDIR, errno.EFBIG, errno.ENODEV, errno.ENXIO, errno.ESTALE,
})  # fmt: skip


def is_disk_full(error: OSError) -> bool:
    """Whether the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_error(error: OSError, who: str) -> DiskError | None:
    """What the user is told of a file that cannot be used; None if error is not about a file.

    Args:
        error: As raised.
        who: Did it: 'the writer'.
    """
    if error.errno not in _OF_FILES:
        return None
    file = f" {error.filename}" if error.filename else ""
    full = is_disk_full(error)
    remedy = "free some space" if full else "see that the folder is there and may be written"
    return DiskError(
        f"{who} cannot use the disk:{file} {error.strerror}",
        f"{remedy}; the same command then goes on where it ended",
    )
