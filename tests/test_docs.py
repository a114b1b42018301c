"""What README and docs/ show is true: their commands, configurations, links and tables.

Every fenced block names its kind. What the tests do with it:

    sh run      executed, all of a page in one folder: four small shards in shards/, and the YAML
                blocks that begin with the name of a file
    sh          every command of ours is parsed: the command and its options exist, with values
                that they take; `python -m MODULE` has such a module
    yaml        is a configuration: its keys exist and may stand together
    text, mermaid, html, python    shown
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import yaml

from pipeline import settings
from pipeline.cli import cli
from pipeline.config import from_plain
from pipeline.messages import Message
from pipeline.rules import validate
from tests import page_errors, pages
from tests.harness import ROOT, english, write_shards

_KINDS = ("sh run", "sh", "yaml", "text", "mermaid", "html", "python")
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_OTHERS = (  # commands of other programs, which are not looked at
    "git", "pip", "export", "curl", "cd", "mlx_lm.generate", "mlx.launch", "ray", "ssh", "rsync",
    "tar", "watch", "mkdir", "mv", "uv", "ulimit", "exec", "pytest", "tmux", "sudo", "ruff",
)  # fmt: skip


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    kind: str
    text: str


def blocks() -> list[Block]:
    """Every fenced block there is."""
    found = []
    for page in pages.pages():
        for kind, text in _FENCE.findall(page.read_text(encoding="utf-8")):
            found.append(Block(page, kind.strip(), text))
    return found


def of(kind: str) -> list[Block]:
    """All blocks of a kind."""
    return [block for block in blocks() if block.kind == kind]


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block as words; comments and prompts are none."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [_bare(one) for one in words if one]


def _bare(words: list[str]) -> list[str]:
    """Without leading VARIABLE=value, and without what is redirected or piped to."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    ends = [n for n, word in enumerate(words) if word in ("|", ">", ">>", "&", "&&", ";", "2>")]
    return words[: ends[0]] if ends else words


# ── the blocks ──────────────────────────────────────────────────────────────────────────────


def test_every_block_says_what_it_is() -> None:
    strange = {(block.page.name, block.kind) for block in blocks() if block.kind not in _KINDS}
    assert not strange
    assert len(of("sh")) > 15
    assert len(of("sh run")) > 4


def test_every_command_that_is_shown_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With options that it has and values that they take."""
    _write_files(tmp_path)
    for folder in ("shards", "made"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    wrong = []
    for block in [*of("sh"), *of("sh run")]:
        for words in commands(block.text):
            try:
                _parse(words)
            except (click.ClickException, LookupError, ValueError) as error:
                said = error.format_message() if isinstance(error, click.ClickException) else error
                wrong.append(f"{block.page.name}: {shlex.join(words)}: {said}")
    assert not wrong, "\n".join(wrong)


def _parse(words: list[str]) -> None:
    program, *rest = words
    if program.endswith(("/python", "python", "python3")) and rest[:1] == ["-m"]:
        if rest[1].split(".")[0] in ("tests", "benchmarks"):
            assert (ROOT / (rest[1].replace(".", "/") + ".py")).exists(), rest[1]
    elif program == "./run_fineweb_limited.sh":
        known = re.findall(r"--[a-z-]+", (ROOT / program).read_text(encoding="utf-8"))
        assert {word for word in rest if word.startswith("--")} <= set(known), words
    elif program.removeprefix("bin/") == "fineweb-pipeline":
        _parse_ours(cli, "fineweb-pipeline", rest)
    elif program == "bin/test":
        pass
    elif Path(program).name not in _OTHERS:
        raise LookupError("no known program")


def _parse_ours(command: click.Command, name: str, words: list[str]) -> None:
    if words in (["--help"], ["--version"]):
        return
    with command.make_context(name, list(words)) as ctx:
        if isinstance(command, click.Group):
            found, child, rest = command.resolve_command(ctx, ctx._protected_args + ctx.args)
            assert child is not None and found is not None
            _parse_ours(child, found, rest)


@pytest.mark.parametrize("block", of("yaml"), ids=lambda block: block.page.stem)
def test_every_configuration_that_is_shown_is_one(block: Block) -> None:
    plain = yaml.safe_load(block.text)
    options = plain.pop("commands", {})
    assert set(options) <= set(cli.commands)
    validate(from_plain({"name": "here", **plain}))


@pytest.mark.parametrize(
    "page", sorted({block.page for block in of("sh run")}), ids=lambda p: p.stem
)
def test_every_command_that_can_run_here_runs(page: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", english(40, largest=9000), 4)
    _write_files(tmp_path)
    script = "\n".join(block.text for block in of("sh run") if block.page == page)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _write_files(folder: Path) -> None:
    """Every YAML block that begins with a file's name, as that file."""
    for block in of("yaml"):
        if named := re.match(r"# (\S+\.yaml)\n", block.text):
            (folder / named[1]).write_text(block.text, encoding="utf-8")


# ── what is made from the code ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: page.stem)
def test_what_is_made_from_the_code_is_what_the_code_gives(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert pages.renewed(text) == text, "python -m tests.pages writes it anew"


def test_the_table_of_messages_has_every_message_once() -> None:
    named = [name for _, _, sent in pages.protocol() for name in sent]
    classes = {
        kind.__name__ for kind in Message.__subclasses__() if kind.__module__ == Message.__module__
    }
    assert sorted(named) == sorted(classes)


def test_every_kind_of_error_stands_in_troubleshooting() -> None:
    """With an exit code each, and each message is found by whoever searches for its words."""
    page = (ROOT / "docs/TROUBLESHOOTING.md").read_text(encoding="utf-8")
    used = {name for name, _, _ in page_errors.said()}
    for name, code in page_errors.kinds_of_errors().items():
        assert name not in used or f"Exit code {int(code)}:" in page, name
    assert len(used) > 10


# ── links, help ─────────────────────────────────────────────────────────────────────────────


def test_every_link_leads_somewhere() -> None:
    broken = []
    for page in pages.pages():
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if target.startswith(("http://", "https://", "#")):
                continue
            path, _, anchor = target.partition("#")
            there = page.parent / path
            if not there.exists() or (anchor and anchor not in _anchors(there)):
                broken.append(f"{page.name}: {target}")
    assert not broken


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one).strip().lower().replace(" ", "-") for one in headings}


@pytest.mark.parametrize(("name", "command"), list(pages.commands()))
def test_every_command_teaches(name: str, command: click.Command) -> None:
    """An example, its exit codes, a help text for every option, lines that fit 80 columns."""
    ctx = click.Context(command, info_name=f"fineweb-pipeline {name}", max_content_width=80)
    text = command.get_help(ctx)
    assert re.search(rf"^ +fineweb-pipeline {name}\b", text, re.MULTILINE), "no example"
    assert "Exit codes: 0" in text
    silent = [o.opts for o in command.params if isinstance(o, click.Option) and not o.help]
    assert not silent
    assert not [line for line in text.splitlines() if len(line) > 80]
    assert "..." not in command.get_short_help_str(62), "the list of commands would cut it"


def test_settings_know_the_shipped_configurations_that_pages_name() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in pages.pages())
    assert set(re.findall(r"--config ((?:model|llama)[\w-]+)", text)) <= set(settings.shipped())
