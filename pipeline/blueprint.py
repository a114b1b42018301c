"""What a run is built like: the layouts of shared memory, and the scheduler's plan.

Runs in: supervisor, and the command line for `plan`, whose forecast runs the same. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline import blocks, catalog
from pipeline.catalog import Shard
from pipeline.config import Config, Stream
from pipeline.lanes import Lanes
from pipeline.messages import Cursor, RingLayout, TextLayout
from pipeline.sizes import StageSizes
from pipeline.state import Plan, ShardInfo
from pipeline.turns import Group

NO_LIMIT = 1 << 62  # bytes: the budget of a run that brings no shard onto the disk
_BLOCKS_PER_TOKENIZER = 4


def ring_layout(config: Config, lanes: int, token_bytes: int) -> RingLayout:
    """Of the ring."""
    stream = config.data.stream
    return RingLayout(
        lanes=lanes,
        slots=stream.ring_slots,
        slot_tokens=stream.slot_windows * config.data.preprocessing.max_context_size,
        token_bytes=token_bytes,
    )


def text_layout(stream: Stream, lanes: int, tokenizers: int) -> TextLayout:
    """Of the text slots: one a lane, and what keeps the tokenizers busy."""
    return TextLayout(
        slots=lanes + _BLOCKS_PER_TOKENIZER * tokenizers,
        text_bytes=stream.block_bytes,
        documents=blocks.most_documents(stream.block_bytes),
    )


def plan(
    config: Config,
    shards: Sequence[Shard],
    lanes: Lanes,
    groups: tuple[Group, ...],
    stages: StageSizes,
    ring: RingLayout,
    *,
    text_slots: int,
    cache_dir: str,
    budget_bytes: int,
    fixed_bytes: int,
    cursor: Cursor | None,
    owned: tuple[int, ...] = (),
) -> Plan:
    """The scheduler's.

    Args:
        config: The run's.
        shards: Of all data sets.
        lanes: Which shard comes when in which lane.
        groups: The data sets' lanes.
        stages: How many workers.
        ring: Its layout.
        text_slots: How many there are.
        cache_dir: Where shards are kept.
        budget_bytes: On the disk; NO_LIMIT where no shard comes onto it.
        fixed_bytes: Of the budget, for logs and small files.
        cursor: Where to begin.
        owned: See state.Plan.
    """
    stream = config.data.stream
    zero_disk = stream.max_disk_gb == 0
    return Plan(
        shards=tuple(
            ShardInfo(
                shard.name,
                shard.url,
                shard.key,
                shard.version,
                shard.size_bytes,
                catalog.local_path(shard.url) or (shard.name if streamed else None),
                shard.sha256,
                streamed,
            )
            for shard in shards
            for streamed in [zero_disk and catalog.local_path(shard.url) is None]
        ),
        lanes=lanes,
        groups=groups,
        owned=owned,
        ring=ring,
        seq_len=config.data.preprocessing.max_context_size,
        text_slots=text_slots,
        cache_dir=cache_dir,
        budget_bytes=budget_bytes,
        fixed_bytes=fixed_bytes,
        workers={
            "fetcher": stages.fetchers,
            "decompressor": stages.decompressors,
            "tokenizer": stages.tokenizers,
        },
        prefetch=stream.prefetch,
        max_bad_records=stream.max_bad_records,
        max_bad_shards=stream.max_bad_shards,
        hang_s=stream.hang_s,
        cursor=cursor,
    )
