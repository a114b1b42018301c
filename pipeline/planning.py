"""What a run will need and do, told before anything is spent.

Runs in: the command line's own process, for `plan`. Writes nothing but the caches of measured
costs; only its child (trainer/calibrate.py) imports mlx.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import xxhash

from pipeline import (
    benching,
    blueprint,
    catalog,
    costs,
    doctor,
    mixture,
    model_size,
    sample_shards,
    scaling,
    sizes,
    user_cache,
)
from pipeline.config import Config, to_plain
from pipeline.costs import Costs
from pipeline.encoding import load
from pipeline.errors import FinewebError
from pipeline.forecast import Forecast, Rates, Simulation, Training
from pipeline.scaling import Reached
from pipeline.sizes import StageSizes
from pipeline.sources import ChangedError, Stat, TransientError
from pipeline.state import Plan
from pipeline.status import StageStatus
from pipeline.supervisor import Job
from pipeline.survey import Survey, survey
from pipeline.verdict import Evidence, verdict
from shm import ring, text

_FILE = "calibrations.json"
_MOST_KEPT = 32
_MOST_MB = 256.0  # of text that is measured on
_DISK_BYTES_PER_S = 200e6  # a checkpoint's way to the disk, as far as it matters to the peak
_STATE_BYTES = 1 << 13  # headers and state.json of a written checkpoint
_LISTED_S = 0.4  # of a start, until the trainer is begun

Say = Callable[[str], None]


class Memory(msgspec.Struct, frozen=True):
    """Bytes."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    measured: bool  # the activations are from a measured peak, not from the formula
    ring_bytes: int
    text_slots_bytes: int
    workers_bytes: int
    available_bytes: int

    @property
    def total_bytes(self) -> int:
        trainer = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        shared = self.ring_bytes + self.text_slots_bytes + self.workers_bytes
        return trainer + self.activations_bytes + shared


class Model(msgspec.Struct, frozen=True):
    """What is trained."""

    parameters: int
    flops_per_token: int
    flops: float  # of the whole run
    tokens_per_update: int
    updates: int
    calibration: dict[str, Any]


class Budget(msgspec.Struct, frozen=True):
    """What a disk budget brings."""

    name: str  # smallest, given, roomy
    budget_bytes: int
    forecast: Forecast


class Prediction(msgspec.Struct, frozen=True):
    """All of it."""

    kind: str
    shards: int
    shard_bytes: int
    unknown_sizes: int
    remote: int
    lanes: int
    budget_bytes: int
    smallest_bytes: int
    budgets: list[Budget]
    workers: StageSizes
    costs: Costs
    network_bytes_per_s: float | None
    forecast: Forecast
    start_s: float
    verdict: str
    memory: Memory
    model: Model | None
    cores: list[Reached]
    hosts: list[Reached]
    network_gbit: float
    notes: list[str]

    @property
    def wall_s(self) -> float:
        """Of the whole run, start included."""
        return self.start_s + self.forecast.wall_s


def predict(job: Job, *, network_gbit: float, calibrate_s: float, say: Say) -> Prediction:
    """Find out, measure for a few seconds, and simulate.

    Args:
        job: What would be run.
        network_gbit: Of each host's link, for the table of hosts.
        calibrate_s: Seconds that measuring may take, what is known already not counted.
        say: Told of what takes time.

    Raises:
        FinewebError: what would stop the run: shards, budget.
    """
    say("looking the shards up")
    found = survey(job)
    found.refuse_too_small()
    config = job.config
    cost = _costs(config, found, calibrate_s / 2, say)
    calibration = _trainer(config, calibrate_s / 2, say) if job.kind == "train" else None
    stages = sizes.split(sizes.usable_cpus(), job.kind, config.data.stream, cost)
    network = _network(config, found, say)
    rates = _rates(cost, network)
    training = None if calibration is None else _training(config, found, calibration)
    forecasts = _Forecasts(job, found, stages, rates, training)
    say("simulating the scheduler")
    budgets = forecasts.budgets()
    forecast = next(one.forecast for one in budgets if one.name == "given")
    rest = cost.rest
    assert rest is not None
    start_s = rest.start_s
    if calibration is not None:
        start_s = max(start_s, _LISTED_S + float(calibration["ready_s"]))
    return Prediction(
        kind=job.kind,
        shards=len(found.shards),
        shard_bytes=sum(one.size_bytes or 0 for one in found.shards),
        unknown_sizes=sum(one.size_bytes is None for one in found.shards),
        remote=found.remote,
        lanes=found.lanes,
        budget_bytes=found.budget_bytes,
        smallest_bytes=found.smallest_bytes,
        budgets=budgets if found.remote and found.budget_bytes else [],
        workers=stages,
        costs=cost,
        network_bytes_per_s=network,
        forecast=forecast,
        start_s=start_s,
        verdict=_verdict(job, stages, forecast, rates.cpus),
        memory=_memory(config, found, stages, cost, calibration, job.kind),
        model=None if calibration is None else _model(config, found, forecast, calibration),
        cores=_cores(cost),
        hosts=[] if training is None else _hosts(config, found, training, network_gbit),
        network_gbit=network_gbit,
        notes=_notes(config, found, cost, calibration),
    )


# ── what is measured ────────────────────────────────────────────────────────────────────────


def _costs(config: Config, found: Survey, seconds: float, say: Say) -> Costs:
    """Of the stages: what `bench` or an earlier plan has kept, or measured now."""
    name = found.shards[0].name
    encoding = costs.kind_of(config, found.vocabulary.size)
    tokenizer = config.data.tokenizer
    kept = costs.of(name, lambda: load(tokenizer.name, tokenizer.vocab_size), encoding)
    if kept.rest is not None:
        return kept
    megabytes = min(_MOST_MB, seconds / (kept.read_s + kept.encode_s))
    form = sample_shards.form_of(name)
    local = not found.remote and not config.data.stream.mix
    there = sum(one.size_bytes or 0 for one in found.shards) * benching.usual_ratio(form) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        if local and there > megabytes / 2:
            subject = benching.users(config, found.shards, megabytes)
        else:
            subject = benching.built_in(config, Path(folder), form, megabytes)
        say(f"measuring the pipeline on {megabytes:.0f} MB of {subject.said}")
        _, measured = benching.measure(subject, "auto")
    costs.keep(name, encoding, measured)
    return measured


def _trainer(config: Config, seconds: float, say: Say) -> dict[str, Any]:
    """What an update takes: kept, or measured by a child.

    Raises:
        FinewebError: it failed.
    """
    plain = to_plain(config)
    said = [plain["model"], plain["training"], plain["system"], plain["data"]["preprocessing"]]
    versions = [plain["data"]["tokenizer"], sys.version, psutil.cpu_count()]
    key = xxhash.xxh3_64_hexdigest(msgspec.json.encode([said, versions]))
    path = user_cache.folder() / _FILE
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=dict[str, dict[str, Any]])
    except (OSError, msgspec.MsgspecError):  # none yet, or damaged
        kept = {}
    if key in kept:
        return kept[key]
    say("measuring the trainer's step")
    done = subprocess.run(
        [sys.executable, "-m", "trainer.calibrate", str(seconds)],
        input=msgspec.json.encode(plain), capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise FinewebError(
            f"the trainer's step cannot be measured: {lines[-1] if lines else done.returncode}",
            "fineweb-pipeline doctor says what MLX lacks; --kind tokenize plans without a trainer",
        )
    measured: dict[str, Any] = msgspec.json.decode(done.stdout)
    newest = dict(list(kept.items())[1 - _MOST_KEPT :]) | {key: measured}
    user_cache.keep(path, msgspec.json.encode(newest))
    return measured


def _network(config: Config, found: Survey, say: Say) -> float | None:
    """Bytes a second of one connection to the first remote shard; None: nothing is fetched."""
    first = next((one for one in found.shards if catalog.local_path(one.url) is None), None)
    if first is None:
        return None
    say("reading the beginning of a shard")
    stat, options = Stat(first.size_bytes, first.version), config.data.stream.source_options()
    try:
        return doctor.read_rate(first.url, stat, options)[1]
    except (TransientError, ChangedError) as error:
        raise FinewebError(
            f"{first.name}: {error}", "fineweb-pipeline doctor looks closer"
        ) from None


def _rates(cost: Costs, network: float | None) -> Rates:
    rest = cost.rest
    assert rest is not None
    return Rates(
        cpus=sizes.usable_cpus(),
        read_s=cost.read_s,
        encode_s=cost.encode_s,
        write_s=rest.write_s,
        supervise_s=rest.supervise_s,
        fetch_s=rest.fetch_s,
        tokens_per_mb=rest.tokens_per_mb,
        text_per_shard_byte=rest.text_per_shard_byte,
        network_bytes_per_s=max(1.0, network or 1e9),
    )


def _training(config: Config, found: Survey, measured: dict[str, Any]) -> Training:
    hyper, log = config.training.hyperparameters, config.logging
    batch = int(measured["batch_windows"])
    auto = hyper.batch_size == "auto"
    reserved = found.checkpoint_bytes
    saved = reserved - model_size.HEADERS_BYTES + _STATE_BYTES
    return Training(
        micro_s=measured["micro_s"],
        apply_s=measured["apply_s"],
        cores=measured["cores"],
        batch_windows=batch,
        accumulation=hyper.gradient_accumulation_steps // (batch if auto else 1),
        updates=hyper.iters,
        checkpoint_bytes=reserved,
        saved_bytes=saved,
        checkpoint_every=log.steps.checkpoint_interval,
        kept=found.checkpoints - 1,
        save_s=saved / _DISK_BYTES_PER_S,
    )


# ── what follows from it ────────────────────────────────────────────────────────────────────


class _Forecasts:
    """The simulation under one budget or another."""

    def __init__(
        self, job: Job, found: Survey, stages: StageSizes, rates: Rates, training: Training | None
    ) -> None:
        self.job, self.found, self.stages = job, found, stages
        self.rates, self.training = rates, training

    def budgets(self) -> list[Budget]:
        """The smallest, the given one, and one in which all that may be fetched ahead fits."""
        found, smallest = self.found, self.found.smallest_bytes
        given = Budget("given", found.budget_bytes, self._run(found.budget_bytes))
        if not found.remote or not found.budget_bytes:
            return [given]
        ahead = self.job.config.data.stream.prefetch * found.lanes * found.floor_bytes
        roomy = smallest + max(ahead, found.floor_bytes)
        return [
            Budget("smallest", smallest, self._run(smallest)),
            given,
            Budget("roomy", roomy, self._run(roomy)),
        ]

    def _run(self, budget_bytes: int) -> Forecast:
        plan = self._plan(budget_bytes or blueprint.NO_LIMIT)
        kept_bytes = catalog.size_bytes(Path(self.job.run_dir), self.found.shards)[0]
        return Simulation(
            plan,
            self.rates,
            self.training,
            block_bytes=self.job.config.data.stream.block_bytes,
            limit_tokens=self.job.limit_tokens,
            other_bytes=kept_bytes,
        ).run()

    def _plan(self, budget_bytes: int) -> Plan:
        job, found, stages = self.job, self.found, self.stages
        lanes = mixture.plan(job.config, found.shards, found.set_sizes, found.groups)
        token_bytes = found.vocabulary.dtype.itemsize
        layout = blueprint.ring_layout(job.config, found.lanes, token_bytes)
        slots = blueprint.text_layout(job.config.data.stream, found.lanes, stages.tokenizers).slots
        return blueprint.plan(
            job.config, found.shards, lanes, found.groups, stages, layout,
            text_slots=slots, cache_dir="", budget_bytes=budget_bytes,
            fixed_bytes=found.fixed_bytes, cursor=None,
        )  # fmt: skip


def _verdict(job: Job, stages: StageSizes, forecast: Forecast, cpus: int) -> str:
    counts = dict(
        fetch=stages.fetchers, decompress=stages.decompressors, tokenize=stages.tokenizers
    )
    status = [
        StageStatus(name, count, forecast.busy[name], 0.0, "", 0, 0, 0)
        for name, count in counts.items()
    ]
    seen = Evidence(
        job.kind, forecast.wait_share, forecast.limiting, status, forecast.idle_cores, cpus
    )
    return verdict(seen)


def _memory(
    config: Config,
    found: Survey,
    stages: StageSizes,
    cost: Costs,
    measured: dict[str, Any] | None,
    kind: str,
) -> Memory:
    token_bytes = found.vocabulary.dtype.itemsize
    layout = blueprint.ring_layout(config, found.lanes, token_bytes)
    slots = blueprint.text_layout(config.data.stream, found.lanes, stages.tokenizers)
    weights = optimizer = activations = 0
    peak = None
    if measured is not None:
        size, batch = found.vocabulary.size, int(measured["batch_windows"])
        weights = 4 * model_size.num_parameters(config.model, size)
        optimizer = model_size.optimizer_bytes(config, size)
        item = 2 if measured["dtype"] == "bfloat16" else 4
        activations = model_size.activation_bytes(config, size, batch, item)
        peak = measured["peak_bytes"]
        if peak is not None:
            activations = max(0, int(peak) - 2 * weights - optimizer)
    assert cost.rest is not None
    workers = 2 + stages.fetchers + stages.decompressors + stages.tokenizers - (kind == "train")
    return Memory(
        weights_bytes=weights,
        gradients_bytes=weights,
        optimizer_bytes=optimizer,
        activations_bytes=activations,
        measured=peak is not None,
        ring_bytes=ring.size_bytes(layout),
        text_slots_bytes=text.size_bytes(slots),
        workers_bytes=workers * cost.rest.process_bytes,
        available_bytes=psutil.virtual_memory().available,
    )


def _model(config: Config, found: Survey, forecast: Forecast, measured: dict[str, Any]) -> Model:
    size, T = found.vocabulary.size, config.data.preprocessing.max_context_size
    per_token = model_size.flops_per_token(config.model, size, T)
    one = _training(config, found, measured)
    return Model(
        parameters=model_size.num_parameters(config.model, size),
        flops_per_token=per_token,
        flops=float(per_token) * forecast.tokens,
        tokens_per_update=one.batch_windows * one.accumulation * T,
        updates=one.updates,
        calibration=measured,
    )


def _cores(cost: Costs) -> list[Reached]:
    rest = cost.rest
    assert rest is not None
    parallel = {
        "reading": cost.read_s,
        "encoding": cost.encode_s,
        "fetching": rest.fetch_s / rest.text_per_shard_byte,
    }
    serial = {"writer": rest.write_s, "supervisor": rest.supervise_s}
    return scaling.cores(parallel, serial, rest.tokens_per_mb)


def _hosts(config: Config, found: Survey, training: Training, network_gbit: float) -> list[Reached]:
    parameters = model_size.num_parameters(config.model, found.vocabulary.size)
    return scaling.hosts(
        windows=training.batch_windows * training.accumulation,
        seq_len=config.data.preprocessing.max_context_size,
        compute_s=training.micro_s * training.accumulation,
        apply_s=training.apply_s,
        gradient_bytes=4 * parameters,
        network_gbit=network_gbit,
    )


def _notes(
    config: Config,
    found: Survey,
    cost: Costs,
    measured: dict[str, Any] | None,
) -> list[str]:
    notes: list[str] = []
    assert cost.rest is not None
    unknown = sum(one.size_bytes is None for one in found.shards)
    if unknown:
        notes.append(f"{unknown} shards have no known size: 100 MB each are taken")
    if found.remote:
        notes.append(f"costs are those of {cost.rest.measured_on}: bench --shards measures yours")
    if measured is not None and measured["scaled"] != 1.0:
        notes.append(
            f"the trainer's step was measured on {measured['measured']} and taken "
            f"{measured['scaled']:.3g} times"
        )
    if config.data.filter != type(config.data.filter)():
        notes.append("documents that the filters leave out are not known before they are read")
    load = psutil.getloadavg()[0]
    if load > sizes.usable_cpus() / 2:
        notes.append(f"others are at work here (load {load:.1f}): the plan is of a quiet machine")
    return notes
