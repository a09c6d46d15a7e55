# SPDX-License-Identifier: Apache-2.0
"""Softmax over all codes with a gradient, in blocks of latents: the one-hot estimator, entropies, Gumbel samples.

    p_ij = softmax_j((l_ij + g_ij) / tau),   l_ij = z_i . e_j ("dot")  or  -|z_i - e_j|^2 ("l2"),   g: Gumbel noise or 0

Everything here is a row-wise softmax expectation, so a block of latents is finished before the next one starts, and the
backward computes its block again instead of keeping it. A term of l that is the same for all codes of a latent changes
nothing; |z|^2 is left out of it. Shapes: N latents, K codes, d dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from steadyvq.kernels import hashing
from steadyvq.kernels.rounding import working_dtype
from steadyvq.kernels.statistics import softmax_rows

Score = Literal["l2", "dot"]


class Gumbel(NamedTuple):
    """Noise of a block of latents.

    Attributes:
        key: 0-d int64.
        rows: (N,) int64 positions of the latents.
        fraction: share of the latents that are perturbed at all, drawn by position.
    """

    key: Tensor
    rows: Tensor
    fraction: float = 1.0

    def perturbed(self) -> Tensor:
        """(N,) bool: which latents are perturbed."""
        column = torch.zeros(1, dtype=torch.int64, device=self.rows.device)
        return hashing.uniform(hashing.combine(self.key, 1), self.rows, column)[:, 0] < self.fraction

    def add_to(self, scores: Tensor, block: slice) -> None:
        """Perturbs the scores (R, K) of a block of latents, in place."""
        part = self._replace(rows=self.rows[block])
        columns = torch.arange(scores.shape[1], device=scores.device)
        noise = hashing.gumbel(self.key, part.rows, columns, dtype=scores.dtype)
        scores.addcmul_(noise, part.perturbed().to(scores.dtype).unsqueeze(1))


def rows_per_block(table: Tensor) -> int:
    """Latents per block: a few buffers of 4 MB in float32 on a CPU, more where 64 rows need it."""
    area = 1 << (20 if table.device.type == "cpu" else 24)
    return max(64, min(512, area // table.shape[0]))


class _Scores:
    """Scores of blocks of latents, and the way back from their gradient to latents and codes."""

    def __init__(self, z: Tensor, table: Tensor, dot: bool) -> None:
        dtype = working_dtype(z, table)
        self.z, self.table, self.dot = z.to(dtype), table.to(dtype), dot
        if not dot:
            centre = self.table.mean(0)
            self.z, self.table = self.z - centre, self.table - centre
        self.alpha = 1.0 if dot else 2.0
        self.bias = torch.zeros_like(self.table[:, 0]) if dot else -self.table.square().sum(1)
        self.grad_z, self._sums = torch.zeros_like(self.z), self.table.new_zeros(self.table.shape[::-1])
        self._mass = torch.zeros_like(self.bias)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their scores (R, K)), l without |z|^2."""
        step = rows_per_block(self.table)
        for top in range(0, self.z.shape[0], step):
            block = slice(top, min(top + step, self.z.shape[0]))
            yield block, torch.addmm(self.bias, self.z[block], self.table.t(), alpha=self.alpha)

    def send_back(self, block: slice, grad: Tensor) -> None:
        """Adds the gradient of a block's scores (R, K), whose rows sum to 0, to those of latents and codes."""
        self.grad_z[block] = self.alpha * (grad @ self.table)
        # Transposed, the product reads the gradient as it lies, which is a third quicker.
        self._sums.addmm_(self.z[block].t(), grad, alpha=self.alpha)
        if not self.dot:
            self._mass.add_(grad.sum(0))

    @property
    def grad_table(self) -> Tensor:
        """(K, d) gradient of the codes."""
        return self._sums.t().contiguous().addcmul_(self._mass.unsqueeze(1), self.table, value=-self.alpha)


@torch.library.custom_op("steadyvq::one_hot_carrier", mutates_args=())
def _carrier(
    z: Tensor, table: Tensor, temperature: Tensor, key: Tensor, rows: Tensor, fraction: float, dot: bool
) -> Tensor:
    return torch.zeros_like(z)


@_carrier.register_fake
def _(z: Tensor, table: Tensor, temperature: Tensor, key: Tensor, rows: Tensor, fraction: float, dot: bool) -> Tensor:
    return torch.empty_like(z)


@torch.library.custom_op("steadyvq::one_hot_carrier_backward", mutates_args=())
def _carrier_backward(
    grad: Tensor, z: Tensor, table: Tensor, temperature: Tensor, key: Tensor, rows: Tensor, fraction: float, dot: bool
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        scores = _Scores(z, table, dot)
        grad = grad.to(scores.z.dtype)
        for block, p in scores.blocks():
            if fraction > 0:
                Gumbel(key, rows, fraction).add_to(p, block)
            parts = softmax_rows(p.div_(temperature))
            p = parts.weight.div_(parts.total.unsqueeze(1))
            # d/dl_ij of sum_j p_ij (g_i . e_j): p_ij (s_ij - sum_k p_ik s_ik), s_ij = g_i . e_j.
            pull = grad[block] @ scores.table.t()
            pull.sub_((p * pull).sum(1, keepdim=True)).mul_(p).div_(temperature)
            scores.send_back(block, pull)
    return scores.grad_z.to(z.dtype), scores.grad_table.to(table.dtype)


@_carrier_backward.register_fake
def _(
    grad: Tensor, z: Tensor, table: Tensor, temperature: Tensor, key: Tensor, rows: Tensor, fraction: float, dot: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(table)


def _keep(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, bool], output: Tensor) -> None:
    *tensors, fraction, dot = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (fraction, dot)  # type: ignore[attr-defined]


def _send(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
    grads = _carrier_backward(upstream, *ctx.saved_tensors, *ctx.options)  # type: ignore[attr-defined]
    return (*grads, None, None, None, None, None)


_carrier.register_autograd(_send, setup_context=_keep)


def one_hot_carrier(
    z: Tensor, table: Tensor, *, temperature: Tensor, score: Score = "dot", gumbel: Gumbel | None = None
) -> Tensor:
    """Zeros (N, d) with the gradient of sum_j p_ij sg[e_j]: what a one-hot choice passes back through its softmax.

    Added to the selected code it is the gradient of y E with y = onehot + p - sg[p], whose value is the code: the
    gradient reaches the latents and every code through p, and the selected code directly.

    Args:
        z: (N, d) latents.
        table: (K, d) codes.
        temperature: tau (0-d), on scores and noise alike.
        score: "dot" or "l2".
        gumbel: the noise g, or None for none.
    """
    key = torch.zeros((), dtype=torch.int64, device=z.device) if gumbel is None else gumbel.key
    rows = key if gumbel is None else gumbel.rows
    fraction = 0.0 if gumbel is None else float(gumbel.fraction)
    out: Tensor = _carrier(z, table, temperature.detach(), key, rows, fraction, score == "dot")
    return out


@torch.library.custom_op("steadyvq::gumbel_argmax", mutates_args=())
def _gumbel_argmax(z: Tensor, table: Tensor, key: Tensor, rows: Tensor, fraction: float, dot: bool) -> Tensor:
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        out = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
        for block, scores in _Scores(z, table, dot).blocks():
            Gumbel(key, rows, fraction).add_to(scores, block)
            out[block] = scores.argmax(1)
    return out


@_gumbel_argmax.register_fake
def _(z: Tensor, table: Tensor, key: Tensor, rows: Tensor, fraction: float, dot: bool) -> Tensor:
    return z.new_empty(z.shape[0], dtype=torch.int64)


def gumbel_argmax(z: Tensor, table: Tensor, gumbel: Gumbel, *, score: Score = "l2") -> Tensor:
    """(N,) int64 argmax_j (l_ij + g_ij): a draw from softmax_j(l_ij) for every perturbed latent."""
    out: Tensor = _gumbel_argmax(
        z.detach(), table.detach(), gumbel.key, gumbel.rows, float(gumbel.fraction), score == "dot"
    )
    return out


@torch.library.custom_op("steadyvq::softmax_entropies", mutates_args=())
def _entropies(z: Tensor, table: Tensor, temperature: Tensor, row_weight: Tensor, dot: bool) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        scores = _Scores(z, table, dot)
        entropy, mass = torch.zeros_like(scores.z[:, 0]), torch.zeros_like(scores.bias)
        for block, logits in scores.blocks():
            parts = softmax_rows(logits.div_(temperature))
            entropy[block] = parts.entropy
            mass.addmv_(parts.weight.t(), row_weight[block].to(parts.total.dtype) / parts.total)
    return entropy, mass


@_entropies.register_fake
def _(z: Tensor, table: Tensor, temperature: Tensor, row_weight: Tensor, dot: bool) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(z, table)
    return z.new_empty(z.shape[0], dtype=dtype), table.new_empty(table.shape[0], dtype=dtype)


def entropies(
    z: Tensor, table: Tensor, *, temperature: Tensor, row_weight: Tensor | None = None, score: Score = "dot"
) -> tuple[Tensor, Tensor]:
    """Entropy of each latent's softmax and the soft use of each code; no gradient.

    Returns:
        entropy: (N,) -sum_j p_ij log p_ij.
        mass: (K,) sum_i r_i p_ij.
    """
    row = torch.ones_like(z[:, 0]) if row_weight is None else row_weight
    entropy, mass = _entropies(z.detach(), table.detach(), temperature.detach(), row.detach(), score == "dot")
    return entropy, mass


@torch.library.custom_op("steadyvq::softmax_entropy_gradient", mutates_args=())
def _entropy_gradient(
    z: Tensor,
    table: Tensor,
    temperature: Tensor,
    row_weight: Tensor,
    log_mean: Tensor,
    sample: float,
    batch: float,
    dot: bool,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        scores = _Scores(z, table, dot)
        for block, logits in scores.blocks():
            parts = softmax_rows(logits.div_(temperature).clone())
            share = row_weight[block].to(logits.dtype) / temperature / parts.total
            # v_ij = -sample log p_ij - batch log m_j, less its mean under p_i.
            centre = batch * (parts.weight @ log_mean) / parts.total - sample * parts.entropy
            value = logits.sub_(parts.log_normaliser.unsqueeze(1)).mul_(-sample).sub_(log_mean * batch)
            value.add_(centre.unsqueeze(1)).mul_(parts.weight)
            scores.send_back(block, value.mul_(share.unsqueeze(1)))
    return scores.grad_z, scores.grad_table


@_entropy_gradient.register_fake
def _(
    z: Tensor,
    table: Tensor,
    temperature: Tensor,
    row_weight: Tensor,
    log_mean: Tensor,
    sample: float,
    batch: float,
    dot: bool,
) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(z, table)
    return torch.empty_like(z, dtype=dtype), torch.empty_like(table, dtype=dtype)


def entropy_gradient(
    z: Tensor,
    table: Tensor,
    *,
    temperature: Tensor,
    log_mean: Tensor,
    sample: float = 0.0,
    batch: float = 0.0,
    row_weight: Tensor | None = None,
    score: Score = "dot",
) -> tuple[Tensor, Tensor]:
    """Gradients by latents (N, d) and codes (K, d) of `sample` sum_i r_i H(p_i) - `batch` sum_ij r_i p_ij sg[log m_j].

    With m the mean of p over a batch of M latents, the second sum is M times the part of H(m) that has a gradient, so
    that the gradient of H(m) follows from statistics that may come from other processes too.

    Args:
        z: (N, d) latents.
        table: (K, d) codes.
        temperature: tau (0-d).
        log_mean: (K,) log m.
        sample: factor of the entropies of single latents.
        batch: factor of the entropy of the mean.
        row_weight: (N,) r, or None for ones.
        score: "dot" or "l2".
    """
    row = torch.ones_like(z[:, 0]) if row_weight is None else row_weight
    grad_z, grad_table = _entropy_gradient(
        z.detach(), table.detach(), temperature.detach(), row.detach(), log_mean.detach(), sample, batch, score == "dot"
    )
    return grad_z, grad_table
