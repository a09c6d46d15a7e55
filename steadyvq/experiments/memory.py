# SPDX-License-Identifier: Apache-2.0
"""How much memory a process takes at most, beyond what it held before."""

import sys
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The peak of this process's memory since this object was made, less what it held then.

    On a GPU it is the peak of what torch has allocated there. Otherwise it is resident memory: on Linux its peak is reset
    first; elsewhere an earlier peak hides a lower one, and where the system tells nothing it is None.
    """

    def __init__(self) -> None:
        self._start = None
        if torch.cuda.is_available():
            return
        try:
            _RESET.write_text("5")
            self._start = _linux("VmRSS")
        except OSError:
            self._start = _peak()

    def read(self) -> int | None:
        """Bytes so far."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        peak = _peak()
        return None if peak is None or self._start is None else max(0, peak - self._start)


def _linux(name: str) -> int | None:
    """A line of the kernel's account of this process, in bytes."""
    values = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(values[name].split()[0]) * 1024 if name in values else None


def _peak() -> int | None:
    if _STATUS.is_file():
        return _linux("VmHWM")
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
