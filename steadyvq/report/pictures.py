# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a tokenizer does: originals above their reconstructions, and maps of codes."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

# Thin lines that are visible on black and on white.
GAP_COLOUR = 128
PAIR_GAP, COLUMN_GAP, ROW_GAP = 1, 2, 6
MASKED_COLOUR = (128, 128, 128)


@runtime_checkable
class ArrayLike(Protocol):
    """A NumPy array or a tensor in main memory."""

    def __array__(self) -> np.ndarray[Any, np.dtype[Any]]: ...


def picture_grid(originals: ArrayLike, reconstructions: ArrayLike, columns: int = 8, scale: int = 2) -> Image.Image:
    """Return a picture of pairs, each original above its reconstruction.

    Args:
        originals: images (B, 3, H, W), uint8.
        reconstructions: the same shape and type.
        columns: pairs side by side.
        scale: each pixel is shown as scale x scale pixels, without smoothing.

    Raises:
        ValueError: the images are not uint8 of shape (B, 3, H, W), or the two sets differ in shape, or are empty.
    """
    above, below = _images(originals, "originals"), _images(reconstructions, "reconstructions")
    if above.shape != below.shape:
        raise ValueError(
            f"originals have shape {above.shape} and reconstructions {below.shape}: pass one reconstruction per original."
        )
    if columns < 1 or scale < 1:
        raise ValueError(f"columns is {columns} and scale is {scale}, but both must be at least 1.")
    above, below = _enlarge(above, scale), _enlarge(below, scale)
    count, height, width = len(above), above.shape[2], above.shape[3]
    columns = min(columns, count)
    rows = -(-count // columns)
    pair = 2 * height + PAIR_GAP
    size = (rows * (pair + ROW_GAP) - ROW_GAP, columns * (width + COLUMN_GAP) - COLUMN_GAP, 3)
    canvas = np.full(size, GAP_COLOUR, np.uint8)
    for i in range(count):
        top, left = (i // columns) * (pair + ROW_GAP), (i % columns) * (width + COLUMN_GAP)
        canvas[top : top + height, left : left + width] = above[i].transpose(1, 2, 0)
        canvas[top + height + PAIR_GAP : top + pair, left : left + width] = below[i].transpose(1, 2, 0)
    return Image.fromarray(canvas)


def image_grid(given: ArrayLike, columns: int = 8, scale: int = 2) -> Image.Image:
    """Return a picture of images side by side, row by row.

    Args:
        given: images (B, 3, H, W), uint8.
        columns: images in a row.
        scale: each pixel is shown as scale x scale pixels, without smoothing.

    Raises:
        ValueError: the images are not uint8 of shape (B, 3, H, W), or there are none.
    """
    images = _enlarge(_images(given, "images"), scale)
    count, height, width = len(images), images.shape[2], images.shape[3]
    columns = min(columns, count)
    size = (-(-count // columns) * (height + COLUMN_GAP) - COLUMN_GAP, columns * (width + COLUMN_GAP) - COLUMN_GAP, 3)
    canvas = np.full(size, GAP_COLOUR, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + COLUMN_GAP), (i % columns) * (width + COLUMN_GAP)
        canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return Image.fromarray(canvas)


def code_map(indices: ArrayLike, num_codes: int, scale: int = 8) -> Image.Image:
    """Return a picture of a token grid in which each code has a colour of its own, the same in every picture.

    Args:
        indices: token grid (h, w) of integers in [0, num_codes), or -1 for masked positions, which are grey.
        num_codes: K, the size of the codebook.
        scale: side of a token in pixels.

    Raises:
        ValueError: the grid is not (h, w) of integers, or an index is outside the codebook.
    """
    grid = np.asarray(indices)
    if grid.ndim != 2 or grid.dtype.kind not in "iu":
        raise ValueError(f"indices are {grid.dtype} of shape {grid.shape}, but a map needs integers of shape (h, w).")
    if grid.size and (grid.min() < -1 or grid.max() >= num_codes):
        raise ValueError(
            f"indices reach from {grid.min()} to {grid.max()}, but the codebook has num_codes={num_codes}: pass indices "
            f"in [0, {num_codes}), or -1 for masked positions."
        )
    colours = _colours(grid.astype(np.int64))
    return Image.fromarray(colours.repeat(scale, axis=0).repeat(scale, axis=1))


def _images(given: ArrayLike, name: str) -> UInt8[np.ndarray, "B 3 H W"]:
    images = np.asarray(given)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or not images.size:
        raise ValueError(f"{name} are {images.dtype} of shape {images.shape}, but a grid needs uint8 of (B, 3, H, W).")
    return images


def _enlarge(images: UInt8[np.ndarray, "B 3 H W"], scale: int) -> UInt8[np.ndarray, "B 3 h w"]:
    return images.repeat(scale, axis=2).repeat(scale, axis=3)


def _colours(grid: Integer[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Scatter the codes over 24-bit colours (Knuth's multiplicative hash), away from black and from white."""
    mixed = (grid.astype(np.uint64) + np.uint64(1)) * np.uint64(2654435761)
    mixed = (mixed ^ (mixed >> np.uint64(15))) * np.uint64(2246822519) & np.uint64(0xFFFFFFFF)
    channels = np.stack([(mixed >> np.uint64(shift)) & np.uint64(255) for shift in (0, 8, 16)], axis=-1)
    colours = (40 + channels * 200 // 255).astype(np.uint8)
    colours[grid < 0] = MASKED_COLOUR
    return colours
