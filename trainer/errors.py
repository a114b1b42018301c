"""The trainer's own errors.

Runs in: trainer. Pure, and without mlx, which may be imported only after the BLAS.
"""

from __future__ import annotations

from typing import Any

from pipeline.errors import ExitCode, FinewebError


class BadUpdatesError(FinewebError):
    """Too many updates in a row were skipped.

    Args:
        what: That happened.
        facts: Of the last one's batches, as they were given to Loop.update.
    """

    exit_code = ExitCode.USAGE  # starting again as it is does not help

    def __init__(self, what: str, facts: dict[str, Any]) -> None:
        super().__init__(
            what,
            "lower the learning rate or lengthen the warm-up, and resume from the last checkpoint",
        )
        self.facts = facts
