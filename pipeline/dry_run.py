"""What `--dry-run` tells: what a run would do here, with the shards looked up and nothing written.

Runs in: the command line's own process.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec

from pipeline import (
    checkpoints,
    costs,
    encoding,
    identity,
    mixture,
    sizes,
)
from pipeline.messages import Cursor
from pipeline.screen import human
from pipeline.supervisor import Job
from pipeline.survey import survey
from pipeline.workers import writer


class Facts(msgspec.Struct, frozen=True):
    """What would happen."""

    run_dir: str
    shards: int
    shard_bytes: int  # of those whose size the server says
    unknown_sizes: int
    first_shard: str
    last_shard: str
    lanes: int
    resume_step: int | None  # of the checkpoint; None: it would begin at the beginning
    resume_tokens: int
    deletes: list[str]  # by --fresh
    budget_bytes: int
    smallest_bytes: int  # lanes, logs and checkpoints
    checkpoint_bytes: int
    free_bytes: int  # on the disk of the run's folder
    workers: dict[str, Any]


def look(job: Job) -> Facts:
    """Find out.

    Raises:
        FinewebError: what would stop the run: shards, budget, or a checkpoint of another run.
    """
    config, stream, run_dir = job.config, job.config.data.stream, Path(job.run_dir)
    found = survey(job)
    names = [shard.name for shard in found.shards]
    mix = mixture.described(found.groups)
    step, tokens = _resume(job, identity.identity(config, found.shards, found.lanes, mix=mix))
    tokenizer = config.data.tokenizer
    cost = costs.of(
        names[0],
        lambda: encoding.load(tokenizer.name, tokenizer.vocab_size),
        costs.kind_of(config, found.vocabulary.size),
    )
    found.refuse_too_small()
    there = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents)
                 if folder.exists())  # fmt: skip
    return Facts(
        run_dir=job.run_dir,
        shards=len(found.shards),
        shard_bytes=sum(shard.size_bytes or 0 for shard in found.shards),
        unknown_sizes=sum(shard.size_bytes is None for shard in found.shards),
        first_shard=names[0],
        last_shard=names[-1],
        lanes=found.lanes,
        resume_step=step,
        resume_tokens=tokens,
        deletes=_deletes(job),
        budget_bytes=found.budget_bytes,
        smallest_bytes=found.smallest_bytes,
        checkpoint_bytes=found.checkpoint_bytes * found.checkpoints,
        free_bytes=shutil.disk_usage(there).free,
        workers=msgspec.structs.asdict(sizes.split(sizes.usable_cpus(), job.kind, stream, cost)),
    )


def _resume(job: Job, expected: dict[str, Any]) -> tuple[int | None, int]:
    """Step and tokens of the checkpoint that the run would go on from."""
    run_dir = Path(job.run_dir)
    if job.fresh or not run_dir.is_dir():
        return None, 0
    cursor: Cursor | None = None
    step = None
    if job.kind == "tokenize":
        if state := writer.read_state(run_dir):
            cursor = state.cursor
    elif latest := checkpoints.latest(run_dir):
        cursor, step = latest.cursor, latest.state.step
    if cursor is None:
        return None, 0
    identity.refuse_other(cursor, expected, str(run_dir))
    return step, sum(lane.position for lane in cursor.lanes)


def _deletes(job: Job) -> list[str]:
    if not job.fresh:
        return []
    run_dir = Path(job.run_dir)
    found = checkpoints.whole(run_dir) if job.kind == "train" else run_dir.glob("tokens_*.bin*")
    return sorted(str(path) for path in found)


def describe(facts: Facts) -> str:
    """The same in words."""
    unknown = f", {facts.unknown_sizes} of unknown size" if facts.unknown_sizes else ""
    where = "from the beginning"
    if facts.resume_tokens:
        step = f"update {facts.resume_step}, " if facts.resume_step is not None else ""
        where = f"on from {step}{facts.resume_tokens:,} tokens"
    workers = facts.workers
    budget_said = f"budget {facts.budget_bytes / 1e9:.3f} GB, of which"
    if facts.budget_bytes == 0:
        budget_said = "no shard, for checkpoints and logs"
    lines = [
        "nothing was done; this is what would be:",
        f"  shards   {facts.shards} in {facts.lanes} lanes, {human(facts.shard_bytes, 'B')}"
        f"{unknown}: {facts.first_shard} … {facts.last_shard}",
        f"  run      {facts.run_dir}, {where}",
        f"  workers  {workers['fetchers']} fetchers, {workers['decompressors']} decompressors, "
        f"{workers['tokenizers']} tokenizers: {workers['why']}",
        f"  disk     {budget_said} {facts.smallest_bytes / 1e9:.3f} are the least it needs; "
        f"{facts.free_bytes / 1e9:.3f} GB are free",
    ]
    if facts.free_bytes < facts.budget_bytes:
        lines.append("           the disk is smaller than the budget: give less with --max-disk")
    lines += [f"  DELETES  {path}" for path in facts.deletes]
    return "\n".join(lines)
