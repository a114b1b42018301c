"""What limits a run, in words, from what was measured: 'tokenizers limit: add 2 (6 idle cores)'.

Runs in: supervisor. Pure.

Two things are measured: the share of its time that the trainer waits for data (its own clock),
and, four times a second, the stage that the emptiest lane waits for (Scheduler.limiting).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from math import ceil

import msgspec

from pipeline.status import StageStatus

CONSUMER = "consumer"
_NO_WAIT = 0.01  # a trainer that waits less than this is what limits
_AT_WORK = 0.7  # workers of a stage that limits are busy this share of their time, or starve
_WORKERS = {"fetch": "fetchers", "decompress": "decompressors", "tokenize": "tokenizers"}


class Evidence(msgspec.Struct, frozen=True):
    """What was seen over some time."""

    kind: str  # train or tokenize
    wait_share: float | None  # of the trainer's time, on data; None: not known yet
    limiting: Mapping[str, float]  # how often each stage, or the consumer, was what is waited for
    stages: Sequence[StageStatus] = ()
    idle_cores: float | None = None  # of those that this run may use; None: cannot be told
    cpus: int = 1


def verdict(seen: Evidence) -> str:
    """The words."""
    stages = {name: share for name, share in seen.limiting.items() if name != CONSUMER}
    worst = max(stages, key=lambda name: stages[name], default=None)
    if seen.kind == "train":
        wait = seen.wait_share
        if wait is None:
            return "waiting for the first update"
        if wait < _NO_WAIT:
            return f"trainer-bound: data waits {100 * wait:.1f} %"
        if worst is None:  # the waits are of updates that lie further back than what was seen
            return f"trainer-bound now; before, the trainer waited {100 * wait:.1f} %"
        return f"{_said(worst, wait, seen)}; the trainer waits {100 * wait:.1f} %"
    if worst is None or seen.limiting.get(CONSUMER, 0.0) > sum(stages.values()):
        return "writer-bound: the disk that is written to limits"
    return _said(worst, None, seen)


def _said(name: str, wait: float | None, seen: Evidence) -> str:
    """What is to be done about a stage that limits.

    With n workers that are all at work the trainer is busy 1 − wait of its time; it never waits
    with n / (1 − wait) of them.
    """
    stage = next((one for one in seen.stages if one.name == name), None)
    workers = _WORKERS[name]
    if stage is None:
        return f"{workers} limit"
    if name == "fetch":
        if stage.busy < _AT_WORK:
            rest = 100 * (1 - stage.busy)
            return f"shards come late, fetchers idle {rest:.0f} %: raise --max-disk or --prefetch"
        return f"{workers} limit: a faster source, or --fetchers {2 * stage.workers}"
    idle = seen.idle_cores
    if idle is None:
        return f"{workers} limit"
    wanted = ceil(idle) if wait is None else ceil(stage.workers * wait / max(1e-3, 1 - wait))
    more = min(wanted, int(idle + 0.25))  # three quarters of a core are worth a worker
    if more < 1:
        return f"{workers} limit: all {seen.cpus} cores are busy"
    cores = "core" if int(idle + 0.25) == 1 else "cores"
    return f"{workers} limit: add {more} ({int(idle + 0.25)} idle {cores})"


class Witness:
    """Gathers evidence: of the last seconds, and of the whole run.

    Args:
        kind: train or tokenize.
        cpus: That the run may use.
    """

    def __init__(self, kind: str, cpus: int) -> None:
        self._kind, self._cpus = kind, cpus
        self._seen: deque[str] = deque(maxlen=40)  # ten seconds
        self._all: Counter[str] = Counter()
        self._updates: deque[tuple[float, float]] = deque(maxlen=16)
        self._waited_s = self._update_s = 0.0

    def saw(self, limiting: str) -> None:
        """A quarter of a second has passed, and this was what is waited for."""
        self._seen.append(limiting)
        self._all[limiting] += 1

    def update(self, step_s: float, wait_share: float) -> None:
        """An update took so long, and waited for data for this share of it."""
        waited_s = step_s * wait_share
        self._updates.append((step_s, waited_s))
        self._waited_s, self._update_s = self._waited_s + waited_s, self._update_s + step_s

    @property
    def wait_share(self) -> float | None:
        """Of the whole run."""
        return self._waited_s / self._update_s if self._update_s else None

    def now(self, stages: Sequence[StageStatus], idle_cores: float | None) -> str:
        """The verdict on the last seconds."""
        spent_s = sum(step_s for step_s, _ in self._updates)
        waited_s = sum(waited_s for _, waited_s in self._updates)
        wait = waited_s / spent_s if spent_s else None
        return self._verdict(Counter(self._seen), wait, stages, idle_cores)

    def whole(self, stages: Sequence[StageStatus], idle_cores: float | None) -> str:
        """The verdict on the whole run."""
        return self._verdict(self._all, self.wait_share, stages, idle_cores)

    def _verdict(
        self,
        counts: Mapping[str, int],
        wait: float | None,
        stages: Sequence[StageStatus],
        idle_cores: float | None,
    ) -> str:
        total = max(1, sum(counts.values()))
        shares = {name: count / total for name, count in counts.items()}
        return verdict(Evidence(self._kind, wait, shares, stages, idle_cores, self._cpus))
