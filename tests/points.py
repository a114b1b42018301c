"""Every point of the protocol at which a process can be killed, read out of the sources.

A message that a role sends has three (before, in the middle of, after the sending), one that it
receives two (received, handled), and every `faultpoint("…")` in the sources is one. Nothing here
is a list that somebody has to keep up to date; tests/test_kills.py checks that runs pass them all.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline import messages
from pipeline.child import ROLES

ROOT = Path(__file__).parent.parent
NAMES = frozenset(message.__name__ for message in messages.ALL)
SUPERVISOR = "supervisor"
_WORKERS_OWN = {
    **{role: [f"{module.replace('.', '/')}.py"] for role, module in ROLES.items()},
    "trainer": ["trainer/process.py", "trainer/feed.py", "trainer/checkpoint.py"],
}
_IN_EVERY_WORKER = "pipeline/child.py"
# The first word of a faultpoint's name is the role that passes it, with these exceptions.
_OF_ROLE = {"checkpoint": "trainer", "log": SUPERVISOR, "cache": SUPERVISOR}


class Point(NamedTuple):
    """One cell of the kill matrix."""

    role: str
    name: str


def _tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def sends(role: str) -> set[str]:
    """Messages that a worker's modules construct; `channel.working` sends Working."""
    found = set()
    for path in [*_WORKERS_OWN[role], _IN_EVERY_WORKER]:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                found.add(node.func.id)
            if isinstance(node, ast.Attribute) and node.attr == "working":
                found.add("Working")
    return found & NAMES


def receives(role: str) -> set[str]:
    """Messages that a worker's modules match or test for."""
    found = set()
    for path in _WORKERS_OWN[role]:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.MatchClass) and isinstance(node.cls, ast.Name):
                found.add(node.cls.id)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                found |= {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
    return found & NAMES


def explicit() -> Iterator[Point]:
    """Every faultpoint("literal") in the sources."""
    for folder in ("pipeline", "shm", "trainer"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(_tree(str(path.relative_to(ROOT)))):
                if (
                    isinstance(node, ast.Call)
                    and getattr(node.func, "id", "") == "faultpoint"
                    and isinstance(node.args[0], ast.Constant)
                ):
                    name = str(node.args[0].value)
                    first = name.split(":", maxsplit=1)[0]
                    yield Point(_OF_ROLE.get(first, first), name)


def matrix() -> list[Point]:
    """All points of all roles, in a fixed order."""
    points = set(explicit())
    for role in ROLES:
        for name in sends(role):
            points |= {Point(role, f"{when}_send:{name}") for when in ("before", "mid", "after")}
            points |= {Point(SUPERVISOR, f"{when}:{name}") for when in ("received", "handled")}
        for name in receives(role):
            points |= {Point(role, f"{when}:{name}") for when in ("received", "handled")}
            points |= {
                Point(SUPERVISOR, f"{when}_send:{name}") for when in ("before", "mid", "after")
            }
    points.discard(Point(SUPERVISOR, "handled:Failed"))  # it ends the run with the error
    return sorted(points)


def documented() -> dict[str, set[str]]:
    """The table in the docstring of pipeline/messages.py: 'fetcher → supervisor' → names."""
    table: dict[str, set[str]] = {}
    at = ""
    for line in (messages.__doc__ or "").splitlines():
        if match := re.match(r"\s{4}([\w ]+ → \w+)\s{2,}(.*)", line):
            at, rest = match[1], match[2]
            table[at] = set()
        elif at and line.startswith(" " * 8):
            rest = line
        else:
            at = ""
            continue
        table[at] |= set(re.findall(r"\b[A-Z]\w+", rest))
    return table
