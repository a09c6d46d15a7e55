# SPDX-License-Identifier: Apache-2.0
"""HyperVQ against naive loops on the Poincare ball, written from the equations of the paper and of its logistic regression."""

import math

import pytest
import torch
from cases import build, normal
from torch import Tensor

import steadyvq
from steadyvq.kernels import hyperbolic

N, K, D = 40, 24, 6


def small(**overrides: object) -> steadyvq.Quantizer:
    vq = steadyvq.build_quantizer("hypervq", num_codes=K, dim=D, **overrides).double()
    with torch.no_grad():
        vq.codes.base.copy_(0.6 * normal(K, D, seed=1).double())
    return vq


def latents(scale: float = 1.0) -> Tensor:
    return scale * normal(N, D, seed=2).double()


def exp_0(v: Tensor, c: float) -> Tensor:
    """The exponential map at the origin of the Poincare ball of curvature -c."""
    length = v.norm()
    return torch.tanh(math.sqrt(c) * length) * v / (math.sqrt(c) * length)


def log_0(x: Tensor, c: float) -> Tensor:
    """The logarithmic map at the origin."""
    length = x.norm()
    return torch.atanh(math.sqrt(c) * length) * x / (math.sqrt(c) * length)


def score(z: Tensor, code: Tensor, c: float) -> Tensor:
    """v_j(x) of one latent and one hyperplane with |a| = 1, as Hyperbolic Neural Networks++ writes it."""
    x, r, root = exp_0(z, c), code.norm(), math.sqrt(c)
    conformal = 2 / (1 - c * x.square().sum())
    inner = conformal * (root * x * code / r).sum() * torch.cosh(2 * root * r)
    return 2 / root * torch.asinh(inner - (conformal - 1) * torch.sinh(2 * root * r))


def scores(z: Tensor, table: Tensor, c: float) -> Tensor:
    return torch.stack([torch.stack([score(row, code, c) for code in table]) for row in z])


@pytest.mark.parametrize("c", [1.0, 0.25, 3.0])
def test_tokens_are_the_largest_scores_on_the_ball(c):
    vq, z = small(curvature=c), latents()
    with torch.no_grad():
        vq.codes.base.mul_(0.5 / math.sqrt(c))
    out = vq(z)
    expected = scores(z, vq.codebook(), c).argmax(1)
    assert len(expected.unique()) >= 5
    assert torch.equal(out.indices, expected)
    assert torch.equal(out.z_q, vq.codebook()[expected])
    nearest = (z[:, None] - vq.codebook()[None]).square().sum(-1).argmin(1)
    assert not torch.equal(expected, nearest)


def test_a_code_is_the_point_of_its_hyperplane():
    """p_j = exp_0(r_j a^_j) lies on it: its score is 0; and log_0(p_j) is the row of the table."""
    for code in small().codebook():
        assert abs(score(code, code, 1.0)) < 1e-6
        torch.testing.assert_close(log_0(exp_0(code, 1.0), 1.0), code)


@pytest.mark.parametrize("c", [1.0, 0.5])
@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_gradients_are_those_of_the_softmax_on_the_ball(c, tau):
    vq, z = small(curvature=c, temperature=tau), latents(0.5).requires_grad_()
    upstream = normal(N, D, seed=3).double()
    out = vq(z)
    got = torch.autograd.grad((out.z_q * upstream).sum(), (z, vq.codes.base))
    table = vq.codes.base.detach().clone().requires_grad_()
    p = (scores(z, table, c) / vq.temperature).softmax(1)
    one_hot = torch.nn.functional.one_hot(out.indices, K).double()
    expected = torch.autograd.grad((((one_hot + p - p.detach()) @ table) * upstream).sum(), (z, table))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    assert (got[1] != 0).all(), "every code hears the decoder"


def test_losses_and_their_weights():
    vq, z = small(), latents().requires_grad_()
    out = vq(z)
    error = z.detach() - vq.codebook()[out.indices]
    torch.testing.assert_close(out.loss, 1.25 * error.square().mean())
    (grad,) = torch.autograd.grad(out.loss, z)
    torch.testing.assert_close(grad, 0.25 * 2 * error / error.numel())


def test_blocks_of_latents_give_the_same_gradient():
    vq = small()
    z = normal(1200, D, seed=4).double().requires_grad_()
    leaves = [z, vq.codes.base]
    whole = torch.autograd.grad((vq(z).z_q * z.detach().sin()).sum(), leaves)
    parts = [
        torch.autograd.grad((vq(x).z_q * x.detach().sin()).sum(), [x, vq.codes.base])
        for x in (part.clone().requires_grad_() for part in z.detach().split(100))
    ]
    torch.testing.assert_close(whole[0], torch.cat([by_latents for by_latents, _ in parts]))
    torch.testing.assert_close(whole[1], torch.stack([by_codes for _, by_codes in parts]).sum(0))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 5.0, 30.0, 1e4])
def test_scores_and_gradients_are_finite_at_every_length(scale):
    """On the edge of the ball in float32, where exp_0 rounds to the edge itself, and at the origin."""
    vq = build("hypervq")
    z = (scale * normal(20, 6)).requires_grad_()
    out = vq(z)
    (out.z_q.square().sum() + out.loss).backward()
    assert z.grad.isfinite().all()
    assert vq.codes.base.grad.isfinite().all()
    far = small().float()
    with torch.no_grad():
        far.codes.base.mul_(torch.linspace(0, 200, K)[:, None])
    out = far(z.detach().requires_grad_())
    out.z_q.square().sum().backward()
    assert far.codes.base.grad.isfinite().all()


def test_single_precision_scores_are_those_of_double_precision_far_out():
    """The form with logarithms and the plain one agree where both hold, and with float64 beyond."""
    z, table = latents(4.0), small().codebook()
    dense = scores(latents(1.0), table, 1.0)
    for factor in (1.0, 4.0):
        x = latents(factor)
        q, k = hyperbolic.latent_coordinates(x, 1.0), hyperbolic.code_coordinates(table, 1.0)
        value, _ = hyperbolic._asinh(q[:, :-1] @ k[:, :-1].t(), q[:, -1:] + k[:, -1])
        if factor == 1.0:
            torch.testing.assert_close(2 * value, dense, rtol=1e-9, atol=1e-9)
        s, t = 2 * x.norm(dim=1)[:, None], 2 * table.norm(dim=1)
        cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(table).t()
        plain = torch.sinh(s) * cosine * torch.cosh(t) - torch.cosh(s) * torch.sinh(t)
        torch.testing.assert_close(value, torch.asinh(plain), rtol=1e-7, atol=1e-7)
        q32, k32 = hyperbolic.latent_coordinates(x.float(), 1.0), hyperbolic.code_coordinates(table.float(), 1.0)
        single, _ = hyperbolic._asinh(q32[:, :-1] @ k32[:, :-1].t(), q32[:, -1:] + k32[:, -1])
        torch.testing.assert_close(single.double(), value, rtol=1e-3, atol=1e-2)
    assert z.norm(dim=1).max() > 14


def test_the_nearer_of_two_hyperplanes_in_a_direction_wins():
    vq = small()
    with torch.no_grad():
        vq.codes.base[1] = 2 * vq.codes.base[0]
    indices = vq(vq.codebook()[:1] * torch.linspace(0.1, 5, 30)[:, None].double()).indices
    assert (indices != 1).all()


def test_bake_keeps_the_curvature():
    vq = small(curvature=2.5)
    baked = vq.bake()
    z = latents()
    again = steadyvq.build_quantizer(**baked.spec).double()
    again.load_state_dict(baked.state_dict())
    assert torch.equal(vq(z).indices, again(z).indices)
    assert baked.spec["assign"] == {"hyperbolic": {"curvature": 2.5}}
    assert not torch.equal(vq(z).indices, small(curvature=0.05)(z).indices)


@pytest.mark.parametrize("curvature", [0, -1.0, float("inf"), "1", True])
def test_curvature_is_checked(curvature):
    with pytest.raises(ValueError, match="needs a positive number"):
        steadyvq.build_quantizer("hypervq", num_codes=8, dim=2, curvature=curvature)


def test_operator_passes_opcheck():
    z, table = normal(7, 3).double().requires_grad_(), normal(5, 3, seed=1).double().requires_grad_()
    q, k = hyperbolic.latent_coordinates(z, 1.0), hyperbolic.code_coordinates(table, 1.0)
    args = (q.detach().requires_grad_(), k.detach().requires_grad_(), table.detach(), torch.tensor(1.0), 1.0)
    torch.library.opcheck(torch.ops.steadyvq.hyperbolic_carrier.default, args)
