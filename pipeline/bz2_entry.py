"""Reading of a bz2 file begun in its middle, with every checksum still checked.

Runs in: decompressors.

A bz2 stream is a header, blocks of up to 900 kB of text, and a trailer. Each block has a checksum
and begins at any bit; the trailer has one over those of all blocks, so a decoder that is given the
blocks from one on alone refuses the trailer. Therefore it is given, in place of those before, one
small block that is made up: its checksum is what they would have left, and its length lets the
first true block begin at the same bit of a byte as in the file.

    file     header ─ block ─ block ─ block k ─ … ─ trailer ─ further streams
    decoded  header ─ made up ─────── block k ─ … ─ trailer ─ further streams
"""

from __future__ import annotations

import bz2
import io
import itertools
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

TRAILER_BITS = 80  # magic and checksum
_HEADER_BITS = 32
_BLOCK, _TRAILER = 0x314159265359, 0x177245385090  # what each begins with
_REGISTER = 0xFFFFFFFF


def _table() -> list[int]:
    """The steps of bz2's CRC-32: polynomial 0x04C11DB7, highest bit first."""
    steps = []
    for value in range(256):
        register = value << 24
        for _ in range(8):
            register = register << 1 ^ (0x04C11DB7 if register & 1 << 31 else 0)
        steps.append(register & _REGISTER)
    return steps


_STEPS = _table()
_BY_LOW_BYTE = {step & 0xFF: index for index, step in enumerate(_STEPS)}


class Entry(NamedTuple):
    """A block at which reading can begin.

    bit: where it stands in the file. byte: of the decompressed bytes, its first. checksum: over
    the blocks before it in its stream.
    """

    bit: int
    byte: int
    checksum: int


class Entries:
    """The blocks of a file, as they are decoded.

    Args:
        file: The whole file; its position is moved.
        begin: Where decoding began, if not at the file's start.
        head_bits: What the decoder was given in place of the file before that.
        head_bytes: What it makes of that.
    """

    def __init__(
        self, file: BinaryIO, begin: Entry | None, head_bits: int = 0, head_bytes: int = 0
    ) -> None:
        self._file = file
        first = begin or Entry(0, 0, 0)
        self._bits, self._bytes = first.bit - head_bits, first.byte - head_bytes
        self._first, self._seen, self._checksum = head_bits, -1, first.checksum
        self._known: list[Entry] = []

    def at(self, byte: int, offsets: Mapping[int, int]) -> Entry | None:
        """The last block that begins at or before a byte, which has been decoded already; a byte
        before those asked for earlier is unknown.

        Args:
            byte: Of the decompressed bytes.
            offsets: Bit and first byte of every block so far, as the decoder counts them.
        """
        for bit in sorted(bit for bit in offsets if bit > self._seen and bit >= self._first):
            self._add(bit + self._bits, offsets[bit] + self._bytes)
            self._seen = bit
        before = [entry for entry in self._known if entry.byte <= byte]
        self._known = self._known[max(0, len(before) - 1) :]
        return before[-1] if before else None

    def _add(self, bit: int, byte: int) -> None:
        self._file.seek(bit // 8)
        bits = int.from_bytes(self._file.read(11).ljust(11, b"\0")) >> 8 - bit % 8
        magic, checksum = bits >> 32 & (1 << 48) - 1, bits & _REGISTER
        if magic == _BLOCK:
            self._known.append(Entry(bit, byte, self._checksum))
            turned = self._checksum << 1 | self._checksum >> 31
            self._checksum = turned & _REGISTER ^ checksum
        elif magic == _TRAILER:
            self._checksum = 0


class Rest(io.RawIOBase):
    """A file from one of its blocks on, behind a stream's beginning that is made up.

    Args:
        file: The whole file; closed with this.
        entry: The block.

    head_bits: length of what stands before the block. head_bytes: of what that decodes to.
    size_bytes: of what can be read here.
    """

    def __init__(self, file: BinaryIO, entry: Entry) -> None:
        self._file, self._position = file, 0
        bits, self.head_bits, self.head_bytes = _made_up(entry)
        shared = -entry.bit % 8  # bits of the block in the byte that it shares with the head
        self._next = entry.bit // 8
        if shared:
            file.seek(self._next)
            bits = bits << shared | file.read(1)[0] & (1 << shared) - 1
            self._next += 1
        self._head = bits.to_bytes((self.head_bits + shared) // 8)
        self.size_bytes = len(self._head) + file.seek(0, io.SEEK_END) - self._next

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self._position, self.size_bytes)[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position < len(self._head):
            data = self._head[self._position : self._position + len(buffer)]
        else:
            self._file.seek(self._next + self._position - len(self._head))
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _made_up(entry: Entry) -> tuple[int, int, int]:
    """A stream's header and one block of the entry's checksum, whose end is the entry's bit of a
    byte: the bits as a number, how many they are, and how many bytes they decode to."""
    for number in itertools.count():
        start = number.to_bytes(4)
        data = start + _ending(start, entry.checksum)
        stream = bz2.compress(data)  # of level 9, for which every block is small enough
        bits = int.from_bytes(stream)
        padding = next(
            n for n in range(8) if bits >> n + 32 & (1 << 48) - 1 == _TRAILER
        )  # behind the trailer, up to a whole byte
        size = 8 * len(stream) - padding - TRAILER_BITS
        if size % 8 == entry.bit % 8:
            return bits >> padding + TRAILER_BITS, size, len(data)
    raise AssertionError("never reached")


def _ending(start: bytes, checksum: int) -> bytes:
    """Four bytes that, behind start, give bz2's CRC-32 this value."""
    register, want = _REGISTER, checksum ^ _REGISTER
    for byte in start:
        register = _step(register, byte)
    steps = []
    for _ in range(4):  # backwards: the low byte tells the last step
        steps.append(_BY_LOW_BYTE[want & 0xFF])
        want = (want ^ _STEPS[steps[-1]]) >> 8
    ending = bytearray()
    for step in reversed(steps):
        ending.append(register >> 24 ^ step)
        register = _step(register, ending[-1])
    return bytes(ending)


def _step(register: int, byte: int) -> int:
    return register << 8 & _REGISTER ^ _STEPS[register >> 24 ^ byte]
