"""One HTML page about a run: loss, rates, stalls by stage, disk, memory, samples, configuration.

Runs in: the command line's own process, for `report`. Everything is in the file itself: no
script, no font, no picture from elsewhere; it can be mailed.
"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from pipeline.charts import Line, chart
from pipeline.errors import ConfigError
from pipeline.screen import clock, human

Record = dict[str, Any]
_STAGES = ("fetch", "decompress", "tokenize")
_STRETCHES = 30  # the moving mean over the loss looks back over this part of the run
_EVENTS = 40  # warnings that are listed
STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --dim: #69707d; --paper: #fff; --line: #e3e6eb;
  --c1: #2563c9; --c2: #d2601a; --c3: #2c8a4b; --c4: #8a4fc4; --c5: #a3a9b5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ee; --dim: #9aa1ae; --paper: #15181d;
  --line: #2d323b; --c1: #6ea3ff; --c2: #ff9a5a; --c3: #63c987; --c4: #c190f5; --c5: #6b7280; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1500px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
.sub { color: var(--dim); }
.cards { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.2rem 0; }
.cards div { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem; }
.cards b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.cards span { color: var(--dim); font-size: .8rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .7rem .8rem .3rem; }
figcaption span { margin-left: .9rem; font-size: .85rem; }
figcaption span::before { content: "● "; }
svg { width: 100%; height: auto; } svg text { font-size: 15px; fill: var(--dim); }
text.y { text-anchor: end; } text.x { text-anchor: middle; } .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
polygon { stroke: none; opacity: .18; }
.c1 { stroke: var(--c1); color: var(--c1); } .c2 { stroke: var(--c2); color: var(--c2); }
.c3 { stroke: var(--c3); color: var(--c3); } .c4 { stroke: var(--c4); color: var(--c4); }
.c5 { stroke: var(--c5); color: var(--c5); } circle.c2 { fill: var(--c2); stroke: var(--paper); }
polygon.c1 { fill: var(--c1); } polygon.c2 { fill: var(--c2); } polygon.c3 { fill: var(--c3); }
polygon.c4 { fill: var(--c4); }
table { border-collapse: collapse; } td, th { text-align: left; padding: .25rem .9rem .25rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .85rem; }
details { margin-top: 2rem; } summary { cursor: pointer; font-weight: 600; }
"""


def read(run_dir: Path) -> list[Record]:
    """Records of metrics.jsonl and its predecessor, one a step, in order; a step that was done
    twice, after a resume, counts once, and a line that a crash has cut is left out.

    Raises:
        ConfigError: there are none.
    """
    records: dict[int, Record] = {}
    for name in ("metrics.jsonl.1", "metrics.jsonl"):
        path = run_dir / name
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                record = msgspec.json.decode(line, type=dict[str, Any])
                records[record["step"]] = record
            except (msgspec.DecodeError, KeyError):
                continue
    if not records:
        raise ConfigError(
            f"{run_dir} has no metrics.jsonl with a step in it",
            "give the folder of a training run, as in runs/demo",
        )
    return [records[step] for step in sorted(records)]


def render(run_dir: Path) -> str:
    """The whole page."""
    records = read(run_dir)
    name = html.escape(run_dir.name)
    sections = [
        _cards(records),
        f'<div class="charts">{"".join(_charts(records))}</div>',
        _stalls(records),
        _samples(records),
        _events(run_dir),
        _configuration(run_dir),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style><h1>{name}</h1>"
        f'<p class="sub">steps {records[0]["step"]} to {records[-1]["step"]}, '
        f"{html.escape(records[0]['time'])} to {html.escape(records[-1]['time'])}</p>"
        f"{''.join(sections)}</html>\n"
    )


# ── numbers ─────────────────────────────────────────────────────────────────────────────────


def _cards(records: list[Record]) -> str:
    first, last = records[0], records[-1]
    step_s = [one["step_s"] for one in records]
    rates = sorted(one["tokens_per_s"] for one in records)
    waited = sum(one["data_wait_share"] * one["step_s"] for one in records)
    cards = {
        "loss": f"{first['loss']:.3f} → {last['loss']:.3f}",
        "tokens": human(last["total_tokens"], ""),
        "tokens/s, median": human(rates[len(rates) // 2], ""),
        "time in updates": clock(sum(step_s)),
        "waited for data": f"{100 * waited / max(sum(step_s), 1e-9):.1f} %",
        "disk, most": f"{max(one['disk_used_bytes'] for one in records) / 1e9:.3f} of "
        f"{last['disk_budget_bytes'] / 1e9:.3f} GB",
        "skipped updates": str(last["skipped_updates"]),
    }
    validated = [one for one in records if "val_loss" in one]
    if validated:
        best = min(validated, key=lambda one: one["val_loss"])
        cards["validation, best"] = f"{best['val_loss']:.3f} at {best['step']}"
        cards["bits per byte, best"] = f"{min(one['val_bpb'] for one in validated):.3f}"
    if "mfu" in last:
        cards["MFU, last"] = f"{100 * last['mfu']:.1f} %"
    boxes = "".join(
        f"<div><span>{html.escape(key)}</span><b>{html.escape(value)}</b></div>"
        for key, value in cards.items()
    )
    return f'<div class="cards">{boxes}</div>'


def _line(records: Iterable[Record], key: str, name: str, style: str, **options: Any) -> Line:
    """One metric over the steps, where it was recorded."""
    have = [one for one in records if one.get(key) is not None]
    return Line(name, [one["step"] for one in have], [one[key] for one in have], style, **options)


def _smoothed(line: Line) -> Line:
    """Its moving mean, corrected for the start."""
    keep = 1 - 1 / max(3.0, len(line.ys) / _STRETCHES)
    mean, weight, ys = 0.0, 0.0, []
    for y in line.ys:
        if math.isfinite(y):
            mean, weight = keep * mean + (1 - keep) * y, keep * weight + 1 - keep
        ys.append(mean / weight if weight else y)
    return line._replace(name="moving mean", ys=ys, style="c1")


class _Chart(NamedTuple):
    """A chart of some metrics: (key, name, style, what else thin() must know)."""

    title: str
    metrics: tuple[tuple[str, str, str, dict[str, bool]], ...]
    unit: Callable[[float], str] = lambda value: f"{value:g}"


def _percent(value: float) -> str:
    return f"{100 * value:g} %"


def _bytes(value: float) -> str:
    return human(value, "B")


def _count(value: float) -> str:
    return human(value, "")


_DOTS, _FILLED, _PLAIN = {"dots": True}, {"filled": True}, dict[str, bool]()
_CHARTS = (
    _Chart("Trainer, tokens/s", (("tokens_per_s", "tokens/s", "c1", _PLAIN),), _count),
    _Chart("Model FLOPs utilisation", (("mfu", "MFU", "c3", _PLAIN),), _percent),
    _Chart(
        "Share of each update spent waiting for data",
        (("data_wait_share", "waiting", "c2", _FILLED),),
        _percent,
    ),
    _Chart(
        "Stages, share of their time at work",
        tuple((f"{stage}_busy", stage, f"c{n}", _PLAIN) for n, stage in enumerate(_STAGES, 1)),
        _percent,
    ),
    _Chart(
        "Stages, bytes/s",
        (
            ("fetch_bytes_per_s", "fetched", "c1", _PLAIN),
            ("decompress_bytes_per_s", "decompressed", "c2", _PLAIN),
        ),
        _bytes,
    ),
    _Chart("Tokenizers, tokens/s", (("tokenize_tokens_per_s", "tokens/s", "c3", _PLAIN),), _count),
    _Chart("Ring, share that is full", (("ring_fill", "ring", "c4", _FILLED),), _percent),
    _Chart(
        "Disk",
        (
            ("disk_budget_bytes", "budget", "c2", _PLAIN),
            ("disk_used_bytes", "used", "c1", _FILLED),
            ("disk_checkpoint_bytes", "checkpoints", "c3", _FILLED),
        ),
        _bytes,
    ),
    _Chart(
        "MLX memory",
        tuple(
            (f"memory_{kind}_bytes", kind, f"c{n}", _PLAIN)
            for n, kind in enumerate(("active", "cache", "peak"), 1)
        ),
        _bytes,
    ),
    _Chart("Learning rate", (("lr", "learning rate", "c4", _PLAIN),)),
    _Chart("Gradient norm, before clipping", (("grad_norm", "norm", "c4", _PLAIN),)),
    _Chart("Power, W", (("power_w", "power", "c2", _PLAIN),)),
)


def _charts(records: list[Record]) -> list[str]:
    loss = _line(records, "loss", "each update", "c5")
    validation = _line(records, "val_loss", "validation", "c2", dots=True)
    bits = _line(records, "val_bpb", "validation", "c2", dots=True)
    return [
        chart("Loss, nats per token", [loss, _smoothed(loss), validation]),
        chart("Validation, bits per byte", [bits]),
        *(
            chart(
                one.title,
                [_line(records, key, name, style, **how) for key, name, style, how in one.metrics],
                unit=one.unit,
                from_zero=True,
            )
            for one in _CHARTS
        ),
    ]


# ── tables ──────────────────────────────────────────────────────────────────────────────────


def _stalls(records: list[Record]) -> str:
    """Seconds waited for data, by the stage that limited when the update ended."""
    seconds: dict[str, float] = defaultdict(float)
    for one in records:
        seconds[one.get("limiting_stage", "unknown")] += one["data_wait_share"] * one["step_s"]
    total = sum(one["step_s"] for one in records) or 1.0
    rows = "".join(
        f"<tr><td>{html.escape(stage)}<td>{waited:.1f} s<td>{100 * waited / total:.2f} %"
        for stage, waited in sorted(seconds.items(), key=lambda item: -item[1])
    )
    return (
        "<h2>Stalls by stage</h2><p class=sub>What the trainer waited, under the stage that the "
        "emptiest lane was waiting for when the update ended; “consumer”: the trainer itself "
        f"limited.</p><table><tr><th>stage<th>waited<th>of all time{rows}</table>"
    )


def _samples(records: list[Record]) -> str:
    have = [one for one in records if "sample" in one]
    if not have:
        return ""
    rows = "".join(
        f"<tr><td>{one['step']}<td><pre>{html.escape(one['sample'])}</pre>" for one in have[-20:]
    )
    return f"<h2>Samples</h2><table><tr><th>step<th>text{rows}</table>"


def _events(run_dir: Path) -> str:
    """Warnings and errors of log.txt, the newest last."""
    path = run_dir / "log.txt"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    marked = [line for line in lines if "[warning" in line or "[error" in line]
    if not marked:
        return "<h2>Events</h2><p class=sub>No warning and no error in log.txt.</p>"
    text = html.escape("\n".join(marked[-_EVENTS:]))
    return f"<h2>Events</h2><p class=sub>{len(marked)} warnings and errors.</p><pre>{text}</pre>"


def _configuration(run_dir: Path) -> str:
    path = run_dir / "config.yaml"
    if not path.exists():
        return ""
    text = html.escape(path.read_text())
    return f"<details open><summary>Configuration</summary><pre>{text}</pre></details>"
