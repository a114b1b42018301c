"""Tar archives whose headers lie, or that have no end."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

from tests.corpus.base import (
    TAR_END,
    TEXTS,
    VALID,
    Case,
    Outcome,
    error,
    jsonl,
    line,
    member,
    members,
    noise,
    skipped,
    tar,
)


def tars() -> Iterator[Case]:
    """Members that are no documents, headers that lie, ends that are none."""
    more = lambda *extra: lambda: b"".join((*extra, tar()))  # noqa: E731
    longest = "long/" * 60 + "name.json"
    yield Case("a long name", "x.tar", more(long_name(longest, b"{}")), skipped(1, "has no 'text'"))
    yield Case("a bad checksum", "x.tar", lambda: altered(20, 150), error("bad checksum", 20))
    yield Case("no end of the archive", "x.tar", members, error("empty header", len(TEXTS)))
    yield Case("one block of zeros as its end", "x.tar", lambda: members() + b"\0" * 512, VALID)
    yield Case("half a block at its end", "x.tar", lambda: tar() + b"\0" * 99,
               error("truncated header", len(TEXTS)))  # fmt: skip
    yield Case("garbage behind its end", "x.tar", lambda: tar() + noise(512),
               error("invalid header", len(TEXTS)))  # fmt: skip
    yield Case("two archives in a row", "x.tar", more(TAR_END), VALID)
    for what, kind in (("symbolic link", tarfile.SYMTYPE), ("hard link", tarfile.LNKTYPE),
                       ("device", tarfile.CHRTYPE), ("named pipe", tarfile.FIFOTYPE)):  # fmt: skip
        yield Case(f"a {what}", "x.tar", more(member("a.json", b"", kind)), skipped(1, "a link"))
        yield Case(f"a {what} called a.png", "x.tar", more(member("a.png", b"", kind)), VALID)
    yield Case("a folder", "x.tar", more(member("a.json/", b"", tarfile.DIRTYPE)), VALID)
    yield Case("other files", "x.tar", more(member("a.jpg", noise(999))), VALID)
    yield Case("meta data of webdataset", "x.tar", more(member("__meta__/a.json", b"{}")), VALID)
    yield Case("a negative size", "x.tar", lambda: resized(-512), error("claims -512 bytes"))
    for size in (10**10, 1 << 62):
        yield Case(f"a member of {size} bytes that is not there", "x.tar",
                   lambda size=size: resized(size),
                   Outcome(0, 1, "are more than", "unexpected end of data"))  # fmt: skip
        yield Case(f"a .jsonl member of {size} bytes that is not there", "x.tar",
                   lambda size=size: resized(size, "a.jsonl"),
                   error("unexpected end of data", 1))  # fmt: skip
    yield Case("a long name of 10 GB", "x.tar",
               lambda: resized(10**10, "././@LongLink", tarfile.GNUTYPE_LONGNAME),
               error("claims 10000000000 bytes"))  # fmt: skip
    yield Case("attributes of 10 GB", "x.tar",
               lambda: resized(10**10, "pax", tarfile.XHDTYPE), error("claims"))  # fmt: skip
    yield Case("an attribute that claims a negative size", "x.tar",
               lambda: pax(b"size", b"-1024") + tar(), error("claims -1024 bytes"))  # fmt: skip
    for value in (b"x", b"9" * 5000):
        yield Case(f"an attribute that claims {len(value)} characters as a size", "x.tar",
                   lambda value=value: pax(b"size", value) + tar(),
                   Outcome(0, 1, "truncated", "invalid header"))  # fmt: skip
    yield Case("an attribute that is longer than its block", "x.tar",
               lambda: member("p", b"99999 path=a\n", tarfile.XHDTYPE) + tar(),
               error("damaged"))  # fmt: skip
    yield Case("attributes without end", "x.tar",
               lambda: b"".join(pax(b"path", b"a", tarfile.XGLTYPE) for _ in range(2000)),
               error("damaged"))  # fmt: skip
    yield Case("a sparse member", "x.tar",
               more(member("a.json", b"", tarfile.GNUTYPE_SPARSE)), error("sparse"))  # fmt: skip
    yield Case("a name of control characters", "x.tar",
               more(member("\x1b[2J\n.json", b"{}")), skipped(1, "has no 'text'"))  # fmt: skip
    yield Case("a .txt that is no UTF-8", "x.tar", more(member("a.txt", b"\xff\xfe")),
               skipped(1, "not UTF-8"))  # fmt: skip
    texts = lambda: b"".join(member("a.txt", text.encode()) for text in TEXTS)  # noqa: E731
    yield Case(".txt members", "x.tar", lambda: texts() + TAR_END, VALID)
    yield Case("a .jsonl member", "x.tar", lambda: member("a.jsonl", jsonl()) + TAR_END, VALID)


def long_name(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + b"\0" * (-len(data) % 512)


def altered(index: int, offset: int) -> bytes:
    """The tar with one byte changed in the header of one member."""
    at = sum(len(member("x", line(text))) for text in TEXTS[:index]) + offset
    return tar()[:at] + bytes([tar()[at] ^ 1]) + tar()[at + 1 :]


def resized(size: int, name: str = "a.json", kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar whose first member claims a size: its data are all that follows."""
    return member(name, b"", kind, size=size) + line(TEXTS[0]) + b"\0" * 512


def pax(key: bytes, value: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header with one attribute."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + len(str(len(rest) + 4))
    return member("pax", str(length).encode() + rest, kind)
