# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels under the kernels' contract, run by Triton's interpreter on a CPU; opt-in:

    scripts/test_triton.sh

What this cannot see is said in docs/performance.md.
"""

import os
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from test_kernels import CASES, dense_gradient, grid, oracle, problem, random, relative
from test_operation_counts import Counter
from torch import Tensor

from steadyvq import kernels
from steadyvq.kernels import passes, reference, rounding, triton
from steadyvq.kernels.triton import fused, screening, segments, softmax
from steadyvq.kernels.triton.tiles import Tiles

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or not triton.interpreted(), reason="needs Triton and TRITON_INTERPRET=1"
)
# The interpreter pays per program and operation: small tiles would be slow, large ones would fit everything.
SMALL = Tiles(16, 32, 4, 2)
SINGLE = [case for case, make in CASES.items() if torch.float64 not in {t.dtype for t in make()}]
# Every code is within every bound here, or nearly: each pair is visited.
SLOW = ("nearly tied", "all equal", "latents on equal codes", "offset 1e4", "offset 1e6", "outlier", "zeros")


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return torch.equal(got[0], expected[0]) and torch.equal(got[1].nan_to_num(-1), expected[1].nan_to_num(-1))


@pytest.mark.parametrize("case", SINGLE)
@pytest.mark.parametrize(("dot", "products"), [(False, 1), (False, 3), (True, 1)])
def test_the_search_has_the_bits_of_the_reference(case: str, dot: bool, products: int) -> None:
    z, table = CASES[case]()
    z = z[: 2 if case in SLOW or "denormal" in case or "huge" in case else 9]
    got = triton.nearest(z, table, dot=dot, products=products, tiles=SMALL)
    assert same(got, reference.nearest(z, table, dot=dot))
    if not dot:
        assert torch.equal(got[0], oracle(z, table)[0])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tiles", [SMALL, Tiles(32, 16, 4, 2), Tiles(16, 64, 4, 1)])
@pytest.mark.parametrize(
    ("n", "k", "d"), [(1, 1, 1), (17, 33, 3), (15, 129, 4), (5, 70, 65), (9, 31, 130), (3, 40, 512)]
)
def test_any_shape(n: int, k: int, d: int, tiles: Tiles, tied: bool) -> None:
    make = grid if tied else lambda rows, width, seed: random(rows, width, seed=seed)
    z, table = make(n, d, 1), make(k, d, 2)
    assert same(triton.nearest(z, table, tiles=tiles), reference.nearest(z, table))


def test_tiles_of_real_cards_and_blocks_of_latents() -> None:
    z, table = random(40, 6, seed=1), random(300, 6, seed=2)
    expected = reference.nearest(z, table)
    for tiles in (Tiles(128, 128, 4, 4), Tiles(128, 256, 8, 4)):
        assert same(triton.nearest(z, table, tiles=tiles), expected)
    found = screening.find(z, table, dot=False, products=1, tiles=SMALL, block_rows=16)
    assert same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_broken_rows(dtype: torch.dtype) -> None:
    z, table = random(20, 6, seed=1).to(dtype), random(70, 6, seed=2).to(dtype)
    z[[0, 7, 19], [1, 2, 3]] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    table[3, 1], table[33] = torch.nan, torch.inf
    assert same(triton.nearest(z, table, tiles=SMALL), reference.nearest(z, table))
    nothing = torch.full((5, 6), torch.nan)
    assert same(triton.nearest(z, nothing, tiles=SMALL), reference.nearest(z, nothing))
    empty = triton.nearest(z[:0], table)
    assert [part.dtype for part in empty] == [torch.int64, torch.float64]


@pytest.mark.parametrize("case", SINGLE)
@pytest.mark.parametrize(("dot", "products"), [(False, 1), (False, 3), (True, 1)])
def test_scores_of_packed_rows_are_lower_bounds(case: str, dot: bool, products: int) -> None:
    """In exact arithmetic, against the exact scores of the inputs; what the sums may lose is in the shares."""
    z, table = CASES[case]()
    frame = screening.frame_of(z, table, dot)
    given = {"dot": dot, "products": products}
    codes = screening.packed(table.contiguous(), frame, 32, codes=True, **given)
    latents = screening.packed(z.contiguous(), frame, 16, codes=False, **given)
    assert float(frame.scale) == 2.0 ** rounding.exponent_of(z, table)
    exact_z, exact_e = (t.double() * frame.scale - frame.centre for t in (z, table))
    exact = (0 if dot else exact_e.square().sum(1)) - 2 * exact_z @ exact_e.T
    rows, columns = latents.rows.double(), codes.rows.double()
    bound = rows[: len(z)] @ columns[: len(table)].T
    reach = exact_z.norm(dim=1)[:, None] * exact_e.norm(dim=1)
    sizes = rows[: len(z)].abs() @ columns[: len(table)].T.abs()
    lost = rows.shape[1] * 2.0**-22 * sizes  # what any order of adding up may lose of the sums
    tiny = 1e-12 * (exact_z.norm(dim=1).amax() + exact_e.norm(dim=1).amax()) ** 2
    assert (bound + lost <= exact + tiny).all()
    loose = {1: 2.0**-4, 3: 2.0**-11}[products]
    assert (bound >= exact - loose * reach - 4 * lost - 2.0**-19 * exact_e.square().sum(1) - tiny).all()
    assert (latents.rows[len(z) :, :-16] == 0).all()
    assert (columns[len(table) :, -16] > 1e37).all()


def test_a_mean_is_no_part_of_the_result() -> None:
    """Clusters far from the origin: the frame takes most of it away, the rest is settled in float64."""
    z, table = random(6, 8, seed=1) + 300, random(64, 8, seed=2) + 300
    assert same(triton.nearest(z, table, tiles=SMALL), reference.nearest(z, table))


def test_nothing_depends_on_the_data_but_values() -> None:
    """The operations and shapes of a search are the same where one bundle is looked at and where all are."""
    traces = []
    for z, table in ((random(2, 8, seed=1), random(50, 8, seed=2)), (torch.zeros(2, 8), torch.zeros(50, 8))):
        with Counter() as counter:
            triton.search(z, table, tiles=SMALL, count=True)
        traces.append((counter.count, counter.largest))
    assert traces[0] == traces[1]


def test_counts_and_sums_in_the_same_pass() -> None:
    z, table = random(40, 5, seed=1), random(30, 5, seed=2)
    z[4, 1] = torch.nan
    mask = torch.arange(40) % 3 != 0
    counted = mask & z.isfinite().all(1)
    indices = reference.nearest(z, table)[0]
    counts = torch.bincount(indices[counted], minlength=30)
    sums = torch.zeros(30, 5).index_add_(0, indices[counted], z[counted])
    for deterministic in (True, False):
        with kernels.use_backend("triton"):
            got = passes.nearest_and_sums(z, table, mask=mask, deterministic=deterministic)
        assert torch.equal(got.indices, indices)
        assert torch.equal(got.counts, counts.float())
        torch.testing.assert_close(got.sums, sums)


def test_sums_by_code_and_their_gradient() -> None:
    indices = torch.tensor([3, 0, 3, -1, 3, 6, 0, 3] + [5] * 70)
    values, weight = random(len(indices), 130, seed=1), random(len(indices), 1, seed=2)[:, 0]
    weight[4], values[4] = 0.0, torch.nan
    exact = torch.zeros(7, 130)
    for i, code in enumerate(indices.tolist()):
        if code >= 0 and weight[i] != 0:
            exact[code] += weight[i] * values[i]
    mass, sums = segments.sums_by_code(indices, values, weight, 7)
    torch.testing.assert_close(sums, exact, rtol=1e-5, atol=1e-5)
    assert mass[1] == 0
    torch.testing.assert_close(mass[3], weight[[0, 2, 7]].sum())
    table = random(7, 4, seed=3).requires_grad_()
    picked = indices.clamp_min(0)
    upstream = random(len(indices), 4, seed=4)
    with kernels.use_backend("triton"):
        (got,) = torch.autograd.grad((passes.select(table, picked) * upstream).sum(), table)
    (expected,) = torch.autograd.grad((table[picked] * upstream).sum(), table)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("losers", [True, False])
@pytest.mark.parametrize(("n", "k", "d", "tau"), [(33, 70, 7, 0.5), (20, 37, 70, 20.0), (5, 3, 200, 50.0)])
def test_statistics_are_those_of_the_reference(n: int, k: int, d: int, tau: float, losers: bool, squared: bool) -> None:
    z, table, indices, row = problem(n, k, d) if n > 10 else problem(n, k, d, masked=False)
    centre = table.mean(0)
    z, table = z - centre, table - centre
    factor = torch.linspace(0.5, 2.0, k)
    options = {"losers": losers, "squared": squared, "want_row_sum": True}
    given = (z, table, indices, tau, row, factor)
    got = softmax.soft_statistics(*given, **options, tiles=SMALL)
    exact = reference.soft_statistics(*given, **options)
    reach = torch.nan_to_num(z, 0, 0, 0).square().sum(1).max() + table.square().sum(1).max()
    for a, b in zip(got, exact, strict=True):
        assert a.shape == b.shape
        error = (a.double() - b).abs().max()
        assert error <= 2 * 4e-7 * (8 + float(reach) / tau) * float(b.abs().max()) + 1e-30
    # The same inputs give the same bits.
    again = softmax.soft_statistics(*given, **options, tiles=SMALL)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize(("tau", "scale", "offset"), [(0.35, 1.0, 0.0), (0.05, 1.0, 0.0), (0.35, 0.3, 1e4)])
def test_gradient_error_stays_within_its_bound(tau: float, scale: float, offset: float) -> None:
    z, table = scale * random(60, 8, seed=1) + offset, scale * random(90, 8, seed=2) + offset
    indices = reference.nearest(z, table)[0]
    centre = table.double().mean(0)
    reach = (z.double() - centre).square().sum(1).max() + (table.double() - centre).square().sum(1).max()
    leaf = table.clone().requires_grad_()
    with kernels.use_backend("triton"):
        loss = kernels.non_stationary_loss(z, leaf, indices, temperature=tau)
    (gradient,) = torch.autograd.grad(loss, leaf)
    exact_loss, exact, _ = dense_gradient(z, table, indices, temperature=tau)
    bound = 2 * 2.0**-24 * (1 + reach.item() / tau)
    assert relative(gradient, exact) <= bound
    assert loss.item() == pytest.approx(exact_loss.item(), rel=4 * bound)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_both_sides(dtype: torch.dtype, squared: bool) -> None:
    z, table, indices, row = problem(24, 40, 7)
    z, table = z.to(dtype).requires_grad_(), table.to(dtype).requires_grad_()
    options = {"temperature": 0.5, "row_weight": row, "per_code": True, "squared": squared}
    with kernels.use_backend("triton"):
        out = kernels.non_stationary(z, table, indices, detach_latents=False, **options)
    by_table, by_latents = torch.autograd.grad(out.loss, (table, z))
    loss, exact, exact_latents = dense_gradient(z, table, indices, **options)
    assert (by_table.dtype, by_latents.dtype) == (dtype, dtype)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    digits = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[dtype]
    assert relative(by_table, exact) < digits
    assert row is not None
    assert relative(by_latents[row != 0], exact_latents[row != 0]) < digits


@pytest.mark.parametrize("case", ["random", "integer grid", "duplicates", "bfloat16", "offset 1e4"])
def test_search_and_normaliser_in_one_pass(case: str) -> None:
    z, table = CASES[case]()
    z = z[:20].clone()
    z[3, 0] = torch.nan
    got = fused.nearest_and_normaliser(z.contiguous(), table.contiguous(), torch.tensor(0.8), tiles=SMALL)
    assert same(got, reference.nearest(z, table))
    distance = (z.double()[:, None] - table.double()[None]).square().sum(-1)
    expected = torch.logsumexp(-distance / 0.8, 1)
    reach = (torch.nan_to_num(z.double()) - table.double().mean(0)).square().sum(1).max()
    torch.testing.assert_close(got[2].double(), expected, rtol=0, atol=float(reach) * 2e-6 + 1e-6, equal_nan=True)
    assert got[2][3].isnan()


def test_operators_pass_opcheck() -> None:
    z, table, indices, row = problem(10, 12, 3)
    z = torch.nan_to_num(z, 0, 0, 0)
    with kernels.use_backend("triton"):
        torch.library.opcheck(torch.ops.steadyvq.nearest.default, (z, table))
        arguments = (z, table, indices, torch.tensor(0.5), row, None, True, True, True)
        torch.library.opcheck(torch.ops.steadyvq.soft_statistics.default, arguments)
        torch.library.opcheck(torch.ops.steadyvq.nearest_and_normaliser.default, (z, table, torch.tensor(0.5)))
        torch.library.opcheck(torch.ops.steadyvq.nearest_and_sums.default, (z, table, row > 0, True))
        weighted = (indices, z.clone().requires_grad_(), row, 12)
        torch.library.opcheck(torch.ops.steadyvq.sums_by_code.default, weighted)
        torch.library.opcheck(torch.ops.steadyvq.select.default, (table.clone().requires_grad_(), indices))


def test_full_graph_compile() -> None:
    def step(z: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        indices, score = kernels.nearest(z, table)
        out = kernels.non_stationary(z, table, indices, temperature=0.5, detach_latents=False)
        pulled = (passes.select(table, indices) - z).square().sum()
        return out.loss + pulled, indices, score, *passes.nearest_and_sums(z, table)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        z, table = random(20, 4, seed=1).requires_grad_(), random(30, 4, seed=2).requires_grad_()
        with kernels.use_backend("triton"):
            loss, *rest = function(z, table)
            results.append([loss, *rest, *torch.autograd.grad(loss, (z, table))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: triton.nearest(random(3, 4).double(), random(5, 4)), "float64"),
        (lambda: triton.nearest(random(3, 2000), random(5, 2000)), "1024 dimensions"),
        (lambda: triton.nearest(random(3, 4), random(5, 4), products=2), "1 or 3"),
    ],
)
def test_refusals_say_what_to_do(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_the_interpreter_is_never_chosen_by_itself() -> None:
    from steadyvq.kernels import choice

    assert os.environ["TRITON_INTERPRET"] == "1"
    assert "for tests" in choice.search_choice(2048, 65536, 128, device="cuda").reason
    assert choice.search_choice(2048, 65536, 128).backend != "triton"
