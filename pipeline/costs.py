"""What reading and encoding a megabyte of text costs on this machine: measured, not assumed.

Runs in: supervisor, once per kind of shard, encoding and machine; the answer is kept in the
user's cache folder. The stages' sizes follow from it (pipeline/sizes.py).
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import platform
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
import zstandard

from pipeline import user_cache
from pipeline.blocks import Texts
from pipeline.codecs import open_documents
from pipeline.encoding import Encoder

_SAMPLE_BYTES = 2_000_000  # of text; bz2 takes a tenth of a second for it
_FILE = "costs.json"


class Costs(msgspec.Struct, frozen=True):
    """CPU seconds per megabyte (10⁶ bytes) of text, on one core."""

    read_s: float  # decompress and parse
    encode_s: float


def of(
    name: str,
    local_path: str | None,
    text_field: str,
    load: Callable[[], Encoder],
    encoding: str,
) -> Costs:
    """The costs of shards like this one.

    Args:
        name: A shard's name: its endings tell the format.
        local_path: The same shard on this disk, which is then measured itself; None: text of this
            Python's own library is written in that format, and measured.
        text_field: Where a record's text is.
        load: Makes the run's encoder, if something has to be measured.
        encoding: How that is called.
    """
    form = form_of(name)
    key = f"{form} {encoding} {_machine()}"
    path = user_cache.folder() / _FILE
    known: dict[str, Costs] = {}
    with contextlib.suppress(OSError, msgspec.MsgspecError):  # none yet, or another version's
        known = msgspec.json.decode(path.read_bytes(), type=dict[str, Costs])
    if key not in known:
        known[key] = measure(form, local_path, text_field, load())
        user_cache.keep(path, msgspec.json.encode(known))
    return known[key]


def measure(form: str, local_path: str | None, text_field: str, encoder: Encoder) -> Costs:
    """Read a sample of the format and encode it; see of."""
    with tempfile.TemporaryDirectory() as scratch:
        path = local_path
        if path is None:
            path = str(Path(scratch) / f"sample.{form}")
            Path(path).write_bytes(_write(form, text_field))
        text, offsets = _sample(path, text_field)
        read_s = _cpu_s(lambda: _sample(path, text_field))
    half = int(np.searchsorted(offsets, offsets[-1] // 2))
    encoder.encode_block(text, offsets[: half + 1], False)  # warms its cache
    encode_s = _cpu_s(lambda: encoder.encode_block(text, offsets[half:], False))
    encoded = int(offsets[-1] - offsets[half])
    least = 1e-9  # of a sample without text
    return Costs(
        1e6 * read_s / max(1, int(offsets[-1])) + least, 1e6 * encode_s / max(1, encoded) + least
    )


def _cpu_s(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def form_of(name: str) -> str:
    """A shard's format as its name tells it: tar.bz2, jsonl.zst, parquet …"""
    last = name.lower().rsplit("/", 1)[-1]
    for short, long in (("tgz", "tar.gz"), ("tbz2", "tar.bz2"), ("tbz", "tar.bz2")):
        last = last.removesuffix(short) + long if last.endswith(f".{short}") else last
    parts = last.split(".")
    container = next((part for part in parts if part in _CONTAINERS), "jsonl")
    compression = parts[-1] if parts[-1] in _COMPRESSIONS and container != "parquet" else ""
    return f"{container}.{compression}".rstrip(".")


def _machine() -> str:
    version = metadata.version("fineweb-pipeline")
    return f"{platform.processor() or platform.machine()} {platform.python_version()} {version}"


def _sample(path: str, text_field: str) -> Texts:
    """The first documents of a shard, as one block."""
    found: list[bytes] = []
    size = 0
    for document in open_documents(path, path, text_field):
        some: Iterator[bytes] | list[bytes] = []
        if isinstance(document, Texts):
            some = document.one_by_one()
        elif isinstance(document, bytes):
            some = [document]
        for text in some:
            found.append(text)
            size += len(text)
        if size >= _SAMPLE_BYTES:
            break
    offsets = np.cumsum([0, *map(len, found)])
    return Texts(np.frombuffer(b"".join(found), np.uint8), offsets)


# ── a sample for shards that are elsewhere ──────────────────────────────────────────────────


def _write(form: str, text_field: str) -> bytes:
    """Text of this Python's own library as a shard of the format."""
    from pydoc_data.topics import topics

    texts = [text for _, text in sorted(topics.items())]
    container, _, compression = form.partition(".")
    return _COMPRESSIONS[compression](_CONTAINERS[container](texts, text_field))


def _jsonl(texts: list[str], text_field: str) -> bytes:
    return b"".join(msgspec.json.encode({text_field: text}) + b"\n" for text in texts)


def _tar(texts: list[str], text_field: str) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for number, text in enumerate(texts):
            data = msgspec.json.encode({text_field: text})
            member = tarfile.TarInfo(f"{number:06d}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return raw.getvalue()


def _parquet(texts: list[str], text_field: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table({text_field: texts}), out)
    return out.getvalue()


_CONTAINERS: dict[str, Callable[[list[str], str], bytes]] = {
    "tar": _tar,
    "jsonl": _jsonl,
    "parquet": _parquet,
}
_COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "bz2": bz2.compress,
    "gz": gzip.compress,
    "zst": zstandard.compress,
}
