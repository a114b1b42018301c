"""`bench`: how fast the pipeline is here with 1 … N workers, and the settings that follow.

Runs in: the command line's own process.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from pipeline import cli_options
from pipeline.cli_options import config_option, shard_options
from pipeline.cli_stream import EXIT_CODES, TOKENIZE_DEFAULTS
from pipeline.costs import Costs
from pipeline.errors import ConfigError
from pipeline.screen import human
from pipeline.sizes import StageSizes

_CELLS = 36
_NEAR = 0.95  # of the best rate: fewer workers that reach it are recommended


class Point(msgspec.Struct, frozen=True):
    """So many workers on so many CPUs."""

    workers: int
    tokens_per_s: float
    mb_per_s: float
    cpu_s_per_mtok: float
    memory_gb: float
    stages: dict[str, float]


class Report(msgspec.Struct, frozen=True):
    """What was found."""

    subject: str
    points: list[Point]
    costs: Costs
    tokenize: StageSizes  # what --workers auto comes to from now on
    train: StageSizes
    enough: int  # workers that reach 95 % of the best rate


@click.command(epilog=EXIT_CODES)
@config_option("YAML file with defaults.")
@click.option("--tokenizer", metavar="NAME", help="A tiktoken encoding.  [default: gpt2]")
@click.option("--vocab-size", type=click.IntRange(257), metavar="V",
              help="Keep only the encoding's first ranks.")  # fmt: skip
@click.option("--form", default="tar.bz2", show_default=True, metavar="FORM",
              help="Without --shards: the form of the built-in corpus: jsonl.zst, parquet "
              "…")  # fmt: skip
@click.option("--megabytes", type=click.FloatRange(0.1), default=48.0, show_default=True,
              metavar="MB", help="Text of a run.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True, metavar="N",
              help="How often each is run; the median counts.")  # fmt: skip
@click.option("--most-workers", type=click.IntRange(1), metavar="N",
              help="Sweep 1, 2, 4 … up to N.  [default: all CPUs]")  # fmt: skip
@click.option("--png", type=click.Path(dir_okay=False), metavar="FILE",
              help="Draw the curve into this file (needs the extra `plot`).")  # fmt: skip
@shard_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON line.")
@click.pass_context
def bench(ctx: click.Context, /, config_path: str | None, **options: Any) -> None:
    """Measure how the pipeline scales on this machine, by worker.

    On your shards, or on a built-in corpus, with 1 … N workers.

    Every point is two runs of `tokenize` whose difference counts, so that starts cancel; N workers
    are kept to N CPUs. What the stages cost is kept: `--workers auto` chooses by it from then on,
    for shards of this form and this tokenizer. It takes about a minute on two CPUs. Ctrl-C ends
    it; then nothing is kept.

    \b
    Examples:
      fineweb-pipeline bench
      fineweb-pipeline bench --shards '/data/*.zst' --megabytes 200 --png a.png
      fineweb-pipeline bench --form jsonl.zst --json
    """
    given = cli_options.given(ctx)
    config = given.resolve(config_path, {"name": "bench", **TOKENIZE_DEFAULTS}).config
    if options["png"]:
        _matplotlib()
    with tempfile.TemporaryDirectory() as folder:
        report = _measure(config, Path(folder), options)
    if options["png"]:
        draw(report, Path(options["png"]))
    if options["as_json"]:
        click.echo(msgspec.json.encode(report).decode())
    else:
        click.echo("\n".join(describe(report)))
    sys.exit(0)


def _measure(config: Any, folder: Path, options: dict[str, Any]) -> Report:
    from pipeline import benching, catalog, costs, encoding, manifest, mixture, sizes

    stream, tokenizer = config.data.stream, config.data.tokenizer
    vocabulary = encoding.vocabulary(tokenizer.name, tokenizer.vocab_size)
    if stream.mix:
        raise ConfigError("data.stream.mix: a bench reads one data set", "name it with --shards")
    if stream.patterns() or stream.manifest:
        read = None if stream.manifest is None else manifest.read(Path(stream.manifest))
        found, _ = mixture.read(stream, stream.source_options(), catalog.Known(read))
        subject, name = benching.users(config, found, options["megabytes"]), found[0].name
    else:
        form = costs.form_of(f"x.{options['form']}")
        if form != options["form"]:
            raise ConfigError(f"--form {options['form']} is no form", "give tar.bz2, jsonl.zst …")
        _say(f"making {options['megabytes']:g} MB of text into {form} shards")
        subject = benching.built_in(config, folder, form, options["megabytes"])
        name = f"x.{form}"
    counts = benching.worker_counts(options["most_workers"])
    figures, cost = benching.sweep(subject, counts, options["rounds"], _say)
    costs.keep(name, costs.kind_of(config, vocabulary.size), cost)
    points = [Point(workers=count, **one) for count, one in figures.items()]
    best = max(one.tokens_per_s for one in points)
    automatic = msgspec.structs.replace(stream, workers="auto", fetchers=None, decompressors=None)
    return Report(
        subject=subject.said,
        points=points,
        costs=cost,
        tokenize=sizes.split(sizes.usable_cpus(), "tokenize", automatic, cost),
        train=sizes.split(sizes.usable_cpus(), "train", automatic, cost),
        enough=min(one.workers for one in points if one.tokens_per_s >= _NEAR * best),
    )


def _say(what: str) -> None:
    click.echo(f"{what} …", err=True)


def describe(report: Report) -> Iterator[str]:
    """Curve, costs and what to do, at 80 columns."""
    yield f"{report.subject}; dots: as many times one"
    best = max(one.tokens_per_s for one in report.points)
    one = report.points[0].tokens_per_s / report.points[0].workers
    scale = _CELLS / max(best, one * report.points[-1].workers)
    for point in report.points:
        full, ideal = round(scale * point.tokens_per_s), round(scale * one * point.workers)
        bar = "█" * full + "·" * max(0, ideal - full)
        yield f"{point.workers:>4} {bar:<{_CELLS}} {human(point.tokens_per_s, 'tok/s'):>12}  " + (
            f"{point.tokens_per_s / one:5.2f} × one"
        )
    yield ""
    cost, rest = report.costs, report.costs.rest
    assert rest is not None
    yield "CPU milliseconds a MB of text:"
    yield f"  read {1e3 * cost.read_s:.1f}, encode {1e3 * cost.encode_s:.1f}, " + (
        f"write {1e3 * rest.write_s:.1f}, supervise {1e3 * rest.supervise_s:.1f}"
    )
    yield "kept: --workers auto is from now on"
    for name, split in (("tokenize", report.tokenize), ("start", report.train)):
        yield f"  {name:<9}--workers {split.tokenizers} --decompressors {split.decompressors} " + (
            f"--fetchers {split.fetchers}"
        )
    if report.enough < report.points[-1].workers:
        yield f"{report.enough} workers on as many CPUs reach {100 * _NEAR:.0f} % of the best rate"


# ── the picture ─────────────────────────────────────────────────────────────────────────────


def _matplotlib() -> None:
    """Raises: ConfigError, before a minute is spent."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--png needs matplotlib, which is not installed",
            "pip install 'fineweb-pipeline[plot]', or leave --png out",
        ) from None


def draw(report: Report, path: Path) -> None:
    """The curve as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = [one.workers for one in report.points]
    rates = [one.tokens_per_s / 1e6 for one in report.points]
    figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    axes.plot(counts, rates, "o-", color="#0072B2", label=report.subject)
    axes.plot(counts, [rates[0] * n / counts[0] for n in counts], ":", color="#999999")
    axes.set_xticks(counts)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("workers, and CPUs (dotted: as many times one)")
    axes.set_ylabel("million tokens/s")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)
