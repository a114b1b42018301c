"""A condition over columns: its grammar, and what it says of one record.

Runs in: supervisor, decompressors. Pure. What it says of tables: pipeline/filters.py.

    language == 'en' and language_score >= 0.65       0.65 <= language_score < 0.9
    dump in ['CC-MAIN-2024-10', 'CC-MAIN-2024-18']    'wiki' in url, url.startswith('https://')
    not (is_ad or token_count > 10000)                url is not None
    meta.lang == 'de'                                 what is nested: see pipeline/fields.py
    column('/tags/0') == 'news'                       names that are no words
    optional(stars) > 3                               a column that need not be there

It is Python's syntax (and that of pandas' query), of which only these pieces exist; a column is
compared with constants. Null compares with nothing: neither a condition nor its opposite holds
for it. NaN is null. Texts are compared character by character, which orders dates like
2024-02-20T12:00:00Z, also by their beginnings.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline import fields
from pipeline.errors import ConfigError

Constant = str | int | float | bool
_MOST_CHARACTERS = 100_000
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_TURNED = {"==": "==", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
_SIGNS: dict[type, str] = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
    ast.Is: "==", ast.IsNot: "!=",
}  # fmt: skip
_METHODS = ("startswith", "endswith")


@dataclass(frozen=True)
class Column:
    """A column: its path, and whether a record may lack it (it is null then)."""

    path: fields.Path
    optional: bool = False

    def __str__(self) -> str:
        return fields.shown(self.path)


@dataclass(frozen=True)
class Test:
    """One comparison. It does not hold for null, and so does not its opposite.

    sign: == != < <= > >= · in · contains startswith endswith · null.
    values: one constant, several of one kind (in), or none (null). opposite: it must not hold.
    """

    column: Column
    sign: str
    values: tuple[Constant, ...] = ()
    opposite: bool = False


@dataclass(frozen=True)
class Group:
    """All of the parts, or any of them."""

    every: bool
    parts: tuple[Node, ...]


Node = Test | Group


# ── reading ─────────────────────────────────────────────────────────────────────────────────


def parse(text: str) -> Node:
    """Read a condition.

    Raises:
        ConfigError: shows the piece that is not of the grammar.
    """
    what = f"data.filter.where: {text[:200]!r}"
    if len(text) > _MOST_CHARACTERS:
        raise ConfigError(f"{what} … is longer than {_MOST_CHARACTERS} characters", "shorten it")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value.encode()  # half a surrogate pair is no text
        return _node(tree.body)
    except _NotOursError as error:
        raise ConfigError(f"{what}: {error}", _HELP) from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = error.msg if isinstance(error, SyntaxError) else "it cannot be read"
        raise ConfigError(f"{what}: {why}", _HELP) from None


_HELP = (
    "write it like: language == 'en' and language_score >= 0.65 and dump in ['CC-MAIN-2024-10']; "
    "also not, or, is None, 'piece' in url, url.startswith('https'), meta.lang, column('/a/0'), "
    "optional(column)"
)


class _NotOursError(Exception):
    """A piece of Python that is none of the grammar's."""


def _refuse(node: ast.AST, why: str) -> _NotOursError:
    return _NotOursError(f"{ast.unparse(node)!r} {why}")


def _node(node: ast.expr) -> Node:
    match node:
        case ast.BoolOp():
            return Group(isinstance(node.op, ast.And), tuple(_node(one) for one in node.values))
        case ast.UnaryOp(op=ast.Not()):
            return _opposite(_node(node.operand))
        case ast.Compare():
            sides = [node.left, *node.comparators]
            tests = [
                _test(node, sign, left, right)
                for sign, left, right in zip(node.ops, sides[:-1], sides[1:], strict=True)
            ]
            return tests[0] if len(tests) == 1 else Group(True, tuple(tests))
        case ast.Call(func=ast.Attribute(attr=method), args=[piece], keywords=[]) if (
            method in _METHODS
        ):
            assert isinstance(node.func, ast.Attribute)
            return Test(_column(node.func.value), method, (_piece(piece),))
        case _:
            return Test(_column(node), "==", (True,))


def _test(whole: ast.Compare, sign: ast.cmpop, left: ast.expr, right: ast.expr) -> Node:
    """One comparison of a chain."""
    if isinstance(sign, ast.In | ast.NotIn):
        if _is_constant(left):
            test = Test(_column(right), "contains", (_piece(left),))
        elif isinstance(right, ast.List | ast.Tuple | ast.Set):
            values = tuple(_constant(one) for one in right.elts)
            if not values or len({kind_of(value) for value in values}) > 1:
                raise _refuse(right, "is no list of constants of one kind")
            test = Test(_column(left), "in", values)
        else:
            raise _refuse(right, "is no list of constants")
        return replace(test, opposite=isinstance(sign, ast.NotIn))
    spelled = _SIGNS[type(sign)]
    if _is_constant(left):
        left, right, spelled = right, left, _TURNED[spelled]
    if isinstance(right, ast.Constant) and right.value is None:
        if spelled not in ("==", "!="):
            raise _refuse(whole, "compares with None")
        return Test(_column(left), "null", opposite=spelled == "!=")
    if isinstance(sign, ast.Is | ast.IsNot):
        raise _refuse(whole, "uses is with something else than None")
    value = _constant(right)
    if isinstance(value, bool) and spelled not in ("==", "!="):
        raise _refuse(whole, "compares the size of True or False")
    return Test(_column(left), spelled, (value,))


def _opposite(node: Node) -> Node:
    """What holds where a condition does not, null apart."""
    if isinstance(node, Group):
        return Group(not node.every, tuple(_opposite(part) for part in node.parts))
    if node.sign in _OPPOSITE:
        return replace(node, sign=_OPPOSITE[node.sign])
    return replace(node, opposite=not node.opposite)


def _column(node: ast.expr) -> Column:
    match node:
        case ast.Name():
            return Column((node.id,))
        case ast.Attribute():
            above = _column(node.value)
            return replace(above, path=(*above.path, node.attr))
        case ast.Call(func=ast.Name(id="column"), args=[ast.Constant(value=str(name))]):
            return Column(fields.parse(name))
        case ast.Call(func=ast.Name(id="optional"), args=[inner], keywords=[]):
            return replace(_column(inner), optional=True)
        case _:
            raise _refuse(node, "is no column")


def _is_constant(node: ast.expr) -> bool:
    inner = node.operand if isinstance(node, ast.UnaryOp) else node
    return isinstance(inner, ast.Constant)


def _constant(node: ast.expr) -> Constant:
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    inner = node.operand if isinstance(node, ast.UnaryOp) and negative else node
    value = inner.value if isinstance(inner, ast.Constant) else None
    if negative and isinstance(value, int | float) and not isinstance(value, bool):
        value = -value
    elif negative:
        value = None
    if not isinstance(value, str | int | float):
        raise _refuse(node, "is no text, number, True or False")
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise _refuse(node, "has more than 64 bits")
    return value


def _piece(node: ast.expr) -> str:
    value = _constant(node)
    if not isinstance(value, str):
        raise _refuse(node, "is no text")
    return value


# ── what it says of a record ────────────────────────────────────────────────────────────────


def kind_of(value: object) -> str:
    """text, number, truth or null, as messages call it; else the type's name."""
    if isinstance(value, bool):
        return "truth"
    if value is None or isinstance(value, str):
        return "null" if value is None else "text"
    return "number" if isinstance(value, int | float) else type(value).__name__


def tests(node: Node) -> Iterator[Test]:
    """Every comparison in a condition."""
    if isinstance(node, Test):
        yield node
    else:
        for part in node.parts:
            yield from tests(part)


def predicate(node: Node) -> Callable[[Mapping[Column, Any]], bool]:
    """The condition as a function of a record's values, whose kinds are right."""
    if isinstance(node, Group):
        parts = [predicate(part) for part in node.parts]
        combine = all if node.every else any
        return lambda values: combine(part(values) for part in parts)
    column, opposite = node.column, node.opposite
    if node.sign == "null":
        return lambda values: (values[column] is None) != opposite
    holds = _holds(node)
    return lambda values: (value := values[column]) is not None and holds(value) != opposite


def _holds(test: Test) -> Callable[[Any], bool]:
    if test.sign == "in":
        among = frozenset(test.values)
        return lambda value: value in among
    (constant,) = test.values
    if test.sign == "contains":
        return lambda value: constant in value
    if test.sign in _METHODS:
        method = test.sign
        return lambda value: bool(getattr(value, method)(constant))
    compare = _COMPARE[test.sign]
    return lambda value: compare(value, constant)
