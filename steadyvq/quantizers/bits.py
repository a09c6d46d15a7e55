# SPDX-License-Identifier: Apache-2.0
"""Quantizers with one bit per feature (LFQ, BSQ), and their entropy losses without an N x K matrix.

A code is a sign pattern s of magnitude m. The soft assignment of a latent is a softmax over all 2^d codes,

    p_i(s) = exp(-|z_i - m s|^2 / tau) / sum_t exp(-|z_i - m t|^2 / tau) = prod_b sigma(4 m s_b z_ib / tau),

a product over bits, because |z - m s|^2 depends on s through -2 m z . s alone. So the entropy of p_i is a sum over bits, O(d).
The mean of p_i over latents is no product, but with the bits in two halves p_i is the outer product of two vectors of
2^(d/2) numbers, and the sum of outer products over latents is one matrix product of (2^(d/2), N) by (N, 2^(d/2)): exact in
value and gradient, with memory O(N sqrt(K) + K).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from steadyvq.quantizers.base import Assignment
from steadyvq.quantizers.losses import Commitment, Loss
from steadyvq.quantizers.scalar import Grid, Order, ScalarQuantizer

LARGEST_GROUP = 24
"""Bits whose joint distribution is written out: 2^24 float32 numbers are 64 MB."""


class BitQuantizer(ScalarQuantizer):
    """The codes are the corners of a cube around the origin: +magnitude where a latent is positive, -magnitude elsewhere.

    Args:
        num_codes: K, a power of two.
        dim: d = log2 K.
        magnitude: m.
        losses: Losses by name.
        estimator: Name of the gradient estimator.
        temperature: tau of the soft assignments.
        order: `little`: feature 0 is bit 0 of the index; `big`: the last feature is.
        channel_axis: The axis of the latents that holds the features.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        magnitude: float = 1.0,
        losses: Mapping[str, Loss] | None = None,
        estimator: str = "straight_through",
        temperature: float = 0.01,
        order: Order = "little",
        channel_axis: int = -1,
    ) -> None:
        check_bits(num_codes, dim)
        for loss in (losses or {}).values():
            if isinstance(loss, BatchEntropy):
                loss.check(dim)
        super().__init__(
            Grid([[0.0]] * dim, [[-magnitude, magnitude]] * dim, order=order),
            losses=losses,
            estimator=estimator,
            temperature=temperature,
            channel_axis=channel_axis,
        )


def check_bits(num_codes: int, dim: int) -> None:
    """Raises ValueError, naming what would do, unless num_codes is a power of two and dim its logarithm."""
    positive = isinstance(num_codes, int) and not isinstance(num_codes, bool) and num_codes > 0
    bits = max(1, round(math.log2(num_codes))) if positive else 0
    if not positive or num_codes != 2**bits:
        near = f": the nearest is num_codes={2**bits} with dim={bits}" if positive else ""
        raise ValueError(
            f"num_codes is {num_codes!r}, but codes of one bit per feature number a power of two from 2 on{near}"
        )
    if dim != bits:
        raise ValueError(
            f"dim is {dim!r}, but {num_codes} codes of one bit per feature need dim={bits}: set it, and project the latents "
            "(Tokenizer does this with pre_quant)"
        )


def log_odds(a: Assignment) -> Tensor:
    """log p(bit = 1) / p(bit = 0) of every bit (N, d): 4 m z / tau."""
    return 4 * a.z * a.selected.detach().abs() / a.temperature


@dataclass
class SampleEntropy:
    """H_s = mean_i H(p_i) = mean_i sum_b h(sigma(4 m z_ib / tau)): makes the encoder sure of each bit. In nats.

    h(p) = -p log p - (1 - p) log(1 - p). Source: MAGVIT-v2 (arXiv 2310.05737), first term of the entropy penalty.
    """

    weight: float = 0.1

    def __call__(self, a: Assignment) -> Tensor:
        """The sample entropy (0-d)."""
        # In terms of the less likely value, where nothing cancels: h = log(1 + e^-x) + x sigma(-x).
        size = log_odds(a).abs()
        return a.mean((softplus(-size) + size * torch.sigmoid(-size)).sum(-1))


@dataclass
class BatchEntropy:
    """-H_b = sum_s q(s) log(q(s) + eps), q = mean_i p_i over the global batch: spreads the batch over all codes. In nats.

    With `group_size` c < d the bits are cut into d / c neighbouring groups, and H_b is the sum of the groups' entropies: the
    sum over marginals is an upper bound of the joint entropy, and costs O(N d 2^(c/2)).

    Source: MAGVIT-v2 (arXiv 2310.05737), second term of the entropy penalty; groups: BSQ (arXiv 2406.07548). The released
    codes add eps inside the logarithm, which is no small number where K = 65,536: 1/K is 1.5e-5.

    Across processes q is the mean over all of them. Each process sends the gradient of its own latents, scaled such that the
    mean of the processes' losses, weighted by `Quantized.num_valid`, has the gradient of the loss of the global batch.

    Attributes:
        weight: Of -H_b.
        group_size: c; 0: all bits in one group, no approximation.
        eps: Added to q inside the logarithm.
    """

    weight: float = 0.1
    group_size: int = 0
    eps: float = 1e-5

    batch_coupled = True

    def check(self, dim: int) -> None:
        """Raises ValueError unless the groups fit d bits."""
        size = self.group_size or dim
        fitting = [c for c in range(1, min(dim, LARGEST_GROUP) + 1) if dim % c == 0]
        if size not in fitting:
            raise ValueError(
                f"batch_entropy has group_size={self.group_size} with {dim} bits, but groups must divide the bits evenly and "
                f"have at most {LARGEST_GROUP} of them (2^{size} numbers would be written out): choose one of "
                f"{', '.join(map(str, fitting))}"
            )

    def __call__(self, a: Assignment) -> Tensor:
        """The negative entropy of the mean assignment (0-d)."""
        total = sum_of_joints(log_odds(a), self.group_size or a.z.shape[1], a.row_weight)
        here = total / a.num_valid.clamp_min(1)
        summed = a.reduce(torch.cat([total.detach().flatten(), a.num_valid.reshape(1)]))
        everywhere = summed[:-1].reshape(total.shape) / summed[-1].clamp_min(1)
        mean = everywhere + (here - here.detach())
        tiny = torch.finfo(mean.dtype).tiny
        return (mean * (mean + self.eps).clamp_min(tiny).log()).sum()


def sum_of_joints(odds: Tensor, group_size: int, row_weight: Tensor | None = None) -> Tensor:
    """sum_i r_i p_i for every group of bits, differentiable by the log-odds; no N x 2^c array is made.

    Args:
        odds: (N, d) log-odds of the bits.
        group_size: c, a divisor of d.
        row_weight: (N,) r; None: all 1.

    Returns:
        (d / c, 2^(c - c // 2), 2^(c // 2)): by group, the pattern of its last and of its first bits, each little-endian.
    """
    groups = odds.reshape(odds.shape[0], -1, group_size)
    low, high = (_joint(part) for part in groups.tensor_split([group_size // 2], -1))
    if row_weight is not None:
        low = low * row_weight[:, None, None]
    return high.permute(1, 2, 0) @ low.transpose(0, 1)


def _joint(odds: Tensor) -> Tensor:
    """(N, G, c) log-odds to the probabilities (N, G, 2^c) of all patterns of independent bits, the first bit fastest."""
    joint = odds.new_ones(*odds.shape[:2], 1)
    for b in range(odds.shape[-1]):
        bit = odds[..., b : b + 1]
        joint = torch.cat([joint * torch.sigmoid(-bit), joint * torch.sigmoid(bit)], -1)
    return joint


LOSSES = {"commitment": Commitment, "sample_entropy": SampleEntropy, "batch_entropy": BatchEntropy}
"""Losses of quantizers with one bit per feature."""
