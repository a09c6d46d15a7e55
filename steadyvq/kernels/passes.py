# SPDX-License-Identifier: Apache-2.0
"""Sums of rows by code, and searches that give more than codes in one pass.

On a card with Triton each is one kernel or two; elsewhere the same results come from the search and torch operators. Shapes: N
latents, K codes, d dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from steadyvq import kernels
from steadyvq.kernels import choice, triton
from steadyvq.kernels.rounding import working_dtype


class Sums(NamedTuple):
    """Rows added up by code.

    Attributes:
        mass: (K,) sum of the weights of each code's rows.
        sums: (K, d) sum of its weighted rows.
    """

    mass: Tensor
    sums: Tensor


class FoundSums(NamedTuple):
    """A search and the statistics of its result.

    Attributes:
        indices: (N,) int64.
        score: (N,) squared distance.
        counts: (K,) counted latents of each code, in the dtype of the score.
        sums: (K, d) their sum.
    """

    indices: Tensor
    score: Tensor
    counts: Tensor
    sums: Tensor


def _by_triton(z: Tensor, table: Tensor) -> bool:
    return kernels.backend() == "triton" or (kernels.backend() == "auto" and choice.uses_triton(z, table))


@torch.library.custom_op("steadyvq::sums_by_code", mutates_args=())
def _sums(indices: Tensor, values: Tensor, weight: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(values)
    if _by_triton(values, values):
        return triton.sums_by_code(indices, values, weight, num_codes)
    weight = torch.where(indices >= 0, weight.to(dtype), 0.0)
    rows = torch.where((weight != 0).unsqueeze(1), values.to(dtype) * weight.unsqueeze(1), 0.0)
    places = indices.clamp_min(0)
    mass = rows.new_zeros(num_codes).index_add_(0, places, weight)
    return mass, rows.new_zeros(num_codes, values.shape[1]).index_add_(0, places, rows)


@_sums.register_fake
def _(indices: Tensor, values: Tensor, weight: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(values)
    return values.new_empty(num_codes, dtype=dtype), values.new_empty(num_codes, values.shape[1], dtype=dtype)


def _keep_rows(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    indices, values, weight, _ = inputs
    ctx.save_for_backward(indices, weight)
    ctx.dtype = values.dtype  # type: ignore[attr-defined]


def _send_rows(ctx: FunctionCtx, by_mass: Tensor, by_sums: Tensor) -> tuple[None, Tensor, None, None]:
    indices, weight = ctx.saved_tensors  # type: ignore[attr-defined]
    share = torch.where(indices >= 0, weight, 0.0).to(by_sums.dtype).unsqueeze(1)
    grad = by_sums[indices.clamp_min(0)] * share
    return None, grad.to(ctx.dtype), None, None  # type: ignore[attr-defined]


_sums.register_autograd(_send_rows, setup_context=_keep_rows)


def sums_by_code(indices: Tensor, values: Tensor, num_codes: int, *, row_weight: Tensor | None = None) -> Sums:
    """Weighted sums of rows by code, with a gradient to the rows. On a card with Triton the same bits every time.

    Args:
        indices: (N,) int64, the code of each row; rows of code -1 count for nobody.
        values: (N, d).
        num_codes: K.
        row_weight: (N,) weights or bool; rows of weight 0 may hold anything. None for ones.
    """
    weight = torch.ones_like(values[:, 0]) if row_weight is None else row_weight.to(working_dtype(values))
    return Sums(*_sums(indices, values, weight.detach(), num_codes))


@torch.library.custom_op("steadyvq::select", mutates_args=())
def _select(table: Tensor, indices: Tensor) -> Tensor:
    return table[indices]


@_select.register_fake
def _(table: Tensor, indices: Tensor) -> Tensor:
    return table.new_empty(indices.shape[0], table.shape[1])


def _keep_indices(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    table, indices = inputs
    ctx.save_for_backward(indices)
    ctx.size, ctx.dtype = table.shape[0], table.dtype  # type: ignore[attr-defined]


def _send_to_codes(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors  # type: ignore[attr-defined]
    sums = sums_by_code(indices, upstream, ctx.size).sums  # type: ignore[attr-defined]
    return sums.to(ctx.dtype), None  # type: ignore[attr-defined]


_select.register_autograd(_send_to_codes, setup_context=_keep_indices)


def select(table: Tensor, indices: Tensor) -> Tensor:
    """(N, d) the codes of `indices` (N,), with a gradient to the table that is added up by `sums_by_code` on a card."""
    if table.device.type == "cpu" and kernels.backend() != "triton":
        return F.embedding(indices, table)
    out: Tensor = _select(table, indices)
    return out


@torch.library.custom_op("steadyvq::nearest_and_sums", mutates_args=())
def _nearest_and_sums(
    z: Tensor, table: Tensor, counted: Tensor, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = working_dtype(z, table)
    if _by_triton(z, table):
        with torch.autocast(z.device.type, enabled=False):
            found = triton.search(z, table, counted=counted, count=True, total=not deterministic)
        sums = found.sums
        if deterministic:
            present = (counted & found.score.isfinite()).float()
            _, sums = triton.sums_by_code(found.indices, z, present, table.shape[0])
        return found.indices, found.score.to(dtype), found.counts.to(dtype), sums
    indices, score = kernels.nearest(z, table)
    mass, sums = sums_by_code(indices, z.to(dtype), table.shape[0], row_weight=counted & score.isfinite())
    return indices, score, mass, sums


@_nearest_and_sums.register_fake
def _(z: Tensor, table: Tensor, counted: Tensor, deterministic: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = working_dtype(z, table)
    score, counts = z.new_empty(z.shape[0], dtype=dtype), table.new_empty(table.shape[0], dtype=dtype)
    return torch.empty_like(score, dtype=torch.int64), score, counts, torch.empty_like(table, dtype=dtype)


def nearest_and_sums(z: Tensor, table: Tensor, *, mask: Tensor | None = None, deterministic: bool = True) -> FoundSums:
    """`kernels.nearest` with the counts and sums that moving averages of codes need; nothing here carries a gradient.

    Args:
        z: (N, d) latents.
        table: (K, d) codes.
        mask: (N,) bool, which latents count (None: all); those that are not finite never do.
        deterministic: Add the latents up in a fixed order after the search. False adds them with float atomics while their
            codes are found, in one pass less, and their last bits vary from run to run. Counts are integers and exact.
    """
    counted = torch.ones_like(z[:, 0], dtype=torch.bool) if mask is None else mask
    return FoundSums(*_nearest_and_sums(z.detach(), table.detach(), counted, deterministic))


@torch.library.custom_op("steadyvq::nearest_and_normaliser", mutates_args=())
def _nearest_and_normaliser(z: Tensor, table: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = working_dtype(z, table)
    if _by_triton(z, table):
        with torch.autocast(z.device.type, enabled=False):
            indices, score, normaliser = triton.nearest_and_normaliser(z, table, temperature)
        return indices, score.to(dtype), normaliser
    indices, score = kernels.nearest(z, table)
    finite = z.isfinite().all(1)
    sums = kernels.soft_statistics(z, table, indices, temperature=temperature, row_weight=finite.to(dtype), rule="all")
    return indices, score, sums.lse.masked_fill(~finite, torch.nan)


@_nearest_and_normaliser.register_fake
def _(z: Tensor, table: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    score = z.new_empty(z.shape[0], dtype=working_dtype(z, table))
    return torch.empty_like(score, dtype=torch.int64), score, torch.empty_like(score)


def nearest_and_normaliser(z: Tensor, table: Tensor, *, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(indices (N,), squared distance (N,), log sum_j exp(-|z_i - e_j|^2 / tau) (N,)): search and log-sum-exp in one pass.

    The softmax weight of the chosen code is exp(-distance / tau - normaliser). Nothing here carries a gradient; a latent that
    is not finite gets index 0 and nan. All codes must be finite.

    Args:
        z: (N, d) latents.
        table: (K, d) codes.
        temperature: tau > 0 (0-d).
    """
    out: tuple[Tensor, Tensor, Tensor] = _nearest_and_normaliser(z.detach(), table.detach(), temperature.detach())
    return out
