"""Completion of commands, options, runs and configurations in the user's shell.

Runs in: the command line's own process.
"""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from pipeline.errors import ConfigError, ExitCode, exit_codes

_PROGRAM = "fineweb-pipeline"
_VARIABLE = "_FINEWEB_PIPELINE_COMPLETE"  # as click derives it from the program's name


def complete_run(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of the runs in runs/, and folders."""
    runs = Path("runs")
    found = sorted(path.parent.name for path in runs.glob("*/log.txt")) if runs.is_dir() else []
    items = [CompletionItem(name) for name in found if name.startswith(incomplete)]
    return [*items, CompletionItem(incomplete, type="dir")]


@click.command(epilog=exit_codes(ExitCode.OK, ExitCode.USAGE))
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    With it, SHELL completes commands, options, runs and configurations.

    \b
    Examples:
      fineweb-pipeline completion bash >> ~/.bashrc
      fineweb-pipeline completion zsh >> ~/.zshrc
      fineweb-pipeline completion fish | source
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise ConfigError(f"there is no completion for {shell}", "take bash, zsh or fish")
    root = ctx.find_root().command
    try:
        click.echo(kind(root, {}, _PROGRAM, _VARIABLE).source())
    except RuntimeError as error:  # click looks at the version of the user's bash
        raise ConfigError(str(error), "install bash 4.4 or newer, or take zsh or fish") from None
