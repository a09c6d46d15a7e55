# SPDX-License-Identifier: Apache-2.0
"""A training step asks torch for as many operations as it did, never for an N x K tensor, and seldom for a value.

Counts do not depend on the machine, as times do. After a change that is worth more operations:

    python tests/test_operation_counts.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

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


# What makes the host wait for a card: a value is asked for, or a shape depends on values.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal"}


def waits(func: Any, args: Any) -> bool:
    """Whether an operation would wait for the device on a card."""
    name = func._schema.name.split("::")[-1]
    if name in ("index", "index_put", "index_put_") and len(args) > 1:
        masks = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1])
        # One number put into masked places is a fill.
        return masks and (name == "index" or args[2].numel() > 1)
    return name in WAITS


class Counter(TorchDispatchMode):
    """Counts operations and those that wait for the device, and remembers the largest tensor that one returned."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.largest = self.waits = 0

    def __enter__(self) -> "Counter":
        # These two read memory without asking the dispatcher.
        self._originals = {name: getattr(torch.Tensor, name) for name in ("tolist", "numpy")}
        for name, original in self._originals.items():

            def noted(tensor: torch.Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Any:
                # Within an operator of ours no mode is on: a CPU's kernels may look at what they like.
                self.waits += _get_current_dispatch_mode() is self
                return original(tensor, *args, **kwargs)

            setattr(torch.Tensor, name, noted)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for name, original in self._originals.items():
            setattr(torch.Tensor, name, original)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += 1
        self.waits += waits(func, args)
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
    return {"operations": counter.count, "largest": counter.largest, "waits": counter.waits}


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
    assert found.get("waits", 0) <= bound.get("waits", 0), "the host waits for the device more often"


def test_what_waits_is_seen() -> None:
    x = torch.arange(6.0)
    for call in (
        x.sum().item,
        (x > 2).nonzero,
        lambda: x[x > 2],
        lambda: x.tolist(),
        lambda: bool(x[0] > 1),
        lambda: x.numpy(),
    ):
        assert counted(call).waits == 1
    for call in (lambda: x.masked_fill(x > 2, 0.0), lambda: x[torch.tensor([1, 2])], lambda: x.topk(2)):
        assert counted(call).waits == 0


if __name__ == "__main__":
    BOUNDS.write_text(json.dumps({name: measured(name) for name in names()}, indent=1) + "\n")
