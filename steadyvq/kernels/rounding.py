# SPDX-License-Identifier: Apache-2.0
"""How far a computed score may be from the exact one: what makes the fast searches exact.

Rounding error of the search
============================
u is the unit roundoff of the working dtype, gamma_m = m u / (1 - m u). Everything is scaled by one power of two so that
the largest entry of latents and codes is near 2^40: a product of two such entries, summed over d, cannot overflow, and
the scaling itself is exact. c is any vector (the code mean, rounded), Z = z - c, E = e - c in exact arithmetic.

1. The stored Z^ = fl(z - c) is one correctly rounded subtraction, so |Z^ - Z| <= u |Z| entry by entry. A matrix product
   that rounds its operands again (TF32, bfloat16) adds a relative v: together rho = u + v + u v.
   Hence |Z~ . E~ - Z . E| <= (2 rho + rho^2) |Z| |E|, by Cauchy-Schwarz on the absolute values.
2. The working-precision value of n - 2 Z~ . E~ is a sum of d + 1 products in *some* order, with or without fused
   multiply-add, bias first or last: its error is at most gamma_{d+2} (n + 2 (1 + rho)^2 |Z| |E|) for every order.
   Products by 2 are exact. Tensor cores truncate instead of rounding: their u is taken four times as large.
3. The stored n, the rounded square of the computed length of E^, is off by at most a relative gamma_{d+1} + 6 u: the
   sum of squares in any order, 2 u from E^, 2 u from the root, u from the square.
4. The float64 score of a pair is off by at most (d + 2) 2^-53 (1 + small) D, with D <= (|Z| + |E|)^2.
5. What underflows loses at most 2^-126 (flush to zero included) per operation: at most 2^-126 (d + 2) (2 + |Z| + |E|)
   times 4, all in scaled units.

With s^ the computed and S = |E|^2 - 2 Z . E the exact shifted score, items 1-3 and 5 bound |s^ - S| by B', and item 4
bounds the error of a float64 score by B''. If j* wins in float64 then S_j* <= S_j + 2 B'' for every j, so
s^_j* <= min_j s^_j + 2 (B' + B''). All codes within that slack of the running minimum, which is never below the final
one, are re-scored in float64, so the winner is always among them. The slack also carries the rounding of
`minimum + slack` itself (2 u (|s^| + slack)) and a factor 1.01 for the arithmetic of the bound.

6. A screen in bfloat16: operands Z~, E~ are the stored ones rounded once more; products are exact in float32, sums
   accumulated in float32 with four times its unit roundoff. With the operands' errors as they are, not as they might be,
       |Z~ . E~ - Z . E| <= |Z^ - Z~| |E^| + |Z~| |E^ - E~| + (2 u + u^2) |Z| |E|.
   Two more columns subtract twice that from every score, for its own code and not for the longest one, which may be far
   out. Sums of d + 4 products lose at most gamma (n + 2 |Z~| |E~| + 2 |Z^ - Z~| |E^| + 2 |Z~| |E^ - E~|), which is below
   gamma (n + 2.05 |Z| |E|), with gamma = gamma_{d+8} of 4 u: it lowers n by a share kappa and adds lambda |Z| to the factor
   of 2 |E^|. So the computed score is at most S, but for underflow, and with the float32 score s^_k of any code k
   s~_j* <= S_j* <= S_k + 2 B'' <= s^_k + B' + 2 B'': the slack again, whose second B' is left for underflow.

7. The same screen wholly inside one product of T columns (Triton), with Z and E in float64 before they are rounded to
   bfloat16, once or as the sum of two parts (then T is three times as wide, and the product of the second parts is left out).
   With Z~, E~ the rounded rows, r the residuals and low the second parts (0 for one part),
       |Z . E - sum of the products| <= |r_Z| |E| + |Z~| |r_E| + |low_Z| |low_E|,
   and three columns subtract twice each of these, rounded up. Three more add (1 - kappa) |E|^2 as three bfloat16 parts. The sum
   of T products in any order, accumulated in float32 with four times its unit roundoff, errs by at most gamma = gamma_T of 4 u
   times the sum of the terms' sizes, which is below |E|^2 + (2.09 + 2.1 lambda) |Z| |E| even where bfloat16 cuts off instead of
   rounding: lambda = 1.25 gamma is added to |r_Z| / |Z|, and kappa = 1.25 gamma + 2^-20 also covers what three parts leave of
   |E|^2. So the computed score is at most S but for underflow. A latent's code j* satisfies, by item 4,
   S_j* <= D_best - |Z|^2 + 2 B'' for every D_best that some code has in float64: bundles above that are out, and everything
   below it is scored in float64. Underflow is added to that limit.

For inner products c = 0 and n = 0, and the float64 score is -z . e: its error, doubled as S is, is at most
2 (d + 1) 2^-53 |z| |e|, which item 4 covers because 4 |z| |e| <= (|z| + |e|)^2; item 3 falls away.

float64 inputs whose squares leave the range of float64 (entries above 1e150 or, all of them, below 1e-150) are outside
the contract.
"""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

# Exponent of the largest scaled entry; see the module docstring.
_EXPONENT = 40


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, else float32, which holds every bfloat16, float16 and float32 value exactly."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def exponent_of(z: Tensor, codes: Tensor) -> int:
    """The power of two that brings the largest entry of both inputs to [2^39, 2^40)."""
    largest = torch.stack([bound.abs().double() for tensor in (z, codes) for bound in tensor.aminmax()]).amax()
    return _EXPONENT - int(torch.frexp(largest).exponent)


def scaled(tensor: Tensor, exponent: int, padding: int, dtype: torch.dtype) -> Tensor:
    """A fresh tensor, times 2^exponent in steps that each fit the dtype, with `padding` rows of zeros at the end."""
    out = tensor.new_empty(tensor.shape[0] + padding, tensor.shape[1], dtype=dtype)
    out[: tensor.shape[0]].copy_(tensor)
    out[tensor.shape[0] :] = 0.0
    while exponent:
        step = max(-100, min(100, exponent))
        out.mul_(2.0**step)
        exponent -= step
    return out


def slack_of(lengths: Tensor, longest: Tensor, dim: int, operand: float, accumulate: float) -> Tensor:
    """(N,) how far above the minimum a computed score may lie and still belong to the winner, in the working dtype.

    Args:
        lengths: (N,) computed lengths of the scaled and centred latents.
        longest: 0-d, the largest computed length of a code.
        dim: d.
        operand: unit roundoff of a second rounding of the operands of a product (0: none).
        accumulate: unit roundoff of its sums.
    """
    u = torch.finfo(lengths.dtype).eps / 2
    rho = u + operand + u * operand
    gamma = (dim + 2) * accumulate / (1 - (dim + 2) * accumulate)
    stored = (dim + 1) * u / (1 - (dim + 1) * u)
    # Computed lengths are themselves rounded; (1 + rho) and (1 + stored) lead back to upper bounds of the exact ones.
    reach = lengths.double() * ((1 + rho) * (1 + stored))
    code = longest.double() * ((1 + rho) * (1 + stored))
    product, norm = reach * code, code * code
    size = norm + 2 * product * (1 + rho) ** 2
    score = gamma * size + 2 * (2 * rho + rho * rho) * product + (stored + 6 * u) * norm
    exact = (dim + 3) * 2.0**-53 * (reach + code) ** 2
    underflow = 2.0**-124 * (dim + 2) * (2 + reach + code)
    slack: Tensor = 1.01 * (2 * (score + exact + underflow) + 4 * u * size)
    return slack.to(lengths.dtype)


class Screen(NamedTuple):
    """Shares of lengths by which a bfloat16 score is lowered; see items 6 and 7.

    Attributes:
        kappa: of |E|^2.
        lam: of |Z|, in the factor of 2 |E|.
    """

    kappa: float
    lam: float


def screen_of(dim: int) -> Screen:
    """What sums in float32 may lose of a bfloat16 score of d dimensions."""
    u = 2.0**-24
    terms = (dim + 8) * 4 * u
    gamma = terms / (1 - terms)
    stored = (dim + 1) * u / (1 - (dim + 1) * u)
    return Screen(1.01 * (gamma + stored + 8 * u), 1.05 * gamma + 3 * u)


def screen_shares(columns: int) -> Screen:
    """The shares of item 7, for a product over that many columns."""
    terms = columns * 4 * 2.0**-24
    gamma = terms / (1 - terms)
    return Screen(1.25 * gamma + 2.0**-20, 1.25 * gamma)


def roundoff(dtype: torch.dtype) -> tuple[float, float]:
    """Unit roundoff of the second rounding of a product's operands (0: none), and of its accumulation.

    Only float32 products may be computed from shorter operands. Every knob of every backend is read and the worst one
    counts; operands may be cut off instead of rounded, hence twice the unit roundoff.
    """
    u = torch.finfo(dtype).eps / 2
    if dtype == torch.float64:
        return 0.0, u
    modes = _matmul_modes()
    if "bf16" in modes or "medium" in modes:
        return 2.0**-7, 4 * u
    if "tf32" in modes or "high" in modes:
        return 2.0**-10, 4 * u
    return 0.0, u


def _matmul_modes() -> set[str]:
    """Every float32 matmul setting of this process, of the old interface and of the one that replaces it."""
    backends = torch.backends
    places = (backends, backends.cuda, backends.cudnn, backends.mkldnn)
    modes = set()
    for place in (*places, *(getattr(place, "matmul", None) for place in places)):
        modes.add(str(getattr(place, "fp32_precision", "none")))
    # It raises once the new interface was used for one backend only; that setting was read above.
    with contextlib.suppress(RuntimeError):
        modes.add(torch.get_float32_matmul_precision())
    return modes
