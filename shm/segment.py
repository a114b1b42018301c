"""Anonymous shared memory: a descriptor that is mapped, and never a name that can leak.

Runs in: supervisor (create), workers and consumer (map a descriptor they were given).
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import sys


def create(size_bytes: int) -> int:
    """Make a segment of zeros and return its descriptor; it has no name that outlives this call.

    Every page is allocated now: memory that is not there is an error here and not a SIGBUS later.

    Raises:
        OSError: ENOMEM or ENOSPC where the machine cannot give that much.
    """
    fd = os.memfd_create("fineweb", os.MFD_CLOEXEC) if sys.platform == "linux" else _unnamed()
    try:
        os.ftruncate(fd, size_bytes)
        if sys.platform == "linux":
            os.posix_fallocate(fd, 0, size_bytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def _unnamed() -> int:
    """macOS: POSIX shared memory, unlinked before anybody else can see it."""
    import _posixshmem  # type: ignore[import-not-found]  # CPython's own module behind multiprocessing.shared_memory

    for _ in range(16):
        name = f"/fw-{secrets.token_hex(8)}"  # 20 characters; macOS allows 31
        try:
            fd = _posixshmem.shm_open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode=0o600)
        except FileExistsError:
            continue
        _posixshmem.shm_unlink(name)
        return int(fd)
    raise FileExistsError(errno.EEXIST, "no free shared-memory name")


def attach(fd: int, size_bytes: int, *, writable: bool) -> mmap.mmap:
    """Map a segment. The mapping outlives the descriptor, which may be closed."""
    return mmap.mmap(fd, size_bytes, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
