"""The status server of a run, if the configuration asks for one: started, watched, ended.

Runs in: supervisor.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import spawn, web

if TYPE_CHECKING:
    from pipeline.supervisor import Job


class Serving:
    """A status server that runs, or None.

    Args:
        process: It.
        url: Where it answers.
    """

    def __init__(self, process: subprocess.Popen[bytes] | None, url: str | None) -> None:
        self._process, self.url = process, url

    def check(self, event: Callable[..., None]) -> None:
        """Say it once if the server has died: the run goes on without."""
        if self._process is not None and (code := self._process.poll()) is not None:
            self._process, self.url = None, None
            event("warning", "status_server_ended", exit_code=code)

    def close(self) -> None:
        """End it."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.kill()
            self._process.wait()


@contextmanager
def of(job: Job) -> Iterator[Serving]:
    """The server of a job for the length of the block. Raises: ConfigError, the port is taken."""
    log = job.config.logging
    if log.http_port is None:
        yield Serving(None, None)
        return
    with web.listen(log.http_host, log.http_port) as listening:
        process = spawn.start_status_server(Path(job.run_dir), listening)
        serving = Serving(process, web.address(listening))
    try:
        yield serving
    finally:
        serving.close()
