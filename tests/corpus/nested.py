"""Tar archives whose members are compressed, and tables of Arrow's own format."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from tests.corpus.base import (
    COMPRESS,
    TAR_END,
    TENTHS,
    TEXTS,
    VALID,
    Case,
    Outcome,
    error,
    jsonl,
    member,
    skipped,
    zst,
)


def nested() -> Iterator[Case]:
    """Compressed members that are cut, altered, bombs, or something else."""
    damaged = error("member b.jsonl", len(TEXTS))
    for kind, compress in COMPRESS.items():
        name = f"b.jsonl.{kind}"
        inner = lambda c=compress: c(jsonl())  # noqa: E731
        whole = lambda i=inner, n=name: archive((n, i()))  # noqa: E731
        yield Case(f"a member of lines as {kind}", "x.tar", whole, VALID)
        for tenth in TENTHS[::2]:
            cut = lambda i=inner, n=name, t=tenth: archive((n, i()[: len(i()) * t // 10]))  # noqa: E731
            yield Case(f"a member of {kind} cut at {tenth}/10", "x.tar", cut, damaged)
        yield Case(f"a member of {kind}, then garbage", "x.tar",
                   lambda i=inner, n=name: archive((n, i() + b"?")), damaged)  # fmt: skip
        texts = lambda c=compress, k=kind: archive(  # noqa: E731
            *((f"{number}.txt.{k}", c(text.encode())) for number, text in enumerate(TEXTS))
        )
        yield Case(f"texts as {kind}", "x.tar", texts, VALID)
    yield Case("a member of plain lines called .zst", "x.tar",
               lambda: archive(("b.jsonl.zst", jsonl())), VALID)  # fmt: skip
    yield Case("a member as zst called .jsonl", "x.tar",
               lambda: archive(("b.jsonl", zst(jsonl()))), VALID)  # fmt: skip
    yield Case("a text of 70 MB as zst", "x.tar",
               lambda: archive(("a.txt.zst", zst(b"a" * 70_000_000)), ("b.jsonl", jsonl())),
               skipped(1, "more than 67108864 bytes"))  # fmt: skip


def archive(*files: tuple[str, bytes]) -> bytes:
    return b"".join(member(name, data) for name, data in files) + TAR_END


# ── arrow ───────────────────────────────────────────────────────────────────────────────────


def arrows() -> Iterator[Case]:
    """Files and streams that are cut, altered, or hold other columns."""
    damaged = error("is damaged or cut off after record", len(TEXTS))
    for form, make in (("file", arrow), ("stream", arrow_stream)):
        yield Case(f"arrow {form}", "x.arrow", make, VALID)
        yield Case(f"arrow {form} under another name", "x.tar", make, VALID)
        for tenth in TENTHS:
            cut = lambda m=make, t=tenth: m()[: len(m()) * t // 10]  # noqa: E731
            yield Case(f"arrow {form} cut at {tenth}/10", "x.arrow", cut, damaged)
        yield Case(
            f"arrow {form} without its last byte", "x.arrow", lambda m=make: m()[:-1], damaged
        )
        yield Case(f"arrow {form}, then garbage", "x.arrow", lambda m=make: m() + b"?", damaged)
    yield Case("arrow stream without its end", "x.arrow", lambda: arrow_stream()[:-8], damaged)
    yield Case("arrow magic and nothing else", "x.arrow", lambda: b"ARROW1\0\0", damaged)
    yield Case("arrow inside gz", "x.arrow.gz", lambda: COMPRESS["gz"](arrow()),
               error("arrow again"))  # fmt: skip
    yield Case("arrow without the column", "x.arrow",
               lambda: arrow(pa.table({"content": TEXTS})), error("no column 'text'"))  # fmt: skip
    yield Case("arrow with two of the column", "x.arrow",
               lambda: arrow(pa.table([TEXTS, TEXTS], ["text", "text"])),
               error("no column 'text'"))  # fmt: skip
    yield Case("an arrow column of numbers", "x.arrow",
               lambda: arrow(pa.table({"text": [1]})), error("holds int64"))  # fmt: skip
    yield Case("no rows of arrow", "x.arrow",
               lambda: arrow(pa.table({"text": pa.array([], "string")})), Outcome(0))  # fmt: skip
    yield Case("null rows of arrow", "x.arrow",
               lambda: arrow(pa.table({"text": [*TEXTS, None]})), skipped(1, "null"))  # fmt: skip
    yield Case("only null rows of arrow", "x.arrow",
               lambda: arrow(pa.table({"text": pa.nulls(3)})), skipped(3, "null", 0))  # fmt: skip
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    for kind in kinds:
        yield Case(f"an arrow column of {kind}", "x.arrow",
                   lambda k=kind: arrow(typed(k)), VALID)  # fmt: skip
    yield Case("an arrow dictionary", "x.arrow",
               lambda: arrow(pa.table({"text": pa.array(TEXTS).dictionary_encode()})),
               VALID)  # fmt: skip
    yield Case("arrow bytes that are not UTF-8", "x.arrow",
               lambda: arrow(pa.table({"text": [*(t.encode() for t in TEXTS), b"\xff"]})),
               skipped(1, "not UTF-8"))  # fmt: skip
    yield Case("an arrow string that is not UTF-8", "x.arrow", not_utf8, skipped(1, "not UTF-8"))
    yield Case("arrow offsets that point outside", "x.arrow", outside, error("damaged"))
    yield Case("arrow indices that point outside", "x.arrow", indices_outside, error("damaged"))


def typed(kind: str) -> pa.Table:
    whole = {"string_view": pa.string_view(), "binary_view": pa.binary_view()}.get(kind)
    as_bytes = kind.startswith(("binary", "large_binary"))
    values = [text.encode() for text in TEXTS] if as_bytes else TEXTS
    return pa.table({"text": pa.array(values, whole or kind)})


def arrow(table: pa.Table | None = None) -> bytes:
    return _written(table, pa.ipc.new_file)


def arrow_stream(table: pa.Table | None = None) -> bytes:
    return _written(table, pa.ipc.new_stream)


def _written(table: pa.Table | None, writer: Callable[..., pa.RecordBatchWriter]) -> bytes:
    if table is None:
        table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    out = io.BytesIO()
    with writer(out, table.schema) as open_writer:
        open_writer.write_table(table, 16)
    return out.getvalue()


def not_utf8() -> bytes:
    return arrow(pa.table({"text": [*TEXTS, "cafe-marker"]})).replace(b"cafe-mark", b"caf\xe9-mark")


def outside() -> bytes:
    """The last offset of a column of 16 texts."""
    ends = np.cumsum([0, *(len(text.encode()) for text in TEXTS[:16])]).astype("<i4").tobytes()
    data = arrow(pa.table({"text": TEXTS}))
    assert data.count(ends) == 1
    return data.replace(ends, ends[:-4] + (1 << 30).to_bytes(4, "little"))


def indices_outside() -> bytes:
    texts = pa.DictionaryArray.from_arrays(pa.array([0x0ABCDEF0 % 3] * 5 + [1], "int32"), TEXTS[:3])
    indices = texts.indices.to_numpy().astype("<i4").tobytes()
    data = arrow(pa.table({"text": texts}))
    assert data.count(indices) == 1
    return data.replace(indices, indices[:-4] + (99).to_bytes(4, "little"))
