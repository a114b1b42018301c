"""One socket, many messages: framing, for workers (blocking) and supervisor (never blocking).

Runs in: every process. A frame is a little-endian uint32 length and one msgpack message.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable

import msgspec

from pipeline.faults import faultpoint
from pipeline.messages import ALL, Message, Working

_LENGTH = struct.Struct("<I")
_MAX_FRAME_BYTES = 64 << 20
_RECV_BYTES = 1 << 18
_WORKING_S = 1.0
_NO_MESSAGE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(__import__("typing").Union[ALL]).decode


class ClosedError(Exception):
    """The other side has closed the socket, or died."""


class Frames:
    """Cuts received bytes into messages; a torn last frame is never delivered. Pure.

    damaged: the bytes are no messages from here on: whoever sends them must be given up.

    Args:
        decode: Makes a message of a payload.
    """

    def __init__(self, decode: Callable[[bytes], Message] = _decode) -> None:
        self._decode = decode
        self._buffer = bytearray()
        self.damaged = False

    def feed(self, data: bytes) -> list[Message]:
        """Add received bytes and return the messages that are now whole, in order."""
        buffer, messages, at = self._buffer, [], 0
        buffer += data
        while len(buffer) - at >= _LENGTH.size and not self.damaged:
            (size,) = _LENGTH.unpack_from(buffer, at)
            if size > _MAX_FRAME_BYTES:
                self.damaged = True
            if self.damaged or len(buffer) - at - _LENGTH.size < size:
                break
            at += _LENGTH.size
            try:
                messages.append(self._decode(bytes(memoryview(buffer)[at : at + size])))
            except _NO_MESSAGE:
                self.damaged = True
            at += size
        del buffer[:at]
        return messages


def frame(message: Message) -> bytes:
    """The bytes of one message on the wire."""
    payload = _encode(message)
    return _LENGTH.pack(len(payload)) + payload


class Channel:
    """The worker's end: blocking, and the end of the supervisor is the end of the worker.

    Runs in: workers and consumer. Not for use by several threads at once, except that one may
    send while another receives.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames = Frames()
        self._inbox: deque[Message] = deque()
        self._at_work_on: str | None = None  # the message that was received last
        self._working_at = 0.0

    def working(self) -> None:
        """Tell the supervisor, once a second at most, that a long piece of work goes on.

        To be called where the work makes progress: silence is what a hang is found by.

        Raises:
            ClosedError: the supervisor is gone.
        """
        now = time.monotonic()
        if now - self._working_at >= _WORKING_S:
            self._working_at = now
            self.send(Working())

    def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            ClosedError: the supervisor is gone.
        """
        name = type(message).__name__
        faultpoint(f"before_send:{name}")
        data = frame(message)
        try:
            with faultpoint.torn(f"mid_send:{name}", self._sock, data):
                self._sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ClosedError from error
        faultpoint(f"after_send:{name}")

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message; None when none came within timeout_s (0: do not wait at all).

        Raises:
            ClosedError: the supervisor is gone.
        """
        if self._at_work_on is not None:
            faultpoint(f"handled:{self._at_work_on}")
            self._at_work_on = None
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._inbox:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._sock], [], [], wait)[0]:
                return None
            try:
                data = self._sock.recv(_RECV_BYTES)
            except ConnectionResetError as error:
                raise ClosedError from error
            if not data:
                raise ClosedError
            self._inbox.extend(self._frames.feed(data))
            if self._frames.damaged:
                raise ClosedError
        message = self._inbox.popleft()
        self._at_work_on = type(message).__name__
        faultpoint(f"received:{self._at_work_on}")
        return message


class SupervisorChannel:
    """The supervisor's end: sends are queued and never block, receives take what is there.

    Runs in: supervisor.

    Args:
        sock: Connected.
        decode: See Frames.
    """

    def __init__(self, sock: socket.socket, decode: Callable[[bytes], Message] = _decode) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._frames = Frames(decode)
        self._outbox = bytearray()

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether queued bytes wait for the socket to take them."""
        return bool(self._outbox)

    def send(self, message: Message) -> None:
        """Queue a message and send what the socket takes now. A dead peer is not an error here:
        its EOF is what counts."""
        name = type(message).__name__
        faultpoint(f"before_send:{name}")
        data = frame(message)
        with faultpoint.torn(f"mid_send:{name}", self.sock, data):
            self._outbox += data
            self.flush()
        faultpoint(f"after_send:{name}")

    def flush(self) -> None:
        """Send queued bytes as far as the socket takes them."""
        with contextlib.suppress(BlockingIOError):
            try:
                while self._outbox:
                    del self._outbox[: self.sock.send(self._outbox)]
            except (BrokenPipeError, ConnectionResetError, TimeoutError):
                self._outbox.clear()

    def receive(self) -> tuple[list[Message], bool]:
        """All messages that have arrived, and whether the peer is gone (EOF or reset).

        A peer that is gone has had everything it sent drained; a torn last record is dropped. One
        that sends what is no message is as good as gone.
        """
        messages: list[Message] = []
        while True:
            try:
                data = self.sock.recv(_RECV_BYTES)
            except BlockingIOError:
                return messages, False
            except (ConnectionResetError, TimeoutError):
                return messages, True
            if not data:
                return messages, True
            messages += self._frames.feed(data)
            if self._frames.damaged:
                return messages, True

    def close(self) -> None:
        self.sock.close()
