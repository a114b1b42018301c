"""Watts, where the machine lets them be read.

Runs in: supervisor. NVIDIA: what the driver's library says of all GPUs. Linux on Intel and AMD:
the packages' energy counters, which most systems show to root alone. Elsewhere: nothing, not a
guess.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

_RAPL = Path("/sys/class/powercap")


class Power:
    """Reads all meters that can be read.

    Args:
        rapl: Folder of the kernel's energy counters.
        nvml: Name of NVIDIA's library.
    """

    def __init__(self, rapl: Path = _RAPL, nvml: str = "libnvidia-ml.so.1") -> None:
        self._zones = [
            zone
            for zone in sorted(rapl.glob("intel-rapl:*"))
            if zone.name.count(":") == 1 and _counter(zone) is not None
        ]
        self._last: dict[Path, tuple[float, int]] = {}
        self._gpus, self._library = _open_nvml(nvml)

    def watts(self) -> float | None:
        """Of processors (mean since the last call) and GPUs (now) together; None where no meter
        can be read."""
        cpu, gpu = self._cpu_watts(), self._gpu_watts()
        return None if cpu is None and gpu is None else (cpu or 0.0) + (gpu or 0.0)

    def _cpu_watts(self) -> float | None:
        total, measured = 0.0, False
        for zone in self._zones:
            now, energy = time.monotonic(), _counter(zone)
            before = self._last.get(zone)
            if energy is None:
                continue
            self._last[zone] = now, energy
            if before is not None and energy >= before[1] and now > before[0]:  # else: wrapped
                total += (energy - before[1]) / 1e6 / (now - before[0])
                measured = True
        return total if measured else None

    def _gpu_watts(self) -> float | None:
        milliwatts = ctypes.c_uint()
        total, measured = 0.0, False
        for gpu in self._gpus:
            assert self._library is not None
            if self._library.nvmlDeviceGetPowerUsage(gpu, ctypes.byref(milliwatts)) == 0:
                total += milliwatts.value / 1e3
                measured = True
        return total if measured else None


def _counter(zone: Path) -> int | None:
    """Microjoules used so far."""
    try:
        return int((zone / "energy_uj").read_text())
    except (OSError, ValueError):
        return None


def _open_nvml(name: str) -> tuple[list[ctypes.c_void_p], ctypes.CDLL | None]:
    """Handles of all GPUs. Source: NVML API reference, nvmlDeviceGetPowerUsage."""
    try:
        library = ctypes.CDLL(name)
        if library.nvmlInit_v2() != 0:
            return [], None
    except (OSError, AttributeError):
        return [], None
    count = ctypes.c_uint()
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    handles = []
    for index in range(count.value):
        handle = ctypes.c_void_p()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0:
            handles.append(handle)
    return handles, library
