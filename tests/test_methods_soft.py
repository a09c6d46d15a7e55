# SPDX-License-Identifier: Apache-2.0
"""Methods with a softmax over all codes, draws, balanced assignment or matched distributions, against dense forms."""

import math

import pytest
import torch
from cases import build, normal
from torch import Tensor

import steadyvq
from steadyvq import kernels
from steadyvq.kernels import soft
from steadyvq.kernels.sinkhorn import sinkhorn
from steadyvq.quantizers import noise

N, K, D = 21, 9, 4


def small(name: str, **overrides: object) -> steadyvq.Quantizer:
    """A small quantizer in float64 with codes among standard normal latents."""
    vq = steadyvq.build_quantizer(name, num_codes=K, dim=D, **overrides).double()
    vq.codes.base.data.copy_(normal(K, D, seed=11).double())
    return vq


def latents(seed: int = 3, count: int = N) -> Tensor:
    return normal(count, D, seed=seed).double()


def scores(z: Tensor, table: Tensor, score: str) -> Tensor:
    return z @ table.T if score == "dot" else -(z[:, None] - table[None]).square().sum(-1)


def entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(-1)


class TestLargestProduct:
    @pytest.mark.parametrize("backend", ["streaming", "reference"])
    @pytest.mark.parametrize("offset", [0.0, 1e3])
    def test_equals_a_loop_and_does_not_depend_on_the_batch(self, backend, offset):
        z, table = normal(50, 16, seed=1) + offset, normal(300, 16, seed=2)
        table[7] = table[200]
        with kernels.use_backend(backend):
            indices, score = kernels.nearest(z, table, metric="dot")
            alone = torch.cat([kernels.nearest(row[None], table, metric="dot")[0] for row in z])
        products = (z[:, None].double() * table[None].double()).sum(-1)
        torch.testing.assert_close(-score.double(), products.amax(1), rtol=1e-6, atol=1e-6)
        assert torch.equal(indices, products.argmax(1))
        assert torch.equal(indices, alone)
        assert (indices != 200).all()

    def test_near_ties_are_settled_in_double(self):
        z = normal(64, 8, seed=3) * 1e3
        table = normal(1, 8, seed=4) + 1e-7 * normal(500, 8, seed=5)
        indices, _ = kernels.nearest(z, table, metric="dot")
        with kernels.use_backend("reference"):
            assert torch.equal(indices, kernels.nearest(z, table, metric="dot")[0])


class TestIndexBackpropagation:
    @pytest.mark.parametrize("score", ["dot", "l2"])
    @pytest.mark.parametrize("tau", [0.25, 1.0, 4.0])
    def test_gradients_equal_the_dense_form(self, score, tau):
        vq = small(
            "ibq",
            temperature=tau,
            assign=score,
            estimator={"index": {"score": score}},
            losses={"index": {"weight": 0.7, "score": score}, "entropy": None, "commitment": 0.9, "codebook": 0.3},
        )
        z = latents().requires_grad_()
        upstream = latents(seed=4)
        out = vq(z)
        grads = torch.autograd.grad(out.loss + (out.z_q * upstream).sum(), (z, vq.codes.base))

        x, table = z.detach().requires_grad_(), vq.codebook().requires_grad_()
        ell = scores(x, table, score)
        p = (ell / tau).softmax(1)
        hard = torch.nn.functional.one_hot(ell.argmax(1), K).double()
        z_q = (hard + p - p.detach()) @ table
        picked = hard @ table
        loss = 0.7 * (z_q - x).square().mean() + 0.9 * (picked.detach() - x).square().mean()
        loss = loss + 0.3 * (picked - x.detach()).square().mean()
        dense = torch.autograd.grad(loss + (z_q * upstream).sum(), (x, table))
        torch.testing.assert_close(out.loss, loss)
        assert torch.equal(out.indices, ell.argmax(1))
        for a, b in zip(grads, dense, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)

    def test_many_blocks_in_single_precision(self):
        z, table = normal(700, 8, seed=1).requires_grad_(), normal(3000, 8, seed=2).requires_grad_()
        upstream = normal(700, 8, seed=3)
        out = soft.one_hot_carrier(z, table, temperature=torch.tensor(1.0), score="dot")
        grads = torch.autograd.grad((out * upstream).sum(), (z, table))
        x, e = z.detach().double().requires_grad_(), table.detach().double().requires_grad_()
        p = (x @ e.T).softmax(1)
        dense = torch.autograd.grad(((p @ e.detach()) * upstream).sum(), (x, e))
        assert (out == 0).all()
        for a, b in zip(grads, dense, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))

    def test_every_code_receives_a_gradient(self):
        vq = small("ibq", losses={"commitment": None, "codebook": None, "entropy": None})
        z = latents(count=3)
        vq(z).z_q.sum().backward()
        assert (vq.codes.base.grad != 0).any(1).all()

    def test_tokens_are_the_largest_products_and_stay_so_when_baked(self):
        vq = small("ibq")
        z = latents(count=200)
        expected = (z @ vq.codebook().T).argmax(1)
        assert torch.equal(vq.encode(z), expected)
        error = (z - vq.codebook()[expected]).square().sum(1)
        torch.testing.assert_close(vq(z).assignment.distance, error)
        baked = vq.bake()
        again = steadyvq.build_quantizer(**baked.spec).double()
        again.load_state_dict(baked.state_dict())
        assert torch.equal(again.encode(z), expected)
        assert not torch.equal(expected, torch.cdist(z, vq.codebook()).argmin(1))

    def test_memory_holds_no_matrix_of_all_pairs(self):
        """The largest tensor of a step is far below N x K."""
        seen = [0]

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                for tensor in out if isinstance(out, tuple | list) else [out]:
                    if isinstance(tensor, Tensor):
                        seen[0] = max(seen[0], tensor.numel())
                return out

        rows, codes = 4096, 4096
        z, table = normal(rows, 4).requires_grad_(), normal(codes, 4, seed=1).requires_grad_()
        with Watch():
            out = soft.one_hot_carrier(z, table, temperature=torch.tensor(1.0))
            out.sum().backward()
            soft.entropies(z, table, temperature=torch.tensor(1.0))
        assert seen[0] <= 1 << 20 < rows * codes / 8


class TestEntropy:
    @pytest.mark.parametrize("score", ["dot", "l2"])
    @pytest.mark.parametrize(("sample", "batch"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.8)])
    @pytest.mark.parametrize("masked", [False, True])
    def test_against_the_dense_form(self, score, sample, batch, masked):
        options = {"weight": 1.0, "temperature": 0.7, "sample": sample, "batch": batch, "score": score}
        vq = small("ibq", losses={"index": None, "commitment": None, "codebook": None, "entropy": options})
        z = latents().requires_grad_()
        valid = torch.arange(N) % 3 > 0 if masked else torch.ones(N, dtype=torch.bool)
        out = vq(z, valid if masked else None)
        grads = torch.autograd.grad(out.loss, (z, vq.codes.base))
        x, table = z.detach().requires_grad_(), vq.codebook().requires_grad_()
        p = (scores(x[valid], table, score) / 0.7).softmax(1)
        loss = sample * entropy(p).mean() - batch * entropy(p.mean(0))
        torch.testing.assert_close(out.loss, loss)
        for a, b in zip(grads, torch.autograd.grad(loss, (x, table)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)

    def test_sharp_softmax_of_the_paper_stays_finite(self):
        vq = build("ibq")
        z = (10 * normal(64, vq.dim)).requires_grad_()
        out = vq(z)
        out.loss.backward()
        assert all(value.isfinite().all() for value in (out.loss, z.grad, vq.codes.base.grad))


class TestGumbel:
    @pytest.mark.parametrize("score", ["l2", "dot"])
    @pytest.mark.parametrize("fraction", [1.0, 0.4])
    def test_against_the_dense_form(self, score, fraction):
        options = {"score": score, "fraction": fraction}
        vq = small(
            "gumbel",
            assign={"gumbel": options},
            estimator={"gumbel": options},
            temperature=0.5,
            losses={"prior": {"weight": 0.3, "score": score}},
            seed=4,
        )
        z = latents().requires_grad_()
        upstream = latents(seed=4)
        out = vq(z)
        grads = torch.autograd.grad(out.loss + (out.z_q * upstream).sum(), (z, vq.codes.base))

        source = noise.Noise.at(4, torch.tensor(0), noise.positions(torch.tensor(0), N, 1))
        g = source.gumbel(K, noise.ASSIGNMENT)
        drawn = soft.Gumbel(source.stream(noise.ASSIGNMENT), source.rows, fraction).perturbed()
        assert drawn.all() == (fraction == 1.0)
        assert drawn.any()
        x, table = z.detach().requires_grad_(), vq.codebook().requires_grad_()
        ell = scores(x, table, score)
        noisy = ell + g * drawn[:, None]
        assert torch.equal(out.indices, noisy.argmax(1))
        p = (noisy / 0.5).softmax(1)
        hard = torch.nn.functional.one_hot(noisy.argmax(1), K).double()
        z_q = (hard + p - p.detach()) @ table
        loss = 0.3 * (math.log(K) - entropy(ell.softmax(1)).mean())
        torch.testing.assert_close(out.loss, loss)
        for a, b in zip(grads, torch.autograd.grad(loss + (z_q * upstream).sum(), (x, table)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert torch.equal(out.z_q, vq.decode(out.indices))
        assert torch.equal(vq.eval()(z).indices, ell.argmax(1))

    def test_draws_follow_the_softmax(self):
        table = normal(5, 2, seed=1).double()
        z = normal(1, 2, seed=2).double().expand(20_000, 2)
        key = torch.tensor(12345)
        drawn = soft.gumbel_argmax(z, table, soft.Gumbel(key, torch.arange(20_000)))
        p = scores(z[:1], table, "l2").softmax(1)[0]
        counts = torch.bincount(drawn, minlength=5) / 20_000
        assert ((counts - p).abs() < 4.5 * (p * (1 - p) / 20_000).sqrt()).all()

    def test_the_share_of_draws_is_the_fraction(self):
        chosen = soft.Gumbel(torch.tensor(3), torch.arange(10_000), 0.4).perturbed()
        assert abs(float(chosen.double().mean()) - 0.4) < 4 * math.sqrt(0.24 / 10_000)

    def test_usage_prior_against_loops(self):
        vq = small("regvq", losses={"commitment": None, "codebook": None, "usage_prior": {"weight": 1.0}})
        z = latents().requires_grad_()
        out = vq(z)
        grads = torch.autograd.grad(out.loss, (z, vq.codes.base))
        hits = torch.bincount(out.indices, minlength=K).double()
        value = sum(float(h) / N * math.log(K * float(h) / N) for h in hits if h > 0)
        assert float(out.loss) == pytest.approx(value)
        assert (hits == 0).any()
        x, table = z.detach().requires_grad_(), vq.codebook().requires_grad_()
        p = scores(x, table, "l2").softmax(1)
        slope = (hits.clamp_min(0.1) / N).log() + 1 + math.log(K)
        for a, b in zip(grads, torch.autograd.grad((slope * p.mean(0)).sum(), (x, table)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


class TestSteps:
    def test_diveq_against_loops(self):
        vq = small("diveq", estimator={"diveq": {"variance": 0.3}}, seed=2)
        z = latents().requires_grad_()
        upstream = latents(seed=4)
        out = vq(z)
        grads = torch.autograd.grad((out.z_q * upstream).sum(), (z, vq.codes.base))
        source = noise.Noise.at(2, torch.tensor(0), noise.positions(torch.tensor(0), N, 1))
        n = source.normal(D, noise.ESTIMATOR)
        grad_z, grad_e = torch.zeros(N, D).double(), torch.zeros(K, D).double()
        for i in range(N):
            error = vq.codebook()[out.indices[i]] - z[i].detach()
            v = error + math.sqrt(0.3) * n[i]
            u = v / v.norm()
            torch.testing.assert_close(out.z_q[i].detach(), z[i].detach() + error.norm() * u)
            along = (upstream[i] @ u) * error / error.norm()
            grad_z[i] = upstream[i] - along
            grad_e[out.indices[i]] += along
        torch.testing.assert_close(grads[0], grad_z)
        torch.testing.assert_close(grads[1], grad_e)
        assert torch.equal(vq.eval()(z).z_q, vq.decode(vq(z).indices))
        exact = small("diveq", estimator={"diveq": {"variance": 0.0}})
        torch.testing.assert_close(exact(z).z_q, exact.decode(exact(z).indices))

    def test_noise_substitution_against_loops(self):
        vq = small("noise_substitution", seed=2)
        z = latents().requires_grad_()
        upstream = latents(seed=4)
        out = vq(z)
        grads = torch.autograd.grad((out.z_q * upstream).sum(), (z, vq.codes.base))
        source = noise.Noise.at(2, torch.tensor(0), noise.positions(torch.tensor(0), N, 1))
        n = source.normal(D, noise.ESTIMATOR)
        x, table = z.detach().requires_grad_(), vq.codebook().requires_grad_()
        rows = [x[i] + (table[j] - x[i]).norm() * n[i] / n[i].norm() for i, j in enumerate(out.indices.tolist())]
        value = torch.stack(rows)
        torch.testing.assert_close(out.z_q, value)
        for a, b in zip(grads, torch.autograd.grad((value * upstream).sum(), (x, table)), strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close((out.z_q - z).norm(dim=1), (vq.decode(out.indices) - z).norm(dim=1))

    @pytest.mark.parametrize("name", ["diveq", "noise_substitution"])
    def test_a_latent_on_its_code_has_a_finite_gradient(self, name):
        vq = small(name)
        z = vq.codebook()[:3].clone().requires_grad_()
        out = vq(z)
        torch.testing.assert_close(out.z_q, z)
        out.z_q.sum().backward()
        assert torch.equal(z.grad, torch.ones_like(z))
        assert vq.codes.base.grad.isfinite().all()


def dense_sinkhorn(z: Tensor, table: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The plan by its definition: rows are codes, columns are latents."""
    cost = (z[:, None] - table[None]).norm(dim=-1)
    cost = (cost - cost.mean()) / cost.std()
    q = torch.exp(-epsilon * (cost - cost.min())).T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / len(table)
        q = q / q.sum(0, keepdim=True) / len(z)
    return q.T


class TestBalanced:
    @pytest.mark.parametrize(("epsilon", "iterations"), [(10.0, 5), (3.0, 1), (3.0, 2), (25.0, 20)])
    def test_equals_the_dense_plan(self, epsilon, iterations):
        z, table = 2 + latents(count=400), normal(37, D, seed=8).double()
        found = sinkhorn(z, table, epsilon=epsilon, iterations=iterations, reduce=lambda x: x)
        plan = dense_sinkhorn(z, table, epsilon, iterations)
        assert torch.equal(found, plan.argmax(1))
        assert not torch.equal(found, torch.cdist(z, table).argmin(1))

    def test_far_latents_do_not_underflow(self):
        z, table = 500 + latents(count=300), normal(16, D, seed=8).double()
        found = sinkhorn(z, table, epsilon=10.0, iterations=5, reduce=lambda x: x)
        assert torch.equal(found, dense_sinkhorn(z, table, 10.0, 5).argmax(1))
        assert len(found.unique()) > 2 * len(torch.cdist(z, table).argmin(1).unique())

    def test_training_balances_and_evaluation_does_not(self):
        vq = small("optvq", codebook="free")
        z = 1 + latents(count=500)
        used = torch.bincount(vq(z).indices, minlength=K)
        assert used.min() > 0.5 * 500 / K
        assert used.max() < 2 * 500 / K
        assert torch.bincount(vq.eval()(z).indices, minlength=K).min() < 0.2 * 500 / K

    def test_masked_latents_take_no_part_in_the_balance(self):
        vq = small("optvq", codebook="free")
        z = 1 + latents(count=300)
        mask = torch.rand(300, generator=torch.Generator().manual_seed(3)) < 0.5
        assert torch.equal(vq(z, mask).indices[mask], vq(z[mask]).indices)

    def test_losses_are_those_of_the_balanced_code(self):
        vq = small("optvq", codebook="free")
        z = latents()
        out = vq(z)
        error = (z - vq.codebook()[out.indices]).square()
        torch.testing.assert_close(out.loss, 1.25 * error.mean())
        torch.testing.assert_close(out.assignment.distance, error.sum(1))

    def test_micro_batches_are_named_in_the_warning(self):
        vq = small("optvq")
        assert vq.batch_coupled == ("assignment",)
        with pytest.warns(UserWarning, match="the assignment couples all"):
            vq.update([vq(latents()), vq(latents())])


class TestMatching:
    def test_wasserstein_against_its_definition(self):
        vq = small("wasserstein_vq", losses={"commitment": None, "codebook": None, "wasserstein": {"weight": 1.0}})
        z = latents() @ torch.diag(torch.tensor([3.0, 1.0, 0.5, 2.0]).double()) + 1
        out = vq(z)
        out.loss.backward()

        def power(m: Tensor, e: float) -> Tensor:
            values, vectors = torch.linalg.eigh(m)
            return vectors @ torch.diag(values**e) @ vectors.T

        table = vq.codebook().requires_grad_()
        a, b = 0.25 * torch.cov(z.T, correction=0), torch.cov(table.T, correction=0)
        root = power(a, 0.5)
        w = (z.mean(0) - table.mean(0)).square().sum() + (a + b - 2 * power(root @ b @ root, 0.5)).trace()
        torch.testing.assert_close(out.loss, w / D)
        (grad,) = torch.autograd.grad(w / D, table)
        torch.testing.assert_close(vq.codes.base.grad, grad)

    def test_wasserstein_is_zero_where_it_must_be(self):
        vq = small("wasserstein_vq", losses={"commitment": None, "codebook": None, "wasserstein": {"weight": 1.0}})
        table = vq.codebook()
        z = table.mean(0) + 2 * (table - table.mean(0))
        out = vq(z)
        out.loss.backward()
        assert out.loss.abs() < 1e-9
        assert vq.codes.base.grad.abs().max() < 1e-9

    def mmd(self, z: Tensor, table: Tensor) -> Tensor:
        z = z.mean(0) + 0.5 * (z - z.mean(0))
        pool = torch.cat([z, table.detach()])
        b = ((pool[:, None] - pool[None]).square().sum(-1) / math.sqrt(D)).mean()

        def k(x: Tensor, y: Tensor) -> Tensor:
            d = (x[:, None] - y[None]).square().sum(-1) / math.sqrt(D)
            return (torch.exp(-d / b) + torch.exp(-d / (2 * b))).mean()

        return k(z, z) + k(table, table) - 2 * k(z, table)

    def test_mmd_is_the_kernel_form_in_the_mean(self):
        """Random features: the mean over draws comes to the exact value and gradient."""
        parts = {"commitment": None, "codebook": None, "mmd": {"weight": 1.0, "features": 4000}}
        z = 1 + latents()
        values, grads = [], []
        for seed in range(40):
            vq = small("mmd_vq", losses=parts, seed=seed)
            out = vq(z)
            out.loss.backward()
            values.append(out.loss.detach())
            grads.append(vq.codes.base.grad)
        table = vq.codebook().requires_grad_()
        exact = self.mmd(z, table)
        (grad,) = torch.autograd.grad(exact, table)
        spread = torch.stack(values).std() / math.sqrt(40)
        assert (torch.stack(values).mean() - exact).abs() < 4 * spread
        assert spread < 0.02 * exact
        mean = torch.stack(grads).mean(0)
        assert (mean - grad).norm() < 0.03 * grad.norm()

    def test_mmd_against_its_features(self):
        """Value and gradient of one draw, by autograd through the features."""
        parts = {"commitment": None, "codebook": None, "mmd": {"weight": 1.0, "features": 7}}
        vq = small("mmd_vq", losses=parts)
        z = latents()
        out = vq(z)
        out.loss.backward()
        draws = noise.Noise(noise.Noise.at(0, torch.tensor(0), torch.arange(1)).key, torch.arange(14)).normal(
            D, noise.LOSS
        )
        table = vq.codebook().requires_grad_()
        x = z.mean(0) + 0.5 * (z - z.mean(0))
        pool = torch.cat([x, table.detach()])
        b = ((pool[:, None] - pool[None]).square().sum(-1) / math.sqrt(D)).mean()
        value = 0.0
        for f in range(14):
            c = b * math.sqrt(D) * (1 if f < 7 else 2)
            w = draws[f] * (2 / c).sqrt()
            value = value + ((x @ w).cos().mean() - (table @ w).cos().mean()) ** 2 / 7
            value = value + ((x @ w).sin().mean() - (table @ w).sin().mean()) ** 2 / 7
        torch.testing.assert_close(out.loss, value)
        torch.testing.assert_close(vq.codes.base.grad, torch.autograd.grad(value, table)[0])

    @pytest.mark.parametrize("name", ["mmd_vq", "wasserstein_vq"])
    def test_codes_reach_the_spread_of_the_latents(self, name):
        """Codes that start elsewhere come to mean and spread of the contracted latents by this loss alone."""
        parts = {"commitment": None, "codebook": None}
        vq = steadyvq.build_quantizer(name, num_codes=64, dim=D, losses=parts)
        vq.codes.set_rows_(2 + 0.3 * normal(64, D, seed=2))
        optimizer = torch.optim.Adam(vq.parameters(), 0.02)
        z = 3 + 2 * normal(500, D)
        for _ in range(150):
            out = vq(z)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            vq.update(out, optimizer)
        table = vq.codebook()
        assert (table.mean(0) - 3).abs().max() < 0.3
        assert 0.7 < table.std(0).mean() < 1.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": {"diveq": {"varance": 1.0}}}, "did you mean 'variance'"),
        ({"estimator": {"rotation": {"angle": 1.0}}}, "has no such settings"),
        ({"assign": {"sinkhorn": {"iterations": 2.5}}}, "iterations of assignment 'sinkhorn' is 2.5"),
        ({"assign": {"sinkhorm": {}}}, "did you mean 'sinkhorn'"),
        ({"assign": {"l2": {}, "dot": {}}}, "one name"),
    ],
)
def test_settings_of_functions_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        steadyvq.build_quantizer("vq", num_codes=K, dim=D, **options)


def test_operators_pass_opcheck():
    z, table = latents(count=12).requires_grad_(), normal(K, D, seed=8).double().requires_grad_()
    key, rows, tau, row = torch.tensor(5), torch.arange(12), torch.tensor(0.7).double(), torch.ones(12).double()
    ops, plain = torch.ops.steadyvq, (z.detach(), table.detach())
    indices = torch.arange(12) % K
    potential = torch.zeros(K).double()
    calls = [
        (ops.one_hot_carrier, (z, table, tau, key, rows, 0.5, True)),
        (ops.one_hot_carrier_backward, (z.detach(), *plain, tau, key, rows, 0.5, False)),
        (ops.gumbel_argmax, (*plain, key, rows, 0.5, False)),
        (ops.softmax_entropies, (*plain, tau, row, True)),
        (ops.softmax_entropy_gradient, (*plain, tau, row, potential, 1.0, -1.0, False)),
        (ops.pull, (*plain, indices, tau, row, 0.3, False)),
        (ops.pull, (*plain, indices, tau, row, 0.3, True)),
        (ops.kernel_average, (plain[1], plain[1], plain[1], tau, torch.arange(K) > 3, True)),
        (ops.distance_moments, (*plain, row)),
        (ops.sinkhorn_columns, (*plain, row, tau, tau, potential, True)),
        (ops.sinkhorn_argmax, (*plain, tau, potential)),
        (ops.nearest, (*plain, True)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)


def test_noise_of_single_precision_draws_alike_in_every_cutting():
    """Draws of one batch and of its parts, in float32 and many blocks."""
    z, table = normal(300, 6, seed=1), normal(9000, 6, seed=2)
    assert soft.rows_per_block(table) < 150
    key, rows = torch.tensor(9), torch.arange(300)
    whole = soft.gumbel_argmax(z, table, soft.Gumbel(key, rows))
    parts = [soft.gumbel_argmax(z[i : i + 77], table, soft.Gumbel(key, rows[i : i + 77])) for i in range(0, 300, 77)]
    assert torch.equal(whole, torch.cat(parts))
