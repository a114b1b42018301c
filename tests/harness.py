"""Whole runs for tests: shards of real English text, jobs, watchers, and who is still alive."""

from __future__ import annotations

import bz2
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.config import Config
from pipeline.supervisor import Job

ROOT = Path(__file__).parent.parent


def english(num_documents: int, *, largest: int = 40_000) -> list[str]:
    """Documents of real text: pieces of the standard library's sources, in a fixed order."""
    documents: list[str] = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        step = 500 + 7919 * (len(documents) + 1) % largest
        documents += [source[at : at + step] for at in range(0, len(source), step)]
        if len(documents) >= num_documents:
            return documents[:num_documents]
    raise AssertionError(f"the standard library has only {len(documents)} documents")


def split(documents: Sequence[str], num_shards: int) -> list[list[str]]:
    """Consecutive documents, about the same number in each shard."""
    per = -(-len(documents) // num_shards)
    return [list(documents[at : at + per]) for at in range(0, len(documents), per)]


def write_shards(
    folder: Path, documents: Sequence[str], num_shards: int, form: str = "tar.bz2"
) -> list[Path]:
    """The documents as num_shards files of one form: tar.bz2, jsonl.zst or parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, part in enumerate(split(documents, num_shards)):
        path = folder / f"shard-{number:05d}.{form}"
        path.write_bytes(_FORMS[form](part))
        paths.append(path)
    return paths


def _tar_bz2(documents: Sequence[str]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for number, text in enumerate(documents):
            data = json.dumps({"id": number, "text": text}).encode()
            info = tarfile.TarInfo(f"{number:06d}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return bz2.compress(raw.getvalue(), 1)


def _jsonl_zst(documents: Sequence[str]) -> bytes:
    lines = "".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in enumerate(documents))
    return zstandard.compress(lines.encode())


def _parquet(documents: Sequence[str]) -> bytes:
    out = io.BytesIO()
    table = pa.table({"id": list(range(len(documents))), "text": list(documents)})
    pq.write_table(table, out, row_group_size=16)
    return out.getvalue()


_FORMS = {"tar.bz2": _tar_bz2, "jsonl.zst": _jsonl_zst, "parquet": _parquet}


def job(
    folder: Path, shards: Sequence[Path | str], *, kind: str = "tokenize", **changes: Any
) -> Job:
    """A job with small sizes, so that a short run passes every boundary many times.

    changes: keys of data.stream, or of the job itself.
    """
    own = {
        key: changes.pop(key)
        for key in ("limit_tokens", "file_tokens", "fresh", "held_out")
        if key in changes
    }
    sections = {
        key: changes.pop(key)
        for key in ("model", "training", "logging", "system")
        if key in changes
    }
    tokenizer, validation = changes.pop("tokenizer", {}), changes.pop("validation", {})
    chosen = changes.pop("filter", {})
    stream = {
        "shards": [str(shard) for shard in shards],
        "lanes": 1,
        "shuffle": False,
        "epochs": 1,
        "max_disk_gb": 0.1,
        "workers": 2,
        "block_bytes": 40_000,
        "slot_windows": 8,
        "ring_slots": 3,
        **changes,
    }
    plain = {
        "name": folder.name,
        "data": {
            "preprocessing": {"max_context_size": 64},
            "tokenizer": tokenizer,
            "stream": stream,
            "filter": chosen,
            "validation": validation,
        },
        "logging": {"max_log_mb": 0.5, **sections.pop("logging", {})},
        **sections,
    }
    config = msgspec.convert(plain, Config)
    return Job(kind, config, str(folder / "run"), str(folder / "cache"), **own)  # type: ignore[arg-type]


def start(folder: Path, one: Job, **environment: str) -> subprocess.Popen[str]:
    """Start a run as its own process; events are JSON lines on its standard error."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.json"
    path.write_bytes(msgspec.json.encode(one))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.drive", str(path)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 90) -> tuple[dict[str, Any], str]:
    """The outcome (or error) of a run and its standard error."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"the run did not end in {timeout_s} s:\n{err[-6000:]}") from None
    if not out.strip():
        raise AssertionError(f"no outcome, exit code {process.returncode}:\n{err[-6000:]}")
    return json.loads(out.splitlines()[-1]), err


def run(folder: Path, one: Job, **environment: str) -> dict[str, Any]:
    """Run to the end and return the summary; anything but success fails the test."""
    process = start(folder, one, **environment)
    outcome, err = finish(process)
    assert process.returncode == 0, f"{outcome}\n{err[-4000:]}"
    return outcome["summary"]


def events(stderr: str, name: str) -> list[dict[str, Any]]:
    """All events of one name."""
    lines = [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == name]


def wait_for_event(process: subprocess.Popen[str], name: str) -> Iterator[str]:
    """Lines of standard error up to the first event of this name; the test's limit bounds it."""
    assert process.stderr is not None
    for line in process.stderr:
        yield line
        if f'"event":"{name}"' in line:
            return
    raise AssertionError(f"the run ended without {name}")


def descendants(pid: int) -> list[psutil.Process]:
    """All living children of a process, their children too."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


class DiskWatcher:
    """Samples the bytes in some folders every few milliseconds, in a thread of its own."""

    def __init__(self, *folders: Path, every_s: float = 0.002) -> None:
        self._folders, self._every_s = folders, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = self.samples = 0

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            total = sum(self._size(folder) for folder in self._folders)
            self.peak_bytes = max(self.peak_bytes, total)
            self.samples += 1

    def _size(self, folder: Path | str) -> int:
        total = 0
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        total += self._size(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            pass
        return total

    def __enter__(self) -> DiskWatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
