"""`kill -9` at the points of the protocol: a fast part of the matrix (tests/kill_matrix.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline import messages
from pipeline.child import ROLES
from tests.kill_matrix import Kill, Matrix
from tests.points import SUPERVISOR, Point, documented, explicit, matrix, receives, sends
from tests.scenarios import SCENARIOS, world

# ── the list is complete ────────────────────────────────────────────────────────────────────


def test_every_message_is_sent_and_received_by_somebody_and_documented() -> None:
    """What the workers' sources say, what the table in messages.py says, and what there is."""
    table = documented()
    to_workers = set().union(*(names for way, names in table.items() if way.startswith(SUPERVISOR)))
    from_workers = set().union(*table.values()) - to_workers
    assert set().union(*(sends(role) for role in ROLES)) == from_workers
    assert set().union(*(receives(role) for role in ROLES)) == to_workers
    assert {message.__name__ for message in messages.ALL} == to_workers | from_workers


def test_every_faultpoint_belongs_to_a_role_and_is_in_the_matrix() -> None:
    points = list(explicit())
    assert len(points) > 15
    assert {point.role for point in points} == {*ROLES, SUPERVISOR}
    assert set(points) <= set(matrix())


def test_the_matrix_has_every_message_of_every_role_at_every_moment() -> None:
    points = set(matrix())
    for role in ROLES:
        for name in sends(role):
            assert {
                Point(role, f"{when}_send:{name}") for when in ("before", "mid", "after")
            } <= points
        for name in receives(role):
            assert {Point(role, f"{when}:{name}") for when in ("received", "handled")} <= points
    assert len(points) > 200


# ── a part of it, killed ────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    base = tmp_path_factory.mktemp("matrix")
    with world(base) as here:
        yield Matrix(base, here)


def kills(role: str, *points: tuple[str, int]) -> list[Kill]:
    return [Kill(Point(role, name), count) for name, count in points]


# Kills of one batch come about in one run; the writer's and the trainer's start the next
# generation, so they come one after another.
BATCHES = {
    "workers": (
        "plain",
        kills("fetcher", ("fetcher:mid_write", 1), ("mid_send:ShardFetched", 1))
        + kills("decompressor", ("decompressor:mid_block", 2), ("received:OpenShard", 1))
        + kills("tokenizer", ("tokenizer:mid_place", 2), ("mid_send:Encoded", 3)),
    ),
    "workers again": (
        "plain",
        kills("fetcher", ("fetcher:before_rename", 1), ("fetcher:after_rename", 1))
        + kills("decompressor", ("mid_send:BlockFilled", 2), ("after_send:ShardEnded", 1))
        + kills("tokenizer", ("before_send:Placed", 3), ("tokenizer:before_encode", 4)),
    ),
    "writer": (
        "plain",
        kills("writer", ("writer:mid_write", 4), ("writer:after_close", 2),
              ("writer:before_rename", 1), ("before_send:ConsumerDone", 1)),
    ),
    "trainer": (
        "train",
        kills("trainer", ("checkpoint:mid_write", 2), ("checkpoint:after_rename", 1),
              ("trainer:step", 11)),
    ),
    "supervisor evicts": ("plain", kills(SUPERVISOR, ("supervisor:before_evict", 2))),
    "supervisor sends": ("plain", kills(SUPERVISOR, ("mid_send:Place", 3))),
    "supervisor receives": ("train", kills(SUPERVISOR, ("received:CheckpointWritten", 2))),
}  # fmt: skip


@pytest.mark.parametrize("batch", BATCHES)
def test_kills_change_nothing_and_leave_nothing(whole: Matrix, batch: str) -> None:
    name, plan = BATCHES[batch]
    assert {kill.point for kill in plan} <= set(matrix())
    assert whole.check(SCENARIOS[name], plan) == len(plan), "a kill did not come about"
