# SPDX-License-Identifier: Apache-2.0
"""No two splits of the built-in photographs show the same thing, found by a detector that does fire on what does.

The detector follows Brown, Szeliski and Winder (2005), "Multi-image matching using multi-scale oriented patches",
without the orientation (all cameras here are upright): Harris corners at several scales, 8 x 8 normalised patches,
mutual nearest neighbours with Lowe's ratio test, then the largest set of matches that agree on one shift and zoom.
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from steadyvq.data import Collection, load_collection, mvtb_scenes

pytest.importorskip("mvtbdata")

# Agreeing matches from which two pictures count as overlapping. Of the 1,029 pairs across splits one reaches 6 (a
# brick court and the Eiffel tower) and 14 reach 4; the stereo pairs, the aerial frames and two shifted crops of one
# photograph reach 19 to 60, neighbours of the campus walk up to 48.
OVERLAP = 8
_LONG_SIDE = 480
_SCALES = (1.0, 0.707, 0.5, 0.354, 0.25)
_CORNERS = (220, 160, 120, 80, 50)
_MARGIN = 18


@dataclass
class Features:
    positions: torch.Tensor  # (n,) complex, pixels at the largest scale
    patches: torch.Tensor  # (n, 64), zero mean, unit norm


def _corners(grey: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    dy, dx = torch.gradient(grey)
    xx, yy, xy = F.avg_pool2d(torch.stack([dx * dx, dy * dy, dx * dy])[:, None], 5, 1, 2)[:, 0]
    strength = (xx * yy - xy * xy) / (xx + yy + 1e-3)
    peak = strength == F.max_pool2d(strength[None, None], 7, 1, 3)[0, 0]
    inner = torch.zeros_like(peak)
    inner[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = True
    strength = torch.where(peak & inner, strength, torch.zeros_like(strength)).flatten()
    best = strength.topk(min(count, strength.numel()))
    chosen = best.indices[best.values > 1.0]
    return chosen // grey.shape[1], chosen % grey.shape[1]


def features(image: torch.Tensor) -> Features:
    grey = image.float().mean(0)[None, None]
    shrink = min(1.0, _LONG_SIDE / max(image.shape[1:]))
    positions, patches = [], []
    offsets = torch.arange(-14, 15, 4)
    for scale, count in zip(_SCALES, _CORNERS, strict=True):
        height, width = (round(side * shrink * scale) for side in image.shape[1:])
        if min(height, width) <= 2 * _MARGIN + 8:
            continue
        level = F.interpolate(grey, size=(height, width), mode="bicubic", antialias=True)
        y, x = _corners(level[0, 0], count)
        smooth = F.avg_pool2d(level, 5, 1, 2)[0, 0]
        patch = smooth[y[:, None, None] + offsets[:, None], x[:, None, None] + offsets].flatten(1)
        patches.append(F.normalize(patch - patch.mean(1, keepdim=True), dim=1))
        positions.append(torch.complex(x.float(), y.float()) / scale)
    return Features(torch.cat(positions), torch.cat(patches))


def agreement(first: Features, second: Features, ratio: float = 0.85, most: int = 60) -> int:
    """The largest number of matches that one shift and zoom explains, a photograph's corner counted once."""
    squared = (2 - 2 * first.patches @ second.patches.T).clamp_min(0)
    near, index = squared.topk(2, 1, largest=False)
    mutual = squared.argmin(0)[index[:, 0]] == torch.arange(len(squared))
    quality = near[:, 0] / near[:, 1].clamp_min(1e-9)
    kept = torch.where(mutual, quality, torch.ones_like(quality)).sort()
    rows = kept.indices[kept.values < ratio**2][:most]
    a, b = first.positions[rows], second.positions[index[rows, 0]]
    if len(rows) < 2:
        return 0
    i, j = torch.triu_indices(len(rows), len(rows), 1)
    span = a[i] - a[j]
    zoom = (b[i] - b[j]) / torch.where(span.abs() < 20, torch.full_like(span, 1e-9), span)
    upright = (zoom.abs() > 0.25) & (zoom.abs() < 4.0) & (zoom.angle().abs() < 0.5)
    zoom, i = zoom[upright], i[upright]
    if not len(zoom):
        return 0
    error = (zoom[:, None] * (a[None] - a[i, None]) + b[i, None] - b[None]).abs()
    agree = error < 0.012 * _LONG_SIDE * zoom.abs().clamp(0.5, 2.0)[:, None]
    # One corner is often found at several scales: places closer than 8 pixels count once.
    cell = (a.real // 8) * 1000 + a.imag // 8
    best = agree[agree.sum(1).argmax()]
    return len(set(cell[best].tolist()))


@pytest.fixture(scope="module")
def photographs() -> Collection:
    return load_collection("mvtb", max_side=960)


@pytest.fixture(scope="module")
def found(photographs: Collection) -> dict[str, Features]:
    return {name: features(image) for name, image in zip(photographs.names, photographs.images, strict=True)}


def test_no_overlap_across_splits(photographs: Collection, found: dict[str, Features]) -> None:
    split = dict(zip(photographs.names, photographs.splits, strict=True))
    pairs = [(a, b) for a, b in itertools.combinations(photographs.names, 2) if split[a] != split[b]]
    scores = {pair: agreement(found[pair[0]], found[pair[1]]) for pair in pairs}
    histogram = torch.bincount(torch.tensor(list(scores.values()))).tolist()
    print(f"agreeing matches over {len(pairs)} pairs across splits, pairs per number from 0: {histogram}")
    assert len(pairs) > 1000
    assert {pair: score for pair, score in scores.items() if score >= OVERLAP} == {}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("walls-l.png", "walls-r.png"),
        ("rocks2-l.png", "rocks2-r.png"),
        ("eiffel-1.png", "eiffel-2.png"),
        ("mosaic/aerial-08.png", "mosaic/aerialphoto.png"),
        ("mosaic/aerial-08.png", "mosaic/aerial-10.png"),
        ("campus/P1070503.png", "campus/holdout/P1070502.png"),
        ("campus/P1070509.png", "campus/P1070510.png"),
        ("campus/P1070500.png", "campus/holdout/P1070502.png"),
    ],
)
def test_detector_fires_on_known_overlap(found: dict[str, Features], first: str, second: str) -> None:
    assert agreement(found[first], found[second]) >= OVERLAP
    assert agreement(found[second], found[first]) >= OVERLAP


def test_detector_fires_on_shifted_and_shrunk_crops(photographs: Collection) -> None:
    """Two corners of one photograph that share 16 % of its area, the second also at 0.7 of the size."""
    missed = []
    sample = list(zip(photographs.names, photographs.images, strict=True))[::4]
    for name, image in sample:
        height, width = image.shape[1:]
        first = features(image[:, : int(0.7 * height), : int(0.7 * width)])
        corner = image[:, int(0.3 * height) :, int(0.3 * width) :]
        shrunk = F.interpolate(corner[None], scale_factor=0.7, mode="bicubic", antialias=True)[0]
        if min(agreement(first, features(corner)), agreement(first, features(shrunk))) < OVERLAP:
            missed.append(name)
    print(f"missed {missed} of {len(sample)}")
    assert len(missed) <= 0.2 * len(sample)


def test_scenes_are_disjoint_and_balanced(photographs: Collection) -> None:
    files = [file for scene in mvtb_scenes() for file in scene.files]
    assert len(files) == len(set(files)) == len(photographs) == 62
    assert photographs.skipped == []
    share = {split: len(photographs.split(split)) / len(files) for split in ("train", "val", "test")}
    assert share == pytest.approx({"train": 0.6, "val": 0.2, "test": 0.2}, abs=0.05)


def test_every_photograph_has_colour(photographs: Collection) -> None:
    for name, image in zip(photographs.names, photographs.images, strict=True):
        spread = image.float().amax(0) - image.float().amin(0)
        assert spread.mean() > 5, name
