# SPDX-License-Identifier: Apache-2.0
"""How much memory a process takes at most, beyond what it held before; how much autograd keeps of a forward."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class KeptForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Inside this context: counts the bytes that autograd keeps of what is computed, each memory once.

    It needs shapes alone, so networks of any size can be counted on the device `meta`.

    Args:
        known: Modules whose weights and buffers do not count.
    """

    def __init__(self, *known: nn.Module) -> None:
        tensors = [tensor for module in known for tensor in (*module.parameters(), *module.buffers())]
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._kept: dict[int, Tensor] = {}
        super().__init__(self._pack, _as_it_is)

    def _pack(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self._known:
            # Held, or another memory might get the same key.
            self._kept.setdefault(key, tensor.detach())
        return tensor

    @property
    def bytes(self) -> int:
        """So far."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


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
