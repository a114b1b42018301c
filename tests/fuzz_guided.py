"""One target of tests/fuzz.py, guided by coverage: what `python -m tests.fuzz --guided` starts.

    python -m tests.fuzz_guided TARGET SEED COUNT

atheris ends the process at the first input that raises, takes too long or needs too much.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["pipeline", "tarfile", "gzip", "http", "urllib3", "yaml"]):
    from tests.fuzz import LARGEST_BYTES, LIMIT_S, fast_folder
    from tests.fuzz_targets import TARGETS


def main() -> None:
    target, seed, count = TARGETS[sys.argv[1]], sys.argv[2], sys.argv[3]
    with (
        tempfile.TemporaryDirectory() as corpus,
        tempfile.TemporaryDirectory(dir=fast_folder()) as name,
    ):
        folder = Path(name)
        for number, data in enumerate(target.seeds()):
            (Path(corpus) / str(number)).write_bytes(data)
        options = [
            f"-runs={count}",
            f"-seed={seed}",
            f"-timeout={LIMIT_S:.0f}",
            "-rss_limit_mb=3000",
            f"-max_len={LARGEST_BYTES}",
            f"-artifact_prefix={folder}/",
            "-print_final_stats=1",
        ]
        atheris.Setup([sys.argv[0], *options, corpus], lambda data: target.check(data, folder))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
