# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels are compiled for real cards, without one: they fit, and they use what they are meant to use.

Opt-in, with scripts/test_triton.sh: runs where Triton is installed and its interpreter is off.
"""

from typing import Any

import pytest

from steadyvq.kernels import triton as ours
from steadyvq.kernels.triton import screening, tiles

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(ours.interpreted(), reason="TRITON_INTERPRET=1 compiles nothing")

CARDS = [(8, 0), (8, 6), (9, 0)]
FLOAT, DOUBLE, BYTE, LONG, INT = "*fp32", "*fp64", "*i8", "*i64", "i32"
SOFTMAX_ROWS = [FLOAT] * 4 + [LONG, BYTE] + [FLOAT] * 6 + [INT] * 2
SOFTMAX_COLUMNS = [FLOAT] * 4 + [LONG] + [FLOAT] * 7 + [INT] * 2
PULLS = [FLOAT] * 4 + [LONG, FLOAT, BYTE] + [FLOAT] * 4 + [INT] * 2
FUSED = [FLOAT] * 7 + [INT] * 3
SETTLE = [FLOAT] * 3 + [BYTE] * 2 + [DOUBLE] * 3 + [BYTE, LONG, DOUBLE, INT.replace("i", "*i"), FLOAT, INT, INT]
PACK = [FLOAT, "*bf16", DOUBLE, BYTE, DOUBLE, DOUBLE, INT, "fp32", "fp32"]


def compiled(kernel: Any, types: list[str], card: tuple[int, int], constants: dict[str, Any], **options: Any) -> Any:
    """A kernel as the launcher would compile it for pointers that are multiples of 16 bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name in kernel.arg_names if name not in constants]
    assert len(names) == len(types)
    signature = {**dict(zip(names, types, strict=True)), **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 10 * card[0] + card[1], 32), options=options)
    assert made.metadata.shared <= tiles._shared(card)
    return made


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(("dim", "products"), [(8, 3), (128, 1), (512, 1), (64, 3)])
def test_the_screen_fits_and_uses_the_tensor_cores(card: tuple[int, int], dim: int, products: int) -> None:
    from steadyvq.kernels.triton import device_search as device

    block, padded, width = screening.width_of(dim, products)
    size = tiles.fitted(tiles.search_tiles(card, 65536), card, block, products * padded)
    constants = {"MAIN": products * padded, "WIDTH": width, "ROWS": size.rows, "CODES": size.codes, "BLOCK": block}
    constants |= {"LANES": tiles.LANES, "WIDEN": False}
    types = ["*bf16", "*bf16", FLOAT, INT, INT, INT]
    made = compiled(device.screen, types, card, constants, num_warps=size.warps, num_stages=size.stages)
    assert ("wgmma.mma_async" if card[0] == 9 else "mma.sync") in made.asm["ptx"]
    assert size.stages >= 2
    # The formula is what chooses the stages: it must not promise less than is taken.
    assert made.metadata.shared <= tiles.screen_bytes(size, card, block, products * padded)


@pytest.mark.parametrize("dim", [100, 512])
@pytest.mark.parametrize("dot", [False, True])
def test_float64_scores_are_not_contracted(dim: int, dot: bool) -> None:
    """A fused multiply-add would give other last bits than the reference."""
    from steadyvq.kernels.triton import device_search as device

    levels = (dim - 1).bit_length()
    constants = {"D": dim, "LEVELS": levels, "TILE": 256, "LANES": 8, "CHUNK": 1024, "TOGETHER": 2048 >> levels}
    constants |= {"DOT": dot, "MASKED": True, "COUNT": True, "SUM": True}
    made = compiled(device.settle, SETTLE, (9, 0), constants, num_warps=4, enable_fp_fusion=False)
    assert "fma.rn.f64" not in made.asm["ptx"]
    assert "mul.f64" in made.asm["ptx"] or "mul.rn.f64" in made.asm["ptx"]
    for codes in (False, True):
        block, padded, width = screening.width_of(dim, 1)
        constants = {"D": dim, "PADDED": padded, "WIDTH": width, "PRODUCTS": 1, "CODES": codes, "DOT": dot}
        constants |= {"ROWS": 16, "BLOCK": block}
        compiled(device.pack, PACK, (9, 0), constants, enable_fp_fusion=False)


@pytest.mark.parametrize("card", [(8, 6), (9, 0)])
@pytest.mark.parametrize("dim", [32, 512])
def test_the_reductions_fit(card: tuple[int, int], dim: int) -> None:
    from steadyvq.kernels.triton import device_segments, device_softmax

    size = tiles.softmax_tiles(card)
    options = {"num_warps": size.warps, "num_stages": size.stages}
    block, width = tiles.block_of(dim, 32), tiles.block_of(dim, 128)
    constants = {"D": dim, "PADDED": dim, "ROWS": size.rows, "CODES": size.codes, "BLOCK": block, "PRECISION": "tf32x3"}
    rule = {"LOSERS": True, "SQUARED": True}
    compiled(device_softmax.reduce_rows, SOFTMAX_ROWS, card, {**constants, **rule}, **options)
    summed = {**constants, **rule, "OUT": width}
    compiled(device_softmax.reduce_columns, SOFTMAX_COLUMNS, card, summed, **options)
    compiled(device_softmax.pull_rows, PULLS, card, summed, **options)
    compiled(device_softmax.screen_and_reduce, FUSED, card, {**constants, "LANES": tiles.LANES}, **options)
    kinds = [LONG, LONG, FLOAT, FLOAT, FLOAT, FLOAT]
    compiled(device_segments.add_segments, kinds, card, {"D": dim, "OUT": width, "ROWS": 32}, num_warps=4)
