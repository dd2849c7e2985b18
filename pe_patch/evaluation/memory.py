"""Peak memory of a block of code."""

from __future__ import annotations

import sys

import torch


class PeakMemory:
    """A context manager that measures the peak memory of its block.

    Args:
        device: Device of the model. A CUDA device counts its allocations, any other the memory of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        """Bytes above those at the start; None until the block ends."""
        self.kind = "CUDA memory allocated above start"
        """Description of what `bytes` counts, which depends on the device and the system."""
        self._start = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        # Linux lets a process reset its high-water mark. Elsewhere only the growth of the mark is visible.
        if _reset_peak_rss():
            self.kind, self._start = "resident memory above start", _linux_status("VmRSS") or 0
        else:
            self.kind, self._start = "growth of the process's high-water resident memory", _peak_rss()
        return self

    def __exit__(self, *exception: object) -> None:
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _peak_rss()
        self.bytes = max(0, peak - self._start)


def _linux_status(name: str) -> int | None:
    """Return a size from /proc/self/status in bytes, or None if the system has no such file."""
    try:
        with open("/proc/self/status") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith(name + ":")), None)
    except OSError:
        return None


def _reset_peak_rss() -> bool:
    """Reset the peak resident size of the process. Returns False if the system cannot."""
    try:
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")
    except OSError:
        return False
    return True


def _peak_rss() -> int:
    """Return the peak resident size of the process in bytes, or 0 if the system does not report it."""
    peak = _linux_status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
