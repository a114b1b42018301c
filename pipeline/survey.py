"""What stands firm about a run before it begins: its shards, its lanes, the bytes that it needs.

Runs in: the command line's own process, for `--dry-run` and `plan`. Writes nothing.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from pipeline import budget, catalog, checkpoints, encoding, held_out, manifest, mixture, model_size
from pipeline.catalog import Shard
from pipeline.cli_watch import watch
from pipeline.encoding import Vocabulary
from pipeline.errors import ConfigError
from pipeline.state import Plan
from pipeline.supervisor import Job, fixed_bytes
from pipeline.turns import Group


class Survey(msgspec.Struct, frozen=True):
    """The facts."""

    vocabulary: Vocabulary
    shards: tuple[Shard, ...]
    set_sizes: tuple[int, ...]
    groups: tuple[Group, ...]
    remote: int  # shards that are not on this disk
    budget_bytes: int
    fixed_bytes: int  # logs, small files, the catalog that is kept
    checkpoint_bytes: int  # one checkpoint
    checkpoints: int  # on the disk at most, the one being written too
    floor_bytes: int  # of every lane

    @property
    def lanes(self) -> int:
        """Of all data sets."""
        return sum(group.lanes for group in self.groups)

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that the run accepts."""
        saved = self.checkpoint_bytes * self.checkpoints
        return self.fixed_bytes + saved + self.floor_bytes * self.lanes

    def refuse_too_small(self) -> None:
        """As the run would. Raises: BudgetError."""
        if self.budget_bytes:  # else no shard comes onto the disk; logs have their own limits
            budget.refuse_too_small(
                self.budget_bytes,
                fixed_bytes=self.fixed_bytes,
                checkpoint_bytes=self.checkpoint_bytes * self.checkpoints,
                floor=self.floor_bytes,
                lanes=self.lanes,
            )


def survey(job: Job) -> Survey:
    """Look the shards up, and add the bytes up.

    Raises:
        FinewebError: no shards, one that cannot be had, or a configuration that cannot be.
    """
    config, stream = job.config, job.config.data.stream
    if stream.mix and job.kind == "tokenize":
        raise ConfigError(
            "data.stream.mix: only training mixes data sets",
            "tokenize each of them by itself, with --shards and an --out of its own",
        )
    tokenizer = config.data.tokenizer
    vocabulary = encoding.vocabulary(tokenizer.name, tokenizer.vocab_size)
    given = manifest.read(Path(stream.manifest)) if stream.manifest else None
    options = stream.source_options()
    shards, set_sizes = mixture.read(stream, options, catalog.Known(given), watch())
    held_out.check_apart(config, [shard.name for shard in shards], options)
    train, zero_disk = job.kind == "train", stream.max_disk_gb == 0
    remote = [one.size_bytes for one in shards if catalog.local_path(one.url) is None]
    floor = budget.floor_bytes(remote, Plan.grant_step_bytes) if remote and not zero_disk else 0
    return Survey(
        vocabulary=vocabulary,
        shards=shards,
        set_sizes=set_sizes,
        groups=mixture.groups(config, set_sizes),
        remote=len(remote),
        budget_bytes=int(stream.max_disk_gb * 1e9),
        fixed_bytes=fixed_bytes(job) + catalog.size_bytes(Path(job.run_dir), shards)[1],
        checkpoint_bytes=model_size.checkpoint_bytes(config, vocabulary.size) if train else 0,
        checkpoints=checkpoints.most(config) + 1 if train else 0,
        floor_bytes=floor,
    )
