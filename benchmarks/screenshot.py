"""A picture of a run's screen, drawn by the program that draws the screen.

    python -m benchmarks.screenshot RUN --out docs/pictures/screen.svg

RUN is the folder of a run that is going on (or has ended): what `fineweb-pipeline status RUN`
prints, as SVG.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import click
from rich.console import Console
from rich.terminal_theme import MONOKAI

from pipeline import status_file
from pipeline.screen import picture

_COLUMNS = 80
_FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # addresses on another server


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path))
def main(run: Path, out: Path) -> None:
    """Write the picture."""
    recorded = status_file.read(run)
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(picture(recorded.status, status_file.state(recorded)))
    title = "fineweb-pipeline start"
    svg = console.export_svg(title=title, theme=MONOKAI, unique_id="screen")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_FONT.sub("", svg), encoding="utf-8")


if __name__ == "__main__":
    main()
