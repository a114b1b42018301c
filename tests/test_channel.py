"""Frames and sockets: every message arrives once and whole, or not at all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.channel import Channel, ClosedError, Frames, SupervisorChannel, frame
from pipeline.faults import FaultPoint
from pipeline.messages import (
    ALL,
    BadRecord,
    BlockFilled,
    Counts,
    Cursor,
    CursorIs,
    Encoded,
    Hello,
    LaneCursor,
    Message,
    Skip,
    SlotReleased,
)

MESSAGES: list[Message] = [
    Hello("fetcher", 7),
    SlotReleased(3, 1 << 40),
    Encoded(1, 2, 2**64 - 1, 0.25),
    BlockFilled(0, 1, 2, 3, 4, 5, (BadRecord("line 1", "no text"),)),
    CursorIs(
        1,
        Cursor(
            "f",
            {"a": "b"},
            (LaneCursor(1, 2, 3, 4),),
            Counts(1, 2, 3, 4),
            (Skip(0, 1, 2, True, "why"),),
        ),
    ),
]


@given(st.lists(st.sampled_from(MESSAGES), max_size=20), st.data())
def test_frames_survive_any_cut(messages: list[Message], data: st.DataObject) -> None:
    wire = b"".join(map(frame, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=10)))
    frames, got = Frames(), []
    for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        got += frames.feed(wire[a:b])
    assert got == messages


def test_a_torn_last_record_is_dropped() -> None:
    ours, theirs = socket.socketpair()
    supervisor = SupervisorChannel(ours)
    wire = frame(MESSAGES[0]) + frame(MESSAGES[4])
    theirs.sendall(wire[:-1])
    theirs.close()
    messages, gone = supervisor.receive()
    assert (messages, gone) == ([MESSAGES[0]], True)


def test_every_message_has_its_own_tag() -> None:
    assert len({cls.__struct_config__.tag for cls in ALL}) == len(ALL) > 20


def test_a_supervisor_never_blocks_on_a_worker_that_does_not_read() -> None:
    ours, theirs = socket.socketpair()
    supervisor, worker = SupervisorChannel(ours), Channel(theirs)
    for n in range(20_000):
        supervisor.send(SlotReleased(0, n))
    assert supervisor.wants_write
    for n in range(20_000):
        assert worker.receive(5) == SlotReleased(0, n)
        supervisor.flush()
    assert not supervisor.wants_write


def test_the_workers_end_reports_the_supervisors_death() -> None:
    ours, theirs = socket.socketpair()
    worker = Channel(theirs)
    assert worker.receive(0) is None
    ours.close()
    with pytest.raises(ClosedError):
        worker.receive()
    with pytest.raises(ClosedError):
        for _ in range(1000):
            worker.send(MESSAGES[4])


def test_a_child_ends_with_its_supervisor_even_when_it_is_busy() -> None:
    """A worker in a system call or a long computation ends within a second of the hang-up."""
    ours, theirs = socket.socketpair()
    code = (
        "import sys, pipeline.child as c, types;"
        "m = types.ModuleType('busy');"
        "m.main = lambda channel, fds: [channel.send(c.Hello(role='up', pid=0)),"
        " sum(i for i in range(10**12))];"
        "sys.modules['busy'] = m; c.ROLES['fetcher'] = 'busy';"
        f"sys.argv = ['x', 'fetcher', '{theirs.fileno()}', '-1', '-1']; c.main()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()])
    theirs.close()
    channel = Channel(ours)
    assert isinstance(channel.receive(20), Hello)
    assert isinstance(channel.receive(20), Hello)
    ours.close()
    assert child.wait(2) == 0


def test_a_faultpoint_kills_once_and_leaves_its_mark(tmp_path: Path) -> None:
    latch = tmp_path / "fired"
    code = (
        "from pipeline.faults import faultpoint; faultpoint.role = 'tokenizer'\n"
        "for n in range(3): faultpoint('here'); print(n, flush=True)"
    )
    environment = os.environ | {"FINEWEB_FAULT": f"kill:tokenizer:here:2:{latch}"}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        for _ in range(2)
    )
    assert first.returncode == -signal.SIGKILL
    assert first.stdout == "0\n"
    assert latch.read_text().startswith("tokenizer ")
    assert (second.returncode, second.stdout) == (0, "0\n1\n2\n")


def test_faults_of_another_role_do_not_fire(tmp_path: Path) -> None:
    point = FaultPoint(f"kill:writer:before_send:Hello:1:{tmp_path / 'no'}")
    point.role = "fetcher"
    point("before_send:Hello")
    assert not (tmp_path / "no").exists()
