"""Where the supervisors of several ranks meet: rounds that all take part in, and who is gone.

Runs in: supervisor.

    rank r → rank 0    RankHere · RankSays · RankStops · RankLeaves
    rank 0 → rank r    RanksSaid · RankStops · RankLeaves

Rank 0 listens, the others connect and stay connected. MLX's ring hangs when a process dies, so
each rank's supervisor watches these connections: a dead process is an end of file at once, a dead
host one that the kernel finds (keepalive) within ranks.timeout_s. What is lost is the update under
way. A run of one rank meets nobody, by the same code.
"""

from __future__ import annotations

import hmac
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Union

import msgspec

from pipeline import config
from pipeline.channel import SupervisorChannel
from pipeline.errors import ConfigError, FinewebError, PeerLostError, StoppedError
from pipeline.messages import Cursor, Message
from pipeline.ranks import Rank

_POLL_S = 0.1
_RESUME = "the same command goes on from the last checkpoint, with as many ranks or fewer"


class RankHere(Message):
    """First message of another rank's supervisor."""

    rank: int
    size: int
    key: str
    host: str


class RankSays(Message):
    """A rank's part of a round."""

    rank: int
    round: int
    data: bytes


class RanksSaid(Message):
    """All ranks' parts of a round, in their order, and the names of their hosts."""

    round: int
    data: tuple[bytes, ...]
    hosts: tuple[str, ...]


class RankStops(Message):
    """A rank has been asked to stop, or has to: all do."""

    rank: int


class RankLeaves(Message):
    """A rank ends. settled: its trainer has finished, nobody waits for it any more."""

    rank: int
    settled: bool
    why: str


_ALL = (RankHere, RankSays, RanksSaid, RankStops, RankLeaves)
_decode = msgspec.msgpack.Decoder(Union[_ALL]).decode  # noqa: UP007


class Meeting:
    """One rank's end.

    Args:
        rank: Whose.
        waits: How long the others are waited for, and how long a silent host is.
        stop_requested: Whether this rank has been asked to stop: ends any waiting.
    """

    def __init__(self, rank: Rank, waits: config.Ranks, stop_requested: Callable[[], int]) -> None:
        self.rank, self._waits, self._stop_requested = rank, waits, stop_requested
        self.hosts: tuple[str, ...] = (socket.gethostname(),)
        self.stopping = False  # another rank has said that all stop
        self._said_stopping = False
        self._peers: dict[int, SupervisorChannel] = {}
        self._parts: dict[int, dict[int, bytes]] = {}  # round → rank → data
        self._whole: dict[int, RanksSaid] = {}
        self._round = 0
        self._settled: set[int] = set()

    @property
    def on_this_host(self) -> int:
        """Ranks that share this machine's disk and processors with us, we included."""
        return self.hosts.count(self.hosts[self.rank.number]) if len(self.hosts) > 1 else 1

    # ── coming together ─────────────────────────────────────────────────────────────────────

    def open(self) -> None:
        """Connect everybody.

        Raises:
            PeerLostError: somebody did not come in time.
            ConfigError: the address is no address, or cannot be listened on.
        """
        if self.rank.size == 1:
            return
        host, _, port = self.rank.meeting.rpartition(":")
        address = host.strip("[]"), int(port)
        deadline = time.monotonic() + self._waits.start_s
        if self.rank.number:
            self._peers[0] = self._connect(address, deadline)
            own = socket.gethostname()
            self._peers[0].send(RankHere(self.rank.number, self.rank.size, self.rank.key, own))
        else:
            self._listen(address, deadline)
        self.gather(b"")

    def _connect(self, address: tuple[str, int], deadline: float) -> SupervisorChannel:
        while True:
            try:
                return self._channel(socket.create_connection(address, timeout=5.0))
            except OSError as error:
                self._refuse_to_wait(
                    deadline, f"rank 0 does not answer at {self.rank.meeting}: {error}"
                )
                time.sleep(_POLL_S)

    def _listen(self, address: tuple[str, int], deadline: float) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            listening = socket.create_server(address, family=family, backlog=self.rank.size)
        except OSError as error:
            raise ConfigError(
                f"the ranks cannot meet at {self.rank.meeting}: {error}",
                "set ranks.meeting to HOST:PORT, an address of this host and a free port",
            ) from error
        names = [socket.gethostname()] * self.rank.size
        with listening:
            listening.settimeout(_POLL_S)
            while len(self._peers) < self.rank.size - 1:
                missing = sorted(set(range(1, self.rank.size)) - set(self._peers))
                who = ", ".join(map(str, missing))
                self._refuse_to_wait(deadline, f"not all ranks have come, these are missing: {who}")
                try:
                    found = self._admit(listening.accept()[0])
                except TimeoutError:
                    continue
                if found is not None:
                    here, channel = found
                    names[here.rank] = here.host
                    self._peers[here.rank] = channel
        self.hosts = tuple(names)

    def _admit(self, sock: socket.socket) -> tuple[RankHere, SupervisorChannel] | None:
        """The rank at the other end; None for a stranger, or for one that says nothing."""
        channel, until = self._channel(sock), time.monotonic() + 5.0
        messages: list[Message] = []
        gone = False
        while not messages and not gone and time.monotonic() < until:
            select.select([sock], [], [], _POLL_S)
            messages, gone = channel.receive()
        here = messages[0] if messages else None
        if (
            isinstance(here, RankHere)
            and here.size == self.rank.size
            and 0 < here.rank < self.rank.size
            and here.rank not in self._peers
            and hmac.compare_digest(here.key.encode(), self.rank.key.encode())
        ):
            for message in messages[1:]:
                self._take(here.rank, message)
            return here, channel
        channel.close()
        return None

    def _channel(self, sock: socket.socket) -> SupervisorChannel:
        """With the kernel looking for the other host all the time."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        third = max(1, int(self._waits.timeout_s / 3))
        idle = getattr(socket, "TCP_KEEPIDLE", None) or socket.TCP_KEEPALIVE  # type: ignore[attr-defined]
        for option, value in ((idle, third), (socket.TCP_KEEPINTVL, third),
                              (socket.TCP_KEEPCNT, 2)):  # fmt: skip
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: also with bytes under way
            ms = int(1000 * self._waits.timeout_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, ms)
        return SupervisorChannel(sock, _decode)

    def _refuse_to_wait(self, deadline: float, what: str) -> None:
        if self._stop_requested():
            raise StoppedError("stopped while waiting for the other ranks", _RESUME)
        if time.monotonic() > deadline:
            raise PeerLostError(f"{what} ({self._waits.start_s:.0f} s, ranks.start_s)", _RESUME)

    # ── rounds ──────────────────────────────────────────────────────────────────────────────

    def gather(self, mine: bytes) -> tuple[bytes, ...]:
        """Every rank's part, in their order, once all have given theirs.

        Raises:
            PeerLostError: one is gone.
            StoppedError: this rank has been asked to stop.
        """
        self._round += 1
        self._take(self.rank.number, RankSays(self.rank.number, self._round, mine))
        if self.rank.number:
            self._peers[0].send(RankSays(self.rank.number, self._round, mine))
        while self._round not in self._whole:
            self._refuse_to_wait(float("inf"), "")
            select.select([peer.sock for peer in self._peers.values()], [], [], _POLL_S)
            self.check()
        said = self._whole.pop(self._round)
        self.hosts = said.hosts
        return said.data

    def check(self) -> None:
        """Take what has come, without waiting.

        Raises:
            PeerLostError: a rank is gone that has not finished; says which.
        """
        for number, peer in list(self._peers.items()):
            peer.flush()
            messages, gone = peer.receive()
            for message in messages:
                self._take(number, message)
            if gone:
                del self._peers[number]
                peer.close()
                if number not in self._settled:
                    self._lost(number, "its connection is closed")

    def _take(self, number: int, message: Message) -> None:
        match message:
            case RankSays(rank=rank, round=turn, data=data) if not self.rank.number:
                parts = self._parts.setdefault(turn, {})
                parts[rank] = data
                if len(parts) == self.rank.size:
                    ordered = tuple(data for _, data in sorted(self._parts.pop(turn).items()))
                    said = RanksSaid(turn, ordered, self.hosts)
                    self._whole[turn] = said
                    self._tell(said)
            case RanksSaid(round=turn):
                self._whole[turn] = message
            case RankStops():
                self.stopping = True
                if not self.rank.number:
                    self._tell(message)
            case RankLeaves(rank=rank, settled=settled, why=why):
                self._settled.add(number)
                if not settled:
                    self._lost(rank, why)

    def _lost(self, number: int, why: str) -> None:
        if not self.rank.number:
            self._tell(RankLeaves(number, False, why))
        name = f" ({self.hosts[number]})" if len(self.hosts) > number else ""
        raise PeerLostError(f"rank {number}{name} is gone: {why}", _RESUME)

    def _tell(self, message: Message) -> None:
        for peer in self._peers.values():
            peer.send(message)

    # ── the end ─────────────────────────────────────────────────────────────────────────────

    def stop_all(self) -> None:
        """Tell the others, once, that this rank stops: none of them waits for data then."""
        if not self._said_stopping:
            self._said_stopping = True
            self._tell(RankStops(self.rank.number))

    def explained(self, error: StoppedError) -> StoppedError:
        """The same error, or the one that says which rank was lost, if that shows soon."""
        until = time.monotonic() + 2.0
        while self._peers and time.monotonic() < until:
            try:
                self.check()
            except PeerLostError as better:
                return better
            time.sleep(0.05)
        return error

    def leave(self, *, settled: bool, why: str = "") -> None:
        """Say that this rank ends, and close everything."""
        self._tell(RankLeaves(self.rank.number, settled, why))
        until = time.monotonic() + 1.0
        while any(peer.wants_write for peer in self._peers.values()) and time.monotonic() < until:
            for peer in self._peers.values():
                peer.flush()
            time.sleep(0.01)
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()


@contextmanager
def of(rank: Rank, waits: config.Ranks, stop_requested: Callable[[], int]) -> Iterator[Meeting]:
    """The meeting of a run, for the length of the block; how the block ends is what the others
    are told, unless the run has said so itself."""
    meeting = Meeting(rank, waits, stop_requested)
    try:
        meeting.open()
        yield meeting
    except FinewebError as error:
        meeting.leave(settled=False, why=error.what)
        raise
    finally:
        meeting.leave(settled=False, why="it failed")


def agreed(
    others: Meeting, one: config.Config, stream: dict[str, str], cursor: Cursor | None
) -> Cursor | None:
    """Rank 0's cursor (None: it begins at the beginning), once all ranks are ready to begin.

    Args:
        others: The meeting.
        one: This rank's configuration.
        stream: Its identity of the stream.
        cursor: Of its own checkpoint, if it has one.

    Raises:
        ConfigError: this rank would train something else; says what differs.
    """
    plain = config.to_plain(one)
    settings = {
        "model": plain["model"],
        "training": plain["training"],
        "data.preprocessing": plain["data"]["preprocessing"],
        "logging.steps": plain["logging"]["steps"],
        "system.seed": plain["system"]["seed"],
        "ranks.gradients": plain["ranks"]["gradients"],
        "the stream": stream,
    }
    ours = {key: msgspec.json.encode(value) for key, value in settings.items()}
    first, *_ = others.gather(msgspec.msgpack.encode((ours, cursor)))
    theirs, found = msgspec.msgpack.decode(first, type=tuple[dict[str, bytes], Cursor | None])
    if differing := [key for key in ours if theirs.get(key) != ours[key]]:
        raise ConfigError(
            f"rank {others.rank.number} has another configuration than rank 0: "
            f"{', '.join(differing)}",
            "start all ranks with the same options, files and shards",
        )
    return found
