"""Globs over the paths of a store: * ? [a-z] inside one part of a path, ** across parts.

Runs in: supervisor. Pure. As in the shell, a wildcard at the beginning of a part matches no dot.
"""

from __future__ import annotations

import re

from pipeline.manifest import FILE_NAME

_WILD = re.compile(r"[*?\[]")
_NOT_DOT = r"(?!\.)"
# What lies beside shards in a folder and is none.
_BESIDE = re.compile(rf"(?i:[._].*|README.*|LICENSE.*|{re.escape(FILE_NAME)})")


class Glob:
    """One pattern.

    Args:
        pattern: A path with wildcards, parts separated by slashes.
    """

    def __init__(self, pattern: str) -> None:
        parts = pattern.split("/")
        first_wild = next((at for at, one in enumerate(parts) if _WILD.search(one)), len(parts) - 1)
        self.folder = "/".join(parts[:first_wild])  # everything that matches lies below it
        self.deep = first_wild < len(parts) - 1 or "**" in parts  # and not directly in it
        self._form = re.compile(_regex(parts), re.DOTALL)

    @staticmethod
    def is_in(text: str) -> bool:
        """Whether a text has wildcards."""
        return _WILD.search(text) is not None

    @classmethod
    def of_folder(cls, path: str) -> Glob:
        """The shards that lie directly in a folder."""
        glob = cls(f"{path.rstrip('/')}/*".lstrip("/"))
        glob.folder, glob.deep = path.rstrip("/"), False
        at = f"{glob.folder}/" if glob.folder else ""
        glob._form = re.compile(rf"{re.escape(at)}(?!{_BESIDE.pattern}$)[^/]+")
        return glob

    def matches(self, path: str) -> bool:
        """Whether a path is one of them."""
        return self._form.fullmatch(path) is not None


def may_be_shard(name: str) -> bool:
    """Whether a file of a folder is meant when the folder is given: not a manifest, a read-me or
    a hidden file."""
    return _BESIDE.fullmatch(name) is None


def _regex(parts: list[str]) -> str:
    """The pattern as a regular expression."""
    form = ""
    for number, part in enumerate(parts, 1):
        last = number == len(parts)
        if part == "**":
            form += f"(?:{_NOT_DOT}[^/]+/)*" + (f"{_NOT_DOT}[^/]+" if last else "")
        else:
            form += _part(part) + ("" if last else "/")
    return form


def _part(part: str) -> str:
    """One part of a path."""
    form = _NOT_DOT if part[:1] in ("*", "?", "[") else ""
    at = 0
    while at < len(part):
        end = part.find("]", at + 2) if part[at] == "[" else -1
        if part[at] == "*":
            form += "[^/]*"
        elif part[at] == "?":
            form += "[^/]"
        elif end > 0:
            inside = part[at + 1 : end].replace("\\", r"\\")
            form += f"(?!/)[{'^' + inside[1:] if inside[0] == '!' else inside}]"
            at = end
        else:
            form += re.escape(part[at])
        at += 1
    return form
