# SPDX-License-Identifier: Apache-2.0
"""Measures of samples that are not made of the photographs they are compared with.

Sources: Kynkaanniemi et al., arXiv 1904.06991, equations 1 and 2 (precision and recall, k = 3); Salimans et al., arXiv
1606.03498, section 4 (Inception score); Gretton et al., JMLR 13 (2012), equation 3 (unbiased kernel distance).
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_BLOCK = 1024


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """k(x, y) = (x.y / d + 1)^3, float64."""
    return (x.double() @ y.double().T / x.shape[1] + 1.0) ** 3


def precision_recall(
    real: Float[Tensor, "N d"], made: Float[Tensor, "M d"], neighbours: int = 3
) -> tuple[float, float]:
    """Share of samples inside the manifold of the photographs, and of photographs inside that of the samples.

    A point is inside a set's manifold if it is no farther from some member than that member's k-th nearest other member.
    """
    if min(len(real), len(made)) <= neighbours:
        raise ValueError(
            f"{len(real)} photographs and {len(made)} samples were measured, but precision and recall need more than "
            f"{neighbours} of each"
        )
    return _inside(made, real, neighbours), _inside(real, made, neighbours)


def _inside(points: Tensor, members: Tensor, neighbours: int) -> float:
    members = members.double()
    radius = torch.cat(
        [torch.cdist(part, members).kthvalue(neighbours + 1, dim=1).values for part in torch.split(members, _BLOCK)]
    )
    inside = [(torch.cdist(part, members) <= radius).any(1) for part in torch.split(points.double(), _BLOCK)]
    return float(torch.cat(inside).double().mean())


def inception_score(logits: Float[Tensor, "N C"], splits: int = 10) -> tuple[float, float]:
    """exp(mean KL(p(y|x) || p(y))), mean and standard deviation over equal parts of the samples."""
    parts = [part.double().log_softmax(1) for part in logits.chunk(min(splits, len(logits)))]
    scores = [float((p.exp() * (p - p.exp().mean(0).log())).sum(1).mean().exp()) for p in parts]
    return float(np.mean(scores)), float(np.std(scores))


def kernel_advantage(
    real: Float[Tensor, "N d"],
    first: Float[Tensor, "M d"],
    second: Float[Tensor, "M d"],
    groups: Sequence[str],
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How much closer the first samples are than the second: kernel distance of the second less that of the first.

        D = mean_{i != j} k(b_i, b_j) - 2 mean k(b_i, y_j) - mean_{i != j} k(a_i, a_j) + 2 mean k(a_i, y_j)

    with a 95 % interval by a paired bootstrap: every draw weighs samples i of both sets, and the photographs that the real
    images y were cut from, by how often they were drawn; pairs of one sample with itself stay out.

    Args:
        real: Features of real images.
        first: Of samples a.
        second: Of samples b, paired with the first by their place.
        groups: The photograph of each real image.
        draws: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        The value and the ends of its interval.
    """
    if len(first) != len(second) or len(groups) != len(real):
        raise ValueError(
            f"there are {len(first)} and {len(second)} samples, {len(real)} real images and {len(groups)} photographs: "
            "pair them"
        )
    within = _kernel(second, second) - _kernel(first, first)
    within.fill_diagonal_(0.0)
    across = _kernel(second, real) - _kernel(first, real)
    rng = np.random.default_rng(seed)
    names, group = np.unique(np.array(groups), return_inverse=True)
    samples = np.stack([np.ones(len(first)), *(_weights(rng, len(first)) for _ in range(draws))])
    photographs = np.stack([np.ones(len(names)), *(_weights(rng, len(names)) for _ in range(draws))])
    w = torch.from_numpy(samples)
    v = torch.from_numpy(photographs[:, group])
    pairs = w.sum(1).square() - w.square().sum(1)
    value = ((w @ within) * w).sum(1) / pairs - 2 * ((w @ across) * v).sum(1) / (w.sum(1) * v.sum(1))
    low, high = np.quantile(value[1:].numpy(), [0.025, 0.975])
    return float(value[0]), float(low), float(high)


def _weights(rng: np.random.Generator, count: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
