"""What the program can say when something is wrong, read from its code: docs/TROUBLESHOOTING.md."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline import consuming, errors, rules
from pipeline.config import Config
from pipeline.errors import ExitCode, FinewebError
from pipeline.sources import ChangedError, TransientError
from trainer.errors import BadUpdatesError

ROOT = Path(__file__).parent.parent
CODE = ("pipeline", "shm", "trainer")


def modules() -> list[Path]:
    """Every module of the program."""
    return sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))


def kinds_of_errors() -> dict[str, ExitCode]:
    """Every class of errors that a user meets, and the exit code it leads to."""
    assert {consuming.DiskFullError, BadUpdatesError} < set(_kinds(FinewebError))
    lasting = {kind.__name__: kind.exit_code for kind in _kinds(FinewebError)}
    # These two are tried again first, and end a run when that does not help.
    return lasting | {kind.__name__: ExitCode.SOURCE for kind in (TransientError, ChangedError)}


def _kinds(kind: type[FinewebError]) -> Iterator[type[FinewebError]]:
    yield kind
    for one in kind.__subclasses__():
        yield from _kinds(one)


@functools.cache
def said() -> set[tuple[str, str, str]]:
    """What the code can say: (class, what, remedy), with … for what is known only then."""
    kinds = kinds_of_errors()
    found = set()
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = _constants(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                what = _template(node.args[0], named)
                # without words of its own it only passes another's on
                if node.func.id in kinds and re.search(r"\w{3}", what):
                    found.add((node.func.id, what, _remedy(node, node.func.id, named)))
    return found


def _remedy(call: ast.Call, kind: str, named: dict[str, ast.expr]) -> str:
    """What an error is made to advise: its second argument, or what its class says."""
    own = {"TransientError": TransientError, "ChangedError": ChangedError}.get(kind)
    given = [one.value for one in call.keywords if one.arg == "remedy"]
    if own is None:
        given += call.args[1:2]
    if given:
        return _template(given[0], named)
    return str(inspect.signature(own).parameters["remedy"].default) if own else ""


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    pairs = [(n.targets[0], n.value) for n in tree.body if isinstance(n, ast.Assign)]
    return {target.id: value for target, value in pairs if isinstance(target, ast.Name)}


def _template(node: ast.expr, named: dict[str, ast.expr]) -> str:
    """An expression as a text, with … for what is not written there."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        joined = "".join(_template(part, named) for part in node.values)
        return re.sub(r"…(?:…| )*…", "…", joined)
    if isinstance(node, ast.Name) and node.id in named:
        return _template(named[node.id], {})
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left, named) + _template(node.right, named)
    return "…"


def table_of_errors() -> str:
    """Every error by the exit code it ends the command with."""
    kinds = kinds_of_errors()
    lines: list[str] = []
    for code in ExitCode:
        rows = sorted((what, remedy) for kind, what, remedy in said() if kinds[kind] is code)
        if rows:
            lines += [f"\n### Exit code {int(code)}: {errors.MEANINGS[code]}\n"]
            lines += ["| it says | and what to do |", "|---|---|"]
            lines += [f"| {cell(what)} | {cell(remedy)} |" for what, remedy in rows]
    return "\n".join([*lines, ""])


def table_of_rules() -> str:
    """What configurations must keep to: by what is said of one that does not."""
    keys: dict[str, list[str]] = {}
    for _, key, what in rules.rules(Config(name="x")):
        keys.setdefault(re.sub(r"^(None|[\d.]+)", "…", what), []).append(f"`{key}`")
    lines = ["| it says, after the key | of these keys |", "|---|---|"]
    lines += [f"| {cell(what)} | {', '.join(named)} |" for what, named in keys.items()]
    return "\n".join(lines)


def table_of_codes() -> str:
    """The exit codes."""
    rows = [f"| {int(code)} | {meaning} |" for code, meaning in errors.MEANINGS.items()]
    return "\n".join(["| exit code | meaning |", "|---|---|", *rows])


def cell(text: str) -> str:
    """A text as a table's cell."""
    for sign in "|<>*_":
        text = text.replace(sign, "\\" + sign)
    return text.replace("\n", " ")
