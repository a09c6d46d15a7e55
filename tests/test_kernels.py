# SPDX-License-Identifier: Apache-2.0
"""The kernels against dense float64 definitions: exact indices, and statistics within a proven or stated error."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steadyvq import kernels
from steadyvq.kernels import reference, rounding, statistics, streaming

BLOCKS = [(None, None), (1, 1), (7, 13), (64, 96), (31, 1024), (1000, 4096), (1, 64), (128, 1)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def oracle(z: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Written from the contract, with the library's own summation order but nothing else of the library."""
    distance = reference.squared_distance(z[:, None], table[None])
    score, first = [], []
    for row in distance:
        best = row.min()
        score.append(best)
        first.append((row == best).nonzero()[0, 0])
    return torch.stack(first), torch.stack(score)


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def grid(n: int, d: int, seed: int) -> Tensor:
    """Small integers: exact ties between different codes, and duplicates."""
    return torch.randint(-2, 3, (n, d), generator=torch.Generator().manual_seed(seed)).float()


def far(offset: float) -> tuple[Tensor, Tensor]:
    return random(90, 12, seed=1) + offset, random(150, 12, seed=2) + offset


def between() -> tuple[Tensor, Tensor]:
    """Every latent is exactly half-way between two codes, whose coordinates have few bits."""
    table = (random(60, 8, seed=3) * 64).round() / 64
    a, b = torch.randint(0, 60, (2, 100), generator=torch.Generator().manual_seed(4))
    return (table[a] + table[b]) / 2, table


def nearly_tied() -> tuple[Tensor, Tensor]:
    """Codes one float32 step apart, and latents among them: the fast pass alone cannot tell them apart."""
    base = random(1, 24, seed=5).repeat(70, 1)
    bump = torch.randint(-2, 3, (70, 24), generator=torch.Generator().manual_seed(6))
    table = base + bump * torch.finfo(torch.float32).eps
    return torch.cat([random(20, 24, seed=7), table[:30]]), torch.cat([table, random(40, 24, seed=8)])


def outlier() -> tuple[Tensor, Tensor]:
    """One code a million times as far out as the others."""
    table = random(100, 6, seed=9)
    table[17] *= 1e6
    return random(50, 6, seed=10), table


CASES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "random": lambda: (random(130, 16, seed=11), random(257, 16, seed=12)),
    "wide": lambda: (random(40, 200, seed=13), random(90, 200, seed=14)),
    "one dimension": lambda: (random(200, 1, seed=15), random(64, 1, seed=16)),
    "integer grid": lambda: (grid(120, 4, 17), grid(300, 4, 18)),
    "duplicates": lambda: (random(60, 5, seed=19), random(40, 5, seed=20).repeat(4, 1)),
    "half-way": between,
    "nearly tied": nearly_tied,
    "offset 1e4": lambda: far(1e4),
    "offset 1e6": lambda: far(1e6),
    "all equal": lambda: (random(50, 6, seed=21), torch.full((300, 6), 0.1)),
    "latents on equal codes": lambda: (torch.full((30, 6), 0.1), torch.full((200, 6), 0.1)),
    "zeros": lambda: (torch.zeros(9, 3), torch.zeros(70, 3)),
    "tiny codebook": lambda: (random(80, 32, seed=22), (torch.rand(512, 32) * 2 - 1) / 512),
    "single code": lambda: (random(20, 4, seed=23), random(1, 4, seed=24)),
    "denormal": lambda: (random(50, 4, seed=25) * 1e-42, random(60, 4, seed=26) * 1e-42),
    "denormal codes": lambda: (random(50, 4, seed=25), random(60, 4, seed=26) * 1e-42),
    "huge": lambda: (random(50, 4, seed=27) * 1e30, random(60, 4, seed=28) * 1e30),
    "largest": lambda: (random(50, 4, seed=27).sign() * 3e38, random(60, 4, seed=28).sign() * 3e38),
    "huge latents": lambda: (random(50, 4, seed=27) * 1e37, random(60, 4, seed=28) * 1e-3),
    "outlier": outlier,
    "non-contiguous": lambda: (random(16, 70, seed=29).t(), random(80, 32, seed=30)[:, ::2]),
    "bfloat16": lambda: (random(90, 8, seed=31).bfloat16(), random(200, 8, seed=32).bfloat16()),
    "float16": lambda: (random(90, 8, seed=31).half(), random(200, 8, seed=32).half()),
    "float64": lambda: (random(90, 8, seed=31, dtype=torch.float64), random(200, 8, seed=32, dtype=torch.float64)),
    "mixed dtypes": lambda: (random(90, 8, seed=31).bfloat16(), random(200, 8, seed=32, dtype=torch.float64)),
}


@pytest.mark.parametrize("case", CASES)
def test_nearest_is_exact_at_every_block_size(case: str) -> None:
    z, table = CASES[case]()
    indices, score = oracle(z, table)
    for rows, codes in BLOCKS:
        few = 5 if 1 in (rows, codes) else len(z)  # thousands of tiny tiles are slow
        z_part, index_part = z[:few], indices[:few]
        got, got_score = streaming.nearest(z_part, table, block_rows=rows, block_codes=codes)
        assert torch.equal(got, index_part), (rows, codes)
        assert torch.equal(got_score, score[: len(z_part)]), (rows, codes)
    assert torch.equal(reference.nearest(z, table)[0], indices)
    assert torch.equal(reference.nearest(z, table)[1], score)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_nearest_is_exact_at_every_matmul_precision(case: str, precision: str) -> None:
    z, table = CASES[case]()
    with matmul_precision(precision):
        assert torch.equal(kernels.nearest(z, table)[0], oracle(z, table)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nearest_ignores_autocast(dtype: torch.dtype) -> None:
    z, table = random(1000, 32, seed=1), random(3000, 32, seed=2)
    plain = kernels.nearest(z, table)
    with torch.autocast("cpu", dtype=dtype):
        cast = kernels.nearest(z, table)
        assert not torch.equal((z @ table.t()).float().argmax(1), (z.double() @ table.double().t()).argmax(1))
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])
    assert torch.equal(plain[0][:50], oracle(z[:50], table)[0])


def test_nearest_does_not_depend_on_the_batch() -> None:
    z, table = grid(101, 5, 1), grid(200, 5, 2)
    whole = kernels.nearest(z, table)[0]
    for size in (1, 2, 13, 100):
        assert torch.equal(torch.cat([kernels.nearest(part, table)[0] for part in z.split(size)]), whole)
    huge = torch.cat([z, torch.full((1, 5), 3e38)])
    assert torch.equal(kernels.nearest(huge, table)[0][:-1], whole)


def test_nearest_agrees_with_plain_float64_search_beyond_one_tile() -> None:
    z, table = random(1500, 8, seed=1), random(5000, 8, seed=2)
    indices, score = kernels.nearest(z, table)
    for part, index, value in zip(z.split(100), indices.split(100), score.split(100), strict=True):
        square = ((part.double()[:, None] - table.double()[None]) ** 2).sum(-1)
        assert torch.equal(square.argmin(1), index)
        torch.testing.assert_close(square.amin(1).float(), value, rtol=1e-6, atol=0)


def test_nearest_of_many_equal_codes_is_quick_and_lowest() -> None:
    table = torch.cat([random(1, 16, seed=1) * 100, random(3, 16, seed=2).repeat(4000, 1)])
    z = random(500, 16, seed=3)
    assert torch.equal(kernels.nearest(z, table)[0], oracle(z, table[:4])[0])


def test_nearest_of_bad_rows() -> None:
    z, table = random(6, 3, seed=1), random(40, 3, seed=2)
    expected = oracle(z, table)[0]
    z[1, 0], z[4, 2] = torch.nan, -torch.inf
    for backend in ("streaming", "reference"):
        with kernels.use_backend(backend):
            indices, score = kernels.nearest(z, table)
        assert indices[[1, 4]].tolist() == [0, 0]
        assert score.isnan().tolist() == [False, True, False, False, True, False]
        assert torch.equal(indices[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])


def test_nearest_never_chooses_a_broken_code() -> None:
    z, table = random(30, 3, seed=1), random(40, 3, seed=2)
    keep = [j for j in range(40) if j not in (0, 7)]
    expected = torch.tensor(keep)[oracle(z, table[keep])[0]]
    table[0, 1], table[7] = torch.nan, torch.inf
    for backend in ("streaming", "reference"):
        with kernels.use_backend(backend):
            assert torch.equal(kernels.nearest(z, table)[0], expected)
            assert kernels.nearest(z, torch.full((5, 3), torch.nan))[0].tolist() == [0] * 30


def test_nearest_of_nothing() -> None:
    for backend in ("streaming", "reference"):
        with kernels.use_backend(backend):
            indices, score = kernels.nearest(torch.empty(0, 3), random(5, 3))
        assert indices.shape == score.shape == (0,)
        assert indices.dtype == torch.int64


def test_nearest_dtypes() -> None:
    z, table = random(4, 3), random(5, 3)
    assert kernels.nearest(z.bfloat16(), table.half())[1].dtype == torch.float32
    assert kernels.nearest(z.double(), table)[1].dtype == torch.float64


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 40),
    st.integers(1, 80),
    st.integers(1, 9),
    st.integers(0, 10**6),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e25]),
    st.sampled_from([0.0, 1.0, 1e5]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(1, 50),
    st.integers(1, 70),
    st.booleans(),
)
def test_nearest_is_exact_on_any_mix(
    n: int,
    k: int,
    d: int,
    seed: int,
    scale: float,
    offset: float,
    dtype: torch.dtype,
    rows: int,
    codes: int,
    tied: bool,
) -> None:
    make = grid if tied else lambda n, d, seed: random(n, d, seed=seed)
    z = ((make(n, d, seed) + offset) * scale).to(dtype)
    table = ((make(k, d, seed + 1) + offset) * scale).to(dtype)
    got = streaming.nearest(z, table, block_rows=rows, block_codes=codes)
    expected = oracle(z, table)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize(
    ("precision", "rounded"), [("highest", None), ("high", 13), ("medium", 16)], ids=["float32", "tf32", "bf16"]
)
@pytest.mark.parametrize("case", ["random", "wide", "offset 1e4", "tiny codebook", "huge", "nearly tied"])
def test_search_error_stays_within_its_slack(case: str, precision: str, rounded: int | None) -> None:
    z, table = CASES[case]()
    with matmul_precision(precision):
        latents, codes, norms, slack = streaming._prepare(z, table, 1)
    exponent = rounding.exponent_of(z, table)
    scaled = [tensor.double() * 2.0**exponent for tensor in (z, table)]
    centre = (table * 2.0**exponent).mean(0).double()
    exact_z, exact_e = (tensor - centre for tensor in scaled)
    exact = exact_e.square().sum(1) - 2 * exact_z @ exact_e.T
    if rounded is not None:  # cut the operands off, as the coarsest hardware may
        latents, codes = ((t.view(torch.int32) >> rounded << rounded).view(torch.float32) for t in (latents, codes))
    computed = torch.addmm(norms, latents, codes.t(), alpha=-2.0)
    error = (computed.double() - exact).abs().amax(1)
    assert (2 * error <= slack).all()
    # It is a bound with a worst case in mind, not a blank cheque: it shrinks with the precision.
    reach = exact_z.norm(dim=1) * exact_e.norm(dim=1).max() + exact_e.norm(dim=1).max() ** 2
    limit = {"highest": 40 * z.shape[1] * 2.0**-24, "high": 2.0**-5, "medium": 2.0**-2}[precision]
    assert (slack <= limit * reach).all()


# --- soft statistics -------------------------------------------------------------------------------------------------


def problem(n: int = 60, k: int = 90, d: int = 7, masked: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Latents, codes, winners and row weights of which some are 0, over rows full of nan and inf."""
    z, table = random(n, d, seed=1) + 5, 0.8 * random(k, d, seed=2) + 5
    indices = kernels.nearest(z, table)[0]
    indices[::7] = (indices[::7] + 3) % k  # a winner need not be the nearest
    if not masked:
        return z, table, indices, None
    row = torch.rand(n, generator=torch.Generator().manual_seed(3)) + 0.2
    row[[0, 5, 6, n - 1]] = 0.0
    z[0], z[5], z[6, 1] = torch.nan, torch.inf, -torch.inf
    return z, table, indices, row


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("rule", ["losers", "all"])
@pytest.mark.parametrize("masked", [True, False])
def test_soft_statistics_match_their_definitions(squared: bool, rule: str, masked: bool) -> None:
    z, table, indices, row = problem(masked=masked)
    tau = 0.7
    got = kernels.soft_statistics(
        z, table, indices, temperature=tau, row_weight=row, rule=rule, squared=squared, want_row_sum=True
    )
    r = torch.ones(len(z)) if row is None else row
    expected = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in got._asdict().items()}
    for i in range(len(z)):
        if r[i] == 0:
            continue
        latent, codes = z[i].double(), table.double()
        distance = ((latent - codes) ** 2).sum(1)
        distance = distance if squared else distance.sqrt()
        weight = torch.softmax(-distance / tau, 0)
        expected["lse"][i] = torch.logsumexp(-distance / tau, 0)
        expected["winner_mass"][i] = weight[indices[i]]
        expected["loser_mass"][i] = weight.sum() - weight[indices[i]]
        if rule == "losers":
            weight[indices[i]] = 0.0
        gradient = weight if squared else weight / (2 * distance)
        expected["row_cost"][i] = (weight * distance).sum()
        expected["row_sum"][i] = gradient @ codes
        expected["column_mass"] += r[i] * weight
        expected["gradient_mass"] += r[i] * gradient
        expected["column_sum"] += r[i] * gradient[:, None] * latent
        expected["column_cost"] += r[i] * weight * distance
    for name, value in got._asdict().items():
        torch.testing.assert_close(
            value.double(), expected[name], rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    # The same from the dense backend, which the other tests take as their oracle.
    with kernels.use_backend("reference"):
        dense = kernels.soft_statistics(
            z, table, indices, temperature=tau, row_weight=row, rule=rule, squared=squared, want_row_sum=True
        )
    for name, value in dense._asdict().items():
        torch.testing.assert_close(
            value.double(), expected[name], rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("losers", [True, False])
def test_streaming_statistics_equal_the_reference_in_float64_at_every_block_size(squared: bool, losers: bool) -> None:
    z, table, indices, row = problem()
    z, table = z.double() - 5, table.double() - 5
    factor = torch.rand(len(table), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = {"losers": losers, "squared": squared, "want_row_sum": True}
    expected = reference.soft_statistics(z, table, indices, 0.3, row, factor, **options)
    for rows in (1, 7, 59, 60, 1000):
        got = statistics.soft_statistics(z, table, indices, 0.3, row, factor, block_rows=rows, **options)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_masked_rows_change_nothing() -> None:
    z, table, indices, row = problem()
    assert row is not None
    kept = row != 0
    whole = kernels.soft_statistics(z, table, indices, temperature=0.5, row_weight=row)
    part = kernels.soft_statistics(z[kept], table, indices[kept], temperature=0.5, row_weight=row[kept])
    for name in ("lse", "winner_mass", "row_cost", "loser_mass"):
        torch.testing.assert_close(getattr(whole, name)[kept], getattr(part, name))
        assert (getattr(whole, name)[~kept] == 0).all()
    for name in ("column_mass", "column_sum", "column_cost", "gradient_mass"):
        torch.testing.assert_close(getattr(whole, name), getattr(part, name))
    assert whole.row_sum.shape == (0, 7)


def test_far_losers_are_counted_without_cancellation() -> None:
    z, table = torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [30.0, 0.0]])
    got = kernels.soft_statistics(z, table, torch.tensor([0]), temperature=1.0)
    assert got.winner_mass.item() == 1.0
    assert got.loser_mass.item() == pytest.approx(2 * torch.tensor(-25.0, dtype=torch.float64).exp().item(), rel=1e-5)
    out = kernels.non_stationary(z, table, torch.tensor([0]), temperature=1.0)
    assert out.effective_losers.item() == pytest.approx(2.0, rel=1e-4)
    assert kernels.non_stationary(z, table[:1], torch.tensor([0]), temperature=1.0).effective_losers.item() == 1.0


# --- the non-stationary loss -----------------------------------------------------------------------------------------


def dense_gradient(z: Tensor, table: Tensor, indices: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    z, table = z.detach().double().requires_grad_(), table.detach().double().requires_grad_()
    loss = reference.non_stationary_loss(z, table, indices, **options)
    return loss.detach(), *torch.autograd.grad(loss, (table, z))


def streamed_gradient(z: Tensor, table: Tensor, indices: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    table = table.detach().requires_grad_()
    loss = kernels.non_stationary_loss(z, table, indices, **options)
    return loss.detach(), torch.autograd.grad(loss, table)[0]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("n", "k", "d", "tau", "scale", "offset"),
    [
        (200, 300, 8, 0.35, 1.0, 0.0),
        (200, 300, 8, 0.05, 1.0, 0.0),
        (200, 300, 64, 10.0, 1.0, 0.0),
        (300, 1000, 16, 1.0, 3.0, 0.0),
        (100, 50, 32, 0.35, 0.1, 0.0),
        (400, 700, 4, 0.35, 0.3, 1e4),
        (1, 2, 1, 1.0, 1.0, 0.0),
        (50, 2000, 128, 5.0, 0.5, 10.0),
    ],
)
def test_gradient_error_stays_within_its_bound(n: int, k: int, d: int, tau: float, scale: float, offset: float) -> None:
    z, table = scale * random(n, d, seed=1) + offset, scale * random(k, d, seed=2) + offset
    indices = kernels.nearest(z, table)[0]
    centre = table.double().mean(0)
    reach = (z.double() - centre).square().sum(1).max() + (table.double() - centre).square().sum(1).max()
    for dtype, u in ((torch.float32, 2.0**-24), (torch.float64, 2.0**-53)):
        bound = 2 * u * (1 + reach.item() / tau)
        if dtype == torch.float64:
            bound = max(bound, 1e-12)
        loss, gradient = streamed_gradient(z.to(dtype), table.to(dtype), indices, temperature=tau)
        exact_loss, exact, _ = dense_gradient(z, table, indices, temperature=tau)
        assert relative(gradient, exact) <= bound
        assert loss.item() == pytest.approx(exact_loss.item(), rel=4 * bound)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("per_code", [True, False])
@pytest.mark.parametrize("denominator", [None, 200.0])
def test_gradients_equal_dense_autograd(squared: bool, per_code: bool, denominator: float | None) -> None:
    z, table, indices, row = problem()
    z, table = z.double().requires_grad_(), table.double().requires_grad_()
    options = {
        "temperature": torch.tensor(0.5),
        "row_weight": row,
        "denominator": denominator,
        "per_code": per_code,
        "squared": squared,
    }
    out = kernels.non_stationary(z, table, indices, detach_latents=False, **options)
    by_table, by_latents = torch.autograd.grad(3 * out.loss, (table, z))
    loss, exact, exact_latents = dense_gradient(z, table, indices, **options)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(by_table, 3 * exact, rtol=1e-10, atol=1e-15)
    assert row is not None
    torch.testing.assert_close(by_latents[row != 0], 3 * exact_latents[row != 0], rtol=1e-10, atol=1e-15)
    assert (by_latents[row == 0] == 0).all()
    assert out.grad_max.item() == pytest.approx(exact.abs().max().item(), rel=1e-10)
    assert not out.grad_max.requires_grad
    detached = kernels.non_stationary(z, table, indices, **options).loss
    assert torch.autograd.grad(detached, z, allow_unused=True, retain_graph=True)[0] is None
    assert torch.equal(torch.autograd.grad(detached, table)[0] * 3, by_table)


@pytest.mark.parametrize("squared", [True, False])
def test_per_code_is_what_a_loop_says(squared: bool) -> None:
    z, table, indices, row = problem(20, 15, 3, masked=False)
    tau, prior = 0.4, 0.05
    mass, pull, cost = torch.zeros(15), torch.zeros(15, 3), torch.zeros(15)
    for i in range(20):
        distances = [float(((z[i] - code) ** 2).sum()) ** (1.0 if squared else 0.5) for code in table]
        total = sum(torch.tensor(-x / tau).exp().item() for x in distances)
        for j, x in enumerate(distances):
            if j == indices[i]:
                continue
            weight = torch.tensor(-x / tau).exp().item() / total
            mass[j] += weight
            cost[j] += weight * x
            pull[j] += weight * (table[j] - z[i]) * (2.0 if squared else 1.0 / x)
    options = {"temperature": tau, "row_weight": row, "prior": prior, "per_code": True, "squared": squared}
    loss, gradient = streamed_gradient(z, table, indices, **options)
    assert loss.item() == pytest.approx((cost / (mass + prior)).sum().item() / 60, rel=1e-4)
    torch.testing.assert_close(gradient, pull / (mass + prior)[:, None] / 60, rtol=1e-3, atol=1e-6)
    # Two processes with the same data: twice the mass, twice the count.
    both, _ = streamed_gradient(z, table, indices, reduce=lambda s: 2 * s, **(options | {"denominator": 40}))
    assert both.item() == pytest.approx((cost / (2 * mass + prior)).sum().item() / 120, rel=1e-4)


def test_halves_of_a_batch_add_up_to_the_whole() -> None:
    z, table, indices, row = problem()
    assert row is not None
    count = row.sum()
    whole = streamed_gradient(z, table, indices, temperature=0.5, row_weight=row)
    halves = [
        streamed_gradient(z[part], table, indices[part], temperature=0.5, row_weight=row[part], denominator=count)
        for part in (slice(0, 23), slice(23, None))
    ]
    for a, b, c in zip(whole, *halves, strict=True):
        torch.testing.assert_close(a, b + c)


def test_only_losers_are_pulled() -> None:
    z = torch.tensor([[0.0, 0.0]] * 5)
    table = torch.tensor([[0.1, 0.0], [1.0, 0.0], [0.0, 1.0], [300.0, 0.0]])
    _, gradient = streamed_gradient(z, table, torch.zeros(5, dtype=torch.int64), temperature=1.0)
    assert (gradient[0] == 0).all()  # the winner
    assert (gradient[3] == 0).all()  # too far away to have any weight
    assert gradient[1, 0] > 0  # descent moves these two towards the latents
    assert gradient[2, 1] > 0


def test_a_loser_at_distance_zero_has_no_direction() -> None:
    z, table = torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    options = {"temperature": 1.0, "squared": False, "detach_latents": False}
    loss, gradient = streamed_gradient(z, table, torch.zeros(3, dtype=torch.int64), **options)
    weight = torch.softmax(torch.tensor([0.0, 0.0, -1.0, -1.0]), 0)[2].item()
    assert loss.item() == pytest.approx(weight)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0], [0.0, 0.0], [weight / 2, 0.0], [-weight / 2, 0.0]]))


def test_no_valid_latent_gives_zero() -> None:
    table = random(5, 3).requires_grad_()
    for z, row in ((torch.empty(0, 3), None), (torch.full((4, 3), torch.nan), torch.zeros(4))):
        indices = torch.zeros(len(z), dtype=torch.int64)
        out = kernels.non_stationary(z, table, indices, temperature=1.0, row_weight=row)
        assert out.loss.item() == 0
        assert (torch.autograd.grad(out.loss, table)[0] == 0).all()
        assert (out.effective_losers == 0).all()


def test_effective_losers_is_the_exponential_of_an_entropy() -> None:
    z, table, indices, row = problem()
    assert row is not None
    out = kernels.non_stationary(z, table, indices, temperature=0.8, row_weight=row)
    distance = reference.distances(torch.nan_to_num(z, 0, 0, 0).double(), table.double(), squared=True)
    weight = reference.weights(distance, indices, 0.8, losers=True)
    p = weight / weight.sum(1, keepdim=True)
    expected = torch.exp(-torch.special.xlogy(p, p).sum(1)) * (row != 0)
    torch.testing.assert_close(out.effective_losers.double(), expected, rtol=1e-4, atol=0)


def mutant_winner_kept(z: Tensor, table: Tensor, indices: Tensor, tau: float) -> Tensor:
    distance = reference.distances(z, table, True)
    return (reference.weights(distance, indices, tau, losers=False).detach() * distance).sum() / z.numel()


def mutant_masked_before(z: Tensor, table: Tensor, indices: Tensor, tau: float) -> Tensor:
    distance = reference.distances(z, table, True)
    logits = (-distance / tau).scatter(1, indices[:, None], -torch.inf)
    return (logits.softmax(1).detach() * distance).sum() / z.numel()


def mutant_weights_attached(z: Tensor, table: Tensor, indices: Tensor, tau: float) -> Tensor:
    distance = reference.distances(z, table, True)
    return (reference.weights(distance, indices, tau, losers=True) * distance).sum() / z.numel()


def mutant_mean_over_latents_only(z: Tensor, table: Tensor, indices: Tensor, tau: float) -> Tensor:
    return reference.non_stationary_loss(z, table, indices, temperature=tau) * z.shape[1]


def mutant_sum(z: Tensor, table: Tensor, indices: Tensor, tau: float) -> Tensor:
    return reference.non_stationary_loss(z, table, indices, temperature=tau, denominator=1.0)


def mutant_sign(z: Tensor, table: Tensor, indices: Tensor, tau: float) -> Tensor:
    return -reference.non_stationary_loss(z, table, indices, temperature=tau)


def mutant_temperature_upside_down(z: Tensor, table: Tensor, indices: Tensor, tau: float) -> Tensor:
    return reference.non_stationary_loss(z, table, indices, temperature=1 / tau)


def mutant_plain_distance(z: Tensor, table: Tensor, indices: Tensor, tau: float) -> Tensor:
    return reference.non_stationary_loss(z, table, indices, temperature=tau, squared=False)


@pytest.mark.parametrize(
    "mutant",
    [
        mutant_winner_kept,
        mutant_masked_before,
        mutant_weights_attached,
        mutant_mean_over_latents_only,
        mutant_sum,
        mutant_sign,
        mutant_temperature_upside_down,
        mutant_plain_distance,
    ],
)
def test_plausible_mistakes_give_other_gradients(mutant: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
    z, table, indices, _ = problem(masked=False)
    wrong_table = table.double().requires_grad_()
    wrong = torch.autograd.grad(mutant(z.double(), wrong_table, indices, 0.5), wrong_table)[0]
    _, exact, _ = dense_gradient(z, table, indices, temperature=0.5)
    _, gradient = streamed_gradient(z, table, indices, temperature=0.5)
    assert relative(gradient, exact) < 1e-4
    assert relative(gradient, wrong) > 1e-2


def test_the_loss_ignores_autocast() -> None:
    z, table, indices, row = problem()
    options = {"temperature": 0.5, "row_weight": row, "detach_latents": False}
    plain = kernels.non_stationary(z, table, indices, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = kernels.non_stationary(z, table, indices, **options)
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_a_bfloat16_table_gets_a_bfloat16_gradient() -> None:
    z, table, indices, _ = problem(masked=False)
    table = table.bfloat16().requires_grad_()
    kernels.non_stationary_loss(z.bfloat16(), table, indices, temperature=0.5).backward()
    assert table.grad is not None
    assert table.grad.dtype == torch.bfloat16


# --- operators -------------------------------------------------------------------------------------------------------


def test_attach_gradient_keeps_the_value() -> None:
    value, tensor, grad = (
        random(1, seed=1)[0].requires_grad_(),
        random(4, 3, seed=2).requires_grad_(),
        random(4, 3, seed=3),
    )
    out = kernels.attach_gradient(value, tensor, grad)
    assert torch.equal(out, value)
    by_value, by_tensor = torch.autograd.grad(2.5 * out, (value, tensor))
    assert by_value.item() == 2.5
    assert torch.equal(by_tensor, 2.5 * grad)


def test_operators_pass_opcheck() -> None:
    z, table, indices, row = problem(10, 12, 3)
    z = torch.nan_to_num(z, 0, 0, 0)  # opcheck takes nan for a difference
    torch.library.opcheck(torch.ops.steadyvq.nearest.default, (z, table))
    tau = torch.tensor(0.5)
    for squared, want in ((True, True), (False, False)):
        arguments = (z, table, indices, tau, row, None, True, squared, want)
        torch.library.opcheck(torch.ops.steadyvq.soft_statistics.default, arguments)
    attach = (torch.tensor(1.0, requires_grad=True), table.clone().requires_grad_(), random(12, 3))
    torch.library.opcheck(torch.ops.steadyvq.attach_gradient.default, attach)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_full_graph_compile(dynamic: bool, masked: bool) -> None:
    def step(z: Tensor, table: Tensor, row: Tensor | None) -> tuple[Tensor, ...]:
        indices, score = kernels.nearest(z, table)
        options = {"temperature": 0.5, "row_weight": row, "per_code": masked, "detach_latents": False}
        out = kernels.non_stationary(z, table, indices, **options)
        soft = kernels.soft_statistics(
            z, table, indices, temperature=0.5, row_weight=row, rule="all", want_row_sum=True
        )
        return out.loss, indices, score, out.winner_mass, out.effective_losers, out.grad_max, *soft

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (20, 33, 51) if dynamic else (20,):
        z, table, _, row = problem(60, 30, 4, masked)
        z, row = z[:n], None if row is None else row[:n]
        results = []
        for function in (step, compiled):
            latents, codes = z.clone().requires_grad_(), table.clone().requires_grad_()
            loss, *rest = function(latents, codes, row)
            results.append([loss, *torch.autograd.grad(loss, (latents, codes)), *rest])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kernels.nearest(random(3, 4), random(5, 3)), "project"),
        (lambda: kernels.nearest(random(3, 4), random(0, 4)), "no codes"),
        (lambda: kernels.nearest(random(1, 3, 4), random(5, 4)), "flatten"),
        (lambda: kernels.nearest(random(3, 4), random(5, 4), metric="cosine"), "normalise"),
        (lambda: kernels.use_backend("steaming").__enter__(), "nearest: streaming"),
        (
            lambda: kernels.soft_statistics(
                random(3, 4), random(5, 4), torch.zeros(3).long(), temperature=1.0, rule="x"
            ),
            "'losers' or 'all'",
        ),
    ],
)
def test_refusals_say_what_to_do(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_backend_is_restored() -> None:
    with contextlib.suppress(KeyError), kernels.use_backend("reference"):
        assert kernels._backend == "reference"
        raise KeyError
    assert kernels._backend == "auto"
