# SPDX-License-Identifier: Apache-2.0
"""Grids of images and maps of codes."""

import numpy as np
import pytest
import torch

from steadyvq.report import code_map, picture_grid


def test_picture_grid_shows_every_pixel_of_every_pair():
    rng = np.random.default_rng(0)
    above, below = rng.integers(0, 256, (2, 5, 3, 6, 4), dtype=np.uint8)
    picture = np.asarray(picture_grid(torch.from_numpy(above), torch.from_numpy(below), columns=3, scale=2))
    assert picture.shape == (2 * (2 * 12 + 1) + 6, 3 * 8 + 2 * 2, 3)
    seen = np.zeros(picture.shape[:2], bool)
    for i in range(5):
        for images, shift in ((above, 0), (below, 13)):
            for row in range(12):
                for column in range(8):
                    y, x = (i // 3) * 31 + shift + row, (i % 3) * 10 + column
                    assert (picture[y, x] == images[i, :, row // 2, column // 2]).all()
                    seen[y, x] = True
    assert (picture[~seen] == 128).all()


def test_picture_grid_refuses_in_one_sentence():
    images = np.zeros((2, 3, 4, 4), np.uint8)
    with pytest.raises(ValueError, match="originals are float64"):
        picture_grid(images.astype(float), images)
    with pytest.raises(ValueError, match="one reconstruction per original"):
        picture_grid(images, images[:1])
    with pytest.raises(ValueError, match="at least 1"):
        picture_grid(images, images, columns=0)


def test_code_map_has_one_colour_per_code():
    indices = torch.arange(4096).reshape(64, 64)
    picture = np.asarray(code_map(indices, 4096, scale=3))
    assert picture.shape == (192, 192, 3)
    tokens = picture[::3, ::3].reshape(-1, 3)
    assert len(np.unique(tokens, axis=0)) > 4090
    assert (picture == tokens.reshape(64, 64, 3).repeat(3, 0).repeat(3, 1)).all()
    again = np.asarray(code_map(np.array([[7, -1, 7]]), 10, scale=1))
    assert (again[0, 0] == tokens[7]).all(), "the same colour in every picture"
    assert (again[0, 1] == 128).all()
    with pytest.raises(ValueError, match="num_codes=10"):
        code_map(np.array([[10]]), 10)
    with pytest.raises(ValueError, match=r"shape \(h, w\)"):
        code_map(np.zeros((2, 2)), 10)
