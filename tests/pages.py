"""The parts of docs/ that are made from the code: diagrams, tables of errors, options and keys.

    python -m tests.pages        writes them anew, after the code has changed

A page keeps each between two comments, <!-- made: NAME --> and <!-- end -->;
tests/test_docs.py fails where one is not what the code gives.
"""

from __future__ import annotations

import ast
import configparser
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import click
import msgspec

from pipeline import cli_options, messages, settings
from pipeline.cli import cli
from pipeline.config import Config
from pipeline.state import File, FileState
from tests.page_errors import (
    CODE,
    ROOT,
    cell,
    modules,
    table_of_codes,
    table_of_errors,
    table_of_rules,
)  # fmt: skip
from tests.simulation.simulation import Simulation
from tests.simulation.worlds import draw

_PART = re.compile(r"(<!-- made: ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_WORLDS = 150  # simulated runs that the states' diagram is watched in


def pages() -> list[Path]:
    """Every page that a user reads."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def renewed(page: str) -> str:
    """A page with every part made anew. Raises: KeyError: a part that nothing here makes."""
    return _PART.sub(lambda part: f"{part[1]}{PARTS[part[2]]()}\n{part[4]}", page)


# ── diagrams ────────────────────────────────────────────────────────────────────────────────


def protocol() -> list[tuple[str, str, list[str]]]:
    """Who sends what to whom: (from, to, messages), out of the table in pipeline/messages.py."""
    table = (messages.__doc__ or "").split("\n\n")[2]
    joined = re.sub(r"\n\s+·", " ·", table)
    rows = []
    for line in joined.strip().splitlines():
        source, target, sent = re.fullmatch(r"\s*(.+?) → (.+?)\s{2,}(.+)", line).groups()  # type: ignore[union-attr]
        rows.append((source, target, re.split(r" · | or ", sent)))
    return rows


def diagram_of_messages() -> str:
    """Processes and what they say to one another, as a mermaid graph."""
    lines = ["```mermaid", "flowchart LR"]
    for source, target, sent in protocol():
        near, far = (one.replace(" ", "_") for one in (source, target))
        lines.append(f'    {near}["{source}"] -->|"{"<br/>".join(sent)}"| {far}["{target}"]')
    return "\n".join([*lines, "```"])


@functools.cache
def transitions() -> set[tuple[str, str, str]]:
    """How shards' files change: (from, to, by which function of the scheduler).

    Not read but watched: simulated runs, with every fault they know.
    """
    seen: set[tuple[str, str, str]] = set()

    def watch(file: File, name: str, value: object) -> None:
        before = file.__dict__.get("state")
        if name == "state" and isinstance(value, FileState) and before not in (None, value):
            by = sys._getframe(1).f_code.co_name
            seen.add((before.value, value.value, by))
        object.__setattr__(file, name, value)

    with mock.patch.object(File, "__setattr__", watch):
        for seed in range(_WORLDS):
            Simulation(draw(seed)).run()
    return seen


def diagram_of_states() -> str:
    """The states of a shard's file, as a mermaid state diagram."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {FileState.ABSENT.value}"]
    edges: dict[tuple[str, str], list[str]] = {}
    for before, after, by in sorted(transitions()):
        edges.setdefault((before, after), []).append(by.strip("_"))
    lines += [f"    {a} --> {b}: {', '.join(by)}" for (a, b), by in edges.items()]
    return "\n".join([*lines, "```"])


def diagram_of_imports() -> str:
    """Which package imports which, as a mermaid graph."""
    edges = set()
    for path in modules():
        package = ".".join(path.relative_to(ROOT).parent.parts)
        for name in _imported(ast.parse(path.read_text(encoding="utf-8"))):
            target = _package(name)
            if target and target != package:
                edges.add((package, target))
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"    {a} --> {b}" for a, b in sorted(edges)]
    return "\n".join([*lines, "```"])


def contracts() -> str:
    """The import contracts of setup.cfg, as a list."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    names = [s for s in parser.sections() if s.startswith("importlinter:contract:")]
    return "\n".join(f"* {parser[name]['name']}" for name in names)


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _package(name: str) -> str | None:
    """The package of ours that a dotted name lies in."""
    parts = name.split(".")
    if parts[0] not in CODE:
        return None
    if len(parts) > 1 and (ROOT / parts[0] / parts[1]).is_dir():
        return ".".join(parts[:2])
    return parts[0]


# ── options and keys ────────────────────────────────────────────────────────────────────────


def commands(group: click.Group = cli, place: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, f"{place}{name} ")
        else:
            yield f"{place}{name}", command


def table_of_options() -> str:
    """Every command with its options, their variables and keys."""
    lines: list[str] = []
    for name, command in commands():
        ctx = click.Context(command, info_name=f"fineweb-pipeline {name}")
        usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
        lines += [f"\n### {name}\n", f"`{usage}`\n", command.get_short_help_str(200), ""]
        lines += ["| option | meaning | key of the file |", "|---|---|---|"]
        for option in command.params:
            record = option.get_help_record(ctx)
            if record is not None:
                streams = name in ("start", "tokenize")
                key = cli_options.KEYS.get(option.name or "", "") if streams else ""
                code = f"`{key}`" if key else ""
                flags = record[0].replace("|", "\\|")
                lines.append(f"| `{flags}` | {cell(record[1])} | {code} |")
    return "\n".join([*lines, ""])


def table_of_keys() -> str:
    """Every key of the configuration: default, and the comment beside it in the code."""
    notes = _comments()
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key, section, name in _keys(Config, ""):
        field = next(f for f in msgspec.structs.fields(section) if f.name == name)
        default = "required"
        if field.default is not msgspec.NODEFAULT:
            default = f"`{_plain(field.default)}`"
        elif field.default_factory is not msgspec.NODEFAULT:
            default = f"`{_plain(field.default_factory())}`"
        lines.append(f"| `{key}` | {default} | {cell(notes.get((section.__name__, name), ''))} |")
    return "\n".join(lines)


def _keys(section: type[msgspec.Struct], path: str) -> Iterator[tuple[str, type, str]]:
    for field in msgspec.structs.fields(section):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from _keys(field.type, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", section, field.name


def _plain(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _comments() -> dict[tuple[str, str], str]:
    """The comments of pipeline/config.py: (class, field) → what stands above and beside it."""
    notes, kind, above = {}, "", []  # type: ignore[var-annotated]
    for line in (ROOT / "pipeline/config.py").read_text(encoding="utf-8").splitlines():
        if opened := re.match(r"class (\w+)\(", line):
            kind = opened[1]
        if comment := re.match(r" +# (.*)", line):
            above.append(comment[1])
            continue
        if field := re.match(r"    (\w+): .*?(?:  # (.*))?$", line):
            notes[kind, field[1]] = " ".join([*above, field[2] or ""]).strip()
        above = []
    return notes


def list_of_pages() -> str:
    """The guides by their titles."""
    found = [path for path in pages() if path.parent == ROOT / "docs" and path.stem != "README"]
    titles = {path.name: path.read_text(encoding="utf-8").splitlines()[0] for path in found}
    return " · ".join(f"[{title.lstrip('# ')}]({name})" for name, title in titles.items())


PARTS: dict[str, Callable[[], str]] = {
    "messages": diagram_of_messages,
    "states": diagram_of_states,
    "imports": diagram_of_imports,
    "contracts": contracts,
    "errors": table_of_errors,
    "pages": list_of_pages,
    "rules": table_of_rules,
    "exit-codes": table_of_codes,
    "options": table_of_options,
    "keys": table_of_keys,
    "shipped": lambda: "\n".join(f"* `{name}`" for name in settings.shipped()),
}


def main() -> None:
    """Write every part anew."""
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = renewed(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
