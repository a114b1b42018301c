"""How many tokens Muon needs to reach the loss at which AdamW ends.

    python -m benchmarks.muon [--data FILE|FOLDER] [--updates N] [--seeds 1 2 3] [--device gpu]

Both are tuned first, over the same number of runs on a seed of its own. Then AdamW trains for all
updates, and Muon for an eighth to all of them, each length with its whole schedule (a run that is
merely cut off has not had its decay); where Muon's final loss over the length crosses AdamW's,
interpolated per seed, are the tokens that Muon needs. Outside of the lengths nothing is guessed.
Everything else is the same: model, first weights, windows and their order, batch, warm-up,
schedule, clipping, weight decay.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from benchmarks.trial import Result, Setting, Size, Trials, load

_TUNING_SEED = 100
_LENGTHS = (0.125, 0.25, 0.375, 0.5, 0.65, 0.8, 1.0)  # of AdamW's updates
_RATE = "training.hyperparameters.learning_rate"
_ADAMW_RATE = "training.optimization.adamw_learning_rate"
_OPTIMIZER = "training.optimization.optimizer"
# The same number of runs for each: AdamW has one learning rate, Muon has two.
GRID: dict[str, list[dict[str, Any]]] = {
    "adamw": [{_RATE: rate} for rate in (2.5e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4.5e-3, 7e-3)],
    "muon": [{_RATE: m, _ADAMW_RATE: a} for m in (0.005, 0.01, 0.02, 0.04) for a in (3e-3, 1e-2)],
}


def tune(trials: Trials, updates: int) -> dict[str, list[Result]]:
    """All runs of the grid, the best first."""
    settings = {
        name: [Setting({_OPTIMIZER: name, **rates}, _TUNING_SEED, updates) for rates in grid]
        for name, grid in GRID.items()
    }
    trials.run([one for several in settings.values() for one in several])
    return {
        name: sorted(trials.run(several), key=lambda one: one.final)
        for name, several in settings.items()
    }


def crossing(lengths: list[int], finals: list[float], goal: float) -> float | None:
    """The first length at which the final loss is goal, linear between lengths; None if it lies
    before the shortest or behind the longest."""
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(lengths, finals, strict=True)):
        if y0 > goal >= y1:
            return x0 + (goal - y0) * (x1 - x0) / (y1 - y0)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="token file, or folder of parquet files")
    parser.add_argument("--updates", type=int, default=200, help="of AdamW's runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--results", type=Path, default=Path("muon.jsonl"), help="goes on from it")
    parser.add_argument("--plot", type=Path, help="PNG or SVG; needs matplotlib, extra plot")
    parser.add_argument("--budget-s", type=float, default=900.0, help="the most one run may take")
    for field, default in (("hidden", 96), ("layers", 4), ("context", 128), ("vocab", 1024)):
        parser.add_argument(f"--{field}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=16, help="windows per update")
    parser.add_argument("--validation", type=int, default=12_288, help="held-out tokens")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    size = Size(args.hidden, args.layers, args.context, args.vocab, args.batch, args.validation)
    data = load(args.data, size)
    trials = Trials(data, size, args.results, args.device, args.budget_s, args.jobs)
    tuned = tune(trials, args.updates)
    best = {name: runs[0].setting.overrides for name, runs in tuned.items()}
    lengths = [round(args.updates * share) for share in _LENGTHS]
    of_adamw = [Setting(best["adamw"], seed, args.updates) for seed in args.seeds]
    of_muon = [[Setting(best["muon"], seed, n) for n in lengths] for seed in args.seeds]
    trials.run([*of_adamw, *(one for several in of_muon for one in several)])
    adamw, muon = trials.run(of_adamw), [trials.run(several) for several in of_muon]
    report(tuned, adamw, muon, f"{data.said}, {size}")
    if args.plot is not None:
        plot(args.plot, adamw, muon)


def report(
    tuned: dict[str, list[Result]], adamw: list[Result], muon: list[list[Result]], said: str
) -> None:
    """Markdown: what was tuned, and the table over the seeds."""
    print(f"{said}\n")
    print("| optimizer | learning rates, best of the tuning runs first: held-out loss |\n|---|---|")
    for name, runs in tuned.items():
        cells = (
            f"{' / '.join(f'{v:g}' for k, v in one.setting.overrides.items() if k != _OPTIMIZER)}"
            f": {one.final:.4f}"
            for one in runs
        )
        print(f"| {name} | {', '.join(cells)} |")
    print("\n| seed | AdamW, all tokens | Muon, all tokens | tokens Muon needs | share |")
    print("|---|---|---|---|---|")
    shares = []
    for one, several in zip(adamw, muon, strict=True):
        need = crossing([r.tokens[-1] for r in several], [r.final for r in several], one.final)
        start = f"| {one.setting.seed} | {one.final:.4f} | {several[-1].final:.4f} |"
        if need is None:
            early = several[0].final <= one.final
            limit = several[0 if early else -1].tokens[-1]
            print(f"{start} {'fewer' if early else 'more'} than {limit:,} | – |")
            continue
        shares.append(need / one.tokens[-1])
        print(f"{start} {need:,.0f} of {one.tokens[-1]:,} | {shares[-1]:.2f} |")
    if len(shares) == len(adamw):
        spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
        print(f"\nMuon needs {statistics.mean(shares):.2f} ± {spread:.2f} of AdamW's tokens.")


def plot(path: Path, adamw: list[Result], muon: list[list[Result]]) -> None:
    """Held-out loss over tokens: a line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for number, one in enumerate(adamw):
        label = "AdamW" if number == 0 else None
        axes.plot(one.tokens, one.losses, color="tab:orange", label=label)
    for number, several in enumerate(muon):
        for one in several:
            whole = one is several[-1]
            label = "Muon, whole schedule at each length" if number == 0 and whole else None
            alpha = 1.0 if whole else 0.45
            axes.plot(one.tokens, one.losses, color="tab:blue", alpha=alpha, label=label)
    axes.set(xlabel="tokens", ylabel="held-out loss, nats per token", xscale="log")
    axes.axhline(statistics.mean(one.final for one in adamw), color="tab:orange", ls=":")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
