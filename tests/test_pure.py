"""Lanes, budget, blocks and schedules against independent references."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import budget
from pipeline.blocks import BlockData, Texts, blocks
from pipeline.config import Scheduler
from pipeline.encoding import safe_cut
from pipeline.errors import BudgetError
from pipeline.lanes import LanePlan, deal, permutation
from pipeline.messages import BadRecord
from trainer import schedule

SIZES = st.lists(st.one_of(st.none(), st.integers(0, 10**9)), min_size=1, max_size=40)


@given(SIZES, st.data())
def test_every_epoch_deals_every_shard_once(sizes: list[int | None], data: st.DataObject) -> None:
    lanes = data.draw(st.integers(1, len(sizes)))
    seed = data.draw(st.one_of(st.none(), st.integers(0, 9)))
    plan = LanePlan(sizes, lanes=lanes, seed=seed, epochs=3)
    turns = []
    for lane in range(lanes):
        sequence = 0
        while (turn := plan.turn(lane, sequence)) is not None:
            turns.append(turn)
            sequence += 1
        epochs = [plan.turn(lane, n).epoch for n in range(sequence)]  # type: ignore[union-attr]
        assert epochs == sorted(epochs)
    assert sorted(turns) == [(epoch, shard) for epoch in range(3) for shard in range(len(sizes))]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 8))
def test_lanes_are_balanced(sizes: list[int], lanes: int) -> None:
    """Greedy dealing: no lane is ahead of another by more than the largest shard."""
    lanes = min(lanes, len(sizes))
    dealt = deal(sizes, range(len(sizes)), lanes)
    loads = [sum(sizes[shard] for shard in lane) for lane in dealt]
    assert max(loads) - min(loads) <= max(sizes)
    assert all(dealt)


@given(st.integers(1, 60), st.integers(0, 99), st.integers(0, 9))
def test_a_permutation_is_one_and_depends_on_seed_and_epoch(n: int, seed: int, epoch: int) -> None:
    order = permutation(n, seed, epoch)
    assert sorted(order) == list(range(n))
    assert permutation(n, seed, epoch) == order
    if n > 30:
        assert permutation(n, seed + 1, epoch) != order != permutation(n, seed, epoch + 1)


def test_the_permutation_never_changes() -> None:
    """It is part of every cursor in the world: this list is the contract."""
    assert permutation(8, 42, 0) == [1, 5, 6, 3, 7, 4, 0, 2]


def test_the_smallest_budget_is_named_and_works() -> None:
    needs = {
        "fixed_bytes": 1_000_000,
        "checkpoint_bytes": 5_000_000,
        "floor": 2_000_001,
        "lanes": 3,
    }
    with pytest.raises(BudgetError) as caught:
        budget.refuse_too_small(12_000_002, **needs)
    named = float(caught.value.remedy.split()[2])
    budget.refuse_too_small(int(named * 1e9), **needs)
    budget.refuse_too_small(12_000_003, **needs)


@given(SIZES, st.integers(1, 100))
def test_a_floor_holds_any_shard_whose_size_is_known(sizes: list[int | None], step: int) -> None:
    floor = budget.floor_bytes(sizes, step)
    assert all(size <= floor for size in sizes if size is not None)
    assert floor >= step or None not in sizes


WORDS = st.text(st.sampled_from("ab c\n.é1'"), max_size=60).map(str.encode)


DOCUMENTS = st.lists(st.one_of(WORDS, st.just(BadRecord("x", "y"))), max_size=30)


def pieces_of(block: BlockData) -> list[bytes]:
    """A block's documents, each as bytes of its own."""
    raw = b"".join(bytes(piece) for piece in block.pieces)
    assert len(raw) == sum(block.lengths)
    ends = list(itertools.accumulate(block.lengths, initial=0))
    return [raw[start:end] for start, end in itertools.pairwise(ends)]


@given(DOCUMENTS, st.integers(8, 40), st.integers(1, 5))
def test_blocks_hold_every_document_in_order(
    documents: list[bytes | BadRecord], block_bytes: int, most: int
) -> None:
    cut = safe_cut("gpt2")
    made = list(blocks(documents, block_bytes=block_bytes, max_documents=most, cut=cut))
    joined: list[bytes] = []
    for block in made:
        pieces = pieces_of(block)
        assert sum(block.lengths) <= block_bytes
        assert len(pieces) <= most
        assert block.begins == len(pieces) - block.continues
        for number, piece in enumerate(pieces):
            if block.continues and number == 0:
                joined[-1] += piece
            else:
                joined.append(piece)
    kept = [d for d in documents if isinstance(d, bytes)]
    lost = len(kept) - len(joined)
    assert sum(block.num_bad for block in made) == len(documents) - len(kept) + lost
    remaining = iter(kept)
    assert all(any(document == other for other in remaining) for document in joined)
    if lost:
        assert any(len(d) > block_bytes for d in kept)


@given(DOCUMENTS, st.integers(8, 40), st.integers(1, 5), st.data())
def test_documents_in_one_buffer_make_the_same_blocks(
    documents: list[bytes | BadRecord], block_bytes: int, most: int, data: st.DataObject
) -> None:
    """Runs of documents are handed over in one buffer, cut out of a larger one."""
    together: list[bytes | Texts | BadRecord] = []
    for is_text, run in itertools.groupby(documents, lambda one: isinstance(one, bytes)):
        some = list(run)
        if is_text and data.draw(st.booleans()):
            ends = np.cumsum([3, *map(len, some)])  # type: ignore[arg-type]
            text = np.frombuffer(b"xyz" + b"".join(some) + b"w", np.uint8)  # type: ignore[arg-type]
            together.append(Texts(text, ends))
        else:
            together += some
    rule: Any = {"block_bytes": block_bytes, "max_documents": most, "cut": safe_cut("gpt2")}
    one_by_one, at_once = list(blocks(documents, **rule)), list(blocks(together, **rule))
    assert [pieces_of(block) for block in at_once] == [pieces_of(block) for block in one_by_one]
    for ours, other in zip(at_once, one_by_one, strict=True):
        assert (ours.continues, ours.begins, ours.bad) == (other.continues, other.begins, other.bad)


@given(
    st.sampled_from(["cosine", "wsd", "constant"]),
    st.integers(2, 200),
    st.data(),
    st.floats(0, 1),
)
def test_schedules(kind: str, total: int, data: st.DataObject, low: float) -> None:
    warmup = data.draw(st.integers(0, total - 2))
    config = Scheduler(type=kind, warmup_steps=warmup, min_lr_ratio=low)  # type: ignore[arg-type]
    values = [schedule.multiplier(config, step, total) for step in range(total)]
    assert all(0 < value <= 1 for value in values[:warmup])
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup] == 1.0
    after = values[warmup:]
    assert after == sorted(after, reverse=True)
    assert values[-1] == (1.0 if kind == "constant" else low)


def test_cosine_is_the_textbook_s() -> None:
    config = Scheduler(type="cosine", warmup_steps=10, min_lr_ratio=0.1)
    for step in range(10, 100):
        progress = (step - 10) / 89
        expected = 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
        assert schedule.multiplier(config, step, 100) == pytest.approx(expected, abs=1e-12)
