"""Process: supervisor. Runs one job from a JSON file, for tests that kill it or set odd sizes.

python -m tests.drive JOB.json        prints the outcome as one JSON line
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

from pipeline import supervisor
from pipeline.errors import FinewebError
from pipeline.status import Status


class LineView:
    """Events as JSON lines on standard error, and the largest disk use that was reported."""

    def update(self, status: Status) -> None:
        pass

    def event(self, level: str, event: str, **fields: Any) -> None:
        line = msgspec.json.encode({"event": event, **fields}, enc_hook=str)
        sys.stderr.buffer.write(line + b"\n")
        sys.stderr.flush()

    def close(self) -> None:
        pass


def main() -> int:
    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=supervisor.Job)
    try:
        outcome = supervisor.run(job, LineView())
    except FinewebError as error:
        print(msgspec.json.encode({"what": error.what, "remedy": error.remedy}).decode())
        return int(error.exit_code)
    print(msgspec.json.encode(outcome).decode(), flush=True)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
