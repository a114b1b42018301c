"""Line charts as inline SVG.

Runs in: the command line's own process, for `report`. Pure: numbers in, text out; colours come
from the page's style.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT = 720, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 16, 14, 34
_MAX_POINTS = 600  # a longer line is drawn through the means of its stretches
_TICKS = 5
_LARGEST = 1e18


class Line(NamedTuple):
    """One line, or dots where measurements are few."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str  # class of the page's style: c1 … c5
    dots: bool = False
    filled: bool = False  # down to zero


def thin(line: Line) -> Line:
    """The line with at most _MAX_POINTS points; what is not finite, or nearly so, is left out."""
    points = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if abs(y) < _LARGEST]
    size = -(-len(points) // _MAX_POINTS) or 1
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    xs = [sum(x for x, _ in part) / len(part) for part in parts]
    ys = [sum(y for _, y in part) / len(part) for part in parts]
    return line._replace(xs=xs, ys=ys)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers that span the interval: about five steps of 1, 2 or 5 × 10ⁿ."""
    span = max(high - low, 1e-9 * max(abs(low), abs(high)), 1e-12)
    step = 10 ** math.floor(math.log10(span / _TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= _TICKS)
    first = math.floor(low / step)
    last = max(first + 1, math.ceil(high / step))
    return [number * step for number in range(first, last + 1)]


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: Callable[[float], str] = lambda value: f"{value:g}",
    from_zero: bool = False,
    x_unit: Callable[[float], str] = lambda value: f"{value:g}",
) -> str:
    """A figure: title, legend, axes and lines; nothing if no line has a point.

    Args:
        title: Above it; says the unit.
        lines: Drawn in order.
        unit: Shows a number of the vertical axis.
        from_zero: The vertical axis begins at zero.
        x_unit: Shows a number of the horizontal axis.
    """
    shown = [line for line in map(thin, lines) if line.xs]
    if not shown:
        return ""
    xs = [x for line in shown for x in line.xs]
    ys = [y for line in shown for y in line.ys] + ([0.0] if from_zero else [])
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(*xs, min(xs) + 1e-9)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def across(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _TOP + (y_high - y) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_safe(title)}">']
    for y in y_ticks:
        at = down(y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" '
                     f'y2="{at:.1f}"/><text x="{_LEFT - 6}" y="{at + 4:.1f}" class="y">'
                     f"{_safe(unit(y))}</text>")  # fmt: skip
    for x in x_ticks:
        if x_low <= x <= x_high:
            parts.append(f'<text x="{across(x):.1f}" y="{_HEIGHT - 10}" class="x">'
                         f"{_safe(x_unit(x))}</text>")  # fmt: skip
    parts += [_drawn(line, across, down) for line in shown]
    legend = "".join(f'<span class="{one.style}">{_safe(one.name)}</span>' for one in shown)
    return (
        f"<figure><figcaption><b>{_safe(title)}</b>{legend}</figcaption>"
        f"{''.join(parts)}</svg></figure>"
    )


def _drawn(line: Line, across: Callable[[float], float], down: Callable[[float], float]) -> str:
    points = [(across(x), down(y)) for x, y in zip(line.xs, line.ys, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    if line.dots:
        return "".join(
            f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>'
            f"{_safe(line.name)} at {at:g}: {value:.4g}</title></circle>"
            for (x, y), at, value in zip(points, line.xs, line.ys, strict=True)
        )
    fill = ""
    if line.filled:
        base = down(0.0)
        area = f"{points[0][0]:.1f},{base:.1f} {path} {points[-1][0]:.1f},{base:.1f}"
        fill = f'<polygon class="{line.style}" points="{area}"/>'
    return f'{fill}<polyline class="{line.style}" points="{path}"/>'


def _safe(text: str) -> str:
    return html.escape(text, quote=True)
