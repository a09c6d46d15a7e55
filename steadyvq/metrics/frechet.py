# SPDX-License-Identifier: Apache-2.0
"""Distances between two sets of images by the features of a network: Frechet distance and kernel distance.

They know no network: whoever calls gives features, one row per image. What a distance is called depends on the
network, and numbers of different networks have nothing to do with each other.

Sources: Heusel et al., arXiv 1706.08500, equation 6 (Frechet distance); Binkowski et al., arXiv 1801.01401, section 4
(kernel distance, kernel (x.y / d + 1)^3); Gretton et al., JMLR 13 (2012), equations 3 and 4 (unbiased estimates for
two samples and for pairs).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 512
"""Rows of a kernel matrix that are in memory at a time."""


class FeatureStatistics:
    """Mean and covariance of features, batch by batch, in float64; no feature is kept.

    Batches are merged by their means and sums of squares about them (Chan et al. 1979), so a large mean costs no
    digits.

    Args:
        num_features: Length of a feature vector, d.

    Attributes:
        count: Number of vectors so far.
        mean: Their mean (d,).
    """

    def __init__(self, num_features: int) -> None:
        if num_features < 1:
            raise ValueError(f"num_features is {num_features}, but a feature vector has at least 1 entry")
        self.count = 0
        self.mean: Tensor = torch.zeros(num_features, dtype=torch.float64)
        self._scatter = torch.zeros(num_features, num_features, dtype=torch.float64)

    def update(self, features: Float[Tensor, "B d"]) -> None:
        """Add a batch of any floating type.

        Raises:
            ValueError: Their length is another, or not all are finite.
        """
        if features.shape[1] != len(self.mean):
            raise ValueError(
                f"features have {features.shape[1]} entries, but {len(self.mean)} were announced: pass num_features of "
                "the network"
            )
        if not bool(features.isfinite().all()):
            raise ValueError("features have entries that are not finite: check the images and the network's weights")
        if not len(features):
            return
        batch = features.detach().to("cpu", torch.float64)
        mean = batch.mean(0)
        total = self.count + len(batch)
        step = mean - self.mean
        centred = batch - mean
        self._scatter += centred.T @ centred + torch.outer(step, step) * (self.count * len(batch) / total)
        self.mean = self.mean + step * (len(batch) / total)
        self.count = total

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The unbiased covariance.

        Raises:
            ValueError: There are fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} images were measured, but a covariance needs at least 2")
        return self._scatter / (self.count - 1)

    @property
    def rank_deficient(self) -> bool:
        """Whether there are too few vectors for a covariance of full rank."""
        return self.count <= len(self.mean)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """The squared Frechet distance of two normal distributions with these means and covariances.

        d^2 = |m_1 - m_2|^2 + tr(S_1) + tr(S_2) - 2 tr((S_1 S_2)^(1/2))

    The last trace is the sum of the singular values of S_1^(1/2) S_2^(1/2): a root of a product that is not symmetric,
    which loses digits where a covariance is singular, is never taken.
    """
    means = (first.mean - second.mean).square().sum()
    a, b = first.covariance, second.covariance
    cross = torch.linalg.svdvals(_root(a) @ _root(b)).sum()
    return max(0.0, float(means + a.trace() + b.trace() - 2.0 * cross))


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root; eigenvalues that rounding alone has made are 0."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = values[-1].clamp_min(0.0) * len(values) * torch.finfo(values.dtype).eps
    roots = torch.where(values > noise, values, 0.0).sqrt()
    return torch.matmul(vectors * roots, vectors.T)


@dataclass(frozen=True)
class KernelDistance:
    """A kernel distance with its interval.

    Attributes:
        value: The unbiased estimate; it may be below 0.
        low: Lower end of the 95 % jackknife interval over photographs; None with fewer than three.
        high: Upper end, likewise.
    """

    value: float
    low: float | None
    high: float | None


def kernel_distance(first: Float[Tensor, "N d"], second: Float[Tensor, "M d"]) -> float:
    """The unbiased squared MMD of two independent samples ("KID"), with the kernel k(x, y) = (x.y / d + 1)^3.

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)

    Source: Gretton et al. 2012, equation 3. Reconstructions are no sample that is independent of their originals: use
    `paired_kernel_distance` for them.
    """
    x, y = _checked(first), _checked(second)
    within = [(_kernel_sum(z, z) - float(_kernel_of_pairs(z, z).sum())) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return sum(within) - 2.0 * _kernel_sum(x, y) / (len(x) * len(y))


def paired_kernel_distance(
    first: Float[Tensor, "N d"], second: Float[Tensor, "N d"], photographs: Sequence[str]
) -> KernelDistance:
    """The unbiased squared MMD where the images come in pairs (an original and its reconstruction).

        mean_{i != j} k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)

    It is 0 for identical sets. The estimate for independent samples also counts k(x_i, y_i), which is larger than
    other terms for no other reason than that y_i was made of x_i, and falls below 0 for good reconstructions, the more
    so the fewer images there are.

    The interval leaves out one photograph at a time (jackknife): crops of one are not independent, and drawing images
    twice, as a bootstrap does, would put k(x_i, x_i) back in.

    Source: Gretton et al. 2012, equation 4.

    Args:
        first: Features of the originals.
        second: Features of the reconstructions, in the same order.
        photographs: The photograph of each pair.
    """
    x, y = _checked(first), _checked(second)
    if not len(x) == len(y) == len(photographs):
        raise ValueError(
            f"there are {len(x)} and {len(y)} features and {len(photographs)} photographs: name one for each pair"
        )
    names = {name: i for i, name in enumerate(dict.fromkeys(photographs))}
    group = torch.tensor([names[name] for name in photographs])
    sums, inner = _pair_sums(x, y, group, len(names))
    sizes = torch.bincount(group, minlength=len(names)).double()
    total, count = sums.sum(), float(len(x))
    value = float(total / (count * (count - 1.0)))
    rest = count - sizes
    if len(names) < 3 or bool((rest < 2).any()):
        return KernelDistance(value, None, None)
    # Without a photograph go its rows and its columns, which hold the pairs inside it twice.
    without = (total - 2.0 * sums + inner) / (rest * (rest - 1.0))
    spread = (without - without.mean()).square().sum() * (len(names) - 1) / len(names)
    reach = 1.96 * math.sqrt(float(spread))
    return KernelDistance(value, value - reach, value + reach)


def _checked(features: Tensor) -> Tensor:
    if len(features) < 2:
        raise ValueError(f"{len(features)} images were measured, but a kernel distance needs at least 2")
    return features.detach().to("cpu", torch.float64)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _kernel_of_pairs(x: Tensor, y: Tensor) -> Tensor:
    """k(x_i, y_i) alone (N,)."""
    return ((x * y).sum(1) / x.shape[1] + 1.0) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    return math.fsum(float(_kernel(rows, y).sum()) for rows in torch.split(x, _BLOCK))


def _pair_sums(
    x: Float[Tensor, "N d"], y: Float[Tensor, "N d"], group: Int[Tensor, "N"], groups: int
) -> tuple[Float[Tensor, "G"], Float[Tensor, "G"]]:
    """Sums of h_ij over j != i by the group of i, and over those j that are in the group of i too."""
    sums, inner = (torch.zeros(groups, dtype=torch.float64) for _ in range(2))
    for rows in torch.split(torch.arange(len(x)), _BLOCK):
        terms = _kernel(x[rows], x) + _kernel(y[rows], y) - _kernel(x[rows], y) - _kernel(y[rows], x)
        terms[torch.arange(len(rows)), rows] = 0.0
        sums.index_add_(0, group[rows], terms.sum(1))
        inner.index_add_(0, group[rows], (terms * (group[rows, None] == group[None])).sum(1))
    return sums, inner


@dataclass(frozen=True)
class FeatureReport:
    """How far reconstructions are from their originals in the features of one network.

    Attributes:
        frechet: Frechet distance.
        kernel: Kernel distance of the pairs.
        count: Images in the Frechet distance.
        kernel_count: Images in the kernel distance.
        rank_deficient: Whether there were too few images for covariances of full rank.
    """

    frechet: float
    kernel: KernelDistance
    count: int
    kernel_count: int
    rank_deficient: bool


class FeatureDistance:
    """Accumulates the features of originals and reconstructions over batches.

    The Frechet distance keeps sums alone. The kernel distance needs the features, and keeps those of `kernel_limit`
    images that are spread evenly over all.

    Args:
        num_features: Length of a feature vector.
        total: Number of images that will come.
        kernel_limit: Images in the kernel distance at most.
    """

    def __init__(self, num_features: int, total: int, kernel_limit: int = 5000) -> None:
        self._statistics = FeatureStatistics(num_features), FeatureStatistics(num_features)
        self._total = total
        count = min(total, kernel_limit)
        self._kept = {i * total // count for i in range(count)}
        self._features: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._photographs: list[str] = []

    def update(
        self, originals: Float[Tensor, "B d"], reconstructions: Float[Tensor, "B d"], photographs: Sequence[str]
    ) -> None:
        """Add a batch of pairs, with the photograph of each."""
        seen = self._statistics[0].count
        kept = [i for i in range(len(originals)) if seen + i in self._kept]
        for part, found, store in zip((originals, reconstructions), self._statistics, self._features, strict=True):
            found.update(part)
            store.append(part[kept].detach().cpu())
        self._photographs += [photographs[i] for i in kept]

    def report(self) -> FeatureReport:
        """Both distances.

        Raises:
            ValueError: Other images came than were announced, or fewer than two.
        """
        first, second = self._statistics
        if not first.count == second.count == self._total:
            raise ValueError(
                f"{first.count} and {second.count} images came, but {self._total} were announced: pass the right total"
            )
        x, y = (torch.cat(store) for store in self._features)
        kernel = paired_kernel_distance(x, y, self._photographs)
        return FeatureReport(frechet_distance(first, second), kernel, first.count, len(x), first.rank_deficient)
