"""Process: writer. The consumer of `tokenize`: the ring's tokens into files of llm.c's form.

A file is 256 int32 (magic, version, number of tokens, zeros) and the tokens, little-endian:
magic 20240520, version 1 with uint16; magic 20240801, version 7 with uint32. The file being
written is `tokens_000000.bin.partial` until it is whole.

Several lanes are written in the order that a trainer would read them: T tokens of each in turn.
Every few seconds what was written is made durable and writer.json says how far it goes, so that
a run that was killed goes on at that token.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import BinaryIO

import msgspec
import numpy as np

from pipeline import durable
from pipeline.channel import Channel
from pipeline.child import Descriptors
from pipeline.errors import ShardError
from pipeline.faults import faultpoint
from pipeline.messages import (
    ConsumerDone,
    ConsumerReady,
    Cursor,
    CursorIs,
    CursorWanted,
    LaneEnded,
    SlotPublished,
    SlotReleased,
    StepDone,
    Stop,
    WriterSetup,
)
from shm import ring, segment

STATE_FILE = "writer.json"
HEADER_BYTES = 256 * 4
_FORMATS = {2: (20240520, 1), 4: (20240801, 7)}
_HASH_BYTES = 1 << 22
_REPORT_S = 0.5


class WriterState(msgspec.Struct, frozen=True):
    """What writer.json holds: the tokens before cursor are in the files."""

    cursor: Cursor
    tokens: int
    documents: int
    complete: bool


def read_state(out_dir: Path) -> WriterState | None:
    """The state of an earlier run in this folder, or None. Runs in: supervisor, writer.

    Raises:
        ShardError: its file cannot be read.
    """
    path = out_dir / STATE_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=WriterState)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ShardError(f"{path} is damaged: {error}", "start over with --fresh") from error


def file_name(index: int) -> str:
    """Of a whole file."""
    return f"tokens_{index:06d}.bin"


def read_tokens(path: Path) -> np.ndarray:
    """The tokens of a whole file, shape (n,), uint16 or uint32. Runs in: trainer, benchmarks."""
    magic = int(np.fromfile(path, "<i4", 1)[0])
    width = next(width for width, (known, _) in _FORMATS.items() if known == magic)
    return np.fromfile(path, f"<u{width}", offset=HEADER_BYTES)


def header(tokens: int, token_bytes: int) -> bytes:
    """The 1,024 bytes before the tokens of a file."""
    words = np.zeros(256, "<i4")
    words[:2] = _FORMATS[token_bytes]
    words[2] = tokens
    return words.tobytes()


class TokenFiles:
    """Files of file_tokens tokens each, and the sha256 over all their tokens.

    Args:
        out_dir: Folder of the files.
        token_bytes: 2 or 4.
        file_tokens: Tokens of every file but the last.
        tokens: How many tokens earlier runs have written; anything beyond is cut off.
    """

    def __init__(self, out_dir: Path, token_bytes: int, file_tokens: int, tokens: int) -> None:
        self._dir = out_dir
        self._token_bytes = token_bytes
        self._file_tokens = file_tokens
        self.tokens = 0
        self.sha256 = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._restore(tokens)

    def _path(self, index: int, partial: bool = False) -> Path:
        return self._dir / f"{file_name(index)}{'.partial' if partial else ''}"

    def _restore(self, tokens: int) -> None:
        """Hash what is there, cut what goes beyond, and open the file that is not full."""
        whole, rest = divmod(tokens, self._file_tokens)
        for index in range(whole):
            self._hash(self._path(index), self._file_tokens)
        for path in self._dir.glob("tokens_*.bin*"):
            index = int(path.name[7:13])
            if index > whole or (index == whole and rest == 0):
                path.unlink()
        if rest:
            done, partial = self._path(whole), self._path(whole, partial=True)
            if done.exists():
                done.rename(partial)
            self._hash(partial, rest)
            self._file = partial.open("r+b")
            self._file.truncate(HEADER_BYTES + rest * self._token_bytes)
            self._file.seek(0, os.SEEK_END)
        self.tokens = tokens

    def _hash(self, path: Path, tokens: int) -> None:
        left = tokens * self._token_bytes
        with path.open("rb") as file:
            file.seek(HEADER_BYTES)
            while left and (data := file.read(min(left, _HASH_BYTES))):
                self.sha256.update(data)
                left -= len(data)
        if left:
            raise EOFError(f"{path} is {left} bytes shorter than {STATE_FILE} says")

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, shape (n,)."""
        done = 0
        while done < len(tokens):
            if self._file is None:
                self._file = self._path(self.tokens // self._file_tokens, True).open("wb")
                self._file.write(header(0, self._token_bytes))
            take = min(len(tokens) - done, self._file_tokens - self.tokens % self._file_tokens)
            piece = np.ascontiguousarray(tokens[done : done + take])
            half = len(piece) // 2
            self._file.write(memoryview(piece[:half]).cast("B"))
            faultpoint("writer:mid_write")
            self._file.write(memoryview(piece[half:]).cast("B"))
            self.sha256.update(memoryview(piece).cast("B"))
            self.tokens += take
            done += take
            if self.tokens % self._file_tokens == 0:
                self.close()

    def sync(self) -> None:
        """Make everything written so far durable."""
        if self._file is not None:
            durable.sync(self._file)

    def close(self) -> None:
        """Finish the file that is being written: header, fsync, rename."""
        if self._file is None:
            return
        index = (self.tokens - 1) // self._file_tokens
        self._file.seek(0)
        self._file.write(header(self.tokens - index * self._file_tokens, self._token_bytes))
        self.sync()
        self._file.close()
        self._file = None
        faultpoint("writer:before_close")
        self._path(index, partial=True).rename(self._path(index))
        faultpoint("writer:after_close")


class Reader:
    """Tokens of all lanes in the trainer's order, as views of the ring.

    Args:
        channel: To the supervisor.
        tokens: The ring.
        positions: Where every lane stands.
        chunk_tokens: Tokens of a lane before the next lane's turn; slot_tokens with one lane.
    """

    def __init__(
        self, channel: Channel, tokens: ring.Ring, positions: tuple[int, ...], chunk_tokens: int
    ) -> None:
        self._channel = channel
        self._ring = tokens
        self._chunk = chunk_tokens
        self.positions = list(positions)
        self._valid = list(positions)  # tokens before this may be read
        self._ends: list[int | None] = [None] * len(positions)
        self._requests = 0
        self._cursor: CursorIs | None = None
        self.stop: Stop | None = None
        self.last_lane = 0

    def chunks(self) -> Iterator[np.ndarray]:
        """Views of the tokens, in order. positions stand behind a view when it is yielded; its
        slot is released when the next one is asked for."""
        C = self._ring.shape.slot_tokens
        turn = min(p // self._chunk for p in self.positions)
        while self.positions != self._ends:
            for lane in range(len(self.positions)):
                goal = (turn + 1) * self._chunk
                while self.positions[lane] < goal and self.positions[lane] != self._ends[lane]:
                    position = self.positions[lane]
                    if position >= self._valid[lane]:
                        self._handle(self._channel.receive())
                        if self.stop is not None:
                            return
                        continue
                    slot_end = (position // C + 1) * C
                    end = self.positions[lane] = min(goal, slot_end, self._valid[lane])
                    self.last_lane = lane
                    yield self._ring.view(lane, position, end - position)
                    if end == slot_end or end == self._ends[lane]:
                        self._channel.send(SlotReleased(lane, position // C))
                    if self.stop is not None:
                        return
            turn += 1

    def give_back(self, tokens: int) -> None:
        """The last tokens of the last view were not used."""
        self.positions[self.last_lane] -= tokens

    def poll(self) -> None:
        """Take messages that have arrived, without waiting."""
        while (message := self._channel.receive(0)) is not None:
            self._handle(message)

    def cursor(self) -> Cursor:
        """The supervisor's cursor for the current positions."""
        self._requests += 1
        self._channel.send(CursorWanted(self._requests, tuple(self.positions)))
        while self._cursor is None or self._cursor.request != self._requests:
            self._handle(self._channel.receive())
        return self._cursor.cursor

    def _handle(self, message: object) -> None:
        match message:
            case SlotPublished(lane=lane, slot=slot, end=end):
                # the halo is the next slot's first token: read there
                self._valid[lane] = min(end, (slot + 1) * self._ring.shape.slot_tokens)
            case LaneEnded(lane=lane, end=end):
                self._ends[lane] = max(end, self.positions[lane])
            case CursorIs():
                self._cursor = message
            case Stop():
                self.stop = message
            case _:
                raise TypeError(f"the writer got {message!r}")


def _save(out_dir: Path, state: WriterState) -> None:
    partial = out_dir / f"{STATE_FILE}.partial"
    with partial.open("wb") as file:
        file.write(msgspec.json.encode(state))
        durable.sync(file)
    durable.sync_folder(out_dir)  # the token files' names, which the state speaks of
    faultpoint("writer:before_rename")
    partial.rename(out_dir / STATE_FILE)
    faultpoint("writer:after_rename")


def main(channel: Channel, descriptors: Descriptors) -> None:
    """Write tokens until every lane has ended, limit_tokens are written, or Stop."""
    setup = channel.receive()
    assert isinstance(setup, WriterSetup)
    out_dir = Path(setup.out_dir)
    earlier = read_state(out_dir)
    memory = segment.attach(descriptors.ring, ring.size_bytes(setup.ring), writable=False)
    tokens = ring.Ring(memory, setup.ring)
    files = TokenFiles(
        out_dir, setup.ring.token_bytes, setup.file_tokens, earlier.tokens if earlier else 0
    )
    chunk = setup.ring.slot_tokens if setup.ring.lanes == 1 else setup.seq_len
    reader = Reader(channel, tokens, setup.positions, chunk)
    documents = earlier.documents if earlier else 0
    channel.send(ConsumerReady(checkpoint_bytes=0, facts={"files": str(out_dir)}))

    def save(complete: bool) -> None:
        files.sync()
        faultpoint("writer:after_sync")
        _save(out_dir, WriterState(reader.cursor(), files.tokens, documents, complete))

    saved = reported = monotonic()
    left = sys.maxsize if setup.limit_tokens is None else setup.limit_tokens - files.tokens
    for view in reader.chunks() if left > 0 else ():
        wanted = view[:left]
        left -= len(wanted)
        reader.give_back(len(view) - len(wanted))
        files.write(wanted)
        documents += int(np.count_nonzero(wanted == setup.eot))
        faultpoint("writer:after_write")
        reader.poll()
        now = monotonic()
        if now - reported >= _REPORT_S:
            reported = now
            channel.send(StepDone({"total_tokens": files.tokens, "documents": documents}))
        if now - saved >= setup.checkpoint_s:
            saved = now
            save(False)
        if left <= 0:
            break
    complete = reader.stop is None
    if complete:
        files.close()
    save(complete)
    summary = {"tokens": files.tokens, "documents": documents, "sha256": files.sha256.hexdigest()}
    channel.send(ConsumerDone(complete, summary))
