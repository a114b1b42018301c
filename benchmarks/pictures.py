"""The benchmarks' pictures: benchmarks/pictures/NAME.png from runs/benchmarks/NAME.json.

    python -m benchmarks.pictures [NAME...]     draws again what the benchmarks have measured

Needs matplotlib (the extra `plot`); without it a benchmark prints its table and says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import measure

FOLDER = Path(__file__).parent / "pictures"
# Okabe and Ito's colours, told apart by everyone: by stage, and by contestant.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}
_STAGES = ("fetcher", "decompressor", "tokenizer", "writer", "trainer", "supervisor")


def figure(columns: int, width: float = 4.2, height: float = 3.6) -> tuple[Any, Any]:
    """A figure with its axes side by side, in the benchmarks' style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(_STYLE)
    drawn, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False)
    return drawn, axes[0]


def save(drawn: Any, name: str) -> Path:
    """Write the picture and say where."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.png"
    drawn.savefig(path)
    print(f"picture: {path.relative_to(measure.ROOT)}")
    return path


def draw(name: str, result: Any) -> None:
    """Draw a benchmark's result, if matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no picture: install the extra `plot`, then python -m benchmarks.pictures")
        return
    _DRAW[name](result)


# ── throughput ──────────────────────────────────────────────────────────────────────────────


def _throughput(result: dict[str, Any]) -> None:
    formats = list(result["floors"])
    local = [one for one in result["runs"] if one["from"] == "files"]
    drawn, (left, right) = figure(2, width=5.2)
    _scaling(left, formats, local)
    if all("stages" in one for one in local):
        _stages(right, formats, {o["format"]: o for o in local if o["workers"] == 1}, result)
    else:
        right.axis("off")
    save(drawn, "throughput")


def _scaling(axes: Any, formats: list[str], local: list[dict[str, Any]]) -> None:
    for form, colour in zip(formats, COLOURS, strict=False):
        mine = sorted((o["workers"], o["tokens_per_s"] / 1e6) for o in local if o["format"] == form)
        counts, rates = zip(*mine, strict=True)
        axes.plot(counts, rates, "o-", color=colour, label=form)
        axes.plot(counts, [rates[0] * n for n in counts], ":", color=colour, linewidth=1)
    axes.set_xticks(sorted({one["workers"] for one in local}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("CPUs, and tokenizers (dotted: as many times one)")
    axes.set_ylabel("million tokens/s")
    axes.set_title("Whole pipeline, local shards")
    axes.legend()


def _stages(
    axes: Any, formats: list[str], runs: dict[str, dict[str, Any]], result: dict[str, Any]
) -> None:
    """CPU seconds by stage, on one CPU, beside the bare library calls."""
    shown = {name: dict(zip(_STAGES, COLOURS, strict=False))[name] for name in _STAGES}
    bare = {"decode": "decompressor", "parse": "fetcher", "encode": "tokenizer"}
    hatches = {"decode": "//", "parse": "..", "encode": "\\\\"}
    labelled: set[str] = set()
    for place, form in enumerate(formats):
        below = 0.0
        for stage in _STAGES:
            cost = max(0.0, runs[form]["stages"].get(stage, 0.0))
            if not cost:
                continue
            axes.bar(place - 0.2, cost, 0.36, bottom=below, color=shown[stage],
                     label=None if stage in labelled else stage)  # fmt: skip
            labelled.add(stage)
            below += cost
        top = below
        below = 0.0
        for part, like in bare.items():
            cost = result["floors"][form][part]
            axes.bar(place + 0.2, cost, 0.36, bottom=below, color="white", hatch=hatches[part],
                     edgecolor=shown[like] if part != "parse" else "#666666", linewidth=1,
                     label=None if part in labelled else f"bare {part}")  # fmt: skip
            labelled.add(part)
            below += cost
        axes.text(place, max(top, below), f"{below / top:.2f}", ha="center", va="bottom")
    axes.set_xticks(range(len(formats)), formats)
    axes.set_ylabel("CPU seconds per million tokens")
    axes.set_title("Cost by stage beside the limit (number: limit / cost)")
    axes.margins(y=0.12)
    axes.legend(fontsize=8)


# ── peers ───────────────────────────────────────────────────────────────────────────────────


def _peers(result: dict[str, Any]) -> None:
    from benchmarks.peers import OURS, with_ratios

    rows = with_ratios(result)
    workers = min(one["workers"] for one in rows)
    formats = list(result["floors"])
    drawn, axes = figure(len(formats), width=3.8)
    for form, here in zip(formats, axes, strict=True):
        mine = [o for o in rows if o["format"] == form and o["workers"] == workers]
        places = range(len(mine))
        costs = [one["cpu_s_per_mtok"] for one in mine]
        colours = [COLOURS[0] if one["name"] == OURS else COLOURS[6] for one in mine]
        here.barh(places, costs, 0.6, color=colours)
        here.plot([o["floor"] for o in mine], places, "|", color="black", markersize=22,
                  markeredgewidth=2, label="floor: bare decoder and tokenizer")  # fmt: skip
        for place, one in zip(places, mine, strict=True):
            said = f" {one['cpu_s_per_mtok']:.3f}"
            said += "" if one["name"] == OURS else f"\n {one['ratio']:.1f} ×"
            here.text(one["cpu_s_per_mtok"], place, said, va="center")
        here.set_yticks(places, [one["name"].replace(" + ", " +\n") for one in mine])
        here.invert_yaxis()
        here.set_xlim(0, max(costs) * 1.3)
        here.set_title(form)
        here.set_xlabel("CPU seconds per million tokens")
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center")
    save(drawn, "peers")


# ── start, memory, stall ────────────────────────────────────────────────────────────────────


def _startup(result: dict[str, Any]) -> None:
    """The milestones on one line of time; each bar begins where the one before it ended."""
    drawn, (axes,) = figure(1, width=7.5, height=0.42 * len(result["milestones"]) + 1.6)
    names, before = list(result["milestones"]), 0.0
    for place, name in enumerate(names):
        at = result["milestones"][name]
        axes.barh(place, at - before, left=before, color=COLOURS[0])
        axes.text(at, place, f" {at:.2f} s", va="center")
        before = at
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.axvline(result["goal_s"], color=COLOURS[5], linestyle=":", label="goal")
    axes.set_xlim(0, 1.12 * max(before, result["goal_s"]))
    axes.set_xlabel("seconds since the command was given")
    axes.set_title("From `start` to the first batch")
    axes.legend(loc="lower left")
    save(drawn, "startup")


def _memory(result: dict[str, Any]) -> None:
    drawn, (axes,) = figure(1, width=7.5)
    samples = result["samples"]
    minutes = [one["s"] / 60 for one in samples]
    roles = [r for r in _STAGES if any(r in one["pss_bytes"] for one in samples)]
    layers = [[one["pss_bytes"].get(role, 0) / 2**30 for one in samples] for role in roles]
    colours = dict(zip(_STAGES, COLOURS, strict=False))
    axes.stackplot(minutes, layers, labels=roles, colors=[colours[role] for role in roles])
    axes.axhline(1.0, color="black", linestyle=":", linewidth=1, label="goal: below 1 GiB")
    axes.set_xlim(0, max(minutes))
    axes.set_ylim(0, 1.25)
    axes.set_xlabel("minutes")
    axes.set_ylabel("memory (PSS), GiB")
    axes.set_title(f"All processes over {result['text_bytes'] / 1e9:.1f} GB of text")
    axes.legend(loc="upper center", ncol=3, fontsize=8)
    save(drawn, "memory")


def _stall(result: dict[str, Any]) -> None:
    drawn, (axes,) = figure(1, width=5.2)
    for name, colour in (("in memory", COLOURS[6]), ("live pipeline", COLOURS[0])):
        for number, rates in enumerate(result["tokens_per_s"][name]):
            axes.plot(range(1, len(rates) + 1), [rate / 1e3 for rate in rates], color=colour,
                      linewidth=1, alpha=0.8, label=None if number else name)  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlabel("update")
    axes.set_ylabel("thousand tokens/s")
    said = f"{result['ratio']:.3f} × in memory, {100 * result['stall_share']:.2f} % waiting"
    axes.set_title(f"Live: {said}")
    axes.legend()
    save(drawn, "stall")


_DRAW: dict[str, Callable[[Any], None]] = {
    "throughput": _throughput,
    "peers": _peers,
    "startup": _startup,
    "memory": _memory,
    "stall": _stall,
}


def main() -> None:
    for name in sys.argv[1:] or _DRAW:
        path = measure.RESULTS / f"{name}.json"
        if path.exists():
            draw(name, json.loads(path.read_text()))


if __name__ == "__main__":
    main()
