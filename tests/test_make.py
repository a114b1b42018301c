"""`shards make` and `shards verify`: same documents, same bytes, whatever dies in between."""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from pipeline import cli_make, manifest
from pipeline.blocks import Texts
from pipeline.codecs import open_documents, open_records
from pipeline.errors import BadRecordsError, ConfigError, ShardError
from pipeline.making import make as making
from pipeline.manifest import Entry
from tests.harness import ROOT, english, write_shards
from tests.servers import Behaviour, http_server

DOCUMENTS = english(120, largest=9000)


def order(folder: Path, inputs: Path, form: str, **changes: Any) -> making.Order:
    return making.Order((str(inputs),), str(folder), form, **{"shard_bytes": 20_000, **changes})


def make(one: making.Order, processes: int = 2) -> making.Result:
    return making.make(one, making.inputs(one), processes)


def held(folder: Path, names: list[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        for item in open_documents(str(folder / name), name, "text"):
            if isinstance(item, Texts):
                found += [one.decode() for one in item.one_by_one()]
            elif isinstance(item, bytes):
                found.append(item.decode())
    return found


def in_manifest(folder: Path) -> list[str]:
    return list(manifest.read(folder / manifest.FILE_NAME).entries)


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("parquet", "tar.bz2"), ("tar.bz2", "jsonl.zst"), ("jsonl.zst", "parquet"),
        ("parquet", "parquet"), ("parquet", "tar.gz"),
    ],
)  # fmt: skip
def test_the_documents_and_their_fields_stay_and_processes_do_not_matter(
    tmp_path: Path, source: str, form: str
) -> None:
    inputs = tmp_path / "in"
    write_shards(inputs, DOCUMENTS, 9, source)
    result = make(order(tmp_path / "two", inputs, form), processes=2)
    assert result.documents == len(DOCUMENTS)
    assert result.shards >= 2
    names = in_manifest(tmp_path / "two")
    assert held(tmp_path / "two", names) == DOCUMENTS
    assert names == sorted(names)
    ids = []
    for name in names:
        for item in open_records(str(tmp_path / "two" / name), name, "text"):
            whole = isinstance(item, pa.RecordBatch)
            ids += item.column("id").to_pylist() if whole else [json.loads(item)["id"]]
    assert len(ids) == len(DOCUMENTS)
    assert ids[:14] == list(range(14))
    make(order(tmp_path / "one", inputs, form), processes=1)
    for name in [*names, manifest.FILE_NAME]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def _start(folder: Path, inputs: Path, **popen: Any) -> subprocess.Popen[bytes]:
    arguments = [str(inputs), "--out", str(folder), "--format", "tar.bz2", "--shard-size", "2000"]
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "shards", "make"]
    return subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **popen)  # fmt: skip


def test_killed_and_run_again(tmp_path: Path) -> None:
    """What has its name is whole, and the second run makes exactly what one run makes."""
    inputs, killed = tmp_path / "in", tmp_path / "killed"
    write_shards(inputs, DOCUMENTS[:60], 20, "parquet")
    process = _start(killed, inputs)
    deadline = time.monotonic() + 60
    while len(list(killed.glob("*.tar.bz2"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=10)  # its children hold the pipes: they have ended, too
    assert not (killed / manifest.FILE_NAME).exists()
    there = sorted(path.name for path in killed.glob("*.tar.bz2"))
    assert held(killed, there)
    again = _start(killed, inputs)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert b"(0 of them from before)" not in out
    reference = tmp_path / "reference"
    make(order(reference, inputs, "tar.bz2", shard_bytes=2000), processes=1)
    for name in [*in_manifest(reference), manifest.FILE_NAME]:
        assert (killed / name).read_bytes() == (reference / name).read_bytes()
    assert not list(killed.glob("*.partial"))


def test_a_shard_in_the_middle_of_a_group_is_made_again(tmp_path: Path) -> None:
    inputs, out = tmp_path / "in", tmp_path / "out"
    write_shards(inputs, DOCUMENTS, 1, "parquet")
    one = order(out, inputs, "jsonl")
    first = make(one)
    assert make(one).kept == first.shards
    names = in_manifest(out)
    before = {name: (out / name).read_bytes() for name in names}
    (out / names[2]).unlink()
    assert make(one).kept == 2
    assert {name: (out / name).read_bytes() for name in names} == before


def test_stopped_by_hand(tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    write_shards(inputs, DOCUMENTS[:60], 20, "parquet")
    process = _start(tmp_path / "out", inputs)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("*.tar.bz2")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75
    assert err.decode() == "stopped: the same command goes on from here\n"


def test_a_disk_without_room(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", DOCUMENTS, 2, "parquet")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    process = _start(tmp_path / "out", tmp_path / "in", preexec_fn=limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4
    assert b"File too large" in err and b"goes on where it ended" in err
    assert not list((tmp_path / "out").glob("*.tar.bz2"))


def test_what_is_refused(tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    write_shards(inputs, DOCUMENTS[:20], 2, "jsonl.zst")
    make(order(tmp_path / "out", inputs, "jsonl"))
    with pytest.raises(ConfigError, match="made with other form"):
        make(order(tmp_path / "out", inputs, "tar"))
    with pytest.raises(
        BadRecordsError, match=r"shard-0000\d\.jsonl\.zst, line \d+: it has no 'body'"
    ):
        make(order(tmp_path / "bad", inputs, "jsonl", text_field="body", max_bad_records=5))
    (inputs / "shard-00001.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd nothing")
    with pytest.raises(ShardError, match=r"shard-00001\.jsonl\.zst is damaged"):
        make(order(tmp_path / "damaged", inputs, "jsonl"))
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"text": "a", "n": 1}\n{"text": "b", "n": "two"}\n')
    with pytest.raises(ShardError, match="do not fit one table"):
        make(order(tmp_path / "table", mixed, "parquet"))


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", DOCUMENTS[:20], 2, "jsonl.zst")
    arguments = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--dry-run", "--json"]
    said = json.loads(CliRunner().invoke(cli_make.make, arguments).stdout)
    assert said["inputs"] == 2
    assert not (tmp_path / "out").exists()


# ── verify ──────────────────────────────────────────────────────────────────────────────────


def verify(path: Path) -> tuple[Result, dict[str, Any]]:
    result = CliRunner().invoke(cli_make.verify, [str(path), "--json"])
    return result, json.loads(result.stdout)


def test_verify_finds_every_kind_of_damage(tmp_path: Path) -> None:
    inputs, out = tmp_path / "in", tmp_path / "out"
    write_shards(inputs, DOCUMENTS, 9, "jsonl.zst")
    make(order(out, inputs, "jsonl"))
    result, report = verify(out)
    assert (result.exit_code, report["num_problems"]) == (0, 0)
    assert report["documents"] == len(DOCUMENTS)
    missing, longer, altered, record = in_manifest(out)[:4]
    (out / missing).unlink()
    with (out / longer).open("ab") as file:
        file.write(b'{"text": "one more"}\n')
    data = (out / altered).read_bytes()
    (out / altered).write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    lines = (out / record).read_bytes().splitlines(keepends=True)
    (out / record).write_bytes(b"".join([lines[0], b"x" * (len(lines[1]) - 1) + b"\n", *lines[2:]]))
    (out / "shard-99999-0000.jsonl").write_bytes(b'{"text": "a stranger"}\n')
    result, report = verify(out / manifest.FILE_NAME)
    assert result.exit_code == 3
    said = {(one["shard"], one["record"]): one["what"] for one in report["problems"]}
    assert "no such file" in said[missing, ""]
    assert "documents" in said[longer, ""] or "bytes" in said[longer, ""]
    assert "sha256" in said[altered, ""]
    assert "no JSON" in said[record, "line 2"]
    assert "manifest does not have it" in said["shard-99999-0000.jsonl", ""]
    (out / manifest.FILE_NAME).unlink()
    result, report = verify(out)
    assert {(one["shard"], one["record"]) for one in report["problems"]} >= {(record, "line 2")}


def test_verify_reads_shards_that_are_elsewhere(tmp_path: Path) -> None:
    """By the manifest that `shards list --json` prints; a byte that is another is found."""
    paths, how = write_shards(tmp_path / "served", english(20), 2, "parquet"), Behaviour()
    with http_server(tmp_path / "served", how) as url:
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        entries = [
            Entry(f"{url}/{path.name}", path.stat().st_size, sha256=digest, documents=10)
            for path, digest in zip(paths, digests, strict=True)
        ]
        gone = Entry(f"{url}/none.parquet")
        manifest.write(tmp_path / "good", entries)
        manifest.write(tmp_path / "bad", [entries[0], gone])
        result, report = verify(tmp_path / "good")
        assert (result.exit_code, report["documents"], report["num_problems"]) == (0, 20, 0)
        data = bytearray(paths[0].read_bytes())
        data[10] ^= 1
        paths[0].write_bytes(data)
        result, report = verify(tmp_path / "bad")
    assert result.exit_code == 3
    said = {one["what"].split(",")[0] for one in report["problems"]}
    assert f"{url}/none.parquet: HTTP 404" in said
    assert any(what.startswith("its sha256 is ") for what in said)
