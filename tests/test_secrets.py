"""Credentials put wherever they can be are found nowhere that a run writes or shows."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import yaml

from pipeline import redaction
from pipeline.errors import FinewebError, SourceError
from pipeline.messages import BadRecord
from tests.harness import ROOT, english, job, write_shards
from tests.proxy import Fault, Request, fault_proxy, header, simple
from tests.servers import http_server
from tests.test_training import SECTIONS, STREAM

MARK = "Zq7Mark"
USER, PASSWORD, QUERY = f"user{MARK}", f"pass%2F{MARK}word", f"{MARK}aAbBcC0123456789"
BASIC = base64.b64encode(f"user{MARK}:pass/{MARK}word".encode()).decode()
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": f"AKIA{MARK}",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}/secret+key",
    "AWS_SESSION_TOKEN": f"{MARK}session",
    "AWS_REGION": "us-east-1",
    "HF_TOKEN": f"hf_{MARK}",
    "https_proxy": f"http://proxy:{MARK}@127.0.0.1:9",
    "no_proxy": "127.0.0.1,localhost",
}
COMMAND = [sys.executable, "-c", "from pipeline.cli import main; main()"]
SIGNATURE = f"X-Amz-Signature={QUERY}&Expires=9&token={QUERY}#{QUERY}"


def leaks(data: bytes) -> bool:
    """Whether something secret is in it, as it stands or encoded."""
    return MARK.encode() in data or BASIC.encode()[:16] in data


def marked(url: str) -> str:
    """The address with user, password, signature and fragment."""
    return f"{url.replace('//', f'//{USER}:{PASSWORD}@')}?{SIGNATURE}"


@dataclass
class Run:
    """A run of the program, its settings in a private file and in the environment.

    Args:
        folder: Everything that the run writes; the private file lies beside it.
        shards: With secrets.
        command: start or tokenize.
        sections: Of the configuration.
    """

    folder: Path
    shards: Sequence[str]
    command: str = "tokenize"
    sections: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()

    def start(self) -> subprocess.Popen[bytes]:
        self.folder.mkdir()
        settings = {"max_retries": 1, "timeout_s": 1} | self.sections.pop("stream", {})
        config = job(self.folder, self.shards, **settings, **self.sections).config
        private = self.folder.with_suffix(".yaml")
        plain = msgspec.to_builtins(config) | {"name": "run"}
        plain["logging"]["runs_dir"] = str(self.folder)
        private.write_text(yaml.safe_dump(plain))
        out = ["--out", str(self.folder / "run")] if self.command == "tokenize" else []
        return subprocess.Popen(
            [*COMMAND, self.command, "--config", str(private), *out, "--plain", *self.arguments],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def finish(self, process: subprocess.Popen[bytes], code: int, said: str = "") -> None:
        """Wait, and look everywhere."""
        out, err = process.communicate(timeout=90)
        text = (out + err).decode()
        assert process.returncode == code, text[-3000:]
        assert said in text
        assert not leaks(out + err), text
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        for path in files:
            assert not leaks(path.read_bytes()), path
            assert not leaks(str(path).encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    write_shards(folder, english(60), 4, "jsonl.zst")
    (folder / "bad.jsonl").write_bytes(b'{"text": "a"}\n{"id": 5}\n')
    (folder / "cut.jsonl.zst").write_bytes((folder / "shard-00000.jsonl.zst").read_bytes()[:-9])
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """A server whose answers have a line that is no header: urllib3 warns of it by URL."""
    with http_server(folder) as origin:
        odd = Fault(head=lambda head: head.replace(b"\r\n", b"\r\nodd line\r\n", 1))
        with fault_proxy(origin, lambda request: odd if "odd" in request.name else None) as proxy:
            yield proxy.url


def test_a_run_that_succeeds(tmp_path: Path, url: str) -> None:
    """Stopped in the middle, so that the command lines of all its processes can be read."""
    shards = [marked(f"{url}/shard-0000{n}.jsonl.zst") for n in range(4)]
    shards.append(marked(f"{url}/bad.jsonl"))
    plan = f"stop:writer:writer:after_write:3:{tmp_path / 'stopped'}"
    one = Run(tmp_path / "ok", shards, environment={"FINEWEB_FAULT": plan})
    process = one.start()
    stopped: list[psutil.Process] = []
    children: list[psutil.Process] = []
    while not stopped and process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        stopped = [c for c in children if c.status() == psutil.STATUS_STOPPED]
    assert len(children) >= 5
    for child in (psutil.Process(process.pid), *children):
        assert not leaks("\0".join(child.cmdline()).encode())
    os.kill(stopped[0].pid, signal.SIGCONT)
    one.finish(process, 0, "1 bad records")
    assert "bad.jsonl" in (one.folder / "run" / "bad_records.jsonl").read_text()
    assert "shard-00003" in (one.folder / "run" / "log.txt").read_text()


def test_checkpoints(tmp_path: Path, url: str) -> None:
    shards = [marked(f"{url}/shard-0000{n}.jsonl.zst") for n in range(4)]
    sections = {**SECTIONS, "stream": STREAM}
    one = Run(tmp_path / "train", shards, "start", sections, arguments=("--steps", "3"))
    one.finish(one.start(), 0)
    (state,) = (one.folder / "run" / "checkpoints").glob("*/state.json")
    assert "shard-00003.jsonl.zst" in state.read_text()


def _redirected(request: Request) -> Fault | None:
    """Every shard is elsewhere, at a signed address that does not work."""
    if request.name == "gone":
        return Fault(answer=simple("403 Forbidden", f"<Signature>{QUERY}".encode()))
    return Fault(answer=simple("302 Found", Location=f"/gone?sig={QUERY}"))


def _expired(request: Request) -> Fault:
    body = f"<Error><Code>ExpiredToken</Code><Token>{MARK}session</Token></Error>".encode()
    return Fault(answer=simple("400 Bad Request", body if request.method == "GET" else b""))


FAILURES: dict[str, tuple[Callable[[str], str], Callable[[Request], Fault | None], int, str]] = {
    "redirect": (lambda url: marked(f"{url}/x.jsonl"), _redirected, 5, "HTTP 403"),
    "expired": (lambda url: "s3://bucket/x.jsonl", _expired, 5, "get new credentials"),
    "missing": (lambda url: marked(f"{url}/none.jsonl"), lambda _: None, 5, "HTTP 404"),
    "cut": (lambda url: marked(f"{url}/cut.jsonl.zst"), lambda _: None, 3, "cut off"),
    "odd headers": (lambda url: marked(f"{url}/bad.jsonl"), lambda request: Fault(
        head=lambda head: head.replace(b"\r\n", b"\r\nodd line\r\n", 1)), 0, "done"),
    "lies": (lambda url: marked(f"{url}/bad.jsonl"), lambda request: Fault(
        head=header("Content-Length", "5x")), 5, "the length"),
    "proxy": (lambda url: marked("https://nobody.invalid/x.jsonl"), lambda _: None, 5, "proxy"),
    "scheme": (lambda url: marked(f"gopher{url[4:]}/x"), lambda _: None, 5, "cannot come from"),
    "typo": (lambda url: marked(f"{url[7:]}/x"), lambda _: None, 2, "nothing is at"),
    "address": (lambda url: marked("http://[bad/x"), lambda _: None, 2, "no address"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_run_that_fails(tmp_path: Path, folder: Path, name: str) -> None:
    address, plan, code, said = FAILURES[name]
    with http_server(folder) as origin, fault_proxy(origin, plan) as proxy:
        environment = {"AWS_ENDPOINT_URL": proxy.url}
        one = Run(tmp_path / "run", [address(proxy.url)], environment=environment)
        one.finish(one.start(), code, said)


# ── the lines of defence, one by one ────────────────────────────────────────────────────────


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(redaction, "_hidden", ())
    redaction.hide([marked("https://host/data/shard-00001.jsonl")])


@pytest.mark.parametrize("text", [
    f"GET /x?sig={QUERY} failed", f"proxy:{MARK}@127.0.0.1", f"Bearer hf_{MARK}",
    f"https://{USER}:{PASSWORD}@host/x", f"pass/{MARK}word", f"s3://a?{MARK}", f"({QUERY})",
    f"https://other/x?new={MARK}#frag", f"http://{USER}@host",
])  # fmt: skip
def test_text_is_scrubbed_wherever_it_comes_from(hidden: None, text: str) -> None:
    nested = {"a": text, "b": [text, {"c": (text,)}], "n": 5}
    assert not leaks(redaction.scrub(text).encode())
    assert not leaks(repr(redaction.scrub_fields(nested)).encode())
    for error in (FinewebError(text, text), SourceError(text, text)):
        assert not leaks(f"{error} {error!r} {error.args} {error.what} {error.remedy}".encode())


def test_what_is_no_secret_stays(hidden: None) -> None:
    redaction.hide(["https://host/get/shard-00002.jsonl?name=shard-00002.jsonl&download=true"])
    for text in ("https://host/get/shard-00002.jsonl", "line 17: it is no JSON", "us-east-1", ""):
        assert redaction.scrub(text) == text
    fields = {"shard": "shard-00001.jsonl", "n": 5, "bad": BadRecord("line 1", "null")}
    assert redaction.scrub_fields(fields) == fields
