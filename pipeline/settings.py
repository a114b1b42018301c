"""Where a setting's value comes from: option, environment, file or default.

Runs in: the command line. The first that says something wins:

    1. the option                   --max-disk 20
    2. the option's variable        FINEWEB_START_MAX_DISK=20
    3. the key's variable           FINEWEB_DATA_STREAM_MAX_DISK_GB=20
    4. the configuration file       data: {stream: {max_disk_gb: 20}}
    5. the command's own default, then the program's

A variable's name is FINEWEB_ and the place of what it sets, command and option or the key's path,
in capitals, joined by underscores. An empty variable counts as none; a list's parts stand between
spaces, a mix is written as YAML or JSON. Options that are no key of the tree stand in the file's
section `commands`, by command.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import msgspec
import yaml

from pipeline.config import Config, from_plain, to_plain, without_secrets
from pipeline.errors import ConfigError
from pipeline.rules import validate

PREFIX = "FINEWEB_"
_COMMANDS = "commands"  # the file's section of options that are no key
_FOREIGN = frozenset({"FINEWEB_SETUP", "FINEWEB_FAULT"})  # of bin/fineweb-pipeline, of the tests
_COMMENT_COLUMN = 44


class Setting(NamedTuple):
    """A value and who gave it."""

    value: Any
    origin: str


class Resolved(NamedTuple):
    """A configuration and, for every key of it, where its value comes from."""

    config: Config
    origins: Mapping[str, str]


def variable(*place: str) -> str:
    """The environment's name for what stands at a place: ('start', 'max-disk')."""
    return PREFIX + "_".join(place).replace("-", "_").replace(".", "_").upper()


def every_key(section: type[msgspec.Struct] = Config, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of the configuration with its type."""
    for field in msgspec.structs.fields(section):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from every_key(field.type, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", field.type


# ── the layers, one over the other ──────────────────────────────────────────────────────────


def load(path: str | None, overrides: dict[str, Any]) -> Config:
    """The configuration of a file with some keys changed; see resolve."""
    given = {key: Setting(value, "caller") for key, value in overrides.items()}
    return resolve(path, given, {}, {}).config


def resolve(
    path: str | None,
    options: Mapping[str, Setting],
    defaults: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
) -> Resolved:
    """Lay option, environment, file and defaults over one another, and check the result.

    Args:
        path: YAML file, or the name of a configuration that comes with the program (demo);
            None: no file.
        options: By dotted key, what options or their variables say.
        defaults: A command's own defaults, by dotted key: they count where all else is silent.
        environ: The environment.

    Raises:
        ConfigError: names the key's path, and the nearest valid name of an unknown one.
    """
    plain = read(path)
    plain.pop(_COMMANDS, None)
    origins = {key: f"file {_shown(path)}" for key in _leaves(plain)}
    layers = (_of_environment(environ), options)
    for key, value in defaults.items():
        if _put(plain, key, value, over=False):
            origins[key] = "default of the command"
    for layer in layers:
        for key, setting in layer.items():
            _put(plain, key, setting.value)
            origins[key] = setting.origin
    config = from_plain(plain)
    validate(config)
    return Resolved(config, {key: origins.get(key, "default") for key, _ in every_key()})


def _of_environment(environ: Mapping[str, str]) -> dict[str, Setting]:
    """What variables of keys say. Raises: ConfigError, names the variable."""
    found = {}
    for key, kind in every_key():
        name = variable(key)
        if text := environ.get(name, ""):
            value: Any = text.split() if get_origin(kind) in (list, tuple) else text
            try:
                if get_origin(kind) is dict:
                    value = yaml.safe_load(text)
                value = msgspec.to_builtins(msgspec.convert(value, kind, strict=False))
            except (msgspec.ValidationError, yaml.YAMLError) as error:
                raise ConfigError(f"{name}={text}: {error}", "correct the variable") from None
            found[key] = Setting(value, f"environment {name}")
    return found


def refuse_unknown_variables(known: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
    """Refuse a variable that is meant for us and sets nothing: a limit would be ignored.

    Args:
        known: The variables of all options.
        environ: The environment.

    Raises:
        ConfigError: names it and the nearest known one.
    """
    valid = {*known, *(variable(key) for key, _ in every_key()), *_FOREIGN}
    for name in environ:
        if name.startswith(PREFIX) and name not in valid:
            near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
            raise ConfigError(
                f"the environment has {name}, which sets nothing",
                f"did you mean {near[0]}? else unset it" if near else "unset it",
            )


def _leaves(plain: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The dotted keys that a file sets; a mix is one of them, whatever it holds."""
    keys = dict(every_key())
    for key, value in plain.items():
        if isinstance(value, dict) and f"{path}{key}" not in keys:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"


def _put(plain: dict[str, Any], key: str, value: Any, *, over: bool = True) -> bool:
    """Set a dotted key, unless it is set and should stay. Raises: ConfigError."""
    at, (*path, last) = plain, key.split(".")
    for depth, section in enumerate(path, 1):
        at = at.setdefault(section, {})
        if not isinstance(at, dict):
            raise ConfigError(f"{'.'.join(path[:depth])}: {at!r} is no section", "correct it")
    if last in at and not over:
        return False
    at[last] = value
    return True


# ── the file ────────────────────────────────────────────────────────────────────────────────


def shipped() -> dict[str, Path]:
    """The configurations that come with the program, by name."""
    folder = Path(__file__).parent.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read(path: str | None) -> dict[str, Any]:
    """A file's plain data; none without a file. Raises: ConfigError."""
    if path is None:
        return {}
    found = _find(path)
    try:
        plain = yaml.safe_load(found.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates, UTF-8
        raise ConfigError(f"{found} is no YAML: {error}", "correct the line") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"{found} holds no configuration", "begin with `name: …`")
    return plain


def _find(path: str) -> Path:
    found, ours = Path(path), shipped()
    if found.is_file():
        return found
    if found.stem in ours:
        return ours[found.stem]
    raise ConfigError(f"there is no configuration {path}", f"give a file, or one of {list(ours)}")


def _shown(path: str | None) -> str:
    return path if path is not None and Path(path).is_file() else f"{path}, of the program"


def options_of(path: str | None, command: str, known: Mapping[str, str | None]) -> dict[str, Any]:
    """What a file's section `commands` says about one command's options.

    Args:
        path: The file.
        command: Its name.
        known: The command's options, each with the key that it sets, if it is one of the tree.

    Raises:
        ConfigError: there is no such command or option, or its place is elsewhere in the file.
    """
    section = read(path).get(_COMMANDS, {})
    mine = section.get(command, {}) if isinstance(section, dict) else section
    if not isinstance(mine, dict):
        raise ConfigError(f"{_COMMANDS}.{command}: {mine!r} is no section", "correct it")
    mine = {"yes" if name is True else name: value for name, value in mine.items()}  # so YAML reads
    for name in mine:
        where = f"{_COMMANDS}.{command}.{name}"
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"options: {', '.join(known)}"
            raise ConfigError(f"{where} is no option of {command}", hint)
        if known[name] is not None:
            raise ConfigError(f"{where} has a place of its own", f"write it as {known[name]}")
    return mine


# ── shown ───────────────────────────────────────────────────────────────────────────────────


def as_json(resolved: Resolved, command: str, options: Mapping[str, Setting]) -> str:
    """What as_yaml shows, as one JSON object: config, commands and origins by dotted key."""
    origins = dict(resolved.origins)
    origins |= {f"{_COMMANDS}.{command}.{name}": one.origin for name, one in options.items()}
    shown = {
        "config": to_plain(without_secrets(resolved.config)),
        _COMMANDS: {command: {name: one.value for name, one in options.items()}},
        "origins": origins,
    }
    return msgspec.json.encode(shown).decode()


def as_yaml(resolved: Resolved, command: str, options: Mapping[str, Setting]) -> str:
    """The whole configuration as YAML that can be used as a file; each value's origin beside it.

    Args:
        resolved: The configuration.
        command: Whose options follow it.
        options: Those that are no key.
    """
    plain = to_plain(without_secrets(resolved.config))
    lines = list(_lines(plain, resolved.origins, "", 0))
    lines += [f"{_COMMANDS}:", f"  {command}:"]
    lines += [_line(4, name, *one) for name, one in options.items()]
    return "\n".join(lines)


def _lines(
    plain: Mapping[str, Any], origins: Mapping[str, str], path: str, indent: int
) -> Iterator[str]:
    for key, value in plain.items():
        if f"{path}{key}" not in origins:
            yield f"{' ' * indent}{key}:"
            yield from _lines(value, origins, f"{path}{key}.", indent + 2)
        else:
            yield _line(indent, key, value, origins[f"{path}{key}"])


def _line(indent: int, key: str, value: Any, origin: str) -> str:
    if isinstance(value, str) and "\n" in value:
        text = msgspec.json.encode(value).decode()  # YAML too, on one line
    else:
        text = yaml.safe_dump(value, default_flow_style=True, width=1 << 30, allow_unicode=True)
    name = yaml.safe_dump(key).splitlines()[0]  # yes is a word of YAML's
    said = f"{' ' * indent}{name}: {text.splitlines()[0]}"
    return f"{said:<{_COMMENT_COLUMN}}  # {origin}"
