"""Several data sets by weight: exact shares, one stream, the same after any stop."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline import cache, config, dry_run, identity, mixture, rules, settings
from pipeline.errors import ConfigError
from pipeline.turns import Group, Turns
from pipeline.where import Request, find
from tests.harness import english, finish, run, start, wait_for_event, write_shards
from tests.training_jobs import STEPS, final_weights, steps_of, training

T = 4


@st.composite
def groups(draw: Any) -> tuple[Group, ...]:
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    firsts = [0, *itertools.accumulate(sizes)]
    weight = st.integers(1, 12)
    return tuple(Group(f"g{n}", firsts[n], size, draw(weight)) for n, size in enumerate(sizes))


@given(groups(), st.data())
@hypothesis_settings(max_examples=150, deadline=None)
def test_shares_are_exact_and_any_position_says_how_far_the_others_are(
    some: tuple[Group, ...], data: st.DataObject
) -> None:
    """Window by window: each data set is never further than its share than Webster's rule lets it
    be, and `reached` says of every window where all lanes stood when it was read."""
    lanes = sum(group.lanes for group in some)
    ends = [data.draw(st.none() | st.integers(0, 12 * T)) for _ in range(lanes)]
    most = [None if end is None else max(0, end - 1) // T for end in ends]
    turns, positions = Turns(some, T), [0] * lanes
    total = sum(group.weight for group in some)
    for count in range(60):
        lane = turns.next_lane(positions, ends)
        if lane is None:
            group = turns.next_group(positions)
            assert all(positions[one] // T == most[one] for one in group.members)
            break
        assert turns.reached(lane, positions[lane] // T, most) == [at // T for at in positions]
        positions[lane] += T
        for group in some:
            share = (count + 1) * group.weight / total
            assert abs(turns.windows(group, positions) - share) < max(2, len(some))


def test_one_data_set_is_a_round_of_its_lanes() -> None:
    turns, positions = Turns((Group("all", 0, 3, 1),), T), [0, 0, 0]
    taken = []
    for _ in range(7):
        lane = turns.next_lane(positions, [None, 2 * T, None])
        assert lane is not None
        taken.append(lane)
        positions[lane] += T
    assert taken == [0, 1, 2, 0, 2, 0, 2]


def _config(mix: Any, **stream: Any) -> config.Config:
    return config.from_plain({"name": "x", "data": {"stream": {"mix": mix, **stream}}})


def test_lanes_by_weight_and_the_fingerprint() -> None:
    mix = {"web": {"shards": ["a"], "weight": 0.7}, "code": {"shards": ["b"], "weight": 0.3}}
    some = mixture.groups(_config(mix), (100, 100))
    assert [(one.name, one.first, one.lanes, one.weight) for one in some] == [
        ("web", 0, 6, 7), ("code", 6, 2, 3)]  # fmt: skip
    assert [one.lanes for one in mixture.groups(_config(mix), (1, 3))] == [1, 3]
    other = mix | {"web": {"shards": ["a"], "weight": 0.6}}
    one, two = (
        identity.identity(
            _config(m), [], 8, mix=mixture.described(mixture.groups(_config(m), (9, 9)))
        )
        for m in (mix, other)
    )
    assert {key for key in one if one[key] != two[key]} == {"data.stream.mix"}
    assert "data.stream.mix" not in identity.identity(_config({}), [], 8)


@pytest.mark.parametrize(
    ("mix", "stream", "what"),
    [
        ({"a": {"shards": ["x"]}}, {"shards": ["y"]}, "shards or a mix"),
        ({"a": {"shards": ["x"], "weight": 0.0}}, {}, "mix.a.weight: 0.0 is not positive"),
        ({"a": {"shards": ["x"], "weight": float("nan")}}, {}, "mix.a.weight"),
        ({"a": {"shards": []}}, {}, "names no shards"),
        ({"a": {"shards": ["x"], "epochs": 0}}, {}, "mix.a.epochs"),
    ],
)
def test_mixes_that_cannot_be(mix: Any, stream: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        rules.validate(_config(mix, **stream))


def test_a_mix_is_shown_as_a_file_that_says_the_same(tmp_path: Path) -> None:
    text = '{"web": {"shards": ["x?sig=secret"], "weight": 2}, "on": {"shards": ["y"]}}'
    shown = settings.as_yaml(
        settings.resolve(None, {}, {"name": "x"}, {"FINEWEB_DATA_STREAM_MIX": text}), "start", {}
    )
    assert "# environment FINEWEB_DATA_STREAM_MIX" in shown
    assert "secret" not in shown
    (tmp_path / "again.yaml").write_text(shown)
    again = settings.load(str(tmp_path / "again.yaml"), {}).data.stream.mix
    assert {name: (one.shards, one.weight) for name, one in again.items()} == {
        "web": (["x"], 2.0), "on": (["y"], 1.0)
    }  # fmt: skip


def test_a_run_of_a_mix(tmp_path: Path) -> None:
    """Shares in metrics and summary; the same batches for other workers and after a stop; and
    `where` finds them."""
    documents = english(90, largest=5000)
    mix = {}
    for name, part, weight in (("web", documents[:60], 0.7), ("code", documents[60:], 0.3)):
        paths = write_shards(tmp_path / name, part, 3, "jsonl.zst")
        mix[name] = {"shards": [str(path) for path in paths], "weight": weight}
    one = training(tmp_path / "one", [], mix=mix)
    summary = run(tmp_path / "one", one)
    windows = STEPS * 8
    assert abs(summary["mix"]["web"] - 0.7) <= 1 / windows
    lines = (tmp_path / "one" / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert (last["mix_web"], last["mix_code"]) == (summary["mix"]["web"], summary["mix"]["code"])
    with cache.own(tmp_path / "one" / "cache"):  # as while it goes on: local shards need no cache
        answer = find(Request(tmp_path / "one" / "run", 20))
    assert answer.verified
    of_web = [all("/web/" in part.shard for part in row.documents) for row in answer.rows]
    assert 5 <= sum(of_web) <= 6
    facts = dry_run.look(one)
    assert (facts.shards, facts.resume_tokens) == (6, summary["tokens"])
    two = training(tmp_path / "two", [], mix=mix, workers=1)
    process = start(tmp_path / "two", two)
    for _ in wait_for_event(process, "step_done"):
        pass
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert process.returncode == 75
    run(tmp_path / "two", two)
    assert steps_of(tmp_path / "two") == steps_of(tmp_path / "one")
    assert final_weights(tmp_path / "two") == final_weights(tmp_path / "one")
    refused, _ = finish(start(tmp_path / "x", msgspec.structs.replace(one, kind="tokenize")))
    assert "only training mixes" in refused["what"]
