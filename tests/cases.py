# SPDX-License-Identifier: Apache-2.0
"""What the tests of quantizers share: every registered method, built so that many of its codes are used."""

import torch
from torch import Tensor

import steadyvq
from steadyvq.quantizers import TransformedCodebook, VectorQuantizer
from steadyvq.quantizers.registry import methods

NAMES = steadyvq.list_quantizers()
LAYOUTS = {  # name -> (shape with 0 for the features, channel axis)
    "rows": ((40, 0), -1),
    "sequence last": ((3, 17, 0), -1),
    "sequence first": ((3, 0, 17), 1),
    "image": ((2, 0, 5, 4), 1),
    "video": ((2, 0, 3, 4, 2), 1),
    "one vector": ((0,), -1),
}


def layout_shape(layout: str, dim: int) -> tuple[tuple[int, ...], int]:
    """The shape of latents of that many features, and the axis that holds them."""
    shape, axis = LAYOUTS[layout]
    return tuple(side or dim for side in shape), axis


def build(name: str, **overrides: object) -> steadyvq.Quantizer:
    """A quantizer of the method's example size whose codes, where it places any, lie among standard normal latents."""
    num_codes, dim = methods()[name].example
    vq = steadyvq.build_quantizer(name, **{"num_codes": num_codes, "dim": dim, **overrides})
    if vq.places_codes:
        axis = overrides.get("channel_axis", -1)
        shape = (200, vq.dim) if axis == -1 else (200, vq.dim, 1)
        vq.init_from(torch.randn(shape, generator=torch.Generator().manual_seed(5)), method="data")
    if isinstance(vq, VectorQuantizer) and isinstance(vq.codes, TransformedCodebook):
        # Placed codes have the identity as their transform, where the base and the table cannot be told apart.
        with torch.no_grad():
            for seed, p in enumerate(p for p in vq.codes.parameters() if p is not vq.codes.base):
                p += 0.5 * p.shape[-1] ** -0.5 * normal(*p.shape, seed=6 + seed)
    return vq


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen(vq: steadyvq.Quantizer, z: Tensor) -> Tensor:
    """Latents (N, d) as the look-up sees them."""
    return z / z.square().sum(-1, keepdim=True).sqrt() if getattr(vq, "unit_sphere", False) else z


def state(vq: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the state."""
    return {name: value.clone() for name, value in vq.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states are equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
