# SPDX-License-Identifier: Apache-2.0
"""Codebooks on streams of latents: the maps, references and oracles that experiments without an encoder rest on."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_recipe
from torch import Tensor

import steadyvq
from steadyvq.experiments.latents import movement
from steadyvq.experiments.oracle import oracle
from steadyvq.experiments.studies.identify import _rank_correlation
from steadyvq.experiments.studies.toy_drift import MOTIONS, Source, followers
from steadyvq.experiments.studies.two_samples import _pair
from steadyvq.experiments.tracking import (
    Candidate,
    Follower,
    affine,
    batches,
    best_codes,
    decibels,
    distortion,
    distortion_of,
    explained,
)
from steadyvq.training.config import resolve
from steadyvq.training.tokenizer_task import TokenizerTask


def clusters(count: int = 400, seed: int = 0) -> Tensor:
    """Four narrow clusters in the plane."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0]])
    return centres[torch.arange(count) % 4] + 0.1 * torch.randn(count, 2, generator=generator)


def test_the_affine_map_is_found_and_noise_is_not():
    before = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    matrix, shift = torch.tensor([[1.2, 0.1, 0.0], [0.0, 0.9, 0.2], [0.1, 0.0, 1.0]]), torch.tensor([1.0, -2.0, 0.5])
    found, moved = affine(before, before @ matrix + shift, ridge=0.0)
    torch.testing.assert_close(found, matrix, atol=1e-4, rtol=0)
    torch.testing.assert_close(moved, shift, atol=1e-4, rtol=0)
    assert explained(before, before @ matrix + shift) > 0.999
    noise = torch.randn(500, 3, generator=torch.Generator().manual_seed(1))
    assert explained(before, before + noise) < 0.05
    numbers = movement(before, before + shift)
    assert numbers["shift_r2"] == pytest.approx(1, abs=1e-3)
    assert numbers["drift"] == pytest.approx(float(shift.norm()) / math.sqrt(3), rel=0.1)


def test_idle_codes_are_transported_with_the_latents():
    """A cluster that is out of sight while everything turns has its code where it comes back."""
    points = clusters()
    seen = points[torch.arange(400) % 4 != 3]
    options = {"maintenance": {"ema": {"decay": 0.9}}}
    follower = Follower(Candidate("ema", options, init="kmeans", transport="idle"), 4, 2, 10, 0)
    follower.begin(points)
    before = follower.codes()
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    follower.step(seen)
    follower.transport(points, points @ turn)
    moved = follower.codes()
    hidden = (before - torch.tensor([4.0, 4.0])).norm(dim=1).argmin()
    torch.testing.assert_close(moved[hidden], before[hidden] @ turn, atol=1e-2, rtol=0)
    others = torch.arange(4) != hidden
    torch.testing.assert_close(moved[others], before[others], atol=0.1, rtol=0)
    follower.step(seen @ turn)
    torch.testing.assert_close(follower.codes()[hidden], moved[hidden], atol=1e-3, rtol=0)


@pytest.mark.parametrize("normalise", ["none", "center", "scale"])
def test_what_a_follower_makes_lies_where_the_latents_do(normalise):
    points = 50 + 10 * clusters()
    follower = Follower(Candidate("ema", init="kmeans", normalise=normalise), 4, 2, 10, 0)
    for _ in range(3):
        follower.step(points)
    made, _ = follower.quantise(points)
    assert distortion(points, made) < 5
    assert distortion_of(points, follower.codes()) == pytest.approx(distortion(points, made), rel=1e-3)


def test_the_rate_falls_and_the_loss_ends_when_they_should():
    options = {"maintenance": {"replace": None}}
    follower = Follower(Candidate("nsvq", options, rate=0.1, ns_until=0.5, cosine=True), 4, 2, 4, 0)
    rates, weights = [], []
    for batch in (clusters(40),) * 4:
        follower.step(batch)
        assert follower.optimizer is not None
        rates.append(follower.optimizer.param_groups[0]["lr"])
        weights.append(follower.quantizer.weight("ns"))
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)])
    assert weights == [0.1, 0.1, 0.0, 0.0]


def test_the_best_of_several_starts_is_no_worse():
    points = clusters(seed=3)
    starts = [distortion_of(points, best_codes(points, 4, 7, restarts=n)) for n in (1, 5)]
    assert starts[1] <= starts[0]
    centres = torch.stack([points[i::4].mean(0) for i in range(4)])
    assert starts[1] == pytest.approx(float((points - centres[torch.arange(400) % 4]).square().sum(1).mean()), rel=1e-4)
    assert decibels(2.0, 1.0) == pytest.approx(3.0103, abs=1e-4)


def test_batches_are_passes():
    rows = torch.arange(10.0)[:, None]
    feed = batches(rows, 5, 0)
    first = torch.cat([next(feed), next(feed)]).flatten().tolist()
    second = torch.cat([next(feed), next(feed)]).flatten().tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_the_oracle_is_k_means_of_the_last_latents():
    quantizer = oracle(4, 2, maintenance={"refit": {"every": 2, "window": 400, "iterations": 8}})
    for step in range(4):
        quantizer.update(quantizer(clusters(seed=step) + 10 * step))
    table = quantizer.codebook()
    points = clusters(seed=3) + 30
    best = distortion_of(points, best_codes(points, 4, 0, restarts=5))
    assert distortion_of(points, table) == pytest.approx(best, rel=0.02)
    with pytest.raises(ValueError, match="frozen"):
        oracle(4, 2, codebook="free")
    with pytest.raises(ValueError, match="window"):
        oracle(4, 2, maintenance={"refit": {"window": 3}})


@pytest.mark.parametrize("motion", MOTIONS)
def test_moving_sources_keep_their_shape(motion):
    """So the k-means of a still source is that of all times, up to the square of the size."""
    still, moved = Source("still", 5).at(0.0, 2000), Source(motion, 5).at(0.7, 2000)
    matrix, shift = affine(still, moved, ridge=0.0)
    torch.testing.assert_close(still @ matrix + shift, moved, atol=1e-3, rtol=0)
    scale = Source(motion, 5).scale(0.7)
    torch.testing.assert_close(matrix @ matrix.T, scale**2 * torch.eye(2), atol=1e-3, rtol=0)
    assert (motion == "still") == bool(torch.allclose(still, moved))


def test_every_method_with_a_table_of_points_is_on_the_moving_sources():
    tried = {own["quantizer"] for own in followers().values()}
    tables = set()
    for name in steadyvq.list_quantizers():
        try:
            made = steadyvq.build_quantizer(name, num_codes=64, dim=2)
        except ValueError:
            continue
        if isinstance(made, steadyvq.quantizers.VectorQuantizer) and not made.unit_sphere:
            tables.add(name)
    assert tables - tried <= {"hypervq", "vqgan_fc"}


def test_ranks_are_compared():
    assert _rank_correlation([1, 2, 3, 4], [10, 20, 30, 99]) == pytest.approx(1)
    assert _rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert _rank_correlation([1, 1, 1], [3, 2, 1]) == 0
    # Ties share their rank: 1.5, 1.5, 3, 4 against 1, 2, 3, 4.
    expected = float(np.corrcoef([1.5, 1.5, 3, 4], [1, 2, 3, 4])[0, 1])
    assert _rank_correlation([5, 5, 6, 7], [1, 2, 3, 4]) == pytest.approx(expected)


def test_a_small_step_moves_others_as_first_order_says(photos):
    config = resolve(tiny_recipe(photos))
    task = TokenizerTask(config)
    images = task.train_crops.batch(0, 0, 4)
    small, large = (_pair(task.tokenizer, images, 0, rate) for rate in (1e-4, 1e2))
    assert small["agreement"] > 0.999
    assert small["agreement"] > large["agreement"]
    assert small["spill"] > 0
