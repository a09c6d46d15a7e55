# SPDX-License-Identifier: Apache-2.0
"""The contrastive loss of CVQ-VAE against a loop over its codes."""

import pytest
import torch
from cases import normal
from torch import Tensor

import steadyvq
from steadyvq.kernels.contrast import contrast

D = 4


def codebook(num_codes: int, **contrastive: object) -> steadyvq.Quantizer:
    losses = {"commitment": None, "codebook": None, "contrastive": {"weight": 1.0, **contrastive}}
    vq = steadyvq.build_quantizer("cvq", num_codes=num_codes, dim=D, losses=losses).double()
    vq.codes.base.data.copy_(normal(num_codes, D, seed=11).double())
    return vq


def by_loops(z: Tensor, table: Tensor, *, score: str = "l2", tau: float = 0.07, negatives: float = 0.5) -> Tensor:
    """The mean over codes of the cross-entropy of the near latents among the far ones."""
    near, far = max(1, len(z) // len(table)), int(len(z) * negatives)
    total = torch.zeros((), dtype=z.dtype)
    for e in table:
        s = [-(x - e).square().sum() if score == "l2" else x @ e / x.norm() / e.norm() for x in z]
        s.sort(key=lambda value: value.item())
        positive = sum(s[len(s) - near :]) / near
        rest = sum(torch.exp((value - positive) / tau) for value in s[:far])
        total = total + torch.log(1 + rest)
    return total / len(table)


class TestCodeContrast:
    @pytest.mark.parametrize("score", ["l2", "cosine"])
    @pytest.mark.parametrize(("count", "num_codes"), [(21, 9), (40, 9), (6, 9), (2, 3), (41, 1)])
    def test_value_and_gradient_against_loops(self, score, count, num_codes):
        """N above and below K; with a temperature at which near and far both matter."""
        vq = codebook(num_codes, score=score, temperature=1.5)
        z = (1 + normal(count, D, seed=3)).double().requires_grad_()
        out = vq(z)
        out.loss.backward()
        table = vq.codebook().requires_grad_()
        expected = by_loops(z.detach(), table, score=score, tau=1.5)
        torch.testing.assert_close(out.loss, expected)
        (grad,) = torch.autograd.grad(expected, table)
        torch.testing.assert_close(vq.codes.base.grad, grad, rtol=1e-9, atol=1e-12)
        assert grad.norm() > 1e-3
        assert z.grad is None, "it acts on the codes alone"

    def test_settings_of_the_official_class(self):
        vq = codebook(5)
        z = 0.3 * normal(31, D, seed=3).double()
        vq.codes.base.data.mul_(0.3)
        torch.testing.assert_close(vq(z).loss, by_loops(z, vq.codebook(), tau=0.07, negatives=0.5))
        fewer = codebook(5, negatives=0.2, temperature=0.3)
        torch.testing.assert_close(fewer(z).loss, by_loops(z, fewer.codebook(), tau=0.3, negatives=0.2))
        assert "contrastive" not in steadyvq.build_quantizer("cvq", num_codes=5, dim=D)(z.float()).losses

    def test_latents_that_are_not_there_or_not_finite_change_nothing(self):
        vq = codebook(5, temperature=1.0)
        z = normal(30, D, seed=3).double()
        mask = torch.rand(30, generator=torch.Generator().manual_seed(0)) < 0.6
        alone = vq(z[mask]).loss
        (expected,) = torch.autograd.grad(alone, vq.codes.base)
        z[~mask] = 1e6
        out = vq(z, mask)
        torch.testing.assert_close(out.loss, alone)
        torch.testing.assert_close(torch.autograd.grad(out.loss, vq.codes.base)[0], expected)
        assert vq(z, torch.zeros(30, dtype=torch.bool)).loss == 0

    def test_many_blocks_in_single_precision(self):
        z, table = normal(4096, 8, seed=1), normal(1500, 8, seed=2).requires_grad_()
        loss = contrast(z, table, temperature=2.0)
        (grad,) = torch.autograd.grad(loss, table)
        e = table.detach().double().requires_grad_()
        s = -torch.cdist(e, z.double()).square()
        positive, negative = s.topk(2, dim=1).values.mean(1), s.topk(2048, dim=1, largest=False).values
        dense = (torch.logsumexp(torch.cat([positive[:, None], negative], 1) / 2, 1) - positive / 2).mean()
        (expected,) = torch.autograd.grad(dense, e)
        torch.testing.assert_close(loss.double(), dense, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))

    def test_compiled_and_under_autocast_it_is_the_same(self):
        vq = codebook(5, temperature=1.0).float()
        z = normal(30, D, seed=3)
        loss = vq(z).loss
        (expected,) = torch.autograd.grad(loss, vq.codes.base)
        compiled = torch.compile(vq, backend="aot_eager", fullgraph=True)(z).loss
        assert torch.equal(compiled, loss)
        assert torch.equal(torch.autograd.grad(compiled, vq.codes.base)[0], expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(vq(z).loss, loss)
        arguments = (z, vq.codebook(), torch.ones(30), 1.0, 0.5, False)
        torch.library.opcheck(torch.ops.steadyvq.contrast.default, arguments)

    def test_it_couples_the_batch_and_says_what_it_cannot_do(self):
        assert codebook(5).batch_coupled == ("contrastive",)
        with pytest.raises(ValueError, match="by 'l2' or 'cosine'"):
            codebook(5, score="dot")
        with pytest.raises(ValueError, match="temperature > 0"):
            codebook(5, temperature=0.0)
        with pytest.raises(ValueError, match="0 < negatives <= 1"):
            codebook(5, negatives=2.0)
