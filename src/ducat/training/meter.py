"""What a run costs: wall time, peak memory, and energy where the machine measures it. Nothing is estimated."""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Counts from when it is made, on top of what an earlier one had read.

    Energy is that of the whole processor packages and of this process's GPU, so it includes whatever else ran there.
    Counters of packages overflow within the hour, so `sample` has to be called every few minutes.

    Args:
        device: where the network is.
        earlier: what `read` returned before the run was stopped.
        powercap: the folder of Linux's power capping framework (RAPL).
    """

    def __init__(
        self, device: torch.device, earlier: Mapping[str, Any] | None = None, powercap: Path = POWERCAP
    ) -> None:
        self.device, self.earlier = device, dict(earlier or {})
        self.began = time.perf_counter()
        self.counters = _package_counters(powercap) | _gpu_counter(device)
        self.joules = dict.fromkeys(self.counters, 0.0)
        self.last = {name: read() for name, (read, _) in self.counters.items()}

    def sample(self) -> None:
        """Read the energy counters."""
        for name, (read, wraps_at) in self.counters.items():
            with contextlib.suppress(OSError):
                now = read()
                self.joules[name] += (now - self.last[name]) % wraps_at if wraps_at else now - self.last[name]
                self.last[name] = now

    def read(self) -> dict[str, Any]:
        """Return the seconds, the peak memory in bytes, and the joules by counter, for the manifest.

        What the machine does not tell is left out.
        """
        self.sample()
        read: dict[str, Any] = {"seconds": round(self.earlier.get("seconds", 0) + time.perf_counter() - self.began, 1)}
        with contextlib.suppress(ImportError):  # Windows has no such count.
            read["peak_memory_bytes"] = max(_peak_memory(), self.earlier.get("peak_memory_bytes", 0))
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            read["peak_gpu_memory_bytes"] = max(peak, self.earlier.get("peak_gpu_memory_bytes", 0))
        before = self.earlier.get("energy_joules", {})
        joules = {name: round(value + before.get(name, 0), 1) for name, value in self.joules.items()}
        # A part of the run without the counter would make the sum too small.
        if joules and (not self.earlier or before.keys() == joules.keys()):
            read["energy_joules"] = joules
        return read


def _peak_memory() -> int:
    # Linux's getrusage tells no less than the peak of the process that began this one.
    status = Path("/proc/self/status")
    if found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text() if status.is_file() else ""):
        return 1024 * int(found[1])
    import resource

    # Bytes on macOS, KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


Counter = tuple[Callable[[], float], float]  # joules so far, and where they start again from 0 (0: never)


def _package_counters(powercap: Path) -> dict[str, Counter]:
    """Return the energy counters of the processor packages that this process may read."""
    counters: dict[str, Counter] = {}
    for zone in sorted(powercap.glob("intel-rapl:*")):
        # Zones with a second colon are parts of a package.
        if zone.name.count(":") != 1:
            continue
        try:
            name, wraps_at = (
                (zone / "name").read_text().strip(),
                float((zone / "max_energy_range_uj").read_text()) / 1e6,
            )
            counter = _Microjoules(zone / "energy_uj")
            counter()
        except (OSError, ValueError):
            continue
        counters[name] = (counter, wraps_at)
    return counters


class _Microjoules:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> float:
        return float(self.path.read_text()) / 1e6


def _gpu_counter(device: torch.device) -> dict[str, Counter]:
    """Return the energy counter of the GPU, if NVIDIA's management library is installed and has one."""
    if device.type != "cuda":
        return {}
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:
        return {}
    return {"gpu": (lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)}
