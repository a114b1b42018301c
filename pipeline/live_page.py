"""The live page of a run: what the live screen shows, as HTML.

Runs in: status server. Pure: a status in, text out.
"""

from __future__ import annotations

import html

from pipeline import status_file
from pipeline.charts import Line, chart
from pipeline.page import STYLE
from pipeline.screen import clock, human, left_s
from pipeline.status import DiskStatus, Status
from pipeline.status_file import Recorded

SCRIPT = """"use strict";
async function look() {
  try {
    const answer = await fetch("fragment", { cache: "no-store" });
    if (answer.ok) document.querySelector("main").innerHTML = await answer.text();
    document.body.className = answer.ok ? "" : "lost";
  } catch { document.body.className = "lost"; }
  setTimeout(look, 1000);
}
look();
"""
_STYLE = """
body { max-width: 1000px; }
.lost main { opacity: .5; } #lost { display: none; } .lost #lost { display: block; }
#lost, .bad { color: var(--c2); } .verdict { font-size: 1.15rem; font-weight: 600; }
.bar { display: flex; height: 1rem; border: 1px solid var(--line); border-radius: 4px;
  overflow: hidden; margin: .3rem 0; }
.bar i { background: currentColor; } td.n, th.n { text-align: right; }
"""


def page(recorded: Recorded) -> str:
    """The whole page; its script puts fragments into it. Without scripts it loads itself anew."""
    name = html.escape(recorded.status.name)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<noscript><meta http-equiv="refresh" content="2"></noscript>'
        f"<style>{STYLE}{_STYLE}</style>"
        '<p id="lost">No answer: the run has ended, or cannot be reached. This was its last '
        f'picture.</p><main>{fragment(recorded)}</main><script src="live.js"></script></html>\n'
    )


def fragment(recorded: Recorded) -> str:
    """What changes."""
    status, state = recorded.status, status_file.state(recorded)
    shown = status.phase if state == "running" else state
    ended = recorded.ended
    said = f"{ended.what} {ended.remedy}".strip() if ended else ""
    steps = f", step {status.step:,} of {status.total_steps:,}" if status.total_steps else ""
    return (
        f"<h1>{html.escape(status.name)}</h1>"
        f'<p class="sub">{shown}, {clock(status.elapsed_s)}{steps}</p>'
        f'<p class="bad">{html.escape(said)}</p>'
        f'<p class="verdict">{html.escape(status.verdict)}</p>'
        f"{_cards(status)}{_loss(status)}{_disk(status.disk)}{_stages(status)}{_notes(status)}"
    )


def _cards(status: Status) -> str:
    metrics, left = status.metrics, left_s(status)
    cards: dict[str, str] = {}
    if "loss" in metrics:
        cards |= {
            "loss, nats": f"{metrics['loss']:.3f}",
            "tokens/s": human(float(metrics["tokens_per_s"]), ""),
            "waits for data": f"{100 * metrics['data_wait_share']:.1f} %",
        }
    if "total_tokens" in metrics:
        cards["tokens"] = human(float(metrics["total_tokens"]), "")
    if left is not None:
        cards["to go"] = clock(left)
    cards |= {
        "ring": f"{100 * status.ring_fill:.0f} % full",
        "restarts": str(status.restarts),
        "bad records": str(status.bad_records),
    }
    boxes = "".join(f"<div><span>{name}</span><b>{said}</b></div>" for name, said in cards.items())
    return f'<div class="cards">{boxes}</div>'


def _loss(status: Status) -> str:
    """Over this run's updates; the means are of stretches of equal length."""
    ys, first = status.losses, status.first_step
    xs = [first + (n + 1) / len(ys) * (status.step - first) for n in range(len(ys))]
    line = Line("mean of a stretch of updates", xs, ys, "c1")
    return chart("Loss since the start of this run, nats per token", [line])


def _disk(disk: DiskStatus) -> str:
    parts = {
        "cached": (disk.cached_bytes, "c3"),
        "reserved": (disk.reserved_bytes, "c2"),
        "checkpoints": (disk.checkpoint_bytes, "c1"),
        "logs": (disk.log_bytes, "c4"),
    }
    budget = disk.budget_bytes or max(1, disk.used_bytes)  # 0: no shard comes onto the disk
    allowed = f"of {human(disk.budget_bytes, 'B')}" if disk.budget_bytes else "without shards"
    bar = "".join(
        f'<i class="{style}" style="width:{100 * size / budget:.2f}%"></i>'
        for size, style in parts.values()
    )
    legend = " · ".join(
        f'<span class="{style}">{name} {human(size, "B")}</span>'
        for name, (size, style) in parts.items()
    )
    return (
        f"<h2>Disk: {human(disk.used_bytes, 'B')} {allowed}</h2>"
        f'<div class="bar">{bar}</div><p class="sub">{legend} · evicted '
        f"{human(disk.evicted_bytes, 'B')} in {disk.evicted_shards} shards</p>"
    )


def _stages(status: Status) -> str:
    rows = "".join(
        f"<tr><td>{stage.name}<td class=n>{stage.workers}<td class=n>{100 * stage.busy:.0f} %"
        f"<td class=n>{human(stage.rate, stage.unit)}<td class=n>{stage.queue}/{stage.capacity}"
        f"<td class=n>{stage.restarts}"
        for stage in status.stages
    )
    head = "".join(
        f"<th class=n>{name}" for name in ("workers", "busy", "rate", "queue", "restarts")
    )
    return f"<h2>Stages</h2><table><tr><th>stage{head}{rows}</table>"


def _notes(status: Status) -> str:
    text = html.escape("\n".join(status.notes))
    return f"<h2>Events</h2><pre>{text}</pre>" if text else ""
