"""Every parser holds against some hundred inputs, and the fuzzer finds what is planted."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.fuzz import campaign, main, make
from tests.fuzz_targets import TARGETS, Target

INPUTS = 150


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_gives_something_or_its_own_error(tmp_path: Path, name: str) -> None:
    """More of the same, with other seeds, is what `python -m tests.fuzz` is for."""
    target = TARGETS[name]
    seeds = target.seeds()
    for index in range(INPUTS):
        target.check(make(name, seeds, 7, index), tmp_path)


def test_inputs_depend_on_seed_and_number_alone() -> None:
    seeds = TARGETS["tar"].seeds()
    again = [make("tar", seeds, 3, index) for index in range(40)]
    assert again == [make("tar", seeds, 3, index) for index in range(40)]
    assert len({*again}) > 35
    assert again != [make("tar", seeds, 4, index) for index in range(40)]


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="macOS has no limit on memory")

# ── planted defects: each is found by what the process that runs the inputs does ────────────


def _raises(data: bytes, folder: Path) -> None:
    if data[:1] != b"a":
        raise KeyError("planted")


def _kills(data: bytes, folder: Path) -> None:
    if data[:1] != b"a":
        os.kill(os.getpid(), signal.SIGSEGV)


def _hangs(data: bytes, folder: Path) -> None:
    while data[:1] != b"a":
        time.sleep(0.01)


def _devours(data: bytes, folder: Path) -> None:
    if data[:1] != b"a":
        bytearray(8 << 30)


RAISES, KILLS, HANGS, DEVOURS = (
    Target(lambda: [b"a" * 20], check) for check in (_raises, _kills, _hangs, _devours)
)


@pytest.mark.parametrize(("name", "said"), [
    ("RAISES", "KeyError: 'planted'"), ("KILLS", "died (-11)"), ("HANGS", "took too long"),
    pytest.param("DEVOURS", "MemoryError", marks=LINUX),
])  # fmt: skip
def test_what_is_planted_is_found(name: str, said: str) -> None:
    target = f"tests.test_fuzz:{name}"
    numbers = [n for n in range(60) if make(target, [b"a" * 20], 1, n)[:1] != b"a"]
    last = numbers[0] + 1
    done = campaign(target, 1, 0, last, limit_s=0.5)
    assert done["inputs"] == last
    assert [one["index"] for one in done["found"]] == numbers[:1]
    assert said in done["found"][0]["what"]


def test_the_command_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", "cache-name", "--count", "300", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    assert "cache-name" in out
    assert "300 inputs" in out
    assert main(["--target", "cache-name", "--count", "2", "--show"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
