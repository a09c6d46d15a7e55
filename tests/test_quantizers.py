# SPDX-License-Identifier: Apache-2.0
"""Every registered quantizer against the shared contract, and each preset against a naive loop from its equations."""

import copy

import pytest
import torch
from cases import NAMES, build, normal, seen, state
from torch import Tensor

import steadyvq
from steadyvq.quantizers import Quantized, VectorQuantizer, compose
from steadyvq.quantizers.initialise import seed_plus_plus
from steadyvq.quantizers.registry import methods
from steadyvq.training.average import WeightAverage

K, D = 24, 6


def _losses(name: str) -> dict[str, object]:
    vq = steadyvq.build_quantizer(name, num_codes=K, dim=D)
    assert isinstance(vq, VectorQuantizer)
    return vq.losses


class TestEquations:
    def test_commitment_and_codebook_against_loops(self):
        vq = build("vq")
        z = normal(30, D).requires_grad_()
        out = vq(z)
        table = vq.codes.base
        error = sum((z[i] - table[out.indices[i]]).detach().square().sum() for i in range(30)) / (30 * D)
        torch.testing.assert_close(out.losses["commitment"], error)
        torch.testing.assert_close(out.losses["codebook"], error)
        torch.testing.assert_close(out.loss, 1.25 * error)
        grad_z, grad_e = torch.autograd.grad(out.loss, (z, table))
        expected_z = 0.25 * 2 * (z - table[out.indices]).detach() / (30 * D)
        expected_e = torch.zeros_like(table)
        for i, j in enumerate(out.indices.tolist()):
            expected_e[j] += 2 * (table[j] - z[i]).detach() / (30 * D)
        torch.testing.assert_close(grad_z, expected_z)
        torch.testing.assert_close(grad_e, expected_e)
        assert (grad_e[torch.bincount(out.indices, minlength=K) == 0] == 0).all()

    def test_ns_against_loops(self):
        vq = build("nsvq", temperature=1.5, losses={"commitment": None, "codebook": None})
        z = normal(20, D).requires_grad_()
        out = vq(z)
        table = vq.codes.base.detach().double()
        expected, value = torch.zeros_like(table), 0.0
        for i in range(20):
            d = [(z[i].detach().double() - table[j]).square().sum() for j in range(K)]
            total = sum(torch.exp(-x / 1.5) for x in d)
            for j in range(K):
                if j != out.indices[i]:
                    w = torch.exp(-d[j] / 1.5) / total
                    value += float(w * d[j]) / (20 * D)
                    expected[j] += 2 * w * (table[j] - z[i].detach()) / (20 * D)
        assert out.losses["ns"].item() == pytest.approx(value, rel=1e-5)
        out.loss.backward()
        torch.testing.assert_close(vq.codes.base.grad.double(), 0.1 * expected, rtol=1e-4, atol=1e-9)
        assert z.grad is None
        assert 0.1 * out.stats["ns_grad_max"].item() == pytest.approx(vq.codes.base.grad.abs().max().item(), rel=1e-5)

    def test_winner_mass_and_effective_losers(self):
        vq = build("nsvq", temperature=2.0)
        z = normal(50, D)
        out = vq(z)
        p = torch.softmax(-torch.cdist(z, vq.codebook()).square().double() / 2.0, 1)
        winner = p.gather(1, out.indices[:, None])[:, 0]
        assert out.stats["winner_mass"].item() == pytest.approx(winner.mean().item(), rel=1e-4)
        losers = p.scatter(1, out.indices[:, None], 0)
        losers = losers / losers.sum(1, keepdim=True)
        entropy = -(losers * losers.clamp_min(1e-300).log()).sum(1)
        assert out.stats["effective_losers"].item() == pytest.approx(entropy.mean().exp().item(), rel=1e-3)

    def test_simvq_table_is_the_linear_map_of_the_frozen_base(self):
        vq = steadyvq.build_quantizer("simvq", num_codes=K, dim=D)
        codes = vq.codes
        torch.testing.assert_close(vq.codebook(), codes.base @ codes.weight.T + codes.bias)
        assert set(dict(vq.named_parameters())) == {"codes.weight", "codes.bias"}
        before = vq.codebook()
        optimizer = torch.optim.SGD(vq.parameters(), 0.5)
        vq(normal(30, D)).loss.backward()
        optimizer.step()
        assert (vq.codebook() != before).any(1).all(), "every code moves, selected or not"

    def test_ema_against_loops(self):
        vq = build("ema", maintenance={"ema": {"decay": 0.9}}).double()
        n, m = torch.ones(K).double(), vq.codebook()
        for step in range(4):
            z = normal(50, D, seed=step).double()
            out = vq(z)
            hits, sums = torch.zeros(K).double(), torch.zeros(K, D).double()
            for i, j in enumerate(out.indices.tolist()):
                hits[j] += 1
                sums[j] += z[i]
            n, m = 0.9 * n + 0.1 * hits, 0.9 * m + 0.1 * sums
            smoothed = (n + 1e-5) / (n.sum() + K * 1e-5) * n.sum()
            vq.update(out)
            torch.testing.assert_close(vq.codebook(), m / smoothed[:, None])

    def test_simvq_with_ns_is_configuration_only(self):
        vq = build("simvq", losses={"ns": 0.1})
        z = normal(40, D)
        out = vq(z)
        assert set(out.losses) == {"commitment", "codebook", "ns"}
        plain = build("simvq")
        a = torch.autograd.grad(out.loss, list(vq.parameters()))
        b = torch.autograd.grad(plain(z).loss, list(plain.parameters()))
        assert not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    @pytest.mark.parametrize("options", [{"squared": False}, {"detach_latents": False}, {"per_code": True}])
    def test_ns_readings_are_switchable(self, options):
        z = normal(40, D).requires_grad_()
        faithful, other = build("nsvq"), build("nsvq", losses={"ns": options})
        (ga,) = torch.autograd.grad(faithful(z).loss, faithful.codes.base)
        out = other(z)
        gb, gz = torch.autograd.grad(out.losses["ns"], (other.codes.base, z), allow_unused=True)
        assert (gz is not None) == (options == {"detach_latents": False})
        (full,) = torch.autograd.grad(other(z).loss, other.codes.base)
        assert torch.equal(full, ga) == (options == {"detach_latents": False})
        assert gb.isfinite().all()

    def test_per_code_gradient_does_not_vanish_with_many_codes(self):
        """The largest pull on unused codes, as the paper has it, falls with 1/K; normalised per code it does not."""
        faithful, per_code = [], []
        for k in (64, 4096):
            for options, into in (({}, faithful), ({"per_code": True}, per_code)):
                vq = steadyvq.build_quantizer("nsvq", num_codes=k, dim=D, losses={"ns": options}, init="normal")
                out = vq(normal(512, D))
                (grad,) = torch.autograd.grad(out.losses["ns"], vq.codes.base)
                into.append(grad[torch.bincount(out.indices, minlength=k) == 0].norm(dim=1).median().item())
        assert faithful[1] < 0.1 * faithful[0]
        assert per_code[1] > 0.5 * per_code[0]


BOTH = {"commitment": 0.25, "codebook": 1.0}
PRESETS = {  # name -> (weights of the losses, names of the maintenance, settings of parts), as the papers and codes have them
    "affine": ({"commitment": 0.05, "codebook": 0.95}, [], {"estimator.nu": 0.2, "codes.rate": 10.0}),
    "cvq": (BOTH, ["anchor"], {"maintenance.anchor.decay": 0.99, "maintenance.anchor.sharpness": 10.0}),
    "diveq": ({}, ["replace"], {"estimator.variance": 5e-3}),
    "ema": ({"commitment": 0.25}, ["ema"], {"maintenance.ema.decay": 0.99}),
    "fvq": (BOTH, [], {}),
    "grit": (BOTH, [], {"estimator.rho": "log"}),
    "gumbel": (
        {"prior": 5e-4},
        ["anneal"],
        {"maintenance.anneal.floor": 1 / 16, "maintenance.anneal.period": 150_000, "assign.fraction": 1.0},
    ),
    "hypervq": (BOTH, [], {"assign.curvature": 1.0, "estimator.curvature": 1.0}),
    "ibq": (
        {"index": 1.0, "commitment": 1.0, "codebook": 0.25, "entropy": 0.05},
        [],
        {"losses.entropy.temperature": 0.01, "losses.entropy.sample": 1.0, "losses.entropy.batch": 1.0},
    ),
    "mmd_vq": ({**BOTH, "mmd": 0.5}, [], {"losses.mmd.contraction": 0.5}),
    "neural_gas": (
        {"commitment": 0.25, "gas": 1.0},
        ["anneal"],
        {
            "maintenance.anneal.rate": 1e-3,
            "maintenance.anneal.floor": 0.01,
            "maintenance.anneal.period": 40_000,
        },
    ),
    "noise_substitution": ({}, ["replace"], {}),
    "nsvq": ({**BOTH, "ns": 0.1}, ["replace"], {"losses.ns.per_code": False}),
    "nsvq_kernel": (
        {"commitment": 0.25, "kernel": 1.0},
        ["anneal"],
        {"losses.kernel.strength": 0.01, "maintenance.anneal.rate": 0.5, "maintenance.anneal.period": 1700},
    ),
    "nsvq_transport": (
        {**BOTH, "transport": 1.0},
        ["anneal"],
        {"maintenance.anneal.rate": 0.5, "maintenance.anneal.period": 1700},
    ),
    "optvq": ({"commitment": 1.0, "codebook": 0.25}, [], {"assign.epsilon": 10.0, "assign.iterations": 5}),
    "regvq": ({**BOTH, "usage_prior": 5e-4}, [], {"assign.fraction": 0.4, "estimator.fraction": 0.4}),
    "rotation": (BOTH, [], {"estimator.__name__": "rotation"}),
    "simvq": (BOTH, [], {}),
    "soft_em": ({"commitment": 0.25}, ["soft_ema"], {"maintenance.soft_ema.decay": 0.99}),
    "transvq": (BOTH, [], {}),
    "vq": (BOTH, [], {}),
    "vqgan_fc": (BOTH, [], {"unit_sphere": True}),
    "vqgan_lc": ({"commitment": 0.1, "codebook": 0.033}, [], {}),
    "wasserstein_vq": ({**BOTH, "wasserstein": 0.5}, [], {"losses.wasserstein.contraction": 0.5}),
}
TEMPERATURES = {"nsvq": 0.35, "neural_gas": 10.0}
"""Of softmaxes over codes; 1 in the other methods that have one."""
WITH_SOFTMAX = ("nsvq", "neural_gas", "nsvq_kernel", "nsvq_transport", "ibq", "gumbel", "regvq", "soft_em", "hypervq")


def setting(vq: VectorQuantizer, path: str) -> object:
    """What `maintenance.ema.decay` names."""
    value: object = vq
    for key in path.split("."):
        value = value[key] if isinstance(value, dict | torch.nn.ModuleDict) else getattr(value, key)
    return value


class TestPresets:
    def test_every_method_with_a_table_is_here(self):
        tables = [n for n in NAMES if isinstance(build(n), VectorQuantizer)]
        assert tables == sorted(PRESETS)

    @pytest.mark.parametrize("name", PRESETS)
    def test_presets_have_the_weights_of_their_papers(self, name):
        weights, maintenance, settings = PRESETS[name]
        vq = build(name)
        assert {loss: vq.weight(loss) for loss in vq.losses} == weights
        assert list(vq.maintenance) == maintenance
        assert {path: setting(vq, path) for path in settings} == settings
        if name in WITH_SOFTMAX:
            assert vq.temperature.item() == pytest.approx(TEMPERATURES.get(name, 1.0))
        out = vq(normal(40, vq.dim))
        total = sum((weight * out.losses[loss] for loss, weight in weights.items()), torch.zeros(()))
        torch.testing.assert_close(out.loss, total)


LIVE = 16


class TestMaintenance:
    def dying(self, **options: object) -> steadyvq.Quantizer:
        """Latents live among the first codes, the last eight lie far away."""
        vq = steadyvq.build_quantizer("nsvq", num_codes=K, dim=D, maintenance={"replace": {"patience": 4.0, **options}})
        table = 0.7 * normal(K, D)
        table[LIVE:] += 50
        vq.codes.set_rows_(table)
        return vq

    def test_dead_codes_become_jittered_copies_of_active_ones(self):
        vq = self.dying(cap=1.0)
        before = vq.codebook()
        for steps in range(1, 10):
            out = vq(normal(48, D, seed=steps - 1))
            replaced = vq.update(out)["replaced"]
            if replaced:
                break
        # 48 latents over 24 codes are 2 expected hits a step: more than 4 hits are missed in the third step.
        assert steps == 3
        assert replaced == K - LIVE
        after = vq.codebook()
        assert torch.equal(before[:LIVE], after[:LIVE]), "donors stay"
        radius = (out.assignment.distance.mean() / D).sqrt()
        nearest = torch.cdist(after[LIVE:], after[:LIVE]).min(1)
        assert (nearest.values < 5 * 0.1 * radius * D**0.5).all()
        assert len(set(nearest.indices.tolist())) == K - LIVE, "no donor is split twice in one event"
        used = torch.bincount(vq(normal(500, D, seed=99)).indices, minlength=K)
        assert (used > 0).float().mean() > 0.9

    def test_a_copy_shares_the_statistics_of_its_donor(self):
        vq = self.dying(cap=1.0)
        part = vq.maintenance["replace"]
        for step in range(3):
            out = vq(normal(48, D, seed=step))
            before = (part.usage.clone(), part.mass.clone())
            event = vq.update(out)
        assert event["replaced"] == K - LIVE
        hits = torch.bincount(out.indices, minlength=K).float()
        distortion = torch.zeros(K).index_add_(0, out.indices, out.assignment.distance)
        for statistic, old, new in zip((part.usage, part.mass), before, (hits, distortion), strict=True):
            merged = 0.95 * old + 0.05 * new
            torch.testing.assert_close(statistic.sum(), merged.sum())
            split = (statistic[:LIVE] - merged[:LIVE]).abs() > 0.01 * merged[:LIVE]
            torch.testing.assert_close(statistic[:LIVE][split], merged[:LIVE][split] / 2)
            assert split.sum() == K - LIVE
            assert (statistic[LIVE:] > 0).all()
        assert (part.idle[LIVE:] == 0).all()

    def test_cap_limits_an_event(self):
        vq = self.dying(cap=0.1)
        events = [vq.update(vq(normal(48, D, seed=i)))["replaced"] for i in range(8)]
        assert events[:6] == [0.0, 0.0, 2.0, 2.0, 2.0, 2.0]

    def test_idle_is_measured_in_expected_hits(self):
        """The same number of latents, in large or small batches, is the same patience."""
        for batch, steps in ((96, 2), (24, 5), (12, 9)):
            vq = self.dying(cap=1.0)
            events = [vq.update(vq(normal(batch, D, seed=i)))["replaced"] > 0 for i in range(steps)]
            assert events == [False] * (steps - 1) + [True]

    def test_one_hit_in_the_window_keeps_a_code(self):
        vq = steadyvq.build_quantizer(
            "nsvq", num_codes=K, dim=D, maintenance={"replace": {"patience": 4.0, "cap": 1.0}}
        )
        table = 10 * normal(K, D)
        vq.codes.set_rows_(table)
        # 40 latents a step: a code that counts as missed in three of them is dead.
        for step in range(30):
            z = torch.cat([table[LIVE:].repeat(3, 1), table[:LIVE]])
            out = vq(z + 0.01 * normal(len(z), D, seed=step))
            assert (torch.bincount(out.indices)[:LIVE] == 1).all()
            assert vq.update(out)["replaced"] == 0, step

    def test_jitter_is_a_share_of_the_cells_radius(self):
        """The mean square of a copy's distance to its donor is jitter^2 D_j, whatever the scale of the latents."""
        count, live = 800, 400
        for scale in (0.1, 3.0):
            vq = steadyvq.build_quantizer(
                "nsvq", num_codes=count, dim=D, maintenance={"replace": {"patience": 0.4, "cap": 1.0, "jitter": 0.01}}
            )
            table = scale * torch.cat([100 * normal(live, D), 1e5 + normal(count - live, D)])
            vq.codes.set_rows_(table)
            error = scale * normal(live, D, seed=3)
            out = vq(table[:live] + error)
            assert torch.equal(out.indices, torch.arange(live))
            assert vq.update(out)["replaced"] == count - live
            moved = torch.cdist(vq.codebook()[live:].double(), table[:live].double()).min(1)
            assert len(moved.indices.unique()) == live
            expected = 0.01**2 * error.square().sum(1).mean()
            assert moved.values.square().mean().item() == pytest.approx(expected.item(), rel=0.15)

    def test_events_come_every_so_many_updates(self):
        vq = self.dying(cap=0.1, every=3)
        events = [vq.update(vq(normal(48, D, seed=i)))["replaced"] for i in range(9)]
        assert events == [0.0, 0.0, 2.0, 0.0, 0.0, 2.0, 0.0, 0.0, 2.0]

    def test_adam_moments_and_average_of_replaced_rows_are_reset(self):

        vq = self.dying(cap=1.0)
        optimizer = torch.optim.Adam(vq.parameters(), 1e-2)
        average = WeightAverage(vq, 0.99)
        for step in range(3):
            out = vq(normal(48, D, seed=step))
            optimizer.zero_grad()
            (out.loss + vq.codes.base.square().mean()).backward()
            optimizer.step()
            average.update()
            vq.update(out, optimizer, average)
        moments = optimizer.state[vq.codes.base]
        for key in ("exp_avg", "exp_avg_sq"):
            assert (moments[key][LIVE:] == 0).all()
            assert (moments[key][:LIVE] != 0).any()
        shadow = average.shadow["codes.base"]
        assert torch.equal(shadow[LIVE:], vq.codes.base.detach()[LIVE:])
        assert not torch.equal(shadow[:LIVE], vq.codes.base.detach()[:LIVE])

    @pytest.mark.parametrize("betas", [(0.9, 0.99), (0.9, 0.999)])
    def test_a_replaced_row_begins_anew(self, betas):
        """Beside its source after one step, no row both source and copy, and later where its own gradients took it."""
        rate, window, jitter = 1e-3, 20, 0.1
        settings = {"replace": {"patience": 2.0, "every": window, "cap": 0.5, "jitter": jitter}}
        vq = steadyvq.build_quantizer("nsvq", num_codes=64, dim=8, maintenance=settings).double()
        optimizer = torch.optim.Adam(vq.parameters(), rate, betas=betas)
        average = WeightAverage(vq, 0.9)
        events: list[tuple[int, Tensor, Tensor, Tensor]] = []
        copy_rows, step = vq.codes.copy_rows_, 0

        def watched(dst: Tensor, src: Tensor, noise: Tensor) -> None:
            events.append((step, dst, src, vq.codebook()[src] + noise))
            copy_rows(dst, src, noise)

        vq.codes.copy_rows_ = watched
        tables, gradients = [], []
        for step in range(8 * window):
            out = vq(normal(16, 8, seed=step).double() * 0.3)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            tables.append(vq.codebook())
            gradients.append(vq.codes.base.grad.clone())
            vq.update(out, optimizer, average)
            average.update()
        assert len(events) >= 3
        for at, dst, src, placed in events[:-2]:
            assert not set(dst.tolist()) & set(src.tolist())
            assert len(set(dst.tolist())) == len(dst) == len(set(src.tolist()))
            noise = (placed - tables[at][src]).norm(dim=1)
            assert (noise > 0).all()
            moved = (tables[at + 1][dst] - tables[at][src]).norm(dim=1)
            assert (moved <= noise + 4 * rate * 8**0.5).all()
            # A loop of Adam from zero moments, with nothing but the row's own gradients of the next two windows.
            m, v, row = torch.zeros_like(placed), torch.zeros_like(placed), placed.clone()
            again = torch.cat([d for a, d, _, _ in events if at < a <= at + 2 * window] or [dst[:0]])
            mine = torch.tensor([code not in again for code in dst.tolist()])
            assert mine.any()
            for t in range(at + 1, at + 1 + 2 * window):
                g = gradients[t][dst]
                m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
                corrected = m / (1 - betas[0] ** (t + 1)), v / (1 - betas[1] ** (t + 1))
                row = row - rate * corrected[0] / (corrected[1].sqrt() + 1e-8)
            torch.testing.assert_close(tables[at + 2 * window][dst][mine], row[mine])

    def test_donors_follow_the_measure_asked_for(self):
        """One crowded tight cluster and one sparse wide one: usage picks the first, distortion the second."""
        picked = {}
        for donors in ("usage", "distortion"):
            counts = torch.zeros(2)
            for seed in range(40):
                maintenance = {"replace": {"patience": 0.5, "cap": 0.01, "donors": donors}}
                vq = steadyvq.build_quantizer("nsvq", num_codes=3, dim=2, seed=seed, maintenance=maintenance)
                vq.codes.set_rows_(torch.tensor([[0.0, 0.0], [20.0, 0.0], [500.0, 0.0]]))
                z = torch.cat([0.1 * normal(90, 2), torch.tensor([20.0, 0.0]) + 4 * normal(10, 2)])
                assert vq.update(vq(z))["replaced"] == 1
                counts[int(vq.codebook()[2, 0] > 10)] += 1
            picked[donors] = counts
        assert picked["usage"][0] > 28
        assert picked["distortion"][1] > 34

    def test_ema_survives_a_replacement(self):
        vq = steadyvq.build_quantizer("ema", num_codes=K, dim=D, maintenance={"replace": {"patience": 4.0, "cap": 1.0}})
        table = normal(K, D)
        table[LIVE:] += 50
        vq.codes.set_rows_(table)
        for part in vq.maintenance.values():
            part.rows_set(table)
        for step in range(200):
            vq.update(vq(normal(48, D, seed=step)))
        assert vq.codebook().abs().max() < 6
        assert len(vq(normal(500, D, seed=999)).indices.unique()) > 0.9 * K

    def test_ema_start_does_not_explode(self):
        vq = steadyvq.build_quantizer("ema", num_codes=1024, dim=16)
        for step in range(5):
            vq.update(vq(normal(256, 16, seed=step)))
        assert vq.codebook().norm(dim=1).max() < 10

    def test_temperature_finds_its_target_at_any_latent_scale(self):
        for scale in (0.01, 1.0, 100.0):
            vq = steadyvq.build_quantizer("nsvq", num_codes=256, dim=D, temperature={"effective_losers": 16})
            vq.init_from(scale * normal(2000, D))
            for step in range(120):
                out = vq(scale * normal(128, D, seed=step))
                vq.update(out)
            assert out.stats["effective_losers"].item() == pytest.approx(16, rel=0.1)

    def test_paused_maintenance_rests(self):
        vq = self.dying(cap=1.0)
        vq.configure(paused=["replace"])
        assert all("replaced" not in vq.update(vq(normal(48, D, seed=i))) for i in range(10))
        vq.configure()
        assert sum(vq.update(vq(normal(48, D, seed=i)))["replaced"] for i in range(10)) > 0

    def test_same_seed_same_replacement(self):
        tables = []
        for seed in (1, 1, 2):
            vq = self.dying(cap=1.0)
            vq.seed = seed
            for step in range(4):
                vq.update(vq(normal(48, D, seed=step)))
            tables.append(vq.codebook())
        assert torch.equal(tables[0], tables[1])
        assert not torch.equal(tables[0], tables[2])


class TestInit:
    @pytest.mark.parametrize("name", NAMES)
    def test_data_init_places_codes_on_latents(self, name):
        num_codes, dim = methods()[name].example
        vq = steadyvq.build_quantizer(name, num_codes=num_codes, dim=dim)
        z = normal(100, dim)
        if not vq.places_codes:
            with pytest.raises(ValueError, match="place"):
                vq.init_from(z, method="data")
            return
        if not isinstance(vq, VectorQuantizer):
            pytest.skip("no single table: the layers are placed one after the other (test_methods_wrappers.py)")
        vq.init_from(z, method="data")
        distance = torch.cdist(vq.codebook().double(), seen(vq, z).double()).min(1)
        assert (distance.values < 1e-6).all()
        assert len(distance.indices.unique()) == num_codes

    def test_starts_of_tables(self):
        """U(-1/K, 1/K), N(0, 1/d) and N(0, 1)."""
        small, unit, wide = (
            steadyvq.build_quantizer("vq", num_codes=500, dim=40, init=name).codebook()
            for name in ("uniform", "normal", "unit_normal")
        )
        assert small.abs().max().item() == pytest.approx(1 / 500, rel=0.01)
        assert small.std().item() == pytest.approx(1 / 500 / 3**0.5, rel=0.02)
        assert unit.std().item() == pytest.approx(40**-0.5, rel=0.02)
        assert wide.std().item() == pytest.approx(1, rel=0.02)
        for table in (unit, wide):
            scaled = (table - table.mean()) / table.std()
            assert (scaled**4).mean().item() == pytest.approx(3, rel=0.05), "normal"

    def test_seeds_lie_apart(self):
        """Among clusters far apart each seed falls into one that has none yet."""
        centres = 1000 * normal(K, D, seed=9)
        z = torch.cat([centre + 0.1 * normal(20, D, seed=i) for i, centre in enumerate(centres)])
        seeds = seed_plus_plus(z, K, torch.Generator().manual_seed(0))
        assert len(torch.cdist(seeds, centres).argmin(1).unique()) == K

    def test_kmeans_beats_a_random_subset(self):
        z = torch.cat([centre + 0.1 * normal(50, D, seed=i) for i, centre in enumerate(5 * normal(K, D, seed=9))])
        errors = {}
        for method in ("data", "kmeans"):
            vq = steadyvq.build_quantizer("vq", num_codes=K, dim=D)
            vq.init_from(z, method=method)
            errors[method] = vq(z).losses["commitment"].item()
        assert errors["kmeans"] < 0.5 * errors["data"]

    def test_fewer_latents_than_codes(self):
        vq = steadyvq.build_quantizer("vq", num_codes=K, dim=D)
        z = normal(7, D)
        vq.init_from(z)
        assert vq.codebook().isfinite().all()
        assert torch.equal(vq.codebook()[:7], z), "each latent is a code, the rest are jittered copies"
        assert len(vq.codebook().unique(dim=0)) == K

    def test_refuses_nonsense(self):
        vq = steadyvq.build_quantizer("vq", num_codes=K, dim=D)
        with pytest.raises(ValueError, match=r"'data' .*or 'kmeans'"):
            vq.init_from(normal(50, D), method="kmean")
        with pytest.raises(ValueError, match="no finite latents"):
            vq.init_from(torch.full((50, D), float("nan")))


class TestBuilding:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"name": "nsqv"}, "unknown quantizer 'nsqv': known are .*nsvq.*; did you mean 'nsvq'"),
            ({"num_codes": 0}, "num_codes is 0, but a quantizer needs a positive integer"),
            ({"dim": -3}, "dim is -3"),
            ({"num_codes": 2.5}, "num_codes is 2.5"),
            ({"lossess": {}}, "unknown option 'lossess'.*did you mean 'losses'"),
            ({"losses": {"comitment": 1.0}}, "unknown loss 'comitment'.*did you mean 'commitment'"),
            ({"losses": {"ns": {"wieght": 1}}}, "'wieght'.*did you mean 'weight'"),
            ({"losses": {"ns": {"per_code": 3}}}, "per_code of loss 'ns' is 3"),
            ({"losses": 3}, "mapping"),
            ({"maintenance": {"replace": {"donors": "best"}}}, "'distortion' or by 'usage'"),
            ({"maintenance": {"ema": {}}}, "EMA cannot maintain a FreeCodebook"),
            ({"temperature": 0.0}, "positive temperature"),
            ({"temperature": "hot"}, "temperature is 'hot', but it needs a number"),
            ({"temperature": float("nan")}, "temperature is nan"),
            ({"temperature": {"effective_losers": 16.0}}, "with 8 codes the target must lie between 1 and 7"),
            ({"seed": "a"}, "seed is 'a', but it needs an integer"),
            ({"channel_axis": "1"}, "channel_axis is '1'"),
            ({"init": [1]}, "init is"),
            ({"maintenance": {"replace": [1]}}, "needs a mapping of settings"),
            ({"maintenance": {"replace": {"every": 2.5}}}, "every of maintenance 'replace' is 2.5"),
            ({"maintenance": {"replace": {"decay": 2.0}}}, "0 <= decay < 1"),
            ({"temperature": {"losers": 4}}, "did you mean 'effective_losers'"),
            ({"estimator": "ste"}, "unknown estimator 'ste'"),
            ({"codebook": "linaer"}, "did you mean 'linear'"),
        ],
    )
    def test_bad_descriptions_are_refused_in_words(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            steadyvq.build_quantizer(**{"name": "nsvq", "num_codes": 8, "dim": 4, **arguments})

    def test_every_allowed_cross_trains_and_the_rest_refuses(self):
        for codebook in ("free", "frozen", "linear"):
            for maintenance in ({}, {"ema": {}}, {"replace": {"patience": 1.0}}, {"ema": {}, "replace": {}}):
                parts = {"codebook": codebook, "maintenance": maintenance, "init": "normal"}
                parts["losses"] = {"commitment": 0.25, "codebook": 1.0, "ns": 0.1}
                if "ema" in maintenance and codebook != "frozen":
                    with pytest.raises(ValueError, match="EMA cannot maintain"):
                        compose(K, D, parts)
                    continue
                self._train(compose(K, D, parts))

    def _train(self, vq: VectorQuantizer) -> None:
        encoder = torch.nn.Linear(D, D)
        optimizer = torch.optim.Adam([*encoder.parameters(), *vq.parameters()], 1e-2)
        for step in range(5):
            x = normal(64, D, seed=step)
            out = vq(encoder(x))
            optimizer.zero_grad()
            ((out.z_q - x).square().mean() + out.loss).backward()
            optimizer.step()
            vq.update(out, optimizer)
        assert vq.codebook().isfinite().all()

    def test_a_quantizer_from_a_file(self, tmp_path):
        file = tmp_path / "mine.py"
        file.write_text(
            "from steadyvq.quantizers import compose\n"
            "def half_vq(num_codes, dim, **overrides):\n"
            "    return compose(num_codes, dim, {'losses': {'commitment': 0.5, 'codebook': 0.5}}, overrides)\n"
        )
        vq = steadyvq.build_quantizer(f"{file}:half_vq", num_codes=8, dim=4)
        assert vq.losses["commitment"].weight == 0.5
        with pytest.raises(ValueError, match="did you mean 'half_vq'"):
            steadyvq.build_quantizer(f"{file}:half", num_codes=8, dim=4)
        with pytest.raises(ValueError, match="there is no file"):
            steadyvq.build_quantizer("nowhere.py:f", num_codes=8, dim=4)
        file.write_text("def f(num_codes, dim): return 3\n")
        with pytest.raises(ValueError, match="returned a int"):
            steadyvq.build_quantizer(f"{file}:f", num_codes=8, dim=4)
        file.write_text("import nonsense_module\n")
        with pytest.raises(ValueError, match=r"importing .* failed with ModuleNotFoundError"):
            steadyvq.build_quantizer(f"{file}:f", num_codes=8, dim=4)

    def test_a_baked_layer_is_built_by_name(self):
        baked = build("nsvq").bake()
        other = steadyvq.build_quantizer(**baked.spec)
        other.load_state_dict(baked.state_dict())
        assert torch.equal(other(normal(9, D)).z_q, baked(normal(9, D)).z_q)
        assert "baked" not in steadyvq.list_quantizers()

    def test_an_optimizer_without_the_codebook_is_noticed(self):
        vq = build("nsvq")
        stranger = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], 0.1)
        with pytest.warns(UserWarning, match="does not hold the codebook"):
            vq.update(vq(normal(9, D)), stranger)

    def test_stage_settings(self):
        vq = build("nsvq")
        vq.configure(weights={"ns": 0.0, "commitment": 0.0}, estimator="direct")
        assert set(vq(normal(9, D)).losses) == {"codebook"}
        vq.configure()
        assert set(vq(normal(9, D)).losses) == {"codebook", "commitment", "ns"}
        with pytest.raises(ValueError, match="unknown loss of this quantizer 'adversarial'"):
            vq.configure(weights={"adversarial": 1.0})

    def test_a_frozen_quantizer_keeps_no_books(self):
        vq = build("ema")
        before = state(vq)
        vq.configure(frozen=True)
        assert vq.active_maintenance() == []
        vq.update(vq(normal(20, D)))
        assert all(torch.equal(before[k], v) for k, v in state(vq).items() if k != "updates")
        vq.configure()
        vq.update(vq(normal(20, D)))
        assert not torch.equal(before["codes.base"], vq.state_dict()["codes.base"])


class Residual(torch.nn.Module):
    """A residual quantizer over two layers (RQ-VAE): the second quantizes what the first leaves."""

    def __init__(self, layers: list[steadyvq.Quantizer]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Quantized]]:
        rest, outs = latents, []
        for layer in self.layers:
            outs.append(layer(rest))
            rest = rest - outs[-1].z_q.detach()
        z_q = sum(out.z_q for out in outs) - (len(outs) - 1) * (latents - latents.detach())
        return z_q, torch.stack([out.indices for out in outs], -1), sum(out.loss for out in outs), outs

    def update(self, outs: list[Quantized], optimizer: torch.optim.Optimizer) -> None:
        for layer, out in zip(self.layers, outs, strict=True):
            layer.update(out, optimizer)

    def decode(self, indices: Tensor) -> Tensor:
        return sum(layer.decode(indices[..., i]) for i, layer in enumerate(self.layers))


def test_a_residual_wrapper_needs_only_the_public_seam():
    wrapper = Residual([build("nsvq"), build("nsvq")])
    optimizer = torch.optim.Adam(wrapper.parameters(), 1e-2)
    first = copy.deepcopy(wrapper.layers[0])
    errors = []
    for step in range(150):
        z = normal(128, D, seed=step).requires_grad_()
        z_q, indices, loss, outs = wrapper(z)
        upstream = torch.autograd.grad(z_q.sum(), z, retain_graph=True)[0]
        torch.testing.assert_close(upstream, torch.ones_like(z)), "the straight-through gradient arrives once"
        torch.testing.assert_close(wrapper.decode(indices), z_q)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wrapper.update(outs, optimizer)
        errors.append((z_q - z).square().mean().item())
    z = normal(500, D, seed=777)
    assert sum(errors[-10:]) < 0.8 * sum(errors[:10])
    assert (wrapper(z)[0] - z).square().mean() < 0.7 * (first(z).z_q - z).square().mean()
