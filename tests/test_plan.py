"""`plan` and `bench`: formulas against references, a forecast against its bounds, exact budgets."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pipeline import (
    blueprint,
    budget,
    catalog,
    cli_bench,
    costs,
    demo,
    mixture,
    model_size,
    scaling,
    supervisor,
)
from pipeline import settings as all_settings
from pipeline.cli import cli
from pipeline.errors import BudgetError, ConfigError
from pipeline.forecast import Forecast, Rates, Simulation, Training
from pipeline.sizes import StageSizes
from pipeline.state import Plan
from pipeline.survey import survey
from tests import harness

# ── formulas ────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 9), st.integers(1, 6))
def test_allreduce_sends_what_a_ring_sends(hosts: int, per_chunk: int) -> None:
    """Reduce-scatter and all-gather around a real ring of arrays, bytes counted."""
    rng = np.random.default_rng(hosts * 10 + per_chunk)
    whole = rng.integers(0, 99, (hosts, hosts, per_chunk)).astype(np.int32)  # host, chunk, part
    have, sent = whole.copy(), 0
    for step in range(2 * (hosts - 1)):
        before = have.copy()
        for host in range(hosts):
            chunk = (host - step + (step >= hosts - 1) * hosts) % hosts
            to = (host + 1) % hosts
            have[to, chunk] = (
                before[host, chunk] + have[to, chunk] if step < hosts - 1 else before[host, chunk]
            )
            sent += before[host, chunk].nbytes
    assert (have == whole.sum(axis=0)).all()
    assert sent / hosts == pytest.approx(scaling.allreduce_bytes(hosts, whole[0].nbytes))


@given(st.integers(1, 10**14))
def test_a_budget_in_gb_is_exact_to_the_byte(size: int) -> None:
    gigabytes = budget.as_gb(size)
    assert int(gigabytes * 1e9) == size
    assert int(math.nextafter(gigabytes, 0) * 1e9) < size or int(size / 1e9 * 1e9) == size


def test_more_hosts_are_never_slower_than_the_network_allows() -> None:
    table = scaling.hosts(64, 2048, 30.0, 0.5, 700_000_000, 10.0)
    assert [one.count for one in table] == [1, 2, 4, 8, 16, 32, 64]
    assert table[0].efficiency == 1.0
    assert table[1].tokens_per_s == pytest.approx(64 * 2048 / (15 + 0.5 + 0.56 + 1e-4))
    assert table[-1].limit == "the network"
    assert [one.count for one in scaling.hosts(6, 8, 1.0, 0.0, 1, 1.0)] == [1, 2]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoints_bytes_are_those_that_the_trainer_reserves(
    optimizer: str, tied: bool
) -> None:
    from trainer import blas

    blas.preload()
    import mlx.core as mx

    from trainer import checkpoint, optim
    from trainer.loop import Loop

    config = all_settings.load(
        "demo",
        {
            "training.optimization.optimizer": optimizer,
            "model.misc.tie_word_embeddings": tied,
            "model.misc.attention_bias": not tied,
            "model.misc.mlp_bias": not tied,
        },
    )
    mx.set_default_device(mx.cpu)
    loop = Loop(config, 300, mx.float32)
    assert model_size.checkpoint_bytes(config, 300) == checkpoint.largest_bytes(loop)
    hidden = [a.shape for name, a in loop.weights.items() if optim.is_hidden_matrix(name, a)]
    assert model_size.layer_parameters(config.model) == sum(math.prod(one) for one in hidden)
    steps = config.training.optimization.ns_steps if optimizer == "muon" else 0
    products = sum(2 * min(s) ** 2 * (2 * max(s) + min(s)) for s in hidden)
    small = 16 * model_size.num_parameters(config.model, 300)
    assert model_size.optimizer_flops(config, 300) == pytest.approx(steps * products + small)


# ── the forecast ────────────────────────────────────────────────────────────────────────────

_RATES = Rates(
    cpus=4, read_s=0.02, encode_s=0.03, write_s=0.002, supervise_s=0.001, fetch_s=0.001,
    tokens_per_mb=230_000, text_per_shard_byte=3.0, network_bytes_per_s=1e9,
)  # fmt: skip


def _plan(shards: int, size: int, workers: tuple[int, int, int], **changes: object) -> Plan:
    lanes = min(shards, 8)
    config = all_settings.load(
        None, {"name": "x", "data.stream.lanes": lanes, "data.stream.epochs": 1}
    )
    found = tuple(
        catalog.Shard(n, f"http://host/{n}", f"shard-{n}", size, "1") for n in range(shards)
    )
    groups, stages = mixture.groups(config, (shards,)), StageSizes(*workers, "")
    plan = blueprint.plan(
        config, found, mixture.plan(config, found, (shards,), groups), groups, stages,
        blueprint.ring_layout(config, lanes, 2), text_slots=lanes + 4 * workers[2],
        cache_dir="", budget_bytes=10**11, fixed_bytes=0, cursor=None,
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]


def _run(plan: Plan, rates: Rates, training: Training | None = None) -> Forecast:
    return Simulation(plan, rates, training, block_bytes=4 << 20).run()


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate], deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 8),
    st.floats(0.005, 0.1), st.floats(0.005, 0.1), st.floats(5e6, 1e9),
)  # fmt: skip
def test_a_forecast_makes_every_token_and_is_as_fast_as_its_slowest_part(
    f: int, d: int, t: int, cpus: int, read_s: float, encode_s: float, network: float
) -> None:
    rates = msgspec.structs.replace(
        _RATES, cpus=cpus, read_s=read_s, encode_s=encode_s, network_bytes_per_s=network
    )
    plan = _plan(16, 10_000_000, (f, d, t))
    said = _run(plan, rates)
    text_mb = 16 * 10 * rates.text_per_shard_byte
    assert said.whole
    assert said.tokens == pytest.approx(text_mb * rates.tokens_per_mb, rel=1e-4)
    assert said.fetched_bytes == 160_000_000
    every = read_s + encode_s + rates.write_s + rates.supervise_s + rates.fetch_s / 3.0
    bounds = [read_s / d, encode_s / t, every / cpus, 1e6 / 3.0 / network, rates.write_s]
    rate = said.tokens_per_s / rates.tokens_per_mb
    assert rate <= 1.05 / max(bounds)  # supervisor and writer run at once, on whatever there is
    assert rate >= 0.5 / sum(bounds)  # stage after stage, with work that divides unevenly
    assert said.peak_disk_bytes <= plan.budget_bytes


def test_with_enough_workers_a_forecast_is_the_formula_of_more_cores() -> None:
    rates = msgspec.structs.replace(_RATES, cpus=8, network_bytes_per_s=1e12)
    said = _run(_plan(64, 20_000_000, (2, 8, 10)), rates)
    parallel = {"read": rates.read_s, "encode": rates.encode_s, "fetch": rates.fetch_s / 3.0}
    serial = {"writer": rates.write_s, "supervisor": rates.supervise_s}
    told = scaling.pipeline(8, parallel, serial, rates.tokens_per_mb)
    assert told.limit == "the cores"
    assert 0.8 * told.tokens_per_s < said.tokens_per_s < told.tokens_per_s
    few = scaling.pipeline(2000, parallel, serial, rates.tokens_per_mb)
    assert (few.limit, few.tokens_per_s) == ("the writer", rates.tokens_per_mb / rates.write_s)


def test_a_slow_trainer_never_waits_and_a_fast_one_does_and_saves_are_on_the_disk() -> None:
    slow = Training(0.5, 0.1, 0.0, 8, 2, 40, 1_000_000, 900_000, 10, 2)
    plan = _plan(24, 10_000_000, (2, 2, 2))
    said = _run(plan, _RATES, slow)
    assert said.wait_share is not None
    assert said.wait_share < 0.01
    assert said.wall_s == pytest.approx(40 * (2 * 0.5 + 0.1), rel=0.05)
    assert said.limiting["consumer"] > 0.9
    none = _run(plan, _RATES, msgspec.structs.replace(slow, saved_bytes=0, checkpoint_bytes=0))
    assert said.peak_disk_bytes - none.peak_disk_bytes == 2 * 900_000 + 1_000_000
    busy = msgspec.structs.replace(_RATES, encode_s=0.3)
    fast = _run(plan, busy, msgspec.structs.replace(slow, micro_s=1e-3, apply_s=0.0, updates=900))
    assert fast.wait_share is not None
    assert fast.wait_share > 0.5
    assert fast.limiting["consumer"] < 0.5


def test_a_budget_with_no_room_ahead_makes_the_trainer_wait() -> None:
    rates = msgspec.structs.replace(_RATES, network_bytes_per_s=20e6)
    trainer = Training(0.0015, 0.0, 0.0, 8, 1, 9000)
    small = _run(_plan(24, 10_000_000, (2, 2, 2), budget_bytes=80_000_000), rates, trainer)
    large = _run(_plan(24, 10_000_000, (2, 2, 2), budget_bytes=300_000_000), rates, trainer)
    assert small.peak_disk_bytes < large.peak_disk_bytes
    assert (small.wait_share or 0) > (large.wait_share or 0)
    with pytest.raises(BudgetError):
        _run(_plan(24, 10_000_000, (2, 2, 2), budget_bytes=79_999_999), rates, trainer)


# ── the smallest budget ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["tokenize", "train"])
def test_the_smallest_budget_is_exact(tmp_path: Path, kind: str) -> None:
    paths = harness.write_shards(tmp_path / "shards", harness.english(24), 4, "jsonl.zst")
    with demo.served(paths[0].parent) as (url, _):
        more = {} if kind == "tokenize" else _tiny_model()
        urls = [f"{url}/{path.name}" for path in paths]
        one, other = (harness.job(tmp_path / n, urls, kind=kind, **more) for n in ("a", "b"))
        smallest = survey(one).smallest_bytes
        less = harness.start(tmp_path / "less", _with_budget(other, smallest - 1))
        said, _ = harness.finish(less)
        assert less.returncode == 4
        assert f"{smallest / 1e9:.3f} GB" in said["what"]
        exact = harness.start(tmp_path / "exact", _with_budget(one, smallest))
        said, _ = harness.finish(exact)
        assert exact.returncode == 0, said
        assert said["summary"]["peak_disk_bytes"] <= smallest


def _with_budget(one: supervisor.Job, size: int) -> supervisor.Job:
    stream = msgspec.structs.replace(one.config.data.stream, max_disk_gb=budget.as_gb(size))
    data = msgspec.structs.replace(one.config.data, stream=stream)
    return msgspec.structs.replace(one, config=msgspec.structs.replace(one.config, data=data))


def _tiny_model() -> dict[str, object]:
    return {
        "tokenizer": {"vocab_size": 300},
        "model": {
            "dimensions": {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1},
            "attention": {"num_heads": 2},
        },
        "training": {
            "hyperparameters": {"iters": 2, "batch_size": 2, "gradient_accumulation_steps": 1}
        },
    }


# ── the commands ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pattern of tiny shards; costs are kept in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    harness.write_shards(tmp_path / "shards", harness.english(24), 3, "jsonl.zst")
    return str(tmp_path / "shards" / "*.zst")


def _keep_costs() -> costs.Costs:
    rest = costs.Rest(0.001, 0.002, 0.0005, 230_000.0, 3.0, 0.7, 80_000_000, "your shards")
    cost = costs.Costs(0.03, 0.01, rest)
    costs.keep("x.jsonl.zst", "gpt2-300", cost)
    return cost


def test_plan_tells_all_of_it_and_measures_the_trainer_once(shards: str, tmp_path: Path) -> None:
    _keep_costs()
    file = tmp_path / "tiny.yaml"
    stream = {"lanes": 1, "epochs": 1, "max_disk_gb": 0.1, "block_bytes": 40_000}
    tiny = _tiny_model()
    data = {"tokenizer": tiny.pop("tokenizer"), "stream": stream}
    data["preprocessing"] = {"max_context_size": 64}
    file.write_text(json.dumps({"name": "tiny", "data": data, **tiny}))
    arguments = ["plan", "--config", str(file), "--shards", shards, "--calibrate-s", "1"]
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert "measuring the trainer" in done.stderr
    assert told["model"]["updates"] == 2
    assert told["forecast"]["tokens"] == 2 * 2 * 64
    assert told["model"]["flops"] == told["model"]["flops_per_token"] * 256
    assert told["smallest_bytes"] == survey(_job(file, shards, tmp_path)).smallest_bytes
    assert [one["count"] for one in told["cores"]] == list(scaling.CORES)
    assert [one["count"] for one in told["hosts"]] == [1, 2]
    again = CliRunner().invoke(cli, arguments)
    assert "measuring" not in again.stderr
    assert max(map(len, again.stdout.splitlines())) <= 80
    for word in ("model", "memory", "workers", "time", "disk", "cores", "hosts", "verdict"):
        assert word in again.stdout
    with pytest.raises(BudgetError, match="too small"):
        CliRunner().invoke(cli, [*arguments, "--max-disk", "0.001"], catch_exceptions=False)
    assert not (tmp_path / "runs").exists()


def _job(file: Path, shards: str, tmp_path: Path) -> supervisor.Job:
    config = all_settings.load(str(file), {"data.stream.shards": [shards]})
    return supervisor.Job("train", config, str(tmp_path / "runs" / "tiny"), str(tmp_path / "c"))


def test_after_a_bench_auto_chooses_by_what_was_measured(shards: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no shards"):
        CliRunner().invoke(cli, ["plan"], catch_exceptions=False)
    done = CliRunner().invoke(
        cli,
        ["bench", "--form", "jsonl.zst", "--megabytes", "8", "--rounds", "1",
         "--most-workers", "1", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    report = msgspec.json.decode(done.stdout, type=cli_bench.Report)
    assert [one.workers for one in report.points] == [1]
    assert report.points[0].tokens_per_s > 0
    vocabulary = "gpt2-50257"
    assert costs.known("shard.jsonl.zst", vocabulary) == report.costs
    dry = ["tokenize", "--shards", shards, "--out", "out", "--dry-run", "--json"]
    workers = json.loads(CliRunner().invoke(cli, dry).stdout)["workers"]
    assert workers["tokenizers"] == report.tokenize.tokenizers
    assert "by whole runs on the built-in corpus" in workers["why"]
    # other costs, other workers: they are what auto goes by
    slow = msgspec.structs.replace(report.costs, read_s=report.costs.encode_s * 50)
    costs.keep("shard.jsonl.zst", vocabulary, slow)
    assert (
        json.loads(CliRunner().invoke(cli, dry).stdout)["workers"]["decompressors"]
        >= (workers["decompressors"])
    )
    lines = list(cli_bench.describe(report))
    assert max(map(len, lines)) <= 80
    assert any("--workers" in line for line in lines)


def test_a_picture_needs_matplotlib_and_says_so_before_anything_is_run(
    shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="matplotlib") as error:
        CliRunner().invoke(cli, ["bench", "--png", "x.png"], catch_exceptions=False)
    assert "plot" in error.value.remedy
