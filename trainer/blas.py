"""MLX, and a fast matrix product for its CPU back end on Linux.

Runs in: whatever imports mlx, before it does so. MLX's Linux wheel carries the reference BLAS
(5 GFLOP/s); a library that exports the same symbols and is loaded first takes its place.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from pipeline.errors import ConfigError

INSTALL = (
    "pip install mlx"
    if sys.platform == "darwin"
    else "pip install 'mlx[cpu]' mkl, or 'mlx[cuda13]' with an NVIDIA GPU"
)
_OPENBLAS = ("libopenblas.so.0", "libopenblas.so")


def preload() -> str:
    """Load the fastest BLAS there is, and mlx, and return what the user should know about it.

    The system's OpenBLAS comes first, then the MKL that pip put into this environment.

    Raises:
        ConfigError: mlx is not installed, or without its back end; says how to install it.
    """
    library = _preload()
    try:
        import mlx.core  # noqa: F401  # after the BLAS
    except ImportError as error:
        raise ConfigError(f"MLX cannot be imported: {error}", INSTALL) from None
    return library


def _preload() -> str:
    if sys.platform != "linux":
        return "Accelerate"
    for name in _OPENBLAS:
        if _load(name):
            return "OpenBLAS of the system"
    folder = Path(sys.prefix) / "lib"
    openmp, mkl = folder / "libiomp5.so", sorted(folder.glob("libmkl_rt.so*"))
    if mkl and openmp.exists() and _load(str(openmp)) and _load(str(mkl[-1])):
        _unregister(str(openmp))
        return "MKL of this environment"
    return (
        "reference BLAS, slow: `pip install mkl` or `apt-get install libopenblas0` is 15 × as fast"
    )


def _load(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _unregister(openmp: str) -> None:
    """Intel's OpenMP enters itself in /dev/shm and takes that back at its exit only, so a process
    that is killed leaves the entry for ever: take it back now. It serves to find two copies of
    OpenMP in one process."""
    ctypes.CDLL(openmp).omp_get_max_threads()  # this makes it initialize itself
    Path(f"/dev/shm/__KMP_REGISTERED_LIB_{os.getpid()}_{os.getuid()}").unlink(missing_ok=True)


def reproducible() -> None:
    """Ask MKL for results that do not depend on memory alignment: resumes are bitwise equal."""
    os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
