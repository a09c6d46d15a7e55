# SPDX-License-Identifier: Apache-2.0
"""Scores of hyperbolic logistic regression and the softmax over them with a gradient, in blocks of latents.

Latents z and codes e = r a^ (r >= 0, |a^| = 1) are tangent vectors at the origin of the Poincare ball of curvature -c, and
x = exp_0(z). The signed distance of x to the hyperplane through exp_0(r a^) with the normal a^ is asinh(S) / sqrt(c),

    S_ij = sinh(s_i) <z^_i, a^_j> cosh(t_j) - cosh(s_i) sinh(t_j),   s = 2 sqrt(c) |z|,   t = 2 sqrt(c) |e|
         = cosh(s_i) cosh(t_j) m_ij,   m_ij = <tanh(s_i) z^_i, a^_j> - tanh(t_j)

which is finite where x itself lies on the edge of the ball in float32, so nothing is clipped. With L = log cosh s + log cosh t,
asinh(S) = sign(m) (L + log(|m| + sqrt(m^2 + e^-2L))). Shapes: N latents, K codes, d dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import softplus

from steadyvq.kernels.rounding import working_dtype
from steadyvq.kernels.soft import rows_per_block

# From here on the form of asinh with logarithms is as exact as torch's, which would overflow later.
_LARGE = 10.0
# Below this length a row has no direction, whose gradient would be its reciprocal.
_SHORTEST = 1e-8


def latent_coordinates(z: Tensor, curvature: float) -> Tensor:
    """(N, d + 2): tanh(s) z^, 1 and log cosh s of latents (N, d); differentiable, also at 0."""
    rate = 2 * math.sqrt(curvature)
    length, present = _length(z)
    scale = torch.where(present, torch.tanh(rate * length) / length, rate)
    return torch.cat([scale * z, torch.ones_like(length), torch.where(present, _log_cosh(rate * length), 0.0)], 1)


def code_coordinates(table: Tensor, curvature: float) -> Tensor:
    """(K, d + 2): a^, -tanh t and log cosh t of codes (K, d); a code at 0 has no direction, and is left at 0."""
    rate = 2 * math.sqrt(curvature)
    length, present = _length(table)
    t = torch.where(present, rate * length, 0.0)
    return torch.cat([table / length, -torch.tanh(t), _log_cosh(t)], 1)


def _length(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths (N, 1), 1 for rows of no length, and which rows have one; the gradient is finite everywhere."""
    rows = rows.contiguous()
    present = rows.detach().norm(dim=1, keepdim=True) > _SHORTEST
    return torch.where(present, rows, 1.0).norm(dim=1, keepdim=True).where(present, 1.0), present


def _log_cosh(x: Tensor) -> Tensor:
    return x + softplus(-2 * x) - math.log(2)


def search_coordinates(z: Tensor, table: Tensor, curvature: float) -> tuple[Tensor, Tensor]:
    """(N, d + 1) and (K, d + 1) whose largest inner product is the largest S_ij; no gradient.

    asinh and cosh(s) change no order, so these are (tanh(s) z^, 1) and cosh(t) (a^, -tanh t), up to a common factor that keeps
    the latter finite.
    """
    queries = latent_coordinates(z.detach(), curvature)[:, :-1]
    codes = code_coordinates(table.detach(), curvature)
    log_scale = codes[:, -1:]
    return queries, codes[:, :-1] * (log_scale - log_scale.max()).exp()


def _asinh(m: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """asinh(e^L m), and its derivative by m, 1 / sqrt(m^2 + e^-2L)."""
    root = (m.square() + (-2 * log_scale).exp()).clamp_min(torch.finfo(m.dtype).tiny).sqrt()
    large = torch.sign(m) * (log_scale + (m.abs() + root).log())
    small = torch.asinh(log_scale.clamp_max(_LARGE).exp() * m)
    return torch.where(log_scale > _LARGE, large, small), 1 / root


@torch.library.custom_op("steadyvq::hyperbolic_carrier", mutates_args=())
def _carrier(queries: Tensor, keys: Tensor, values: Tensor, temperature: Tensor, curvature: float) -> Tensor:
    return torch.zeros_like(queries[:, :-2])


@_carrier.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, temperature: Tensor, curvature: float) -> Tensor:
    return torch.empty_like(queries[:, :-2])


@torch.library.custom_op("steadyvq::hyperbolic_carrier_backward", mutates_args=())
def _carrier_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, temperature: Tensor, curvature: float
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        dtype = working_dtype(queries, keys)
        q, k, e, g = (x.to(dtype) for x in (queries, keys, values, grad))
        grad_q, grad_k = torch.zeros_like(q), torch.zeros_like(k)
        factor = 2 / math.sqrt(curvature)
        step = rows_per_block(values)
        for top in range(0, q.shape[0], step):
            block = slice(top, top + step)
            m = q[block, :-1] @ k[:, :-1].t()
            score, slope = _asinh(m, q[block, -1:] + k[:, -1])
            p = score.mul_(factor / temperature).softmax(1)
            # d/dv_ij of sum_j p_ij (g_i . e_j): p_ij (a_ij - sum_k p_ik a_ik), a_ij = g_i . e_j.
            pull = g[block] @ e.t()
            pull.sub_((p * pull).sum(1, keepdim=True)).mul_(p).mul_(slope).mul_(factor / temperature)
            grad_q[block, :-1] = pull @ k[:, :-1]
            grad_k[:, :-1].addmm_(pull.t(), q[block, :-1])
            # dasinh/dL = m dasinh/dm.
            pull.mul_(m)
            grad_q[block, -1] = pull.sum(1)
            grad_k[:, -1] += pull.sum(0)
    return grad_q.to(queries.dtype), grad_k.to(keys.dtype)


@_carrier_backward.register_fake
def _(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, temperature: Tensor, curvature: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries), torch.empty_like(keys)


def _keep(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    *tensors, curvature = inputs
    ctx.save_for_backward(*tensors)
    ctx.curvature = curvature  # type: ignore[attr-defined]


def _send(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
    grads = _carrier_backward(upstream, *ctx.saved_tensors, ctx.curvature)  # type: ignore[attr-defined]
    return (*grads, None, None, None)


_carrier.register_autograd(_send, setup_context=_keep)


def one_hot_carrier(z: Tensor, table: Tensor, *, temperature: Tensor, curvature: float) -> Tensor:
    """Zeros (N, d) with the gradient of sum_j p_ij sg[e_j], p_i = softmax_j(2 asinh(S_ij) / (sqrt(c) tau)).

    Args:
        z: (N, d) latents.
        table: (K, d) codes.
        temperature: tau (0-d).
        curvature: c.
    """
    queries, keys = latent_coordinates(z, curvature), code_coordinates(table, curvature)
    out: Tensor = _carrier(queries, keys, table.detach(), temperature.detach(), float(curvature))
    return out
