# SPDX-License-Identifier: Apache-2.0
"""A training step asks torch for as many operations as it did, and never for an N x K tensor.

Counts do not depend on the machine, as times do. After a change that is worth more operations:

    python tests/test_operation_counts.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import steadyvq
from steadyvq.kernels import statistics, streaming

BOUNDS = Path(__file__).parent / "operation_counts.json"
# Large enough that a block of latents is a quarter of all of them.
LATENTS, CODES, DIM = 4096, 1024, 16
# Methods whose dimension is given by their number of codes.
SIZES: dict[str, dict[str, Any]] = {
    "fsq": {"num_codes": 1000, "dim": 4},
    "fsq_symmetric": {"num_codes": 1000, "dim": 4},
    "ifsq": {"num_codes": 1125, "dim": 4, "levels": [9, 5, 5, 5]},
    "lfq": {"num_codes": CODES, "dim": 10},
    "bsq": {"num_codes": CODES, "dim": 10},
}
KERNELS = ("kernel: nearest", "kernel: soft_statistics")


class Counter(TorchDispatchMode):
    """Counts operations, and remembers the largest tensor that one returned."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += 1
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def counted(call: Any) -> Counter:
    with Counter() as counter:
        call()
    return counter


def kernel(name: str) -> dict[str, int]:
    """Operations of a kernel itself: as an operator it counts as one."""
    generator = torch.Generator().manual_seed(0)
    z, codes = torch.randn(LATENTS, DIM, generator=generator), torch.randn(CODES, DIM, generator=generator)
    indices = streaming.nearest(z, codes)[0]
    call = {
        "kernel: nearest": lambda: streaming.nearest(z, codes),
        "kernel: soft_statistics": lambda: statistics.soft_statistics(z, codes, indices, 0.35, compiled=False),
    }[name]
    counter = counted(call)
    return {"operations": counter.count, "largest": counter.largest}


def method(name: str) -> dict[str, int]:
    """Operations of forward, backward and update of the second training step."""
    torch.manual_seed(0)
    vq = steadyvq.build_quantizer(name, **SIZES.get(name, {"num_codes": CODES, "dim": DIM}))
    grid = (16, 16, 16) if name == "multiscale" else (LATENTS,)
    z = torch.randn(*grid, vq.dim, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def step() -> None:
        out = vq(z)
        (out.z_q.sum() + out.loss).backward()
        vq.update(out)

    step()
    counter = counted(step)
    return {"operations": counter.count, "largest": counter.largest}


def measured(name: str) -> dict[str, int]:
    return kernel(name) if name in KERNELS else method(name)


def names() -> list[str]:
    return [*KERNELS, *steadyvq.list_quantizers()]


@pytest.mark.parametrize("name", names())
def test_operations_and_the_largest_tensor_stay_within_their_bounds(name: str) -> None:
    bounds = json.loads(BOUNDS.read_text())
    assert set(bounds) == set(names()), "run python tests/test_operation_counts.py"
    found, bound = measured(name), bounds[name]
    assert found["operations"] <= 1.1 * bound["operations"] + 5
    assert found["largest"] <= 1.1 * bound["largest"]
    assert found["operations"] >= 0.7 * bound["operations"], "much fewer: lower the bound"
    assert bound["largest"] <= LATENTS * CODES / 4, "no N x K tensor"


if __name__ == "__main__":
    BOUNDS.write_text(json.dumps({name: measured(name) for name in names()}, indent=1) + "\n")
