"""The README is true of the tree."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from pipeline import cli_stream
from pipeline.cli import cli
from tests.harness import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(
    path
    for folder in ("pipeline", "shm", "trainer")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__init__.py"
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_stands_in_the_file_tree(path: Path) -> None:
    assert re.search(rf"\b{re.escape(path.name)}\b", README)


def test_every_file_that_is_named_is_there() -> None:
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / name).exists(), name
    tree = README.split("## Files")[1].split("## Development")[0]
    known = {path.name for path in MODULES}
    assert set(re.findall(r"\b[a-z_0-9]+\.py\b", tree)) == known


def test_every_option_that_is_named_is_one() -> None:
    known = {
        option
        for command in cli.commands.values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    table = README.split("## Options")[1].split("More commands")[0]
    named = set(re.findall(r"`(--[a-z-]+)", table))
    assert len(named) > 15
    assert named <= known


def test_it_is_short_and_its_exit_codes_are_those_of_the_program() -> None:
    assert len(README.splitlines()) < 250
    assert re.sub(r"\s+", " ", cli_stream.EXIT_CODES).replace(":", ",")[11:] in re.sub(
        r"\s+", " ", README
    )
