"""Does it pay to keep attention inside documents?

    python -m benchmarks.documents [--data FILE|FOLDER] [--updates N] [--seeds 1 2 3] [--device gpu]

The same model, windows, order and learning rates, with and without `mask_documents`. Two losses
are told, on documents that training never saw: that of the windows as they are, each model
reading as it was trained, and that of every document read alone, which is how a model is used.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.trial import Result, Setting, Size, Trials, load

_KEY = "data.preprocessing.mask_documents"
_RATES = {
    "training.optimization.optimizer": "muon",
    "training.hyperparameters.learning_rate": 0.02,
    "training.optimization.adamw_learning_rate": 1e-2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="token file, or folder of parquet files")
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--results", type=Path, default=Path("documents.jsonl"))
    parser.add_argument("--budget-s", type=float, default=900.0, help="the most one run may take")
    for field, default in (("hidden", 96), ("layers", 4), ("context", 512), ("vocab", 1024)):
        parser.add_argument(f"--{field}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=4, help="windows per update")
    parser.add_argument("--validation", type=int, default=12_288, help="held-out tokens")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    size = Size(args.hidden, args.layers, args.context, args.vocab, args.batch, args.validation)
    data = load(args.data, size)
    trials = Trials(data, size, args.results, args.device, args.budget_s, args.jobs)
    settings = {
        masked: [Setting({**_RATES, _KEY: masked}, seed, args.updates) for seed in args.seeds]
        for masked in (False, True)
    }
    trials.run([one for several in settings.values() for one in several])
    runs = {masked: trials.run(several) for masked, several in settings.items()}
    eot = args.vocab - 1
    bounds = float((data.train[:, 1:-1] == eot).sum(1).mean())
    print(f"{data.said}, {bounds:.2f} documents begin inside a window on average; {size}\n")
    report(runs)


def report(runs: dict[bool, list[Result]]) -> None:
    """A Markdown table over the seeds, and the mean difference."""
    print("| seed | loss of windows: off | on | documents alone: off | on | s a run: off | on |")
    print("|---|---|---|---|---|---|---|")
    gains = []
    for off, on in zip(runs[False], runs[True], strict=True):
        assert off.alone is not None and on.alone is not None
        gains.append(off.alone - on.alone)
        print(
            f"| {off.setting.seed} | {off.final:.4f} | {on.final:.4f} | {off.alone:.4f} | "
            f"{on.alone:.4f} | {off.seconds:.0f} | {on.seconds:.0f} |"
        )
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    print(
        f"\nMasking lowers the loss of documents alone by {statistics.mean(gains):+.4f} ± "
        f"{spread:.4f} nats."
    )


if __name__ == "__main__":
    main()
