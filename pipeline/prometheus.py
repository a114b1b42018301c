"""A run's status as Prometheus metrics.

Runs in: status server. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from pipeline import status_file
from pipeline.status_file import Recorded

# Of the trainer's metrics: (name in metrics.jsonl, name here, help).
_METRICS = (
    ("loss", "loss_nats", "Training loss of the last update, nats per token"),
    ("val_loss", "validation_loss_nats", "Validation loss, nats per token"),
    ("tokens_per_s", "trainer_tokens_per_second", "Tokens that the trainer takes"),
    ("data_wait_share", "data_wait_ratio", "Share of the last update spent waiting for data"),
    ("lr", "learning_rate", "Learning rate of the last update"),
    ("grad_norm", "gradient_norm", "Norm of the gradient, before clipping"),
    ("mfu", "mfu_ratio", "Model FLOPs utilisation"),
)
_DISK = ("cached", "reserved", "checkpoint", "log")


class _Status(Collector):
    """The metrics of one status."""

    def __init__(self, recorded: Recorded) -> None:
        self._recorded = recorded

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        seen = self._recorded.status
        now = status_file.state(self._recorded)
        states = GaugeMetricFamily("fineweb_run_state", "1 for what it is", labels=["state"])
        for one in get_args(status_file.State):
            states.add_metric([one], float(one == now))
        yield states
        yield _gauge("status_timestamp_seconds", "When it was measured", self._recorded.written_s)
        yield _gauge("elapsed_seconds", "Since the run's start", seen.elapsed_s)
        yield _gauge("step", "Updates done, earlier runs included", seen.step)
        if "total_tokens" in seen.metrics:
            total = float(seen.metrics["total_tokens"])
            yield _counter("tokens", "Tokens trained on or written", total)
        for name, ours, text in _METRICS:
            if seen.metrics.get(name) is not None:
                yield _gauge(ours, text, float(seen.metrics[name]))
        yield _counter("restarts", "Processes that died and were started again", seen.restarts)
        yield _counter("bad_records", "Records that were skipped", seen.bad_records)
        yield _gauge("ring_fill_ratio", "Share of the ring that is full", seen.ring_fill)
        yield from self._disk()
        yield from self._stages()

    def _disk(self) -> Iterator[Metric]:
        disk = self._recorded.status.disk
        yield _gauge("disk_budget_bytes", "What may be used", disk.budget_bytes)
        yield _gauge("disk_peak_bytes", "The most that was used", disk.peak_bytes)
        used = GaugeMetricFamily("fineweb_disk_bytes", "Bytes in use, by kind", labels=["kind"])
        for kind in _DISK:
            used.add_metric([kind], getattr(disk, f"{kind}_bytes"))
        yield used
        yield _counter("evicted_bytes", "Shards deleted, their bytes", disk.evicted_bytes)
        yield _counter("evicted_shards", "Shards deleted", disk.evicted_shards)

    def _stages(self) -> Iterator[Metric]:
        for name, text in (
            ("workers", "Processes"),
            ("busy", "Share of their time at work"),
            ("rate", "Bytes or tokens a second"),
            ("queue", "What waits"),
            ("capacity", "The most that can wait"),
            ("restarts", "Deaths"),
        ):
            family = GaugeMetricFamily(f"fineweb_stage_{name}", text, labels=["stage"])
            for stage in self._recorded.status.stages:
                family.add_metric([stage.name], float(getattr(stage, name)))
            yield family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"fineweb_{name}", text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"fineweb_{name}", text, value=float(value))


def render(recorded: Recorded) -> tuple[str, bytes]:
    """Content type and body of an answer."""
    registry = CollectorRegistry()
    registry.register(_Status(recorded))
    return CONTENT_TYPE_LATEST, generate_latest(registry)
