"""What doctor finds, and whether its remedies are named."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import doctor
from pipeline.doctor import Finding
from tests.harness import english, write_shards
from tests.servers import http_server
from tests.test_cli import PROGRAM, call


@pytest.fixture
def descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_machine_that_is_ready_and_shards_that_come(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", english(30), 3, "jsonl.zst")
    with http_server(tmp_path / "shards") as origin:
        pattern = f"{origin}/shard-{{00000..00002}}.jsonl.zst"
        done = call(
            PROGRAM, "doctor", pattern, "--max-disk", "0.001", "--runs-dir", tmp_path / "runs",
            "--json",
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {one["subject"]: one for one in json.loads(done.stdout)}
    assert set(found) >= {
        "python", "mlx", "cpu", "memory", "shared memory", "disk", "file descriptors", "shards",
        "network",
    }  # fmt: skip
    assert found["shards"]["what"].startswith("3 from ")
    assert "first byte after" in found["network"]["what"]
    assert "on the" in found["mlx"]["what"]
    assert not (tmp_path / "runs").exists()


def test_what_is_lacking_is_an_error_with_its_remedy(tmp_path: Path) -> None:
    call_it = [PROGRAM, "doctor", "http://127.0.0.1:9/x.tar", tmp_path / "none.jsonl"]
    done = call(*call_it, "--max-disk", "1e9", "--runs-dir", tmp_path)
    assert done.returncode == 2
    for said in ("give --max-disk", "http://127.0.0.1:9/x.tar: no connection", "nothing is at"):
        assert said in done.stdout
    assert "Traceback" not in done.stderr


def test_too_few_descriptors(descriptors: None) -> None:
    finding = doctor._descriptors()
    assert finding.level == "error"
    assert finding.remedy.startswith("ulimit -n ")


def test_the_cgroups_memory_limit_is_read_in_both_versions(tmp_path: Path) -> None:
    assert doctor.memory_limit(tmp_path) is None
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert doctor.memory_limit(tmp_path) is None
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1000000\n")
    assert doctor.memory_limit(tmp_path) == 1_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.memory_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("2000000\n")
    assert doctor.memory_limit(tmp_path) == 2_000_000


def test_mlx_on_the_cpu_beside_a_gpu_and_a_slow_blas_are_warned_of() -> None:
    said = {
        "mlx": "0.32", "device": "cpu", "name": "x", "memory_bytes": 0, "blas": "reference BLAS: y",
        "gflops": 5.0,
    }  # fmt: skip
    slow = list(doctor.judge_mlx(said, gpu=True))
    assert [one.level for one in slow] == ["warning", "warning"]
    assert "mlx[cuda13]" in slow[0].remedy
    assert "pip install mkl" in slow[1].remedy
    fast = list(doctor.judge_mlx({**said, "gflops": 90.0}, gpu=False))
    assert [(one.level, one.remedy) for one in fast] == [("ok", ""), ("ok", "")]
    gpu = list(doctor.judge_mlx({**said, "device": "gpu", "memory_bytes": 8 << 30}, gpu=True))
    assert gpu == [Finding("mlx", "ok", "0.32 on the gpu: x, 8.59 GB")]


@pytest.mark.parametrize(
    ("scheme", "unsigned", "secrets"),
    [
        ("s3", "AWS_SKIP_SIGNATURE", ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")),
        ("gs", "GOOGLE_SKIP_SIGNATURE", ("GOOGLE_APPLICATION_CREDENTIALS",)),
        ("az", "AZURE_SKIP_SIGNATURE", ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_SAS_KEY")),
    ],
)
def test_credentials_are_told_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, scheme: str, unsigned: str, secrets: tuple[str, ...]
) -> None:
    for name in tuple(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    nothing = doctor.credentials(scheme)
    assert nothing.level == "warning"
    assert all(name in nothing.remedy for name in (unsigned, *secrets))
    monkeypatch.setenv(unsigned, "true")
    assert doctor.credentials(scheme).level == "ok"
    monkeypatch.delenv(unsigned)
    for name in secrets:
        assert doctor.credentials(scheme).level == "warning"
        monkeypatch.setenv(name, "hunter2hunter2")
    finding = doctor.credentials(scheme)
    assert finding.level == "ok"
    assert "hunter2" not in finding.what


def test_the_hubs_token_is_told_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_hunter2hunter2")
    finding = doctor.credentials("hf")
    assert (finding.level, finding.what) == ("ok", "hf: a token is set")
