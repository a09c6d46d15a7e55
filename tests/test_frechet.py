# SPDX-License-Identifier: Apache-2.0
"""Frechet and kernel distances against their definitions, written out naively here, and against torchmetrics."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from steadyvq.data import EvaluationCrops, load_collection
from steadyvq.metrics import (
    FeatureDistance,
    FeatureStatistics,
    frechet_distance,
    kernel_distance,
    paired_kernel_distance,
)


class Colours(nn.Module):
    """Mean colours of a 4 x 4 grid, each as it is and squared: 96 features of 8-bit images."""

    num_features = 96

    def forward(self, images: Tensor) -> Tensor:
        means = nn.functional.adaptive_avg_pool2d(images.double() / 255, 4).flatten(1)
        return torch.cat([means, means.square() + 3], 1)


@pytest.fixture(scope="module")
def crops() -> EvaluationCrops:
    return EvaluationCrops(load_collection("mvtb", min_side=32, max_side=160), 32, 240)


@pytest.fixture(scope="module")
def blurred(crops) -> Tensor:
    """The crops at a sixteenth of their resolution and with less contrast."""
    small = nn.functional.avg_pool2d(crops.images.float() * 0.7 + 40, 16)
    return nn.functional.interpolate(small, scale_factor=16).round().byte()


def features(images: Tensor) -> Tensor:
    return Colours()(images)


def statistics(rows: Tensor, batch: int = 50) -> FeatureStatistics:
    found = FeatureStatistics(rows.shape[1])
    for part in rows.split(batch):
        found.update(part)
    return found


def frechet_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """Heusel et al., equation 6, with the eigenvalues of the product."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root)


def k(x: Tensor, y: Tensor) -> float:
    return float((x @ y / len(x) + 1) ** 3)


def pairs_by_hand(x: Tensor, y: Tensor) -> float:
    """Gretton et al., equation 4."""
    n = len(x)
    terms = [
        k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i in range(n) for j in range(n) if i != j
    ]
    return sum(terms) / (n * (n - 1))


class TestFrechet:
    def test_statistics_are_those_of_numpy_however_the_batches_are_cut(self, crops):
        rows = features(crops.images) + 1e4
        for batch in (1, 7, 50, 240):
            found = statistics(rows, batch)
            assert found.count == 240
            torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-12, atol=0)
            expected = torch.from_numpy(np.cov(rows.numpy(), rowvar=False))
            torch.testing.assert_close(found.covariance, expected, rtol=0, atol=1e-9)

    def test_value(self, crops, blurred):
        x, y = features(crops.images), features(blurred)
        assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(
            frechet_by_hand(x.numpy(), y.numpy()), rel=1e-7
        )

    def test_known_values(self):
        """Diagonal covariances have the closed form sum (m - n)^2 + (s - t)^2."""
        corners = torch.tensor([[i, j] for i in (-1.0, 1.0) for j in (-1.0, 1.0)], dtype=torch.float64)
        unit = corners * (3 / 4) ** 0.5
        other = unit * torch.tensor([2.0, 5.0]) + torch.tensor([3.0, -4.0])
        assert frechet_distance(statistics(unit), statistics(other)) == pytest.approx(25 + 1 + 16, rel=1e-12)

    def test_it_agrees_with_torchmetrics_on_the_same_features(self, crops, blurred):
        metric = FrechetInceptionDistance(feature=Colours(), normalize=False)
        for images, real in ((crops.images, True), (blurred, False)):
            for part in images.split(64):
                metric.update(part, real=real)
        ours = frechet_distance(statistics(features(crops.images)), statistics(features(blurred)))
        assert ours == pytest.approx(float(metric.compute()), rel=1e-6)
        assert ours > 1e-4

    def test_fewer_images_than_features(self, crops, blurred):
        """Covariances of rank 29 of 96: nothing of the nullspace is added, which a root of the product would do."""
        x, y = features(crops.images[::8]), features(blurred[::8])
        first, second = statistics(x), statistics(y)
        assert first.rank_deficient
        assert not statistics(features(crops.images)).rank_deficient
        u, v = (rows - rows.mean(0) for rows in (x, y))
        # tr (S T)^(1/2) is the sum of the singular values of U V^T / (n - 1).
        cross = torch.linalg.svdvals(u @ v.T).sum() / 29
        spread = (u.square().sum() + v.square().sum()) / 29
        expected = float((x.mean(0) - y.mean(0)).square().sum() + spread - 2 * cross)
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)
        assert frechet_distance(first, first) == pytest.approx(0, abs=1e-10)

    def test_bad_features_are_refused(self):
        found = FeatureStatistics(3)
        with pytest.raises(ValueError, match="have 4 entries, but 3 were announced"):
            found.update(torch.zeros(2, 4))
        with pytest.raises(ValueError, match="not finite"):
            found.update(torch.tensor([[0.0, 1.0, torch.nan]]))
        found.update(torch.zeros(1, 3))
        with pytest.raises(ValueError, match="at least 2"):
            _ = found.covariance


class TestKernel:
    def test_independent_samples(self, crops, blurred):
        x, y = features(crops.images)[:40], features(blurred)[40:64]
        within = [
            sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
            for z in (x, y)
        ]
        across = sum(k(a, b) for a in x for b in y) / (len(x) * len(y))
        assert kernel_distance(x, y) == pytest.approx(sum(within) - 2 * across, rel=1e-9)

    def test_it_agrees_with_torchmetrics_on_the_same_features(self, crops, blurred):
        metric = KernelInceptionDistance(feature=Colours(), subsets=1, subset_size=240)
        metric.update(crops.images, real=True)
        metric.update(blurred, real=False)
        ours = kernel_distance(features(crops.images), features(blurred))
        assert ours == pytest.approx(float(metric.compute()[0]), rel=1e-6)

    def test_pairs(self, crops, blurred):
        x, y = features(crops.images)[:30], features(blurred)[:30]
        names = [f"photograph {i // 4}" for i in range(30)]
        found = paired_kernel_distance(x, y, names)
        assert found.value == pytest.approx(pairs_by_hand(x, y), rel=1e-9)
        without = []
        for name in dict.fromkeys(names):
            rest = [i for i in range(30) if names[i] != name]
            without.append(pairs_by_hand(x[rest], y[rest]))
        reach = 1.96 * (np.var(without) * (len(without) - 1)) ** 0.5
        assert (found.low, found.high) == (
            pytest.approx(found.value - reach, rel=1e-9),
            pytest.approx(found.value + reach, rel=1e-9),
        )

    def test_blocks_do_not_matter(self, crops, blurred, monkeypatch):
        x, y = features(crops.images), features(blurred)
        whole = paired_kernel_distance(x, y, crops.photographs), kernel_distance(x, y)
        monkeypatch.setattr("steadyvq.metrics.frechet._BLOCK", 7)
        blocks = paired_kernel_distance(x, y, crops.photographs), kernel_distance(x, y)
        assert blocks[1] == pytest.approx(whole[1], rel=1e-9)
        for name in ("value", "low", "high"):
            assert getattr(blocks[0], name) == pytest.approx(getattr(whole[0], name), rel=1e-9)

    def test_perfect_reconstructions_are_at_zero(self, crops):
        x = features(crops.images)
        found = paired_kernel_distance(x, x, crops.photographs)
        assert (found.value, found.low, found.high) == (pytest.approx(0, abs=1e-12),) * 3
        assert kernel_distance(x, x) < -1e-3, "which the estimate for independent samples is not"

    def test_too_few(self, crops):
        x = features(crops.images)
        found = paired_kernel_distance(x[:4], x[4:8], ["a", "a", "b", "b"])
        assert (found.low, found.high) == (None, None)
        with pytest.raises(ValueError, match="at least 2"):
            kernel_distance(x[:1], x)
        with pytest.raises(ValueError, match="name one for each pair"):
            paired_kernel_distance(x[:4], x[:4], ["a"])


class TestBatches:
    def test_both_distances_of_batches(self, crops, blurred):
        x, y = features(crops.images), features(blurred)
        distance = FeatureDistance(96, 240, kernel_limit=60)
        for start in range(0, 240, 32):
            part = slice(start, start + 32)
            distance.update(x[part], y[part], crops.photographs[part])
        found = distance.report()
        assert (found.count, found.kernel_count, found.rank_deficient) == (240, 60, False)
        assert found.frechet == pytest.approx(frechet_distance(statistics(x), statistics(y)), rel=1e-9)
        assert found.kernel == paired_kernel_distance(x[::4], y[::4], crops.photographs[::4])

    def test_the_number_of_images_must_be_as_announced(self, crops):
        distance = FeatureDistance(96, 240)
        distance.update(features(crops.images[:8]), features(crops.images[:8]), crops.photographs[:8])
        with pytest.raises(ValueError, match="8 images came, but 240 were announced"):
            distance.report()
