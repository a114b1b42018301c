"""Simulated worlds break no promise, and would if the scheduler had a defect."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.harness import ROOT
from tests.mutants import FOUND, PLANTED, Mutant
from tests.simulate import campaign
from tests.simulation.shrink import failure, shrink, story
from tests.simulation.simulation import Simulation
from tests.simulation.worlds import draw

_SEEDS = 400  # run by every test run; campaigns run them by the hundred thousand
_PER_MUTANT = 300


def test_no_world_breaks_a_promise(capsys: pytest.CaptureFixture[str]) -> None:
    broken = campaign(0, _SEEDS)
    assert not broken, capsys.readouterr().out


@pytest.mark.parametrize("mutant", [*PLANTED, *FOUND], ids=lambda mutant: mutant.what)
def test_a_defect_is_found(mutant: Mutant) -> None:
    assert mutant.found_at(_PER_MUTANT), f"{_PER_MUTANT} seeds from {mutant.first} find nothing"


def test_a_seed_is_a_history() -> None:
    """The same seed gives the same history to the last message; another gives another."""
    assert story(draw(7)) == story(draw(7)) != story(draw(8))


def test_a_failing_world_is_made_smaller() -> None:
    mutant = next(mutant for mutant in PLANTED if "halo" in mutant.what)
    found = mutant.found_at(_PER_MUTANT)
    assert found is not None
    world = draw(found[0])
    with mutant.planted():
        small = shrink(world)
        assert failure(Simulation(small))
        assert len(story(small)) < len(story(world))
    assert len(small.faults) == 0, "this defect needs no fault"
    assert not failure(Simulation(small)), "without the defect the small world is sound"


def test_the_command_fails_and_tells_the_history(tmp_path: object) -> None:
    """A broken promise is an exit status and a history to read."""
    lines = (
        "from tests import mutants, simulate",
        "import sys",
        "sys.argv = ['simulate', '--seeds', '50']",
        "with mutants.PLANTED[0].planted():",
        "    sys.exit(simulate.main())",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "its history:" in done.stdout
    assert "tokenizer-0" in done.stdout
