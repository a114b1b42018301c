"""Small things that are dear to find out and stay true: kept in the user's cache folder.

Runs in: every process but fetchers. Whatever stands there can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


def folder() -> Path:
    """XDG_CACHE_HOME or the system's own place, below which everything of ours lies."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "fineweb-pipeline"
    home = Path.home()
    caches = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    return caches / "fineweb-pipeline"


def keep(path: Path, data: bytes) -> None:
    """Write a file at once or not at all; a folder that cannot be written costs time only."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(data)
        partial.replace(path)
