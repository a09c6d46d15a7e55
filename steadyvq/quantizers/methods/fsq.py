# SPDX-License-Identifier: Apache-2.0
"""FSQ: finite scalar quantization. Each of few features is rounded to one of few levels; there is nothing to collapse.

    b = h tanh(z + s) - o,   h = (l - 1)(1 - eps) / 2,   o = 0 if l is odd, else 1/2,   s = tan(o / h),   eps = 1e-3
    q = round(b) / (l // 2),   index = sum_k (round(b_k) + l_k // 2) prod_{m<k} l_m,   no loss at all

per feature with l levels. The straight-through estimator goes round the rounding alone: the gradient passes through b. Even l
are lopsided: l = 8 has the levels -4..3, as q from -1 to 3/4.

`form="centred"` has h with 1 + eps and s = artanh(o / h), so that z = 0 lies on q = 0 exactly, as in lucidrains'
vector-quantize-pytorch. tan and artanh agree to third order: the forms hardly differ but for l = 2.

`fsq_symmetric` has levels that are symmetric about 0 for even l too, and no bound but tanh:

    b = tanh(z),   q = 2 / (l - 1) floor((l - 1)(b + 1) / 2 + 1/2) - 1

`ifsq` (iFSQ) has b = 2 sigmoid(1.6 z) - 1 = tanh(0.8 z) in its place, which is almost uniform over (-1, 1) where z is standard
normal. For odd l, which the official code insists on, q = round(h b) / h with h = (l - 1) / 2. The two outer levels are half as
wide as the others, so a uniform b does not mean evenly used levels.

Levels: the paper recommends sets for sizes near powers of two, and `num_codes` picks one by the power or by the product
(2^16 gives 8 8 8 5 5 5, which are 64,000 codes: `quantizer.num_codes` says so); `levels=[...]` gives any other. In iFSQ all
features have the same number of levels, 2^b + 1 for "b bits", and l^d codes are l levels each if l is odd.

Source: FSQ, arXiv 2309.15505, appendix A.1 (JAX) and the table of levels; symmetric form: arXiv 2411.19842, section 3.2,
without its training noise; iFSQ: arXiv 2601.17124 and its code (17 levels in each of 4 features). Even l in `ifsq` are ours.
Differs from the source: a level is found by thresholds on z rather than by rounding b, which is the same but for latents within
rounding error of a threshold, and makes tokens independent of batch, layout and device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steadyvq.quantizers.base import Quantizer
from steadyvq.quantizers.losses import Commitment
from steadyvq.quantizers.names import look_up
from steadyvq.quantizers.registry import register
from steadyvq.quantizers.scalar import Grid, ScalarQuantizer, read_options

RECOMMENDED = {
    2**8: (8, 6, 5),
    2**10: (8, 5, 5, 5),
    2**12: (7, 5, 5, 5, 5),
    2**14: (8, 8, 8, 6, 5),
    2**16: (8, 8, 8, 5, 5, 5),
}
"""The paper's levels for codebooks of about this size."""

EPS = 1e-3
# Above, (l - 2) / 2 is out of reach of (l - 1)(1 - eps) / 2.
MOST_LEVELS = 1000

# 2 sigmoid(1.6 z) - 1 = tanh(0.8 z).
IFSQ_SLOPE = 0.8

FORMS = {"official": (1 - EPS, math.tan), "centred": (1 + EPS, math.atanh)}
"""Factor on h, and what gives s from o / h."""


class FiniteScalars(ScalarQuantizer):
    """The bound of FSQ in front of its grid.

    Args:
        levels: Number of levels of each feature.
        form: `official` or `centred`.
        **options: Of `ScalarQuantizer`.
    """

    bounds: Tensor

    def __init__(self, levels: Sequence[int], form: str = "official", **options: Any) -> None:
        factor, shift_of = look_up("form", form, FORMS)
        thresholds, values, bounds = [], [], []
        for count in levels:
            half = (count - 1) * factor / 2
            offset = 0.0 if count % 2 else 0.5
            shift = shift_of(offset / half)
            middle = count // 2
            between = [k - middle + 0.5 for k in range(count - 1)]
            thresholds.append([math.atanh((b + offset) / half) - shift for b in between])
            values.append([(k - middle) / middle for k in range(count)])
            bounds.append([shift, half / middle, offset / middle])
        super().__init__(Grid(thresholds, values), **options)
        self.register_buffer("bounds", torch.tensor(bounds).t().contiguous(), persistent=False)

    def project(self, z: Tensor) -> Tensor:
        """b / (l // 2): where the codes live."""
        shift, scale, offset = self.bounds
        b: Tensor = scale * torch.tanh(z + shift) - offset
        return b


class SymmetricScalars(ScalarQuantizer):
    """Levels symmetric about 0.

    Args:
        levels: Number of levels of each feature.
        slope: Of the bound tanh(slope z) at 0.
        **options: Of `ScalarQuantizer`.
    """

    def __init__(self, levels: Sequence[int], slope: float = 1.0, **options: Any) -> None:
        self.slope = slope
        thresholds = [[math.atanh((2 * k + 1) / (count - 1) - 1) / slope for k in range(count - 1)] for count in levels]
        values = [[2 * k / (count - 1) - 1 for k in range(count)] for count in levels]
        super().__init__(Grid(thresholds, values, rounds_up=True), **options)

    def project(self, z: Tensor) -> Tensor:
        """Where the codes live: (-1, 1)."""
        return torch.tanh(self.slope * z)


@register(
    "fsq",
    paper="FSQ, arXiv 2309.15505",
    summary="rounds a few bounded features to a few levels; no codebook, no loss",
    cost="N d, no table",
    example=(240, 3),
)
def fsq(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Finite scalar quantization; `levels=[...]` for other sizes than the paper's, `form` as above."""
    options = read_options({"levels": None, "form": "official"}, overrides, {"commitment": Commitment})
    return FiniteScalars(choose_levels(num_codes, dim, options.pop("levels")), **options)


@register(
    "fsq_symmetric",
    paper="arXiv 2411.19842, section 3.2",
    summary="FSQ with levels symmetric about zero",
    cost="N d, no table",
    status="variant",
    example=(240, 3),
)
def fsq_symmetric(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Finite scalar quantization with symmetric levels."""
    options = read_options({"levels": None}, overrides, {"commitment": Commitment})
    return SymmetricScalars(choose_levels(num_codes, dim, options.pop("levels")), **options)


@register(
    "ifsq",
    paper="iFSQ, arXiv 2601.17124",
    summary="FSQ whose bound makes normal latents almost uniform",
    cost="N d, no table",
    example=(125, 3),
)
def ifsq(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """Finite scalar quantization with a bound that matches the distribution; num_codes = l^dim gives l levels each."""
    options = read_options({"levels": None}, overrides, {"commitment": Commitment})
    levels = options.pop("levels")
    if levels is None and isinstance(num_codes, int) and isinstance(dim, int) and num_codes > 0 and dim > 0:
        each = round(num_codes ** (1 / dim))
        levels = [each] * dim if each**dim == num_codes and each % 2 and each > 1 else None
    return SymmetricScalars(choose_levels(num_codes, dim, levels), IFSQ_SLOPE, **options)


def choose_levels(num_codes: int, dim: int, levels: Any = None) -> list[int]:
    """The levels that were given, or the paper's for this size.

    Raises:
        ValueError: They do not make this size, or the paper has none for it; names levels that would do.
    """
    for name, value in (("num_codes", num_codes), ("dim", dim)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}, but a quantizer needs a positive integer")
    if levels is None:
        chosen = next((s for power, s in RECOMMENDED.items() if num_codes in (power, math.prod(s))), None)
        if chosen is None:
            raise ValueError(
                f"num_codes is {num_codes}, but the paper recommends no levels for that size: {_advice(num_codes, dim)}"
            )
        if dim != len(chosen):
            raise ValueError(
                f"dim is {dim}, but the levels recommended for num_codes={num_codes} are {list(chosen)}: set "
                f"dim={len(chosen)}, and project the latents (Tokenizer does this with pre_quant), or give levels=[...]"
            )
        return list(chosen)
    whole = isinstance(levels, list | tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in levels)
    if not whole or not all(2 <= n <= MOST_LEVELS for n in levels):
        raise ValueError(
            f"levels is {levels!r}, but it needs a list of integers from 2 to {MOST_LEVELS}, one per feature"
        )
    if math.prod(levels) != num_codes or len(levels) != dim:
        raise ValueError(
            f"levels={list(levels)} make {math.prod(levels)} codes of dim={len(levels)}, but num_codes={num_codes} and "
            f"dim={dim} were given: {_advice(num_codes, dim)}"
        )
    return list(levels)


def _advice(num_codes: int, dim: int) -> str:
    """Level sets near a size: as even as possible with that many features, and the nearest recommended one."""
    recommended = list(min(RECOMMENDED.values(), key=lambda s: abs(math.log(math.prod(s) / num_codes))))
    sets = [s for s in (_even_levels(num_codes, dim), recommended) if s]
    named = [f"levels={s} with num_codes={math.prod(s)} and dim={len(s)}" for s in sets]
    return "take " + " or ".join(dict.fromkeys(named))


def _even_levels(num_codes: int, dim: int) -> list[int]:
    """The levels, all but equal, whose product is nearest to a size; none where that is twice as large."""
    low = math.floor(num_codes ** (1 / dim) + 1e-9)
    sets = [[low + 1] * high + [low] * (dim - high) for high in range(dim + 1)]
    usable = [s for s in sets if s[-1] >= 2 and s[0] <= MOST_LEVELS and math.prod(s) < 2 * num_codes]
    return min(usable, key=lambda s: abs(math.prod(s) - num_codes), default=[])
