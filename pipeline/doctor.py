"""What this machine offers a run, and what it lacks: findings, each with its remedy.

Runs in: the command line's own process, for `doctor`. Writes nothing; only its child
(trainer/probe.py) imports mlx.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import psutil

from pipeline import catalog, hub_source
from pipeline.config import Stream
from pipeline.errors import FinewebError
from pipeline.screen import human
from pipeline.sizes import usable_cpus
from pipeline.sources import ChangedError, Stat, TransientError, open_source
from shm import segment

Level = Literal["ok", "warning", "error"]
_OLDEST = (3, 11)
_PROBE_S = 120.0  # MLX's first start on a GPU compiles
_SLOW_GFLOPS = 20.0  # the reference BLAS makes 5, a real one 50 and more on one core
_WORKER_BYTES = 400 << 20  # a tokenizer with its tables, an update's worth of slack
_SHARED_BYTES = 256 << 20  # text slots and the ring of the default configuration
_DESCRIPTORS_EACH = 4  # socket and standard error of a worker, and what it fetches
_DESCRIPTORS = 64  # the supervisor's own
_SPEED_BYTES, _SPEED_S = 8 << 20, 3.0  # a shard is read so far, or so long
_SLOW_FIRST_BYTE_S = 2.0


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    subject: str
    level: Level
    what: str
    remedy: str = ""


def examine(patterns: list[str], folder: Path, max_disk_gb: float) -> Iterator[Finding]:
    """Look at everything, one finding as soon as there is one.

    Args:
        patterns: Shards that should be reached; none: the network is not looked at.
        folder: Where runs would be.
        max_disk_gb: The budget that they would have.
    """
    yield _python()
    yield from _mlx()
    yield _cpus()
    yield _memory()
    yield _shared_memory()
    yield _disk(folder, max_disk_gb)
    yield _descriptors()
    for scheme in ("s3", "gs", "az", "hf"):
        if any(pattern.startswith(f"{scheme}://") for pattern in patterns):
            yield credentials(scheme)
    for pattern in patterns:
        yield from _source(pattern)


# ── the machine ─────────────────────────────────────────────────────────────────────────────


def _python() -> Finding:
    what = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < _OLDEST:
        return Finding("python", "error", what, "install Python 3.11 or newer")
    if sys.platform not in ("linux", "darwin"):
        return Finding("python", "error", what, "use Linux or macOS: others have no MLX")
    return Finding("python", "ok", what)


def _mlx() -> Iterator[Finding]:
    """Its back end, device and speed, asked of a child."""
    install = {"darwin": "pip install mlx"}.get(
        sys.platform, "pip install 'mlx[cpu]', or 'mlx[cuda13]' with an NVIDIA GPU"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "trainer.probe"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PROBE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        yield Finding("mlx", "error", f"it did not answer in {_PROBE_S:.0f} s", install)
        return
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        yield Finding("mlx", "error", f"cannot be used: {lines[-1]}", install)
        return
    said: dict[str, Any] = msgspec.json.decode(done.stdout)
    yield from judge_mlx(said, gpu=shutil.which("nvidia-smi") is not None)


def judge_mlx(said: dict[str, Any], *, gpu: bool) -> Iterator[Finding]:
    """What the probe has said.

    Args:
        said: Its JSON.
        gpu: The machine has an NVIDIA GPU.
    """
    memory = f", {human(said['memory_bytes'], 'B')}" if said["memory_bytes"] else ""
    what = f"{said['mlx']} on the {said['device']}: {said['name']}{memory}"
    if said["device"] == "cpu" and gpu:
        remedy = "pip install 'mlx[cuda13]' in place of 'mlx[cpu]'"
        yield Finding("mlx", "warning", f"{what}; the GPU is not used", remedy)
    else:
        yield Finding("mlx", "ok", what)
    if said["device"] == "cpu":
        speed = f"{said['blas'].partition(':')[0]}, {said['gflops']:.0f} GFLOP/s in float32"
        slow = said["gflops"] < _SLOW_GFLOPS
        remedy = "pip install mkl, or apt-get install libopenblas0" if slow else ""
        yield Finding("blas", "warning" if slow else "ok", speed, remedy)


def _cpus() -> Finding:
    usable, all_of_them = usable_cpus(), os.cpu_count() or 1
    what = f"{usable} of {all_of_them} may be used"
    if usable < 2:
        remedy = "give it two: with one, data and training take turns"
        return Finding("cpu", "warning", what, remedy)
    return Finding("cpu", "ok", what)


def _memory() -> Finding:
    free, limit = psutil.virtual_memory().available, memory_limit()
    usable = min(free, limit) if limit is not None else free
    what = f"{human(usable, 'B')} can be had"
    if limit is not None:
        what += f", the cgroup's limit is {human(limit, 'B')}"
    wanted = usable_cpus() * _WORKER_BYTES + _SHARED_BYTES
    if usable < wanted:
        remedy = f"give it {human(wanted, 'B')}, or run fewer --workers"
        return Finding("memory", "warning", what, remedy)
    return Finding("memory", "ok", what)


def memory_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the cgroup (v2, then v1) allows, or None without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        limit = int(text) if text.isdigit() else None
        return limit if limit is not None and limit < 1 << 60 else None  # v1 says 2⁶³ for none
    return None


def _shared_memory() -> Finding:
    what = f"{human(_SHARED_BYTES, 'B')} can be shared"
    try:
        os.close(segment.create(_SHARED_BYTES))
    except OSError as error:
        return Finding(
            "shared memory", "error", f"{human(_SHARED_BYTES, 'B')} are refused: {error.strerror}",
            "free memory, or raise the container's limit (docker run --shm-size, --memory)",
        )  # fmt: skip
    return Finding("shared memory", "ok", what)


def _disk(folder: Path, max_disk_gb: float) -> Finding:
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    free, budget = shutil.disk_usage(there).free, int(max_disk_gb * 1e9)
    what = f"{human(free, 'B')} free at {there}, the budget is {human(budget, 'B')}"
    if not os.access(there, os.W_OK | os.X_OK):
        remedy = "give another --runs-dir or --out, or the right to write there"
        return Finding("disk", "error", f"{there} cannot be written", remedy)
    if free < budget:
        remedy = f"free some, or give --max-disk {free / 1e9 * 0.95:.3g} or less"
        return Finding("disk", "error", what, remedy)
    return Finding("disk", "ok", what)


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS + _DESCRIPTORS_EACH * 3 * usable_cpus()
    unlimited = soft == resource.RLIM_INFINITY
    what = "no limit" if unlimited else f"{soft} may be open"
    if not unlimited and soft < wanted:
        can = "" if hard == resource.RLIM_INFINITY or hard >= wanted else " (as root)"
        return Finding("file descriptors", "error", what, f"ulimit -n {wanted}{can}")
    return Finding("file descriptors", "ok", what)


# ── the shards ──────────────────────────────────────────────────────────────────────────────


class _Keys(NamedTuple):
    """What a store's requests are signed with: any whole set of variables does."""

    sets: tuple[tuple[str, ...], ...]
    unsigned: str  # the variable that says not to sign
    otherwise: str  # who needs none of them


_KEYS = {
    "s3": _Keys(
        (("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),),
        "AWS_SKIP_SIGNATURE",
        "a machine with a role needs neither",
    ),
    "gs": _Keys(
        (("GOOGLE_APPLICATION_CREDENTIALS",), ("GOOGLE_SERVICE_ACCOUNT",)),
        "GOOGLE_SKIP_SIGNATURE",
        "a machine of Google's with an account needs none",
    ),
    "az": _Keys(
        (
            ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"),
            ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_SAS_KEY"),
        ),
        "AZURE_SKIP_SIGNATURE",
        "a machine of Azure's with an identity needs the account's name alone",
    ),
}


def credentials(scheme: str) -> Finding:
    """Whether requests would be signed; the values are not looked at.

    Args:
        scheme: s3, gs, az or hf.
    """
    if scheme == "hf":
        if hub_source.token():
            return Finding("credentials", "ok", "hf: a token is set")
        return Finding("credentials", "ok", "hf: no token; HF_TOKEN opens private data sets")
    keys = _KEYS[scheme]
    region = ""
    if scheme == "s3":
        given = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        region = f", region {given}" if given else ", no AWS_REGION: us-east-1 is taken"
    for names in keys.sets:
        if all(os.environ.get(name) for name in names):
            return Finding("credentials", "ok", f"{scheme}: {' and '.join(names)} set{region}")
    if os.environ.get(keys.unsigned, "").lower() in ("1", "true"):
        return Finding("credentials", "ok", f"{scheme}: requests are not signed{region}")
    wanted = ", or ".join(" and ".join(names) for names in keys.sets)
    return Finding(
        "credentials", "warning", f"{scheme}: no keys in the environment{region}",
        f"set {wanted}, or {keys.unsigned}=true for what is public; {keys.otherwise}",
    )  # fmt: skip


def _source(pattern: str) -> Iterator[Finding]:
    """Whether a pattern's shards are there, and how fast the first one comes."""
    options = Stream(max_retries=1, timeout_s=10.0).source_options()
    begin = time.monotonic()
    try:
        shards = catalog.build([pattern], options)
        listed_s = time.monotonic() - begin
        size = sum(shard.size_bytes or 0 for shard in shards)
        first = shards[0]
        yield Finding(
            "shards", "ok", f"{len(shards)} from {first.name} on, {human(size, 'B')}, "
            f"listed in {listed_s:.1f} s"
        )  # fmt: skip
        yield _speed(first.url, first.name, Stat(first.size_bytes, first.version), options)
    except FinewebError as error:
        yield Finding("shards", "error", error.what, error.remedy)


def _speed(url: str, name: str, stat: Stat, options: dict[str, Any]) -> Finding:
    """Read the beginning of a shard. Raises: FinewebError."""
    try:
        first_byte_s, rate = read_rate(url, stat, options)
    except (TransientError, ChangedError) as error:
        remedy = getattr(error, "remedy", "look again")
        return Finding("network", "error", str(error), remedy)
    if first_byte_s is None:
        return Finding("network", "error", f"{name} is empty", "check the pattern")
    what = f"first byte after {1e3 * first_byte_s:.0f} ms, then {human(rate, 'B/s')}"
    if first_byte_s > _SLOW_FIRST_BYTE_S:
        remedy = "more --fetchers and a larger --prefetch hide it"
        return Finding("network", "warning", what, remedy)
    return Finding("network", "ok", what)


def read_rate(url: str, stat: Stat, options: dict[str, Any]) -> tuple[float | None, float]:
    """Read the beginning of a shard: seconds to its first byte (None: it is empty), bytes/s.

    Raises:
        TransientError, ChangedError, FinewebError: see Source.read.
    """
    begin = time.monotonic()
    first_byte_s, size = None, 0
    for piece in open_source(url, options).read(0, stat).data:
        now = time.monotonic()
        first_byte_s = now - begin if first_byte_s is None else first_byte_s
        size += len(piece)
        if size >= _SPEED_BYTES or now - begin > _SPEED_S:
            break
    return first_byte_s, size / max(1e-6, time.monotonic() - begin)
