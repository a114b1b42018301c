"""What `--dry-run` tells: what a run would do here, with the shards looked up and nothing written.

Runs in: the command line's own process.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec

from pipeline import (
    budget,
    catalog,
    checkpoints,
    costs,
    encoding,
    held_out,
    identity,
    manifest,
    mixture,
    sizes,
)
from pipeline.cli_watch import watch
from pipeline.messages import Cursor
from pipeline.screen import human
from pipeline.state import Plan
from pipeline.supervisor import Job, fixed_bytes
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
    smallest_bytes: int  # lanes, logs, and the checkpoints if their size is known
    checkpoint_bytes: int | None
    free_bytes: int  # on the disk of the run's folder
    workers: dict[str, Any]


def look(job: Job) -> Facts:
    """Find out.

    Raises:
        FinewebError: what would stop the run: shards, budget, or a checkpoint of another run.
    """
    config, stream = job.config, job.config.data.stream
    tokenizer, run_dir = config.data.tokenizer, Path(job.run_dir)
    vocabulary = encoding.vocabulary(tokenizer.name, tokenizer.vocab_size)
    options = stream.source_options()
    given = manifest.read(Path(stream.manifest)) if stream.manifest else None
    shards, set_sizes = mixture.read(stream, options, catalog.Known(given), watch())
    names = [shard.name for shard in shards]
    held_out.check_apart(config, names, options)
    groups = mixture.groups(config, set_sizes)
    lanes = sum(group.lanes for group in groups)
    expected = identity.identity(config, shards, lanes, mix=mixture.described(groups))
    step, tokens, checkpoint = _resume(job, expected)
    cost = costs.of(
        names[0],
        lambda: encoding.load(tokenizer.name, tokenizer.vocab_size),
        f"{tokenizer.name}-{vocabulary.size}",
    )
    zero_disk, budget_bytes = stream.max_disk_gb == 0, int(stream.max_disk_gb * 1e9)
    remote = [s.size_bytes for s in shards if catalog.local_path(s.url) is None]
    floor = budget.floor_bytes(remote, Plan.grant_step_bytes) if remote and not zero_disk else 0
    fixed = fixed_bytes(job) + catalog.size_bytes(run_dir, shards)[1]
    kept = checkpoint * (checkpoints.most(config) + 1) if checkpoint else 0
    if not zero_disk:  # else no shard comes onto the disk, and logs have limits of their own
        budget.refuse_too_small(
            budget_bytes, fixed_bytes=fixed, checkpoint_bytes=kept, floor=floor, lanes=lanes
        )
    there = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents)
                 if folder.exists())  # fmt: skip
    return Facts(
        run_dir=job.run_dir,
        shards=len(shards),
        shard_bytes=sum(shard.size_bytes or 0 for shard in shards),
        unknown_sizes=sum(shard.size_bytes is None for shard in shards),
        first_shard=names[0],
        last_shard=names[-1],
        lanes=lanes,
        resume_step=step,
        resume_tokens=tokens,
        deletes=_deletes(job),
        budget_bytes=budget_bytes,
        smallest_bytes=fixed + kept + floor * lanes,
        checkpoint_bytes=kept if checkpoint or job.kind == "tokenize" else None,
        free_bytes=shutil.disk_usage(there).free,
        workers=msgspec.structs.asdict(sizes.split(sizes.usable_cpus(), job.kind, stream, cost)),
    )


def _resume(job: Job, expected: dict[str, Any]) -> tuple[int | None, int, int]:
    """Step, tokens and bytes of the checkpoint that the run would go on from."""
    run_dir = Path(job.run_dir)
    if job.fresh or not run_dir.is_dir():
        return None, 0, 0
    cursor: Cursor | None = None
    step, size = None, 0
    if job.kind == "tokenize":
        if state := writer.read_state(run_dir):
            cursor = state.cursor
    elif latest := checkpoints.latest(run_dir):
        cursor, step, size = latest.cursor, latest.state.step, latest.size_bytes
    if cursor is None:
        return None, 0, 0
    identity.refuse_other(cursor, expected, str(run_dir))
    return step, sum(lane.position for lane in cursor.lanes), size


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
    if facts.checkpoint_bytes is None:
        lines.append("           checkpoints come on top: the trainer will say how large they are")
    if facts.free_bytes < facts.budget_bytes:
        lines.append("           the disk is smaller than the budget: give less with --max-disk")
    lines += [f"  DELETES  {path}" for path in facts.deletes]
    return "\n".join(lines)
