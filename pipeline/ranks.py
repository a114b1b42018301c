"""Which part of a run is ours: the rank, its lanes, and cursors of all lanes or of some.

Runs in: supervisor (its lanes), trainer (whole cursors), launcher. Pure.

Rank r of R owns the lanes r, r + R, r + 2R …, so R divides the lanes. Its pipeline numbers them
0, 1, 2 …; outside it a lane has its number of the whole stream. A checkpoint holds the cursor of
all lanes, so any R can go on from it. Counts of what lies before a cursor are rank 0's to carry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from pipeline.errors import ConfigError
from pipeline.lanes import Lanes, Turn
from pipeline.messages import Counts, Cursor

_MEETING_PORT = 1000  # above the port that a launcher gave rank 0 for the gradients
_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")


class Rank(msgspec.Struct, frozen=True):
    """One of the processes groups that make up a run; the only one, unless said otherwise.

    meeting: host:port where rank 0's supervisor waits for the others. key: what they show there.
    """

    number: int = 0
    size: int = 1
    meeting: str = ""
    key: str = ""


def of_environment(environ: Mapping[str, str], meeting: str | None) -> Rank:
    """What a launcher (mlx.launch, mpirun) says in the environment that MLX reads.

    Args:
        environ: The environment.
        meeting: The configuration's ranks.meeting, which goes first.

    Raises:
        ConfigError: several ranks, and nothing says where they meet.
    """
    number, size, address = _said(environ)
    if size == 1:
        return Rank()
    if meeting is None and not address:
        raise ConfigError(
            f"this is rank {number} of {size}, and nothing says where the ranks meet",
            "set ranks.meeting (FINEWEB_RANKS_MEETING) to HOST:PORT of rank 0's host",
        )
    if meeting is None:
        host, _, port = address.rpartition(":")
        meeting = f"{host}:{int(port) + _MEETING_PORT}"
    return Rank(number, size, meeting)


def _said(environ: Mapping[str, str]) -> tuple[int, int, str]:
    """Rank, size, and an address of rank 0's host, if that is said."""
    if _MPI[0] in environ:
        return int(environ[_MPI[0]]), int(environ[_MPI[1]]), ""
    if "MLX_RANK" not in environ:
        return 0, 1, ""
    number = int(environ["MLX_RANK"])
    if "MLX_WORLD_SIZE" in environ:  # NCCL
        address = f"{environ.get('NCCL_HOST_IP', '')}:{environ.get('NCCL_PORT', '0')}"
        return number, int(environ["MLX_WORLD_SIZE"]), address
    for name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES"):  # ring, JACCL
        text = Path(environ[name]).read_text() if environ.get(name) else ""
        if text.strip():
            hosts = json.loads(text)
            return number, len(hosts), environ.get("MLX_JACCL_COORDINATOR") or hosts[0][0]
    return 0, 1, ""


class Share:
    """A rank's lanes.

    Args:
        lanes: Of the whole stream.
        rank: Whose.

    Raises:
        ConfigError: the lanes cannot be shared evenly; names numbers of ranks that can.
    """

    def __init__(self, lanes: int, rank: Rank) -> None:
        if lanes % rank.size:
            able = [size for size in range(1, lanes + 1) if lanes % size == 0]
            more = f"{-(-lanes // rank.size) * rank.size} lanes (--lanes, and as many shards)"
            raise ConfigError(
                f"{rank.size} ranks cannot share {lanes} lanes evenly",
                f"take {', '.join(map(str, able))} ranks, or {more} in a new run",
            )
        self._rank = rank
        self.lanes = range(rank.number, lanes, rank.size)

    def cursor(self, whole: Cursor) -> Cursor:
        """The part of a cursor that says where our lanes stand, by our numbers."""
        ours = {lane: number for number, lane in enumerate(self.lanes)}
        return msgspec.structs.replace(
            whole,
            lanes=tuple(whole.lanes[lane] for lane in self.lanes),
            counts=whole.counts if self._rank.number == 0 else Counts(),
            skips=tuple(
                msgspec.structs.replace(skip, lane=ours[skip.lane])
                for skip in whole.skips
                if skip.lane in ours
            ),
        )

    def plan(self, lanes: Lanes) -> Lanes:
        """The shards of our lanes, by our numbers."""
        return _Ours(lanes, self.lanes)


class _Ours:
    def __init__(self, whole: Lanes, ours: range) -> None:
        self._whole, self._ours = whole, ours
        self.lanes = len(ours)

    @property
    def endless(self) -> bool:
        return self._whole.endless

    def turn(self, lane: int, sequence: int) -> Turn | None:
        return self._whole.turn(self._ours[lane], sequence)


def merged(parts: Sequence[Cursor]) -> Cursor:
    """The cursor of all lanes from those of all ranks, in their order."""
    size = len(parts)
    count = sum(len(part.lanes) for part in parts)
    return msgspec.structs.replace(
        parts[0],
        lanes=tuple(parts[lane % size].lanes[lane // size] for lane in range(count)),
        counts=Counts(
            *(sum(ones) for ones in zip(*(_numbers(part.counts) for part in parts), strict=True))
        ),
        skips=tuple(
            msgspec.structs.replace(skip, lane=skip.lane * size + number)
            for number, part in enumerate(parts)
            for skip in part.skips
        ),
    )


def _numbers(counts: Counts) -> tuple[int, ...]:
    return msgspec.structs.astuple(counts)
