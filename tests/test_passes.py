# SPDX-License-Identifier: Apache-2.0
"""Sums by code and searches that give more than codes, on any device."""

import pytest
import torch
from test_kernels import oracle, problem, random

from steadyvq import kernels
from steadyvq.kernels import passes

INDICES = torch.tensor([3, 0, 3, -1, 3, 6, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_by_code_against_a_loop(dtype: torch.dtype) -> None:
    values, weight = random(7, 4, seed=1).to(dtype), random(7, 1, seed=2)[:, 0]
    values[4], weight[4] = torch.nan, 0.0
    values[3] = torch.inf  # nobody's
    mass, sums = torch.zeros(8), torch.zeros(8, 4)
    for i, code in enumerate(INDICES.tolist()):
        if code >= 0 and weight[i] != 0:
            mass[code] += weight[i]
            sums[code] += weight[i] * values[i].float()
    got = passes.sums_by_code(INDICES, values, 8, row_weight=weight)
    assert got.sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.mass.float(), mass)
    torch.testing.assert_close(got.sums.float(), sums)
    plain = passes.sums_by_code(INDICES[4:], torch.ones(3, 2), 8)
    assert plain.mass.tolist() == [1, 0, 0, 1, 0, 0, 1, 0]


def test_the_gradient_of_rows_and_codes() -> None:
    values, weight = random(7, 4, seed=1).double().requires_grad_(), random(7, 1, seed=2).double()[:, 0]
    upstream = random(8, 4, seed=3).double()
    passes.sums_by_code(INDICES, values, 8, row_weight=weight).sums.mul(upstream).sum().backward()
    expected = upstream[INDICES] * weight[:, None] * (INDICES >= 0)[:, None]
    torch.testing.assert_close(values.grad, expected)
    table = random(8, 4, seed=4).requires_grad_()
    picked, rows = INDICES.clamp_min(0), random(7, 4, seed=5)
    by_ours = torch.autograd.grad((torch.ops.steadyvq.select(table, picked) * rows).sum(), table)[0]
    by_torch = torch.autograd.grad((passes.select(table, picked) * rows).sum(), table)[0]
    torch.testing.assert_close(by_ours, by_torch)


def test_a_search_with_sums() -> None:
    z, table = random(50, 6, seed=1), random(20, 6, seed=2)
    z[7, 2] = torch.nan
    mask = torch.arange(50) % 4 != 0
    got = passes.nearest_and_sums(z, table, mask=mask)
    indices, score = kernels.nearest(z, table)
    assert torch.equal(got.indices, indices)
    assert torch.equal(got.score.nan_to_num(-1), score.nan_to_num(-1))
    counted = mask & z.isfinite().all(1)
    assert torch.equal(got.counts, torch.bincount(indices[counted], minlength=20).float())
    torch.testing.assert_close(got.sums, torch.zeros(20, 6).index_add_(0, indices[counted], z[counted]))
    assert passes.nearest_and_sums(z, table).counts.sum() == 49


def test_a_search_with_its_normaliser() -> None:
    z, table, _, _ = problem(masked=False)
    z[3, 1] = torch.inf
    indices, score, normaliser = passes.nearest_and_normaliser(z, table, temperature=torch.tensor(0.7))
    kept = z.isfinite().all(1)
    assert torch.equal(indices[kept], oracle(z[kept], table)[0])
    distance = (z.double()[:, None] - table.double()).square().sum(-1)
    expected = torch.logsumexp(-distance / 0.7, 1)
    torch.testing.assert_close(normaliser[kept].double(), expected[kept], rtol=1e-5, atol=1e-4)
    assert normaliser[3].isnan()
    # The weight of the chosen code, from the two.
    weight = (-score / 0.7 - normaliser).exp()[kept]
    torch.testing.assert_close(weight.double(), torch.softmax(-distance[kept] / 0.7, 1).amax(1), rtol=1e-4, atol=1e-5)


def test_operators_pass_opcheck() -> None:
    z, table, indices, row = problem(10, 12, 3)
    z = torch.nan_to_num(z, 0, 0, 0)
    assert row is not None
    torch.library.opcheck(torch.ops.steadyvq.nearest_and_normaliser.default, (z, table, torch.tensor(0.5)))
    torch.library.opcheck(torch.ops.steadyvq.nearest_and_sums.default, (z, table, row > 0, True))
    torch.library.opcheck(torch.ops.steadyvq.sums_by_code.default, (indices, z.clone().requires_grad_(), row, 12))
    torch.library.opcheck(torch.ops.steadyvq.select.default, (table.clone().requires_grad_(), indices))
