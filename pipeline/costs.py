"""What reading and encoding a megabyte of text costs on this machine: measured, not assumed.

Runs in: supervisor, once per kind of shard, encoding and machine; the answer is kept in the
user's cache folder. The stages' sizes follow from it (pipeline/sizes.py).
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import platform
import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib import metadata

import msgspec
import numpy as np
import pyarrow as pa
import zstandard

from pipeline import user_cache
from pipeline.blocks import Texts
from pipeline.codecs import open_documents
from pipeline.encoding import Encoder

_FIELD = "text"
_FILE = "costs.json"


class Costs(msgspec.Struct, frozen=True):
    """CPU seconds per megabyte (10⁶ bytes) of text, on one core."""

    read_s: float  # decompress and parse
    encode_s: float


def of(name: str, load: Callable[[], Encoder], encoding: str) -> Costs:
    """The costs of shards like this one.

    Args:
        name: A shard's name: its endings tell the format.
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
        known[key] = measure(form, load())
        user_cache.keep(path, msgspec.json.encode(known))
    return known[key]


def measure(form: str, encoder: Encoder) -> Costs:
    """Read a sample in the format and encode it.

    The sample is text of this Python's own library: what a stranger's shard may do to its reader
    is for a worker to suffer, not for the supervisor.
    """
    with tempfile.NamedTemporaryFile(suffix=f".{form}") as file:
        file.write(_write(form))
        file.flush()
        text, offsets = _read(file.name)
        read_s = _cpu_s(lambda: _read(file.name))
    half = int(np.searchsorted(offsets, offsets[-1] // 2))
    encoder.encode_block(text, offsets[: half + 1], False)  # warms its cache
    encode_s = _cpu_s(lambda: encoder.encode_block(text, offsets[half:], False))
    read, encoded = int(offsets[-1]), int(offsets[-1] - offsets[half])
    return Costs(1e6 * read_s / read, 1e6 * encode_s / encoded)


def _cpu_s(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def form_of(name: str) -> str:
    """A shard's format as its name tells it: tar.bz2, jsonl.zst, parquet …"""
    last = name.lower().rsplit("/", 1)[-1]
    for short, long in (("tgz", "tar.gz"), ("tbz2", "tar.bz2"), ("tbz", "tar.bz2"),
                        ("txz", "tar.xz"), ("tzst", "tar.zst")):  # fmt: skip
        last = last.removesuffix(short) + long if last.endswith(f".{short}") else last
    parts = last.split(".")
    container = next((part for part in parts if part in _CONTAINERS), "jsonl")
    whole = container in ("parquet", "arrow")
    compression = parts[-1] if parts[-1] in _COMPRESSIONS and not whole else ""
    return f"{container}.{compression}".rstrip(".")


def _machine() -> str:
    version = metadata.version("fineweb-pipeline")
    return f"{platform.processor() or platform.machine()} {platform.python_version()} {version}"


def _read(path: str) -> Texts:
    """The documents of a shard, in one buffer."""
    found: list[bytes] = []
    for document in open_documents(path, path, _FIELD):
        if isinstance(document, Texts):
            found += document.one_by_one()
        elif isinstance(document, bytes):
            found.append(document)
    return Texts(np.frombuffer(b"".join(found), np.uint8), np.cumsum([0, *map(len, found)]))


# ── the sample ──────────────────────────────────────────────────────────────────────────────


def _write(form: str) -> bytes:
    """Text of this Python's own library as a shard of the format."""
    from pydoc_data.topics import topics

    texts = [text for _, text in sorted(topics.items())]
    container, _, compression = form.partition(".")
    return _COMPRESSIONS[compression](_CONTAINERS[container](texts))


def _jsonl(texts: list[str]) -> bytes:
    return b"".join(msgspec.json.encode({_FIELD: text}) + b"\n" for text in texts)


def _tar(texts: list[str]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for number, text in enumerate(texts):
            data = msgspec.json.encode({_FIELD: text})
            member = tarfile.TarInfo(f"{number:06d}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return raw.getvalue()


def _parquet(texts: list[str]) -> bytes:
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table({_FIELD: texts}), out)
    return out.getvalue()


def _arrow(texts: list[str]) -> bytes:
    out, table = io.BytesIO(), pa.table({_FIELD: texts})
    with pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def _lz4(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "lz4") as stream:
        stream.write(data)
    return bytes(out.getvalue())


_CONTAINERS: dict[str, Callable[[list[str]], bytes]] = {
    "tar": _tar,
    "jsonl": _jsonl,
    "txt": lambda texts: b"\n<|endoftext|>\n".join(text.encode() for text in texts),
    "parquet": _parquet,
    "arrow": _arrow,
}
_COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "bz2": bz2.compress,
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "xz": lambda data: lzma.compress(data, preset=1),
    "lz4": _lz4,
}
