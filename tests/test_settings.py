"""Where a setting comes from: option, environment, file, default; and what is shown of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline import rules, settings
from pipeline.cli import cli
from pipeline.cli_options import KEYS
from pipeline.config import from_plain
from pipeline.errors import ConfigError, FinewebError
from tests.harness import english, write_shards
from tests.test_cli import PROGRAM


def invoke(*arguments: str | Path, **environment: str) -> Result:
    """The command line in this process, with an environment of its own."""
    clean = {name: None for name in os.environ if name.startswith(settings.PREFIX)}
    texts = [str(one) for one in arguments]
    return CliRunner().invoke(cli, texts, env={**clean, **environment}, standalone_mode=False)


def shown(*arguments: str | Path, **environment: str) -> dict[str, Any]:
    done = invoke(*arguments, "--print-config", "--json", **environment)
    assert done.exception is None, done.exception
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def at(plain: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        plain = plain[part]
    return plain


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


# Options whose key has two valid values that differ from the defaults.
CHOICES = {
    "max-disk": ("data.stream.max_disk_gb", [1.5, 2.5, 3.5, 4.5]),
    "workers": ("data.stream.workers", [1, 2, 3, "auto"]),
    "lanes": ("data.stream.lanes", [3, 4, 5, 6]),
    "cache-dir": ("data.stream.cache_dir", ["a", "b", "c", "d"]),
    "text-field": ("data.stream.text_field", ["17", "true", "null", "x"]),
}
LAYERS = ["option", "option's variable", "key's variable", "file"]


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(CHOICES)),
    st.sampled_from(["start", "tokenize"]),
    st.sets(st.sampled_from(LAYERS)),
    st.permutations(range(4)),
)
def test_the_first_layer_that_speaks_wins(
    tmp_path_factory: pytest.TempPathFactory,
    option: str,
    command: str,
    speaking: set[str],
    order: list[int],
) -> None:
    key, values = CHOICES[option]
    said = dict(zip(LAYERS, (values[n] for n in order), strict=True))
    path = tmp_path_factory.getbasetemp() / "layers.yaml"
    content = nested(key, said["file"]) if "file" in speaking else {}
    path.write_text(yaml.safe_dump({"name": "n", **content}))
    arguments: list[str | Path] = [command, "--config", path]
    arguments += ["--out", "o"] if command == "tokenize" else []
    if "option" in speaking:
        arguments += [f"--{option}", str(said["option"])]
    own = f"FINEWEB_{command}_{option}".upper().replace("-", "_")
    of_key = f"FINEWEB_{key}".upper().replace(".", "_")
    variables = {"option's variable": own, "key's variable": of_key}
    environment = {name: str(said[one]) for one, name in variables.items() if one in speaking}
    result = shown(*arguments, **environment)
    winner = next((layer for layer in LAYERS if layer in speaking), None)
    origins = {
        "option": f"option --{option}",
        "option's variable": f"environment {own}",
        "key's variable": f"environment {of_key}",
        "file": f"file {path}",
    }
    if winner is None:
        assert result["origins"][key].startswith("default")
    else:
        assert at(result["config"], key) == said[winner]
        assert result["origins"][key] == origins[winner]


def test_what_is_printed_can_be_used_as_the_file_and_says_every_origin(tmp_path: Path) -> None:
    prompt = "two\nlines: # and more"
    first = tmp_path / "first.yaml"
    first.write_text(yaml.safe_dump({"name": "n", "logging": {"sample_prompt": prompt}}))
    printed = invoke("start", "--config", first, "--seed", "7", "--print-config").stdout
    second = tmp_path / "second.yaml"
    second.write_text(printed)
    again = shown("start", "--config", second)
    assert again["config"] == shown("start", "--config", first, "--seed", "7")["config"]
    assert again["config"]["logging"]["sample_prompt"] == prompt
    leaves = [line for line in printed.splitlines() if not line.rstrip().endswith(":")]
    assert len(leaves) >= len(list(settings.every_key()))
    assert all("  # " in line for line in leaves)
    assert f"sample_prompt: {json.dumps(prompt)}" in printed


def test_what_is_printed_holds_no_secret() -> None:
    url = "https://me:hunter2@host/a.jsonl?sig=s3cr3t"
    printed = invoke("start", "--print-config", FINEWEB_DATA_STREAM_SHARDS=url).stdout
    assert "https://host/a.jsonl" in printed
    assert "hunter2" not in printed
    assert "s3cr3t" not in printed


def test_no_two_settings_share_a_variable() -> None:
    names = [*cli.variables(), *(settings.variable(key) for key, _ in settings.every_key())]
    assert len(names) == len(set(names))
    assert set(KEYS.values()) <= {key for key, _ in settings.every_key()}


@pytest.mark.parametrize(
    ("environment", "what", "remedy"),
    [
        ({"FINEWEB_START_MAX_DSIK": "3"}, "FINEWEB_START_MAX_DSIK", "FINEWEB_START_MAX_DISK?"),
        ({"FINEWEB_DATA_STREAM_LANES": "many"}, "FINEWEB_DATA_STREAM_LANES=many", "correct"),
        ({"FINEWEB_DATA_STREAM_LANES": "0"}, "data.stream.lanes", "correct"),
    ],
)
def test_a_variable_that_is_wrong_is_an_error_with_its_name(
    environment: dict[str, str], what: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        settings.refuse_unknown_variables(cli.variables(), environment)
        settings.resolve(None, {}, {"name": "n"}, environment)
    assert what in caught.value.what
    assert remedy in caught.value.remedy


def test_lists_stand_between_spaces_and_an_empty_variable_is_none() -> None:
    result = shown(
        "start",
        FINEWEB_DATA_STREAM_SHARDS="/a.jsonl /b-{00..11}.jsonl",
        FINEWEB_TRAINING_OPTIMIZATION_BETAS="0.8 0.9",
        FINEWEB_DATA_STREAM_LANES="",
        FINEWEB_LOGGING_TENSORBOARD="true",
        FINEWEB_DATA_STREAM_EPOCHS="null",
    )
    stream = result["config"]["data"]["stream"]
    assert stream["shards"] == ["/a.jsonl", "/b-{00..11}.jsonl"]
    assert (stream["lanes"], stream["epochs"]) == (8, None)
    assert result["config"]["training"]["optimization"]["betas"] == [0.8, 0.9]
    assert result["config"]["logging"]["tensorboard"] is True


def test_options_that_are_no_key_stand_in_the_file_too(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "name: n\ncommands: {tokenize: {out: there, limit_tokens: 5, json: true, print_config: 1}}"
    )
    with pytest.raises(ConfigError, match="print_config"):
        raise invoke("tokenize", "--config", path).exception or AssertionError
    path.write_text("name: n\ncommands: {tokenize: {out: there, limit_tokens: 5, json: true}}")
    done = invoke("tokenize", "--config", path, "--print-config", FINEWEB_TOKENIZE_LIMIT_TOKENS="6")
    result = json.loads(done.stdout)
    assert result["commands"]["tokenize"]["out"] == "there"
    assert result["origins"]["commands.tokenize.out"] == f"file {path}"
    assert result["commands"]["tokenize"]["limit_tokens"] == 6
    path.write_text("name: n\ncommands: {start: {max_disk: 5}}")
    done = invoke("start", "--config", path)
    assert isinstance(done.exception, FinewebError)
    assert "data.stream.max_disk_gb" in done.exception.remedy


def test_a_dry_run_tells_and_writes_nothing(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", english(12), 3, "jsonl.zst")
    pattern = str(tmp_path / "shards" / "*.zst")
    out = tmp_path / "out"
    call = ["tokenize", "--shards", pattern, "--out", out, "--dry-run", "--max-disk"]
    done = invoke(*call, "1", "--json")
    assert done.exception is None, done.exception
    facts = json.loads(done.stdout)
    size = sum(path.stat().st_size for path in (tmp_path / "shards").iterdir())
    assert (facts["shards"], facts["shard_bytes"], facts["lanes"]) == (3, size, 1)
    assert facts["resume_tokens"] == 0
    assert "3 in 1 lanes" in invoke(*call, "1").stdout
    assert not out.exists()
    refused = invoke(*call, "0.01")
    assert isinstance(refused.exception, FinewebError)
    assert int(refused.exception.exit_code) == 4


def test_the_shell_completes_commands_options_and_configurations() -> None:
    for words, expected in (
        ("sta", {"start", "status"}),
        ("start --max-d", {"--max-disk"}),
        ("start --config ll", {"llama-80m"}),
    ):
        line = f"fineweb-pipeline {words}"
        environment = {
            "_FINEWEB_PIPELINE_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - 1),
        }
        done = subprocess.run(
            [PROGRAM], env=os.environ | environment, capture_output=True, text=True, timeout=20,
            check=False,
        )  # fmt: skip
        found = {one.partition(",")[2] for one in done.stdout.split()}
        assert expected <= found, (words, done)
    for shell in ("bash", "zsh", "fish"):
        assert "_FINEWEB_PIPELINE_COMPLETE" in invoke("completion", shell).stdout


@pytest.mark.parametrize("key", rules._POSITIVE)
def test_what_must_be_positive_is_refused_by_its_name(key: str) -> None:
    """Whatever else is computed from it: none of these may divide by the zero first."""
    plain = {"name": "x", **nested(key, 0)}
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}: 0(.0)? is not positive"):
        rules.validate(from_plain(plain))
