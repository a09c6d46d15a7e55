# SPDX-License-Identifier: Apache-2.0
"""Nearest codes and statistics of the softmax over codes, as operators that never hold an N x K array.

`nearest` is exact: the same latent gets the same code at every batch size, block size, backend, autocast state and
matmul precision. `soft_statistics` reduces the weights softmax(-D / tau) over rows and columns, and `non_stationary`
makes the loss of that name, with its gradient in closed form, out of those reductions. `soft` (one-hot estimators,
entropies, Gumbel draws), `pulls` (dense pulls on the codebook), `sinkhorn` (balanced assignment), `contrast` (near and far
latents of every code) and `hashing` (noise by position) hold what single methods need, in blocks as well. Backends
share one contract: `reference` (dense float64 definitions, for tests), `streaming` (tiles of torch products, any device) and
`native` (a C kernel, CPUs) and `triton` (NVIDIA cards). `choice` says which one is used when. `passes` has what else a
search can give in the same pass, and sums by code.

Shapes: N latents, K codes, d dimensions.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from steadyvq.kernels import choice, native, reference, statistics, streaming, triton
from steadyvq.kernels.rounding import working_dtype

__all__ = [
    "NonStationary",
    "SoftStatistics",
    "attach_gradient",
    "backend",
    "effective_losers",
    "nearest",
    "non_stationary",
    "non_stationary_loss",
    "soft_statistics",
    "use_backend",
]


class _Backend(NamedTuple):
    nearest: Callable[..., tuple[Tensor, Tensor]]
    soft_statistics: Callable[..., tuple[Tensor, ...]]


_BACKENDS = {
    "auto": _Backend(choice.nearest, statistics.chosen),
    "native": _Backend(native.nearest, statistics.soft_statistics),
    "triton": _Backend(triton.nearest, triton.soft_statistics),
    "streaming": _Backend(streaming.nearest, statistics.soft_statistics),
    "reference": _Backend(reference.nearest, reference.soft_statistics),
}
_backend = "auto"


class SoftStatistics(NamedTuple):
    """Reductions of the weights w_ij = softmax_j(-D_ij / tau) and of the gradient weights v_ij.

    D is the squared distance, or the distance with `squared=False`. v = w for squared distances and w / (2 D), 0 where
    D = 0, for distances, so that the gradient of sum_ij r_i w_ij D_ij by e_j is 2 (gradient_mass_j e_j - column_sum_j)
    in both cases. r is the row weight. Under the rule "losers" the winner's w is zero in all but `winner_mass`.

    Attributes:
        lse: (N,) log sum_j exp(-D_ij / tau).
        winner_mass: (N,) softmax weight of `indices[i]`.
        row_cost: (N,) sum_j w_ij D_ij, not multiplied by r_i.
        column_mass: (K,) sum_i r_i w_ij.
        column_sum: (K, d) sum_i r_i v_ij z_i.
        column_cost: (K,) sum_i r_i w_ij D_ij.
        row_sum: (N, d) sum_j v_ij e_j if asked for, else (0, d).
        loser_mass: (N,) softmax weight of all codes but `indices[i]`, added up directly.
        gradient_mass: (K,) sum_i r_i v_ij.
    """

    lse: Tensor
    winner_mass: Tensor
    row_cost: Tensor
    column_mass: Tensor
    column_sum: Tensor
    column_cost: Tensor
    row_sum: Tensor
    loser_mass: Tensor
    gradient_mass: Tensor


class NonStationary(NamedTuple):
    """The non-stationary loss and what it saw.

    Attributes:
        loss: 0-d, with a gradient to the table, and to the latents if they were not detached.
        winner_mass: (N,) softmax weight of the winner; 0 in absent rows.
        effective_losers: (N,) exp of the entropy of the loser weights, 1 if one loser has it all; 0 in absent rows.
        grad_max: 0-d, detached, the largest absolute entry of the gradient of `loss` by the table.
    """

    loss: Tensor
    winner_mass: Tensor
    effective_losers: Tensor
    grad_max: Tensor


@contextlib.contextmanager
def use_backend(name: Literal["auto", "native", "triton", "streaming", "reference"]) -> Iterator[None]:
    """Compute with one backend inside the `with` block, in every thread of the process."""
    global _backend
    if name not in _BACKENDS:
        close = difflib.get_close_matches(name, _BACKENDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(_BACKENDS)} (nearest: {close})")
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def backend() -> str:
    """The backend in use."""
    return _backend


@torch.library.custom_op("steadyvq::nearest", mutates_args=())
def _nearest(z: Tensor, table: Tensor, dot: bool = False) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        indices, score = _BACKENDS[_backend].nearest(z, table, dot=dot)
    return indices, score.to(working_dtype(z, table))


@_nearest.register_fake
def _(z: Tensor, table: Tensor, dot: bool = False) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(z, table)
    return z.new_empty(z.shape[0], dtype=torch.int64), z.new_empty(z.shape[0], dtype=dtype)


@torch.library.custom_op("steadyvq::soft_statistics", mutates_args=())
def _soft_statistics(
    z: Tensor,
    table: Tensor,
    indices: Tensor,
    temperature: Tensor,
    row_weight: Tensor | None,
    column_weight: Tensor | None,
    losers: bool,
    squared: bool,
    want_row_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        outputs = _BACKENDS[_backend].soft_statistics(
            z,
            table,
            indices,
            temperature,
            row_weight,
            column_weight,
            losers=losers,
            squared=squared,
            want_row_sum=want_row_sum,
        )
    a, b, c, d, e, f, g, h, i, j = (output.to(z.dtype) for output in outputs)
    return a, b, c, d, e, f, g, h, i, j


@_soft_statistics.register_fake
def _(
    z: Tensor,
    table: Tensor,
    indices: Tensor,
    temperature: Tensor,
    row_weight: Tensor | None,
    column_weight: Tensor | None,
    losers: bool,
    squared: bool,
    want_row_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, dim), codes, kept = z.shape, table.shape[0], z.shape[0] if want_row_sum else 0
    per_row = [z.new_empty(rows) for _ in range(4)]
    mass, gradient_mass, cost = (z.new_empty(codes) for _ in range(3))
    a, b, c, d = per_row
    return a, b, c, d, mass, gradient_mass, z.new_empty(codes, dim), cost, z.new_empty(kept), z.new_empty(kept, dim)


@torch.library.custom_op("steadyvq::attach_gradient", mutates_args=())
def _attach_gradient(value: Tensor, tensor: Tensor, grad: Tensor) -> Tensor:
    return value.clone()


@_attach_gradient.register_fake
def _(value: Tensor, tensor: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(value)


def _keep_gradient(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, tensor, grad = inputs
    ctx.save_for_backward(grad)
    ctx.dtype = tensor.dtype  # type: ignore[attr-defined]


def _send_gradient(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
    (grad,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return upstream, (grad * upstream).to(ctx.dtype), None  # type: ignore[attr-defined]


_attach_gradient.register_autograd(_send_gradient, setup_context=_keep_gradient)


def nearest(z: Tensor, table: Tensor, *, metric: Literal["l2", "dot"] = "l2") -> tuple[Tensor, Tensor]:
    """Exact nearest code of every latent.

    Equation: argmin_j sum_k (double(z_ik) - double(e_jk))^2 in float64, the lowest index on equality. bfloat16,
    float16, float32 and float64 inputs are taken at their value. A latent with a non-finite entry gets index 0 and
    score nan; a code with one is never chosen, unless all have one.

    Args:
        z: (N, d) latents.
        table: (K, d) codes, K >= 1.
        metric: "l2", or "dot" for the largest inner product, summed in float64; normalise both inputs for the cosine.

    Returns:
        indices: (N,) int64.
        score: (N,) squared distance (minus the inner product for "dot"), float32 (float64 if an input is float64), no gradient.

    Raises:
        ValueError: shapes do not fit, or the metric is unknown.
    """
    if metric not in ("l2", "dot"):
        raise ValueError(f"unknown metric {metric!r}: choose 'l2' or 'dot' (for the cosine, normalise both inputs)")
    _check_shapes(z, table)
    indices, score = _nearest(z.detach(), table.detach(), metric == "dot")
    return indices, score


def soft_statistics(
    z: Tensor,
    table: Tensor,
    indices: Tensor,
    *,
    temperature: Tensor | float,
    row_weight: Tensor | None = None,
    rule: Literal["losers", "all"] = "losers",
    squared: bool = True,
    want_row_sum: bool = False,
) -> SoftStatistics:
    """Reduce the softmax over codes in one streamed pass; nothing here carries a gradient.

    Args:
        z: (N, d) latents.
        table: (K, d) codes.
        indices: (N,) int64 winner of every latent, whatever rule chose it.
        temperature: tau > 0, in units of D.
        row_weight: (N,) weights r of the latents in column outputs. Rows of weight 0 are absent: they may hold
            anything, nan included, and their row outputs are 0.
        rule: "losers" zeroes the winner's weight after the softmax, "all" keeps it.
        squared: D is the squared distance, else the distance.
        want_row_sum: fill `row_sum`.

    Raises:
        ValueError: shapes do not fit, or the rule is unknown.
    """
    if rule not in ("losers", "all"):
        raise ValueError(f"unknown rule {rule!r}: choose 'losers' or 'all'")
    _check_shapes(z, table)
    z, table, centre = _centred(z, table)
    tau = _as_scalar(temperature, z)
    lse, winner, loser, row_cost, mass, gradient_mass, column_sum, column_cost, row_mass, row_sum = _soft_statistics(
        z, table, indices, tau, row_weight, None, rule == "losers", squared, want_row_sum
    )
    column_sum = torch.addcmul(column_sum, gradient_mass.unsqueeze(1), centre)
    row_sum = torch.addcmul(row_sum, row_mass.unsqueeze(1), centre)
    return SoftStatistics(lse, winner, row_cost, mass, column_sum, column_cost, row_sum, loser, gradient_mass)


def non_stationary(
    z: Tensor,
    table: Tensor,
    indices: Tensor,
    *,
    temperature: Tensor | float,
    row_weight: Tensor | None = None,
    denominator: Tensor | float | None = None,
    per_code: bool = False,
    prior: float = 1e-2,
    squared: bool = True,
    detach_latents: bool = True,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> NonStationary:
    """Pull every code that lost towards the latents that nearly chose it.

    Equation: L = 1 / (M d) sum_i r_i sum_{j != q_i} sg[a_j softmax_j(-D_ij / tau)] D_ij, the softmax over all codes.
    The weights are stop-gradient, so dL/de_j = 2 a_j / (M d) sum_i r_i v_ij (e_j - z_i) is known in the forward pass.
    a_j = 1 as published; with `per_code`, a_j = 1 / (s_j + prior), s_j = sum_i r_i w_ij over all processes: every code
    receives the pull of at most one hit, independent of K and N, instead of one that shrinks with its soft mass.

    Source: NSVQ, arXiv 2606.11363 (squared distances, per_code=False).

    Args:
        z: (N, d) latents.
        table: (K, d) codes; the gradient goes here.
        indices: (N,) int64 winner of every latent.
        temperature: tau > 0, in units of D.
        row_weight: (N,) r; rows of weight 0 are absent and may hold anything.
        denominator: M, the number of latents that the loss is a mean over. None: the sum of `row_weight`, or N.
        per_code: normalise the pull by code.
        prior: added to s_j, in latents; a code with much less soft mass than this is hardly pulled.
        squared: D is the squared distance, else the distance.
        detach_latents: False also sends 2 a_j / (M d) sum_j r_i v_ij (z_i - e_j) to `z`.
        reduce: sums a tensor over processes; None: there is one.

    Raises:
        ValueError: shapes do not fit.
    """
    _check_shapes(z, table)
    latents, codes, _ = _centred(z, table)
    tau = _as_scalar(temperature, latents)
    lse, winner, loser, row_cost, mass, gradient_mass, column_sum, column_cost, _, _ = _soft_statistics(
        latents, codes, indices, tau, row_weight, None, True, squared, False
    )
    scale = 1.0 / (_valid_count(latents, row_weight, denominator) * z.shape[1])
    factor = 1.0 / ((reduce(mass) if reduce else mass) + prior) if per_code else torch.ones_like(mass)
    loss = (factor * column_cost).sum() * scale
    grad = torch.addcmul(-column_sum, gradient_mass.unsqueeze(1), codes) * (2 * scale * factor).unsqueeze(1)
    low, high = grad.aminmax()
    loss = attach_gradient(loss, table, grad)
    if not detach_latents:
        row_mass, row_sum = _soft_statistics(latents, codes, indices, tau, row_weight, factor, True, squared, True)[-2:]
        pull = _present(row_mass.unsqueeze(1) * latents - row_sum, row_weight)
        pull = pull if row_weight is None else pull * row_weight.unsqueeze(1)
        loss = attach_gradient(loss, z, pull * (2 * scale))
    losers = _present(effective_losers(lse, loser, row_cost, tau), row_weight)
    return NonStationary(loss, winner, losers, torch.maximum(-low, high))


def non_stationary_loss(
    z: Tensor,
    table: Tensor,
    indices: Tensor,
    *,
    temperature: Tensor | float,
    row_weight: Tensor | None = None,
    denominator: Tensor | float | None = None,
    per_code: bool = False,
    prior: float = 1e-2,
    squared: bool = True,
    detach_latents: bool = True,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The 0-d loss of `non_stationary`, which describes the arguments."""
    return non_stationary(
        z,
        table,
        indices,
        temperature=temperature,
        row_weight=row_weight,
        denominator=denominator,
        per_code=per_code,
        prior=prior,
        squared=squared,
        detach_latents=detach_latents,
        reduce=reduce,
    ).loss


def attach_gradient(value: Tensor, tensor: Tensor, grad: Tensor) -> Tensor:
    """Return `value` unchanged; backward sends `grad` times the upstream gradient to `tensor`, and upstream to `value`.

    Args:
        value: 0-d.
        tensor: the tensor that is to receive a gradient.
        grad: same shape as `tensor`, taken as a constant.
    """
    out: Tensor = _attach_gradient(value, tensor, grad.detach())
    return out


def _check_shapes(z: Tensor, table: Tensor) -> None:
    if z.ndim != 2 or table.ndim != 2:
        raise ValueError(f"latents have {z.ndim} and the table {table.ndim} dimensions, both need 2: flatten to (N, d)")
    if z.shape[1] != table.shape[1] or table.shape[1] == 0:
        raise ValueError(f"latents have width {z.shape[1]} and codes {table.shape[1]}: project one of them")
    if table.shape[0] == 0:
        raise ValueError("the table has no codes: give it at least one row")


def _centred(z: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents and codes less the code mean, and the mean, in the working dtype: differences keep their digits."""
    dtype = working_dtype(z, table)
    centre = table.detach().to(dtype).mean(0)
    return z.detach().to(dtype) - centre, table.detach().to(dtype) - centre, centre


def _as_scalar(value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(like)
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _valid_count(like: Tensor, row_weight: Tensor | None, denominator: Tensor | float | None) -> Tensor:
    """0-d number of valid latents; 1 if there are none, so that their loss is 0."""
    if denominator is None:
        denominator = float(like.shape[0]) if row_weight is None else row_weight.to(like.dtype).sum()
    count = _as_scalar(denominator, like)
    return torch.where(count > 0, count, torch.ones_like(count))


def _present(values: Tensor, row_weight: Tensor | None) -> Tensor:
    """`values` (N, ...) with zeros in absent rows, which may hold anything."""
    if row_weight is None:
        return values
    present = (row_weight != 0).view(-1, *[1] * (values.ndim - 1))
    return torch.where(present, values, 0.0)


def effective_losers(lse: Tensor, loser: Tensor, cost: Tensor, tau: Tensor) -> Tensor:
    """Exp of the entropy of p_j = w_j / m over the losers, m their mass: H = sum_j p_j D_j / tau + lse + log m."""
    some = loser > 0
    mass = torch.where(some, loser, 1.0)
    entropy = cost / mass / tau + lse + mass.log()
    return torch.where(some, entropy.clamp(min=0.0).exp(), 1.0)
