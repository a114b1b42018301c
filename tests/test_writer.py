"""The file writer: llm.c's files, one hash, and resumption at the exact token."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.workers.writer import HEADER_BYTES, TokenFiles, header

FORMATS = {2: (np.uint16, 20240520, 1), 4: (np.uint32, 20240801, 7)}


def read_files(folder: Path, token_bytes: int) -> tuple[np.ndarray, list[int]]:
    """All tokens, read as llm.c's dataloader does: by the header, not by the file's size."""
    dtype, magic, version = FORMATS[token_bytes]
    parts = []
    for path in sorted(folder.glob("tokens_*.bin")):
        words = np.fromfile(path, "<i4", 256)
        assert (words[0], words[1]) == (magic, version)
        assert not words[3:].any()
        tokens = np.fromfile(path, np.dtype(dtype).newbyteorder("<"), offset=HEADER_BYTES)
        assert len(tokens) == words[2]
        parts.append(tokens)
    return np.concatenate(parts) if parts else np.zeros(0, dtype), [len(p) for p in parts]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    token_bytes=st.sampled_from([2, 4]),
    file_tokens=st.integers(1, 50),
    pieces=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    stop=st.data(),
)
def test_files_are_the_same_with_and_without_an_interruption(
    tmp_path_factory: pytest.TempPathFactory,
    token_bytes: int,
    file_tokens: int,
    pieces: list[int],
    stop: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("files")
    dtype = FORMATS[token_bytes][0]
    tokens = np.random.default_rng(1).integers(0, 60000, sum(pieces)).astype(dtype)
    files = TokenFiles(folder, token_bytes, file_tokens, 0)
    cut = stop.draw(st.integers(0, len(pieces)))
    saved = sum(pieces[:cut])
    done = 0
    for number, piece in enumerate(pieces):
        files.write(tokens[done : done + piece])
        done += piece
        if number + 1 == cut:
            files.sync()
    # killed: what came after the last save is on disk, and must not be in the result
    if files._file is not None:
        files._file.close()
    again = TokenFiles(folder, token_bytes, file_tokens, saved)
    again.write(tokens[saved:])
    again.close()
    got, sizes = read_files(folder, token_bytes)
    np.testing.assert_array_equal(got, tokens)
    assert all(size == file_tokens for size in sizes[:-1])
    assert again.sha256.hexdigest() == hashlib.sha256(tokens.tobytes()).hexdigest()
    assert not list(folder.glob("*.partial"))


def test_a_file_that_is_shorter_than_its_state_is_an_error(tmp_path: Path) -> None:
    files = TokenFiles(tmp_path, 2, 100, 0)
    files.write(np.arange(40, dtype=np.uint16))
    files.close()
    with pytest.raises(EOFError, match="shorter"):
        TokenFiles(tmp_path, 2, 100, 41)


def test_the_header_is_llm_c_s() -> None:
    assert len(header(5, 2)) == HEADER_BYTES
    assert np.frombuffer(header(5, 2), "<i4")[:4].tolist() == [20240520, 1, 5, 0]
    assert np.frombuffer(header(7, 4), "<i4")[:4].tolist() == [20240801, 7, 7, 0]
