"""What MLX can do here: a child of `doctor`, since only the trainer's processes import mlx.

Process: python -m trainer.probe, started by pipeline/doctor.py. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata

from pipeline.errors import ConfigError
from trainer import blas

_SIDE = 1024
_ROUNDS = 5


def main() -> None:
    """Back end, device, BLAS, and how fast a matrix product is in float32."""
    try:
        library = blas.preload()  # before mlx
    except ConfigError as error:
        sys.exit(error.what)  # doctor knows the remedy
    import mlx.core as mx

    device = mx.default_device()
    a = mx.random.normal((_SIDE, _SIDE))
    mx.eval(a @ a)
    seconds = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        mx.eval(a @ a)
        seconds.append(time.perf_counter() - begin)
    facts = {key: str(value) for key, value in mx.device_info().items()}
    said = {
        "mlx": metadata.version("mlx"),
        "device": str(device.type).rpartition(".")[2],
        "name": facts.get("device_name", ""),
        "memory_bytes": int(facts.get("memory_size", 0) or 0),
        "blas": library,
        "gflops": 2 * _SIDE**3 / sorted(seconds)[_ROUNDS // 2] / 1e9,
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
