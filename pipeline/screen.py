"""The picture of a run: one screen that fits 80 × 24, for the live view and for `status`.

Runs in: the command line's own process. Pure: a status in, something for rich out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.status import DiskStatus, Status

_CURVE = "▁▂▃▄▅▆▇█"
_CELLS = 24  # of bars
_CURVE_CELLS = 40
_RING_LOW = 0.25  # a ring with less is a bad sign


def human(count: float, unit: str) -> str:
    """A number with three digits and the right prefix: 12.3 MB/s."""
    for prefix in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.3g} {prefix}{unit}" if count < 100 else f"{count:.0f} {prefix}{unit}"
        count /= 1000
    return f"{count:.3g} T{unit}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or 3d 04:05:06."""
    days, whole = divmod(int(seconds), 86400)
    hours, minutes = whole // 3600, f"{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{days}d {hours:02d}:{minutes}" if days else f"{hours}:{minutes}"


def curve(values: Sequence[float], width: int) -> str:
    """A line of bars: the mean of each of width stretches of the values."""
    if not values:
        return ""
    width = min(width, len(values))
    bounds = [len(values) * n // width for n in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_CURVE[int((value - low) / span * (len(_CURVE) - 1))] for value in means)


def left_s(status: Status) -> float | None:
    """Seconds to go, if that can be told."""
    if status.total_steps is None or not status.step_s:
        return None
    return max(0.0, (status.total_steps - status.step) * status.step_s)


def picture(status: Status, state: str = "") -> RenderableType:
    """All of it.

    Args:
        status: What to show.
        state: Instead of the status's phase: 'done', 'dead'.
    """
    lines = [_headline(status, state or status.phase)]
    if status.kind == "train":
        lines += [_loss(status), _speed(status)]
    else:
        lines.append(_written(status))
    lines.append(Text.assemble("verdict ", (status.verdict, "bold")))
    lines += [*_disk(status.disk), _ring(status.ring_fill)]
    foot = [_counts(status)]
    if status.url:
        foot.append(Text(f"live page {status.url}", style="dim"))
    foot += [Text(f"  {note}", style="dim") for note in status.notes]
    for line in (*lines, *foot):
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines, _stages(status), *foot)


def _headline(status: Status, state: str) -> Text:
    text = Text.assemble((status.name, "bold cyan"), f"  {state}  {clock(status.elapsed_s)}")
    if status.total_steps:
        text.append(f"  step {status.step:,}/{status.total_steps:,}")
    left = left_s(status)
    if left is not None:
        text.append(f"  {clock(left)} to go")
    return text


def _loss(status: Status) -> Text:
    if "loss" not in status.metrics:
        return Text("loss    waiting for the first update")
    metrics = status.metrics
    said = f"loss    {metrics['loss']:.3f}  ppl {metrics['ppl']:.1f}"
    return Text.assemble(f"{said:<32}", (curve(status.losses, _CURVE_CELLS), "cyan"))


def _speed(status: Status) -> Text:
    metrics = status.metrics
    if "tokens_per_s" not in metrics:
        return Text("speed   –")
    said = (
        f"speed   {human(float(metrics['tokens_per_s']), 'tok/s')}  "
        f"{human(float(metrics['total_tokens']), 'tokens')}  lr {metrics['lr']:.2e}  "
        f"data waits {100 * metrics['data_wait_share']:.1f} %"
    )
    return Text(said)


def _written(status: Status) -> Text:
    tokens = float(status.metrics.get("total_tokens", 0))
    rate = next((one.rate for one in status.stages if one.name == "tokenize"), 0.0)
    return Text(f"speed   {human(rate, 'tok/s')}  {human(tokens, 'tokens')} written")


def _disk(disk: DiskStatus) -> list[Text]:
    """The budget as a bar: what is cached, reserved, in checkpoints and logs, and free."""
    budget = disk.budget_bytes or max(1, disk.used_bytes)  # 0: no shard comes onto the disk
    parts = (
        ("█", "green", disk.cached_bytes),
        ("▒", "yellow", disk.reserved_bytes),
        ("▓", "blue", disk.checkpoint_bytes + disk.log_bytes),
    )
    bar, at, total = Text("disk    "), 0, 0
    for sign, style, size in parts:
        total += size
        end = min(_CELLS, round(_CELLS * total / budget))
        bar.append(sign * (end - at), style=style)
        at = end
    bar.append("·" * (_CELLS - at), style="dim")
    allowed = f"of {human(disk.budget_bytes, 'B')}" if disk.budget_bytes else "without shards"
    bar.append(
        f" {human(disk.used_bytes, 'B')} {allowed}  "
        f"evicted {human(disk.evicted_bytes, 'B')} in {disk.evicted_shards}"
    )
    legend = Text("        ")
    for sign, style, said in (
        ("█", "green", f"cached {human(disk.cached_bytes, 'B')} in {disk.cached_shards} shards"),
        ("▒", "yellow", f"reserved {human(disk.reserved_bytes, 'B')}"),
        ("▓", "blue", f"saved {human(disk.checkpoint_bytes + disk.log_bytes, 'B')}"),
    ):
        legend.append(sign, style=style)
        legend.append(f" {said}  ")
    return [bar, legend]


def _ring(fill: float) -> Text:
    full = min(_CELLS, round(_CELLS * fill))
    style = "green" if fill >= _RING_LOW else "yellow"
    return Text.assemble(
        "ring    ", ("█" * full, style), ("·" * (_CELLS - full), "dim"), f" {100 * fill:.0f} %"
    )


def _counts(status: Status) -> Text:
    text = f"restarts {status.restarts}  bad records {status.bad_records}"
    return Text(text, style="yellow" if status.restarts or status.bad_records else "dim")


def _stages(status: Status) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage")
    for name in ("workers", "busy", "rate", "queue", "restarts"):
        table.add_column(name, justify="right")
    for stage in status.stages:
        table.add_row(
            stage.name,
            str(stage.workers),
            f"{100 * stage.busy:.0f} %",
            human(stage.rate, stage.unit),
            f"{stage.queue}/{stage.capacity}",
            str(stage.restarts),
        )
    return table
