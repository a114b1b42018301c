"""The members of a tar stream, read strictly and in one pass.

Runs in: decompressors. A document is a small member with the plainest of headers, and there are
thousands in a shard: those are read here, in 10 µs each. Every other header (long names,
attributes, links, sparse files, whatever is damaged) goes to Python's tarfile, which takes 60.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from typing import IO, Any, BinaryIO, NamedTuple, cast

_BLOCK = tarfile.BLOCKSIZE
# A block of zeros, and nothing at all; typeshed lacks them.
_AtEnd, _Empty = tarfile.EOFHeaderError, tarfile.EmptyHeaderError  # type: ignore[attr-defined]
_MAX_HEADER_BYTES = 1 << 20  # a member's long name and attributes
_MAX_GLOBAL_HEADERS = 100
Error = tarfile.TarError


class Member(NamedTuple):
    """One member that is no folder.

    data: its bytes if they are few, a stream that is valid until the next member otherwise, or
    None where it is no file. offset: where its headers begin, if members can be read from there
    on; attributes that hold for all members stand before it otherwise.
    """

    name: str
    size: int
    data: bytes | BinaryIO | None
    offset: int | None


def members(stream: BinaryIO, max_bytes: int) -> Iterator[Member]:
    """The members of an archive, or of several in a row.

    Args:
        stream: At the first header; can seek forwards.
        max_bytes: Members up to this size are read into memory.

    Raises:
        Error: the archive is damaged, cut off, or followed by something else.
    """
    source = _Source(stream)
    with _Archive(fileobj=cast(IO[bytes], source), errors="replace", ignore_zeros=True) as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # typeshed lacks it; it would keep them all
            if not member.isdir():
                data = None
                if member.isreg() and not member.issparse():
                    data = cast(BinaryIO, archive.extractfile(member))
                few = data is not None and member.size <= max_bytes
                offset = None if archive.pax_headers else member.offset
                read = data.read() if few and data else data
                yield Member(member.name, member.size, read, offset)
            if archive.offset > source.tell():  # seeking alone would not see that it is cut off
                source.seek(archive.offset - 1)
                if not source.read(1):
                    raise tarfile.ReadError("unexpected end of data")
            if not archive.pax_headers:  # global attributes: every header needs them
                yield from _plain_members(source, stream, max_bytes)
                archive.go_on_at(source.tell())


def _plain_members(source: _Source, stream: BinaryIO, max_bytes: int) -> Iterator[Member]:
    """Members up to the first whose header is not of the plainest form."""
    offset = stream.tell()
    while (plain := _plain(header := stream.read(_BLOCK), max_bytes)) is not None:
        name, size = plain
        data = stream.read(size)
        padding = -size % _BLOCK
        if len(data) < size or len(stream.read(padding)) < padding:
            raise tarfile.ReadError("unexpected end of data")
        yield Member(name, size, data, offset)
        offset += _BLOCK + size + padding
    source.give_back(header)


def _plain(header: bytes, max_bytes: int) -> tuple[str, int] | None:
    """Name and size of a regular file's header that says nothing else, or None."""
    if (
        header[156:157] not in (b"0", b"\0")
        or header[257:263] not in (b"ustar\0", b"ustar ")
        or header[345:346] != b"\0"  # the name goes on
    ):
        return None
    try:
        size = int(header[124:136].rstrip(b" \0"), 8)
        checksum = int(header[148:156].rstrip(b" \0"), 8)
    except ValueError:  # a number of another form
        return None
    if not 0 <= size <= max_bytes or sum(header) - sum(header[148:156]) + 8 * 32 != checksum:
        return None
    name = header[:100].split(b"\0", 1)[0].decode("utf-8", "replace")
    return None if name.endswith("/") else (name, size)


class _Source:
    """The stream, with one header that was read and given back."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._header = b""

    def give_back(self, header: bytes) -> None:
        self._header = header

    def read(self, size: int) -> bytes:
        taken, self._header = self._header[:size], self._header[size:]
        return taken + self._stream.read(size - len(taken)) if len(taken) < size else taken

    def tell(self) -> int:
        return self._stream.tell() - len(self._header)

    def seek(self, offset: int) -> None:
        """Skip forwards; the header that was given back has been read by then."""
        assert not self._header
        self._stream.seek(offset)


class _Member(tarfile.TarInfo):
    """A header that is read strictly: tarfile takes one that is damaged for the archive's end,
    and believes any size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        in_memory = member.type not in tarfile.REGULAR_TYPES and not member.isdir()
        if member.size < 0 or (in_memory and member.size > _MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header claims {member.size} bytes")
        if member.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("sparse members are not supported")
        return member

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> _Member:
        return cast(_Member, tarfile.strictly(super().fromtarfile))


class _Archive(tarfile.TarFile):
    """A tar stream that must end as one: with a block of zeros, and nothing but zeros or a
    further archive behind it."""

    tarinfo = _Member
    _ended = False

    def go_on_at(self, offset: int) -> None:
        """Members were read by somebody else: the next header stands at offset."""
        self._ended = self._ended and offset == self.offset
        self.offset = offset

    def strictly(self, read: Callable[[Any], tarfile.TarInfo]) -> tarfile.TarInfo:
        """Read the next header. Raises: HeaderError at the end, ReadError for a damaged one."""
        try:
            member = read(self)
        except tarfile.HeaderError as error:
            if isinstance(error, _AtEnd):  # a block of zeros
                self._ended = True
            if self._ended and isinstance(error, _AtEnd | _Empty):
                raise
            raise tarfile.ReadError(f"{error} at byte {self.fileobj.tell()}") from error
        self._ended = False
        if member.size < 0 or "\0" in member.name:  # its attributes may say anything
            raise tarfile.ReadError(f"a header claims {member.size} bytes for {member.name!r}")
        if len(self.pax_headers) > _MAX_GLOBAL_HEADERS:
            raise tarfile.ReadError("too many global headers")
        return member
