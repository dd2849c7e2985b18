"""How much memory a piece of work took at its highest point."""

from __future__ import annotations

import sys

import torch


class PeakMemory:
    """`bytes` above those at the start, and `kind`, which says what was counted (it differs by device and system)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self.kind = "CUDA memory allocated above start"
        self._start = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        # Linux lets a process set its own high-water mark back; elsewhere only its growth can be seen.
        if _reset_high_water():
            self.kind, self._start = "resident memory above start", _linux_status("VmRSS") or 0
        else:
            self.kind, self._start = "growth of the process's high-water resident memory", _high_water()
        return self

    def __exit__(self, *exception: object) -> None:
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _high_water()
        self.bytes = max(0, peak - self._start)


def _linux_status(name: str) -> int | None:
    """A size in /proc/self/status, in bytes; None where there is no such file."""
    try:
        with open("/proc/self/status") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith(name + ":")), None)
    except OSError:
        return None


def _reset_high_water() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")
    except OSError:
        return False
    return True


def _high_water() -> int:
    """The highest resident size of the process in bytes; 0 where the system does not say."""
    peak = _linux_status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
