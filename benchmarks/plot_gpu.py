"""Pictures of what benchmarks/gpu.py has measured.

    python -m benchmarks.plot_gpu [--results FOLDER]      its --out; runs/gpu by default

From the JSON files that are there:

    gpu_rate.png      tokens/s by micro-batch: one batch in memory, live pipeline, PyTorch; and
                      peak memory (memory.json, live.json, torch.json)
    gpu_parts.png     where a micro-step's time goes (parts.json)
    gpu_scaling.png   the pipeline alone, 1 … all CPUs (scaling.json)
    gpu_loss.png      loss on real text over the updates (long.json)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pictures import COLOURS, figure, save

_BAR = 0.27
_MEAN_OF = 10  # updates in the line through the losses


def _read(folder: Path, name: str) -> Any:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def rate(folder: Path) -> None:
    """Bars of tokens/s beside one another, one group a micro-batch; peak memory beside them."""
    memory = _read(folder, "memory") or []
    contestants = [
        ("MLX, batch in memory", memory, COLOURS[0]),
        ("MLX, live pipeline", _read(folder, "live") or [], COLOURS[4]),
        ("PyTorch, compiled", _read(folder, "torch") or [], COLOURS[6]),
    ]
    shown = [one for one in contestants if one[1]]
    sizes = sorted({size for _, rows, _ in shown for size in _sizes(rows)})
    drawn, (left, right) = figure(2, width=5.2)
    for axes, key, unit in ((left, "tokens_per_s", 1e3), (right, "peak_gb", 1)):
        with_key = [one for one in shown if key in one[1][0]]
        groups = {
            size: [n for n, (_, rows, _) in enumerate(with_key) if size in _sizes(rows)]
            for size in sizes
        }
        for number, (name, rows, colour) in enumerate(with_key):
            places = []
            for size in _sizes(rows):
                beside = groups[size]
                shift = (beside.index(number) - (len(beside) - 1) / 2) * _BAR
                places.append(sizes.index(size) + shift)
            heights = [row[key] / unit for row in rows]
            axes.bar(places, heights, _BAR * 0.92, color=colour, label=name)
            for place, height in zip(places, heights, strict=True):
                axes.text(place, height, f"{height:.0f}", ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(sizes)), sizes)
        axes.set_xlabel("sequences of a micro-step (64 an update)")
        axes.margins(y=0.2)
    left.set_ylabel("thousand tokens/s")
    left.set_title("Training rate")
    left.legend(fontsize=8, loc="upper left", ncol=2)
    right.set_ylabel("GB")
    right.set_title("Peak memory")
    save(drawn, "gpu_rate")


def _sizes(rows: list[dict[str, Any]]) -> list[int]:
    return [row["micro_batch"] for row in rows]


def parts(folder: Path) -> None:
    """Milliseconds of each part of a micro-step, the slowest first."""
    rows = _read(folder, "parts")
    whole = next(one["s"] for one in rows if one["part"] == "whole micro-step")
    inside = [
        (one["part"].removesuffix(", both"), 1e3 * one["times"] * one["s"])
        for one in rows[: [one["part"] for one in rows].index("whole micro-step")]
        if one["part"] != "attention, forward"  # part of the next
    ]
    inside.append(("gaps and the rest", max(0.0, 1e3 * whole - sum(ms for _, ms in inside))))
    inside.sort(key=lambda one: -one[1])
    drawn, (axes,) = figure(1, width=7.5, height=0.32 * len(inside) + 1.2)
    places = range(len(inside))
    axes.barh(places, [ms for _, ms in inside], color=COLOURS[0])
    for place, (_, ms) in zip(places, inside, strict=True):
        axes.text(ms, place, f" {ms:.1f} ms, {ms / whole / 10:.0f} %", va="center", fontsize=9)
    axes.set_yticks(places, [name for name, _ in inside])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * inside[0][1])
    axes.set_xlabel("ms of a micro-step, forward and backward")
    axes.set_title(f"Where a micro-step of {1e3 * whole:.0f} ms goes")
    save(drawn, "gpu_parts")


def scaling(folder: Path) -> None:
    """Tokens/s of the pipeline alone against tokenizers, and its CPU per token."""
    rows = _read(folder, "scaling")
    counts = [one["workers"] for one in rows]
    drawn, (left, right) = figure(2, width=5.2)
    rates = [one["tokens_per_s"] / 1e6 for one in rows]
    left.plot(counts, rates, "o-", color=COLOURS[0], label="measured")
    left.plot(counts, [rates[0] * n for n in counts], ":", color=COLOURS[6], label="as many × one")
    left.set_ylabel("million tokens/s")
    left.set_title("The pipeline alone, parquet")
    left.legend()
    right.plot(counts, [one["cpu_s_per_mtok"] for one in rows], "o-", color=COLOURS[0])
    right.set_ylabel("CPU seconds per million tokens")
    right.set_title("What a token costs")
    for axes in (left, right):
        axes.set_xticks(counts)
        axes.set_xlabel("tokenizers")
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
    save(drawn, "gpu_scaling")


def loss(folder: Path) -> None:
    """The loss of every update, and the mean of the last few."""
    steps, losses = zip(*_read(folder, "long")["loss"], strict=True)
    drawn, (axes,) = figure(1, width=7.5)
    axes.plot(steps, losses, color=COLOURS[4], linewidth=0.8, label="each update")
    axes.plot(steps, _means(losses), color=COLOURS[0], label=f"mean of the last {_MEAN_OF}")
    axes.set_xlabel("update")
    axes.set_ylabel("loss, nats per token")
    axes.set_title("Training loss on real text")
    axes.legend()
    save(drawn, "gpu_loss")


def _means(values: Sequence[float]) -> list[float]:
    """Of each value and those before it, at most _MEAN_OF together."""
    kept = [values[max(0, at + 1 - _MEAN_OF) : at + 1] for at in range(len(values))]
    return [sum(part) / len(part) for part in kept]


_DRAW: dict[str, Callable[[Path], None]] = {
    "memory": rate,
    "parts": parts,
    "scaling": scaling,
    "long": loss,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("runs/gpu"))
    folder = parser.parse_args().results
    for name, draw in _DRAW.items():
        if _read(folder, name):
            draw(folder)
        else:
            print(f"there is no {folder / name}.json")


if __name__ == "__main__":
    main()
