"""What is installed: the wheel has every module and configuration, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.harness import ROOT

PACKAGES = ("configs", "pipeline", "shm", "trainer")


def test_the_wheel_holds_what_the_program_needs_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves folders beside what it builds
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    names = [name for name in tracked if name and (ROOT / name).is_file()]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet",
         "--wheel-dir", tmp_path, source],
        check=True, capture_output=True, timeout=100,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        entries = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "fineweb-pipeline = pipeline.cli:main" in archive.read(entries).decode()
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    assert inside == {name for name in names if name.split("/")[0] in PACKAGES}
