"""What the commands that stream shards take: their options, and how they become settings.

Runs in: the command line's own process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from pipeline import settings
from pipeline.settings import Resolved, Setting


class _Workers(click.ParamType[int | str]):
    """A positive number, or auto."""

    name = "N|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        if value == "auto" or isinstance(value, int):
            return value  # type: ignore[no-any-return]
        if str(value).isdigit() and int(value) > 0:
            return int(value)
        self.fail(f"{value!r} is neither a positive number nor auto", param, ctx)


# Option → key of the configuration. An option that is not given changes nothing; one that is not
# in this table is no key, and stands in the file's section `commands`.
KEYS = {
    "shards": "data.stream.shards",
    "manifest": "data.stream.manifest",
    "max_disk": "data.stream.max_disk_gb",
    "workers": "data.stream.workers",
    "fetchers": "data.stream.fetchers",
    "decompressors": "data.stream.decompressors",
    "prefetch": "data.stream.prefetch",
    "lanes": "data.stream.lanes",
    "epochs": "data.stream.epochs",
    "shuffle": "data.stream.shuffle",
    "text_field": "data.stream.text_field",
    "min_chars": "data.filter.min_chars",
    "max_chars": "data.filter.max_chars",
    "language": "data.filter.languages",
    "min_language_score": "data.filter.min_language_score",
    "dump": "data.filter.dumps",
    "from_date": "data.filter.from_date",
    "before_date": "data.filter.before_date",
    "where": "data.filter.where",
    "max_bad_records": "data.stream.max_bad_records",
    "max_bad_shards": "data.stream.max_bad_shards",
    "cache_dir": "data.stream.cache_dir",
    "tokenizer": "data.tokenizer.name",
    "vocab_size": "data.tokenizer.vocab_size",
    "steps": "training.hyperparameters.iters",
    "seed": "system.seed",
    "name": "name",
    "runs_dir": "logging.runs_dir",
    "http": "logging.http_port",
    "http_host": "logging.http_host",
}
_NO_SETTING = ("config_path", "print_config", "dry_run")  # decide about the file, or about once


def config_option(text: str) -> Callable[..., Any]:
    """--config FILE. It is read before all other options: they may stand in it."""
    return click.option(
        "--config", "config_path", metavar="FILE", is_eager=True, callback=_take_file,
        shell_complete=_complete_config, help=text,
    )  # fmt: skip


def _take_file(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    known = {
        flag(one): KEYS.get(one.name or "")
        for one in ctx.command.params
        if isinstance(one, click.Option) and one.name not in _NO_SETTING
    }
    names = {flag(one): one.name for one in ctx.command.params if isinstance(one, click.Option)}
    said = settings.options_of(value, ctx.info_name or "", known)
    ctx.default_map = {names[key]: given for key, given in said.items()}
    return value


def _complete_config(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    ours = [CompletionItem(name) for name in settings.shipped() if name.startswith(incomplete)]
    return [*ours, CompletionItem(incomplete, type="file")]


def flag(option: click.Option) -> str:
    """What an option is called in files and variables: its long name, max_disk."""
    return max(option.opts, key=len).lstrip("-").replace("-", "_")


def stream_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of every command that streams shards."""
    return shard_options(_run_options(command))


def shard_options(command: Callable[..., None]) -> Callable[..., None]:
    """Those that say which shards, and how they are streamed: for what runs, and what foretells."""
    options = [
        click.option("--shards", multiple=True, metavar="PATTERN",
                     help="Shards: URLs (http, https, hf, s3, gs, az) or paths, with {000..123} "
                     "braces, globs or a folder, quoted; or @FILE, a pattern a line. May be given "
                     "several times."),
        click.option("--manifest", type=click.Path(dir_okay=False), metavar="FILE",
                     help="Sizes and SHA-256 of the shards, which are then enforced; alone, it "
                     "names the shards as well."),
        click.option("--max-disk", type=float, metavar="GB",
                     help="Hard budget in GB (10⁹ bytes) for cached shards, partial files, "
                     "checkpoints and logs; 0 streams shards through memory, and only "
                     "checkpoints and logs take disk.  [default: 35]"),
        click.option("--workers", type=_Workers(),
                     help="Tokenizer processes; auto sizes every stage from the CPUs.  "
                     "[default: auto]"),
        click.option("--fetchers", type=click.IntRange(1), metavar="N",
                     help="Fetcher processes.  [default: half the tokenizers, 8 at most]"),
        click.option("--decompressors", type=click.IntRange(1), metavar="N",
                     help="Decompressor processes.  [default: from what reading costs]"),
        click.option("--prefetch", type=click.IntRange(0), metavar="N",
                     help="Shards that each lane may fetch ahead.  [default: 2]"),
        click.option("--lanes", type=click.IntRange(1), metavar="N",
                     help="Ordered token streams that are read in turns.  "
                     "[default: 8; tokenize: 1]"),
        click.option("--text-field", metavar="NAME",
                     help="JSON field or column that holds the text; /a/b/0 is what is nested.  "
                     "[default: text]"),
        click.option("--min-chars", type=click.IntRange(0), metavar="N",
                     help="Only documents of N characters or more."),
        click.option("--max-chars", type=click.IntRange(0), metavar="N",
                     help="Only documents of N characters or fewer."),
        click.option("--language", multiple=True, metavar="CODE",
                     help="Only documents whose column language is this; several times."),
        click.option("--min-language-score", type=float, metavar="X",
                     help="Only documents whose column language_score is X or more."),
        click.option("--dump", multiple=True, metavar="NAME",
                     help="Only documents of this crawl: CC-MAIN-2024-10; several times."),
        click.option("--from-date", metavar="DATE",
                     help="Only documents whose column date is this (2024-02) or later."),
        click.option("--before-date", metavar="DATE",
                     help="Only documents whose column date is earlier than this."),
        click.option("--where", metavar="CONDITION",
                     help="Only documents for which this holds: token_count < 4096 and not "
                     "'wiki' in url."),
        click.option("--max-bad-records", type=click.IntRange(0), metavar="N",
                     help="Records that may be skipped before the run ends.  [default: 1000]"),
        click.option("--max-bad-shards", type=click.IntRange(0), metavar="N",
                     help="Shards that may be skipped before the run ends.  [default: 0]"),
        click.option("--cache-dir", type=click.Path(file_okay=False), metavar="DIR",
                     help="Where shards are kept.  [default: cache/ in the run's folder]"),
        click.option("--seed", type=int, metavar="N",
                     help="Decides the order of shards and the first weights."),
    ]  # fmt: skip
    return _with(command, options)


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Those that say how a run is begun and shown."""
    options = [
        click.option("--http", type=click.IntRange(0, 65535), metavar="PORT",
                     help="Serve a live page and Prometheus metrics on this port (0: a free one), "
                     "to this machine only."),
        click.option("--http-host", metavar="ADDRESS",
                     help="With --http: listen on this address instead; whoever can reach it can "
                     "see the run.  [default: 127.0.0.1]"),
        click.option("--fresh", is_flag=True, help="Start over instead of resuming."),
        click.option("--yes", is_flag=True, help="With --fresh: do not ask."),
        click.option("--dry-run", is_flag=True,
                     help="Look the shards up, say what would be done, and do nothing."),
        click.option("--print-config", is_flag=True,
                     help="Print every setting with where it comes from, and do nothing; with "
                     "--json as JSON."),
        click.option("--json", "as_json", is_flag=True,
                     help="Print the result as one JSON line on standard output."),
        click.option("--progress", type=click.Choice(["auto", "live", "plain", "json", "none"]),
                     default="auto", show_default=True,
                     help="On standard error: the live screen (auto: on a terminal), plain lines, "
                     "or JSON lines."),
        click.option("--plain", is_flag=True, help="The same as --progress plain."),
    ]  # fmt: skip
    return _with(command, options)


def _with(command: Callable[..., None], options: list[Callable[..., Any]]) -> Callable[..., None]:
    for option in reversed(options):
        command = option(command)
    return command


# ── the command line, the environment and the file, put together ────────────────────────────


class Given(NamedTuple):
    """What a command was given."""

    keyed: Mapping[str, Setting]  # by the configuration's key
    own: Mapping[str, Setting]  # options that are no key, by their name in files

    def resolve(self, path: str | None, defaults: Mapping[str, Any]) -> Resolved:
        """See settings.resolve."""
        return settings.resolve(path, self.keyed, defaults)


def given(ctx: click.Context) -> Given:
    """All of a command's options with their origins."""
    keyed: dict[str, Setting] = {}
    own: dict[str, Setting] = {}
    for option in ctx.command.params:
        if not isinstance(option, click.Option) or option.name in (None, *_NO_SETTING):
            continue
        value = ctx.params[option.name]
        source = ctx.get_parameter_source(option.name)
        origin = {
            ParameterSource.COMMANDLINE: f"option {max(option.opts, key=len)}",
            ParameterSource.ENVIRONMENT: f"environment {option.envvar}",
            ParameterSource.DEFAULT_MAP: f"file {ctx.params['config_path']}",
        }.get(source or ParameterSource.DEFAULT)
        if option.name not in KEYS:
            own[flag(option)] = Setting(value, origin or "default")
        elif origin is not None and value not in (None, ()):
            plain = list(value) if isinstance(value, tuple) else value
            keyed[KEYS[option.name]] = Setting(plain, origin)
    return Given(keyed, own)


def print_config(resolved: Resolved, command: str, own: Mapping[str, Setting]) -> None:
    """Every setting with its origin: as a file, or as JSON if the options say so."""
    show = settings.as_json if own["json"].value else settings.as_yaml
    click.echo(show(resolved, command, own))


class Commands(click.Group):
    """A group whose commands' options can all stand in the environment."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Give each option its variable, and add the command."""
        _name_variables(cmd, name or cmd.name or "")
        super().add_command(cmd, name)

    def variables(self) -> list[str]:
        """Of all options of all commands."""
        return [str(option.envvar) for option in _options(self) if option.envvar]


def _name_variables(command: click.Command, *place: str) -> None:
    for option in command.params:
        if isinstance(option, click.Option) and option.envvar is None:
            option.envvar = settings.variable(*place, flag(option))
    if isinstance(command, click.Group):
        for name, one in command.commands.items():
            _name_variables(one, *place, name)


def _options(command: click.Command) -> Iterator[click.Option]:
    yield from (one for one in command.params if isinstance(one, click.Option))
    if isinstance(command, click.Group):
        for one in command.commands.values():
            yield from _options(one)
