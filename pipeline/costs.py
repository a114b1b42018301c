"""What reading and encoding a megabyte of text costs on this machine: measured, not assumed.

Runs in: supervisor, once per kind of shard, encoding and machine; the answer is kept in the
user's cache folder. The stages' sizes follow from it (pipeline/sizes.py).
"""

from __future__ import annotations

import contextlib
import platform
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np

from pipeline import sample_shards, user_cache
from pipeline.blocks import Texts
from pipeline.codecs import open_documents
from pipeline.config import Config, Stream
from pipeline.encoding import Encoder
from pipeline.sample_shards import FIELD, form_of

__all__ = ["Costs", "Rest", "form_of", "keep", "kind_of", "known", "measure", "of"]

_FILE = "costs.json"


class Rest(msgspec.Struct, frozen=True):
    """What whole runs have shown besides (pipeline/benching.py)."""

    fetch_s: float  # CPU seconds a megabyte of shards, not of text
    write_s: float
    supervise_s: float
    tokens_per_mb: float
    text_per_shard_byte: float  # bytes of text a byte of shard
    start_s: float  # from the command to the first work
    process_bytes: int  # memory of a process, without what is shared
    measured_on: str  # the user's shards, or the built-in corpus


class Costs(msgspec.Struct, frozen=True):
    """CPU seconds per megabyte (10⁶ bytes) of text, on one core."""

    read_s: float  # decompress and parse
    encode_s: float
    rest: Rest | None = None  # None: reading and encoding were timed by themselves


def kind_of(config: Config, vocab_size: int) -> str:
    """What an encoding's costs are kept under: small blocks cost more a megabyte."""
    name, block_bytes = config.data.tokenizer.name, config.data.stream.block_bytes
    other = "" if block_bytes == Stream().block_bytes else f"-{block_bytes}"
    return f"{name}-{vocab_size}{other}"


def of(name: str, load: Callable[[], Encoder], encoding: str) -> Costs:
    """The costs of shards like this one.

    Args:
        name: A shard's name: its endings tell the format.
        load: Makes the run's encoder, if something has to be measured.
        encoding: See kind_of.
    """
    kept, key = _kept(), _key(name, encoding)
    if key not in kept:
        kept[key] = measure(form_of(name), load())
        user_cache.keep(_path(), msgspec.json.encode(kept))
    return kept[key]


def known(name: str, encoding: str) -> Costs | None:
    """What is kept of shards like this one."""
    return _kept().get(_key(name, encoding))


def keep(name: str, encoding: str, costs: Costs) -> None:
    """Keep what was measured otherwise: `--workers auto` chooses by it from now on."""
    kept = _kept() | {_key(name, encoding): costs}
    user_cache.keep(_path(), msgspec.json.encode(kept))


def _path() -> Path:
    return user_cache.folder() / _FILE


def _kept() -> dict[str, Costs]:
    with contextlib.suppress(OSError, msgspec.MsgspecError):  # none yet, or another version's
        return msgspec.json.decode(_path().read_bytes(), type=dict[str, Costs])
    return {}


def _key(name: str, encoding: str) -> str:
    return f"{form_of(name)} {encoding} {_machine()}"


def measure(form: str, encoder: Encoder) -> Costs:
    """Read a sample in the format and encode it.

    The sample is text of this Python's own library: what a stranger's shard may do to its reader
    is for a worker to suffer, not for the supervisor.
    """
    with tempfile.NamedTemporaryFile(suffix=f".{form}") as file:
        file.write(sample_shards.shard(form, sample_shards.short_texts()))
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


def _machine() -> str:
    version = metadata.version("fineweb-pipeline")
    return f"{platform.processor() or platform.machine()} {platform.python_version()} {version}"


def _read(path: str) -> Texts:
    """The documents of a shard, in one buffer."""
    found: list[bytes] = []
    for document in open_documents(path, path, FIELD):
        if isinstance(document, Texts):
            found += document.one_by_one()
        elif isinstance(document, bytes):
            found.append(document)
    return Texts(np.frombuffer(b"".join(found), np.uint8), np.cumsum([0, *map(len, found)]))
