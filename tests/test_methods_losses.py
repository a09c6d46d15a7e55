# SPDX-License-Identifier: Apache-2.0
"""Methods that differ in loss, estimator or maintenance, each against a naive loop from its equations, in float64."""

import math

import pytest
import torch
from cases import build, normal
from torch import Tensor
from two_processes import one_step, split_step

import steadyvq
from steadyvq.kernels import hashing
from steadyvq.quantizers import noise

N, K, D = 23, 9, 4


def small(name: str, **overrides: object) -> steadyvq.Quantizer:
    """A small quantizer in float64 with codes among standard normal latents."""
    vq = steadyvq.build_quantizer(name, num_codes=K, dim=D, **overrides).double()
    vq.codes.base.data.copy_(normal(K, D, seed=11).double())
    for part in vq.maintenance.values():
        part.rows_set(vq.codebook())
    return vq


def latents(seed: int = 3, count: int = N) -> Tensor:
    return normal(count, D, seed=seed).double()


class TestNoise:
    KEY = hashing.combine(torch.tensor(5), 7)

    def test_splitmix_by_python_integers(self):
        """The finaliser, with the unbounded integers of Python cut to 64 bits."""
        whole = (1 << 64) - 1
        for start in (0, 1, 2**63 - 1, -5, 123456789):
            x = start & whole
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
            x ^= x >> 31
            assert int(hashing.mix(torch.tensor(start))) & whole == x

    def test_uniform_and_independent(self):
        u = hashing.uniform(self.KEY, torch.arange(400), torch.arange(250))
        assert 0 < u.min() < 1e-3
        assert 1 - 1e-3 < u.max() < 1
        counts = torch.histc(u, 100, 0, 1)
        chi = ((counts - 1000).square() / 1000).sum()
        assert 99 - 5 * 14.1 < chi < 99 + 5 * 14.1
        for a, b in (
            (u[:-1], u[1:]),
            (u[:, :-1], u[:, 1:]),
            (u, hashing.uniform(hashing.combine(self.KEY, 1), torch.arange(400), torch.arange(250))),
            (u[::2], u[1::2]),
            (u[:200, :200], u[:200, :200].T.clone().fill_diagonal_(0.5)),
        ):
            correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
            assert correlation.abs() < 5 / math.sqrt(a.numel())

    def test_every_seed_and_update_draws_anew(self):
        rows = torch.arange(50)
        seen = [
            noise.Noise.at(seed, torch.tensor(update), rows).uniform(20, stream)
            for seed in (0, 1, 2)
            for update in (0, 1, 2)
            for stream in (noise.ASSIGNMENT, noise.ESTIMATOR)
        ]
        flat = torch.stack([u.flatten() for u in seen])
        off = torch.corrcoef(flat) - torch.eye(len(flat)).double()
        assert off.abs().max() < 5 / math.sqrt(1000)

    def test_no_two_latents_share_a_position(self):
        first = noise.positions(torch.tensor(0), 6, 5)
        assert len(torch.cat([first, noise.positions(torch.tensor(6), 6, 5)]).unique()) == 60
        assert torch.equal(first[10:15], noise.positions(torch.tensor(2), 1, 7)[:5])

    def test_normal_and_gumbel_moments(self):
        rows, columns = torch.arange(500), torch.arange(200)
        x = hashing.normal(self.KEY, rows, columns)
        for moment, expected in ((x.mean(), 0), (x.var(), 1), ((x**4).mean(), 3)):
            assert abs(float(moment) - expected) < 0.1 * (1 + expected)
        g = hashing.gumbel(self.KEY, rows, columns)
        assert (g.mean() - 0.5772).abs() < 0.02
        assert (g.var() - math.pi**2 / 6).abs() < 0.05

    def test_single_precision_is_the_head_of_double(self):
        rows, columns = torch.arange(300), torch.arange(300)
        a = hashing.uniform(self.KEY, rows, columns, dtype=torch.float32)
        b = hashing.uniform(self.KEY, rows, columns)
        assert (a - b).abs().max() <= 2.0**-23
        assert a.min() > 0
        assert a.max() < 1

    @pytest.mark.parametrize("name", ["gumbel", "diveq", "noise_substitution"])
    def test_a_latent_meets_its_noise_wherever_it_is_cut(self, name):
        vq = build(name, channel_axis=1)
        z = normal(6, vq.dim, 5)
        whole = vq(z).z_q
        parts = []
        for first in (0, 2, 4):
            vq.first_item = first
            parts.append(vq(z[first : first + 2]).z_q)
        torch.testing.assert_close(torch.cat(parts), whole)
        vq.first_item = 1
        assert not torch.allclose(vq(z[:2]).z_q, parts[0])
        vq.first_item = 0
        padded = torch.cat([z, torch.zeros(6, vq.dim, 3)], 2)
        mask = torch.arange(8).expand(6, 8) < 5
        torch.testing.assert_close(vq(padded, mask).z_q[:, :, :5], whole)
        vq.update(vq(z))
        assert not torch.allclose(vq(z).z_q, whole), "the next update draws anew"


class TestRotation:
    def test_gradient_is_that_of_the_dense_matrix(self):
        vq = small("rotation", losses={"commitment": None, "codebook": None})
        z = latents().requires_grad_()
        upstream = latents(seed=4)
        out = vq(z)
        (out.z_q * upstream).sum().backward()
        for i in range(N):
            x, e = z[i].detach(), vq.codebook()[out.indices[i]]
            u, q = x / x.norm(), e / e.norm()
            w = (u + q) / (u + q).norm()
            rotation = torch.eye(D).double() - 2 * torch.outer(w, w) + 2 * torch.outer(q, u)
            torch.testing.assert_close(rotation @ rotation.T, torch.eye(D).double())
            scaled = e.norm() / x.norm() * rotation
            torch.testing.assert_close(scaled @ x, e)
            torch.testing.assert_close(z.grad[i], scaled.T @ upstream[i])
        assert torch.equal(out.z_q, vq.decode(out.indices))
        assert vq.codes.base.grad is None

    def test_opposite_and_zero_vectors(self):
        vq = steadyvq.build_quantizer("rotation", num_codes=1, dim=2, losses={"commitment": None, "codebook": None})
        vq.codes.set_rows_(torch.tensor([[2.0, 0.0]]))
        z = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [-1.0, 1e-8]]).requires_grad_()
        vq(z).z_q.sum().backward()
        torch.testing.assert_close(z.grad[0], torch.tensor([-2.0, 2.0]))
        torch.testing.assert_close(z.grad[1], torch.ones(2))
        assert z.grad[2].norm() == pytest.approx(2 * math.sqrt(2), rel=1e-4)

    def test_any_method_takes_it(self):
        vq = build("ema", estimator="rotation")
        z = normal(5, vq.dim).requires_grad_()
        vq(z).z_q.sum().backward()
        assert not torch.allclose(z.grad, torch.ones_like(z))


class TestKernelRule:
    @pytest.mark.parametrize("tau", [0.05, 0.7, 20.0])
    def test_against_loops(self, tau):
        vq = small("nsvq_kernel", temperature=tau, losses={"commitment": None, "kernel": {"strength": 0.4}})
        z = latents().requires_grad_()
        out = vq(z)
        tau = float(vq.temperature)
        table, value, grad = vq.codebook(), 0.0, torch.zeros(K, D).double()
        for i in range(N):
            d = [(z[i].detach() - table[j]).square().sum() for j in range(K)]
            total = sum(torch.exp(-x / tau) for x in d)
            for j in range(K):
                w = 1.0 if j == out.indices[i] else min(1.0, float(0.4 * K * torch.exp(-d[j] / tau) / total))
                value += float(w * d[j]) / (N * D)
                grad[j] += 2 * w * (table[j] - z[i].detach()) / (N * D)
        out.loss.backward()
        assert float(out.loss) == pytest.approx(value, rel=1e-10)
        torch.testing.assert_close(vq.codes.base.grad, grad)
        assert z.grad is None

    def test_the_cap_and_the_winner_matter(self):
        """Where the share of a loser times lambda K is above one, and where a winner's is below."""
        vq = small("nsvq_kernel", temperature=20.0, losses={"kernel": {"strength": 5.0}, "commitment": None})
        z = latents()
        d = torch.cdist(z, vq.codebook()).square()
        everything_one = d.sum() / (N * D)
        assert float(vq(z).loss) == pytest.approx(float(everything_one))
        vq = small("nsvq_kernel", temperature=20.0, losses={"kernel": {"strength": 1e-9}, "commitment": None})
        assert float(vq(z).loss) == pytest.approx(float(d.amin(1).sum() / (N * D)), rel=1e-6)

    def test_estimator(self):
        vq = small("nsvq_kernel", losses={"commitment": None, "kernel": None})
        z = latents().requires_grad_()
        upstream = latents(seed=5)
        out = vq(z)
        (out.z_q * upstream).sum().backward()
        assert torch.equal(z.grad, upstream)
        expected = torch.zeros(K, D).double().index_add_(0, out.indices, upstream) * 2 / (N * D)
        torch.testing.assert_close(vq.codes.base.grad, expected)

    def test_tau_halves_every_period_and_the_kernel_ends(self):
        vq = small("nsvq_kernel", maintenance={"anneal": {"period": 3}})
        seen = []
        for step in range(100):
            seen.append(float(vq.temperature))
            vq.update(vq(latents(seed=step)))
        assert seen[:7] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]
        assert seen[-1] == 1e-8
        z = latents()
        loss = vq(z).losses["kernel"]
        torch.testing.assert_close(loss, (z - vq(z).z_q).square().mean())


class TestTransport:
    @pytest.mark.parametrize("normalise", [True, False])
    def test_against_loops(self, normalise):
        parts = {"commitment": None, "codebook": None, "transport": {"weight": 0.7, "normalise": normalise}}
        vq = small("nsvq_transport", temperature=0.8, losses=parts)
        z = latents(count=8)
        out = vq(z)
        out.loss.backward()
        table, g = vq.codebook(), torch.zeros(K, D).double()
        for i in range(8):
            g[out.indices[i]] += 2 * (table[out.indices[i]] - z[i]) / (8 * D)
        selected = sorted(set(out.indices.tolist()))
        assert 1 < len(selected) < K - 1
        expected = torch.zeros(K, D).double()
        for k in range(K):
            if k not in selected:
                kernel = {j: torch.exp(-(table[k] - table[j]).square().sum() / 0.8) for j in selected}
                moved = sum(kernel[j] * g[j] for j in selected)
                expected[k] = moved / sum(kernel.values()) if normalise else moved
        torch.testing.assert_close(vq.codes.base.grad, 0.7 * expected)
        assert float(out.losses["transport"]) == pytest.approx(float(expected.square().sum() / 2))

    def test_losers_keep_their_arrangement_where_all_latents_drift_alike(self):
        """A codebook of which every second code is used follows a shift of the latents as a whole."""
        vq = small("nsvq_transport", losses={"commitment": None, "transport": {"weight": 1.0}})
        table = vq.codebook()
        z = table[: K // 2] + torch.tensor([0.01, 0, 0, 0]).double()
        vq(z).loss.backward()
        grad = vq.codes.base.grad
        torch.testing.assert_close(grad, grad[0].expand_as(grad))


class TestAnneal:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"shape": "exponential", "rate": 0.25, "period": 2, "floor": 0.1}, [2, 1, 0.5, 0.25, 0.125, 0.1]),
            ({"shape": "linear", "period": 4, "floor": 0.4}, [2, 1.6, 1.2, 0.8, 0.4, 0.4]),
            ({"shape": "cosine", "period": 2, "floor": 1.0}, [2, 1.5, 1, 1, 1, 1]),
            ({"shape": "linear", "period": 2, "floor": 1.0, "hold": 2}, [2, 2, 2, 1.5, 1, 1]),
        ],
    )
    def test_shapes(self, options, expected):
        vq = steadyvq.build_quantizer("nsvq", num_codes=K, dim=D, temperature=2.0, maintenance={"anneal": options})
        seen = []
        for _ in expected:
            seen.append(float(vq.temperature))
            vq.update(vq(normal(5, D)))
        assert seen == pytest.approx(expected)

    @pytest.mark.parametrize("options", [{"shape": "square"}, {"floor": 0.0}, {"period": 0}, {"rate": 1.5}])
    def test_nonsense_is_refused(self, options):
        with pytest.raises(ValueError, match=r"annealed|annealing needs"):
            steadyvq.build_quantizer("nsvq", num_codes=K, dim=D, maintenance={"anneal": options})


@pytest.mark.parametrize("tau", [0.3, 3.0])
def test_neural_gas_against_loops(tau):
    vq = small("neural_gas", temperature=tau, losses={"commitment": None})
    z = latents()
    out = vq(z)
    out.loss.backward()
    tau = float(vq.temperature)
    table, value, grad = vq.codebook(), 0.0, torch.zeros(K, D).double()
    for i in range(N):
        d = [(z[i] - table[j]).square().sum() for j in range(K)]
        for j in range(K):
            rank = sum(other < d[j] for other in d)
            h = math.exp(-float(rank) / tau)
            value += h * float(d[j]) / (N * D)
            grad[j] += 2 * h * (table[j] - z[i]) / (N * D)
    # Weights below e^-30 are left out.
    assert float(out.loss) == pytest.approx(value, rel=1e-10)
    torch.testing.assert_close(vq.codes.base.grad, grad, rtol=1e-8, atol=1e-10)


def test_soft_em_against_loops():
    vq = small("soft_em", temperature=0.9, maintenance={"soft_ema": {"decay": 0.8}})
    n, m = torch.ones(K).double(), vq.codebook()
    for step in range(3):
        z, table = latents(seed=step), vq.codebook()
        mass, sums = torch.zeros(K).double(), torch.zeros(K, D).double()
        for i in range(N):
            weight = torch.stack([torch.exp(-(z[i] - table[j]).square().sum() / 0.9) for j in range(K)])
            for j in range(K):
                mass[j] += weight[j] / weight.sum()
                sums[j] += weight[j] / weight.sum() * z[i]
        n, m = 0.8 * n + 0.2 * mass, 0.8 * m + 0.2 * sums
        vq.update(vq(z))
        smoothed = (n + 1e-5) / (n.sum() + K * 1e-5) * n.sum()
        torch.testing.assert_close(vq.codebook(), m / smoothed[:, None])


class TestAnchors:
    def test_against_loops(self):
        vq = small("cvq", maintenance={"anchor": {"decay": 0.9, "sharpness": 0.05}})
        p = [0.0] * K
        moves = 0
        for step in range(6):
            z, table = latents(seed=step), vq.codebook()
            out = vq(z)
            event = vq.update(out)
            expected = table.clone()
            for j in range(K):
                p[j] = 0.9 * p[j] + 0.1 * int((out.indices == j).sum()) / N
                alpha = math.exp(-p[j] * K * 0.05 / 0.1 - 1e-3)
                anchor = min(z, key=lambda x: float((x - table[j]).square().sum()))
                expected[j] = (1 - alpha) * table[j] + alpha * anchor
                moves += alpha > 0.01
            torch.testing.assert_close(vq.codebook(), expected)
            assert event["anchored"] == K
        assert moves > 0

    def test_used_codes_stay_and_unused_ones_come(self):
        vq = small("cvq")
        table = vq.codebook()
        table[K - 3 :] += 40
        vq.codes.set_rows_(table)
        vq.maintenance["anchor"].usage.fill_(1 / K)
        vq.maintenance["anchor"].usage[K - 3 :] = 0
        z = torch.cat([table[: K - 3].repeat(4, 1) + 0.01 * normal(4 * (K - 3), D).double()])
        assert vq.update(vq(z))["anchored"] == 3
        assert torch.equal(vq.codebook()[: K - 3], table[: K - 3])
        assert torch.cdist(vq.codebook()[K - 3 :], z).amin(1).max() < 0.1

    def test_random_anchors_come_from_a_pool_of_the_past(self):
        vq = small("cvq", maintenance={"anchor": {"anchors": "random"}})
        part = vq.maintenance["anchor"]
        everything, past = [], 0
        for step in range(5):
            part.usage.zero_()
            z = latents(seed=step, count=4)
            everything.append(z)
            before = vq.codebook()
            vq.update(vq(z))
            pool = torch.cat(everything)
            anchors = (vq.codebook() - before) / math.exp(-1e-3 - 0) + before
            hit = torch.bincount(vq(z).indices, minlength=K)
            near = torch.cdist(anchors, pool).amin(1)
            assert (near[part.usage == 0] < 1e-6).all()
            past += int((torch.cdist(anchors, z).amin(1)[part.usage == 0] > 1e-6).sum())
            assert hit.sum() == 4
        assert past > 0, "some anchors are latents of earlier steps"
        assert int(part.filled) == K
        assert torch.cdist(part.pool, torch.cat(everything)).amin(1).max() < 1e-9
        assert len(part.pool.unique(dim=0)) > K // 2

    def test_probabilistic_anchors_follow_the_softmax(self):
        """One code, three latents: drawn with probability exp(-D) / sum."""
        z = torch.tensor([[0.0], [1.0], [1.5]]).double()
        p = torch.softmax(-z[:, 0].square(), 0)
        counts = torch.zeros(3).double()
        for seed in range(600):
            vq = steadyvq.build_quantizer(
                "cvq",
                num_codes=2,
                dim=1,
                seed=seed,
                maintenance={"anchor": {"anchors": "probabilistic", "sharpness": 1e-9}},
            ).double()
            vq.codes.set_rows_(torch.tensor([[0.0], [90.0]]).double())
            vq.update(vq(z))
            counts[(vq.codebook()[0] - z[:, 0]).abs().argmin()] += 1
        assert ((counts / 600 - p).abs() < 4 * (p * (1 - p) / 600).sqrt()).all()

    def test_moments_of_moved_rows_are_reset(self):
        vq = small("cvq")
        optimizer = torch.optim.Adam(vq.parameters(), 1e-2)
        vq.maintenance["anchor"].usage.fill_(1.0)
        vq.maintenance["anchor"].usage[2] = 0
        vq.codes.base.data[2] += 50
        out = vq(latents())
        (out.loss + vq.codes.base.square().sum()).backward()
        optimizer.step()
        assert vq.update(out, optimizer)["anchored"] == 1
        moment = optimizer.state[vq.codes.base]["exp_avg"]
        assert (moment[2] == 0).all()
        assert (moment[:2] != 0).all()

    def test_refusals(self):
        with pytest.raises(ValueError, match="anchors cannot move the codes of a LinearCodebook"):
            steadyvq.build_quantizer("simvq", num_codes=K, dim=D, maintenance={"anchor": {}})
        with pytest.raises(ValueError, match="'closest', 'random' or 'probabilistic'"):
            steadyvq.build_quantizer("cvq", num_codes=K, dim=D, maintenance={"anchor": {"anchors": "best"}})


TWO = [
    ("rotation", {}),
    ("nsvq_kernel", {}),
    ("nsvq_transport", {}),
    ("cvq", {}),
    ("cvq", {"maintenance": {"anchor": {"anchors": "random"}}}),
    ("cvq", {"maintenance": {"anchor": {"anchors": "probabilistic"}}}),
    ("ibq", {"losses": {"entropy": {"weight": 3.0, "temperature": 1.3}}}),
    ("gumbel", {"losses": {"prior": 1.0}}),
    ("regvq", {"losses": {"usage_prior": 1.0}}),
    ("diveq", {}),
    ("noise_substitution", {}),
    ("optvq", {}),
    ("soft_em", {}),
    ("neural_gas", {}),
    ("mmd_vq", {"losses": {"mmd": 2.0}}),
    ("wasserstein_vq", {"losses": {"wasserstein": 2.0}}),
    ("ema", {}),
    ("nsvq", {"losses": {"ns": {"weight": 1.0, "per_code": True}}}),
    ("nsvq", {"temperature": {"effective_losers": 3}}),
]


@pytest.mark.parametrize(("name", "overrides"), TWO, ids=[f"{n}{i}" for i, (n, _) in enumerate(TWO)])
def test_two_processes_are_one_with_the_whole_batch(name, overrides):
    """Unequal halves, some latents masked: averaged gradients and codebooks are those of the whole batch."""
    vq = small(name, **overrides)
    one = small(name, **overrides)
    for number in range(3):
        z, upstream = latents(seed=number, count=30), latents(seed=50 + number, count=30)
        mask = torch.rand(30, generator=torch.Generator().manual_seed(number)) < 0.8
        grads, _, out = one_step(one, z, mask, upstream)
        averaged, (vq, other) = split_step(vq, z, mask, upstream, cut=11)
        for a, b in zip(averaged, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
        one.update(out)
        for (key, a), b, c in zip(
            vq.state_dict().items(), other.state_dict().values(), one.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), f"{key} differs between processes"
            torch.testing.assert_close(a, c)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("ema", {}),
        ("soft_em", {}),
        ("cvq", {}),
        ("nsvq", {"temperature": {"effective_losers": 3}}),
        ("nsvq", {"maintenance": {"replace": {"patience": 0.5}}}),
    ],
    ids=["ema", "soft_ema", "anchor", "temperature", "replace"],
)
def test_masked_latents_are_no_part_of_the_bookkeeping(name, overrides):
    masked, alone = small(name, **overrides), small(name, **overrides)
    for number in range(3):
        z = latents(seed=number, count=40)
        mask = torch.rand(40, generator=torch.Generator().manual_seed(number)) < 0.5
        masked.update(masked(z, mask))
        alone.update(alone(z[mask]))
        for (key, a), b in zip(masked.state_dict().items(), alone.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, msg=lambda said, key=key: f"{key}: {said}")
