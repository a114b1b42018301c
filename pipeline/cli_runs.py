"""Commands on a run that has been: generate, export and report.

Runs in: the command line's own process. The trainer's code, and mlx with it, is imported by name
and only when one of these commands runs.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click
import msgspec

from pipeline import checkpoints
from pipeline.cli_shell import complete_run
from pipeline.errors import ExitCode, exit_codes

_MODULE = "trainer.commands"
_CODES = exit_codes(ExitCode.OK, ExitCode.USAGE, ExitCode.DATA)

_CHECKPOINT = click.option(
    "--step", type=click.IntRange(0), metavar="N", help="Checkpoint of this step.  [default: last]"
)


@click.command(epilog=_CODES)
@click.argument("run", shell_complete=complete_run)
@click.argument("prompt", default="")
@click.option("--max-tokens", type=click.IntRange(1), default=200, show_default=True, metavar="N",
              help="The text ends here, or at its end-of-text token.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(0), default=0.8, show_default=True,
              metavar="X", help="0 takes the likeliest token each time.")  # fmt: skip
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.95,
              show_default=True, metavar="P", help="Draw from the likeliest tokens that together "
              "have this probability.")  # fmt: skip
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="The same seed, the same text.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "gpu"]), default="auto",
              show_default=True, help="Where it runs; auto: a GPU if MLX finds one.")  # fmt: skip
@_CHECKPOINT
def generate(run: str, prompt: str, step: int | None, **options: Any) -> None:
    """Continue a text with a run's model.

    RUN is a run's folder, its name, or a checkpoint's folder. The text is shown as it is made.
    Without PROMPT the model begins a document of its own.

    \b
    Examples:
      fineweb-pipeline generate demo "This module provides"
      fineweb-pipeline generate runs/fineweb-80m "The sun" --temperature 0
    """
    commands = importlib.import_module(_MODULE)
    commands.generate(checkpoints.find(run, step), prompt, **options)


@click.command(epilog=_CODES)
@click.argument("run", shell_complete=complete_run)
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Folder to make; it must not be there yet.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
              show_default=True, help="Of the weights; float32 keeps them exactly.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON line.")
@_CHECKPOINT
def export(run: str, out: Path, step: int | None, dtype: str, as_json: bool) -> None:
    """Write a run's model in Hugging Face's layout.

    transformers, mlx-lm and others read it. RUN is a run's folder, its name, or a checkpoint's
    folder. The folder gets config.json, model.safetensors and the tokenizer, also of a
    vocabulary that was cut.

    \b
    Examples:
      fineweb-pipeline export demo --out demo-hf
      mlx_lm.generate --model demo-hf --prompt "This module provides"
    """
    commands = importlib.import_module(_MODULE)
    result = commands.export(checkpoints.find(run, step), out, dtype=dtype)
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        size = result["size_bytes"] / 1e6
        click.echo(f"{out}: step {result['step']}, {size:.1f} MB, weights in {dtype}")


@click.command(epilog=_CODES)
@click.argument("run", shell_complete=complete_run)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Page to write.  [default: NAME-report.html here]")  # fmt: skip
def report(run: str, out: Path | None) -> None:
    """Make one HTML page about a run.

    RUN is a run's folder, or its name; it may still be going on. Loss, rates, stalls by stage,
    disk over time, samples and configuration, in one file that needs nothing else.

    \b
    Examples:
      fineweb-pipeline report demo
      fineweb-pipeline report runs/fineweb-80m --out /tmp/fineweb-80m.html
    """
    from pipeline import page

    folder = Path(run) if Path(run).is_dir() else Path("runs") / run
    target = out or Path(f"{folder.resolve().name}-report.html")
    text = page.render(folder)
    target.write_text(text, encoding="utf-8")
    click.echo(f"{target}: {len(text) / 1e3:.0f} kB")
