# SPDX-License-Identifier: Apache-2.0
"""Shapes of tiles by graphics card: chosen by reasoning and by what the compiler says of registers, not tuned on a card.

The reasoning, for the screen of the search: a tile of float32 sums should take about half of the 255 registers of a thread, so
128 x 128 goes with 4 warps and 128 x 256 with 8. Latents of at most 128 dimensions stay on the chip while blocks of codes
stream past, as many at once as fit beside them: with 128 x 256 at d = 128 two on an H100 or H200 (227 KB), with 128 x 128 four
on an A100 (163 KB) and two where there are 99 KB. Wider tiles read the codes fewer times from the second-level cache. The sums
over d of the dense loss sit beside a tile of weights, so its tiles are smaller.

Nothing here changes what the search returns. Sums of the dense loss are added in the order of the tiles, so their last
bits are those of one choice of tiles.
"""

import os
from typing import NamedTuple

import torch

LANES = 8
"""Bundles per tile of the screen: codes that are 8 columns apart lie in one thread's registers."""

# Bytes of shared memory that one program may take, by compute capability.
_SHARED = {(8, 0): 166_912, (8, 7): 166_912, (9, 0): 232_448, (10, 0): 232_448}
_LEAST_SHARED = 101_376


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a card."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Tiles(NamedTuple):
    """Sizes of one kernel.

    Attributes:
        rows: Latents per tile.
        codes: Codes per tile; in the screen of the search a bundle has codes / LANES of them.
        warps: Warps per program.
        stages: Blocks that are under way at once.
    """

    rows: int
    codes: int
    warps: int
    stages: int


SEARCH = {9: Tiles(128, 256, 8, 4), 8: Tiles(128, 128, 4, 4)}
SOFTMAX = {9: Tiles(64, 64, 8, 2), 8: Tiles(32, 64, 4, 2)}
SEARCH_CANDIDATES = tuple(
    Tiles(rows, codes, warps, 4) for rows, codes, warps in ((64, 128, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
)
"""What `benchmarks/gpu.py --tune` tries."""


def capability_of(device: torch.device) -> tuple[int, int]:
    """The compute capability of a card; in the interpreter that of an A100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def search_tiles(capability: tuple[int, int], num_codes: int) -> Tiles:
    """Of the screen; small tables get narrower tiles."""
    tiles = SEARCH[9] if capability[0] >= 9 and _shared(capability) > 200_000 else SEARCH[8]
    codes = tiles.codes
    while codes > 32 and codes >= 2 * num_codes:
        codes //= 2
    return tiles._replace(codes=codes)


def fitted(tiles: Tiles, capability: tuple[int, int], block: int, main: int) -> Tiles:
    """The tiles with as many stages as shared memory holds, at most those given.

    Args:
        tiles: Of the screen.
        capability: Of the card.
        block: Columns that are multiplied at once.
        main: All columns but the bounds.
    """
    stages = tiles.stages
    while stages > 1 and screen_bytes(tiles._replace(stages=stages), capability, block, main) > _shared(capability):
        stages -= 1
    return tiles._replace(stages=stages)


def screen_bytes(tiles: Tiles, capability: tuple[int, int], block: int, main: int) -> int:
    """Shared memory that the screen takes, at most."""
    minima = 4 * tiles.rows * LANES
    if block == main:
        # Before Hopper the latents that stay are held in registers.
        kept = tiles.rows if capability[0] >= 9 else 0
        return 2 * (block + 16) * (kept + tiles.stages * tiles.codes) + minima
    return 2 * (tiles.stages * block + 16) * (tiles.rows + tiles.codes) + minima


def softmax_tiles(capability: tuple[int, int]) -> Tiles:
    """Of the reductions of the softmax."""
    return SOFTMAX[9] if capability[0] >= 9 and _shared(capability) > 200_000 else SOFTMAX[8]


def _shared(capability: tuple[int, int]) -> int:
    return _SHARED.get(capability, _LEAST_SHARED)


def block_of(width: int, most: int) -> int:
    """The power of two, at least 16 and at most `most`, in which a dimension of that width is gone through."""
    return max(16, min(most, 1 << (width - 1).bit_length()))
