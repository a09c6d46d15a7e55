# SPDX-License-Identifier: Apache-2.0
"""Residual, grouped and multi-scale quantization against plain loops over layers, and as layers of a tokenizer."""

import math
import os
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import NAMES, normal, same, state
from torch import Tensor

import steadyvq
from steadyvq.models import AutoencoderConfig, Tokenizer
from steadyvq.quantizers import Quantized, Quantizer, VectorQuantizer
from steadyvq.quantizers.methods.residual import Residual
from steadyvq.quantizers.registry import methods

K, D, L = 16, 6, 3
SCALES = [1, 2, 3, 5]
TOKENS = sum(s * s for s in SCALES)


def residual(*, places: bool = True, **options: object) -> Quantizer:
    vq = steadyvq.build_quantizer("residual", **{"num_codes": K, "dim": D, "layers": L, **options})
    if places:
        vq.init_from(normal(400, D, seed=50), method="data")
    return vq


def multiscale(*, size: int = 8, **options: object) -> Quantizer:
    vq = steadyvq.build_quantizer("multiscale", **{"num_codes": K, "dim": D, "scales": SCALES, **options})
    vq.init_from(normal(size, D, 5, 5, seed=50), method="data")
    return vq


def images(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, D, 5, 5, seed=seed)


def argmin(z: Tensor, table: Tensor) -> Tensor:
    return (z[:, None].double() - table[None].double()).square().sum(-1).argmin(1)


class TestResidual:
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_against_a_loop(self, shared, reduction):
        """Values, tokens and gradients of r_{l+1} = r_l - e_l, the commitment written with the sums of codes."""
        vq = residual(inner="vq", shared=shared, reduction=reduction).double()
        assert vq.shared == shared
        z = normal(40, D).double().requires_grad_()
        tables = [vq.layer(i).codes.base for i in range(L)]
        out = vq(z)
        total, tokens = torch.zeros_like(z).detach(), []
        commitment = codebook = 0.0
        for table in tables:
            rest = (z - total).detach()
            tokens.append(argmin(rest, table.detach()))
            code = table[tokens[-1]]
            total = total + code.detach()
            commitment = commitment + (z - total).square().sum() / (40 * D)
            codebook = codebook + (code - rest).square().sum() / (40 * D)
        share = 1 / L if reduction == "mean" else 1.0
        assert torch.equal(out.indices, torch.stack(tokens, -1))
        torch.testing.assert_close(out.z_q, total)
        torch.testing.assert_close(out.losses["commitment"], share * commitment)
        torch.testing.assert_close(out.losses["codebook"], share * codebook)
        torch.testing.assert_close(out.loss, share * (0.25 * commitment + codebook))
        wanted = torch.autograd.grad(share * (0.25 * commitment + codebook), [z, *tables[: len(vq.inner)]])
        found = torch.autograd.grad(out.loss, [z, *tables[: len(vq.inner)]])
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)

    def test_more_layers_come_closer(self):
        z = normal(400, D, seed=50)
        vq = residual(places=False)
        vq.init_from(z)
        errors = [(vq.decode(vq.encode(z)[:, :n]) - z).square().mean().item() for n in range(1, L + 1)]
        assert errors[2] < 0.8 * errors[1] < 0.64 * errors[0]

    @pytest.mark.parametrize("estimator", [None, "straight_through", "each"])
    def test_the_straight_through_gradient_arrives_once(self, estimator):
        vq = residual(estimator=estimator)
        z = normal(40, D).requires_grad_()
        upstream = normal(40, D, seed=1)
        found = torch.autograd.grad((vq(z).z_q * upstream).sum(), [z, *vq.parameters()], allow_unused=True)
        torch.testing.assert_close(found[0], upstream)
        assert found[1:] == (None,) * L

    def test_each_sends_only_the_first_commitment_to_the_encoder(self):
        z = normal(40, D).double().requires_grad_()
        for estimator in ("straight_through", "each"):
            vq = residual(inner="vq", estimator=estimator, losses={"codebook": None}).double()
            out = vq(z)
            (found,) = torch.autograd.grad(out.losses["commitment"], z)
            after = [vq.decode(out.indices[:, :n]) for n in range(1, L + 1)]
            reached = after if estimator == "straight_through" else after[:1]
            torch.testing.assert_close(found, sum(2 * (z.detach() - a) / (40 * D) for a in reached))

    def test_the_direct_gradient_arrives_at_the_codes_of_every_layer(self):
        vq = residual()
        vq.configure(estimator="direct")
        z = normal(40, D).requires_grad_()
        out = vq(z)
        upstream = normal(40, D, seed=1)
        tables = [layer.codes.base for layer in vq.inner]
        found = torch.autograd.grad((out.z_q * upstream).sum(), [z, *tables], allow_unused=True)
        assert found[0] is None
        for i, gradient in enumerate(found[1:]):
            wanted = torch.zeros(K, D).index_add_(0, out.indices[:, i], upstream)
            torch.testing.assert_close(gradient, wanted)
        vq.configure()
        assert torch.equal(torch.autograd.grad(vq(z).z_q.sum(), z)[0], torch.ones_like(z))

    def test_a_prefix_decodes_and_minus_one_adds_nothing(self):
        vq = residual()
        indices = vq.encode(normal(40, D))
        two = vq.codebook()[0][indices[:, 0]] + vq.codebook()[1][indices[:, 1]]
        assert torch.equal(vq.decode(indices[:, :2]), two)
        dropped = indices.clone()
        dropped[:, 2] = -1
        assert torch.equal(vq.decode(dropped), two)
        for bad in (torch.zeros(5, L + 1, dtype=torch.int64), torch.zeros(5, 0, dtype=torch.int64), torch.tensor(3)):
            with pytest.raises(ValueError, match=f"needs an axis -1 of 1 to {L} layers"):
                vq.decode(bad)

    @pytest.mark.parametrize("shared", [False, True])
    def test_every_layer_is_updated_with_its_own_residuals(self, shared):
        vq = residual(inner="ema", inner_options={"maintenance": {"ema": {"decay": 0.9}}}, shared=shared).double()
        tables = [layer.codebook() for layer in vq.inner]
        counts, sums = [torch.ones(K).double() for _ in tables], [table.clone() for table in tables]
        for step in range(3):
            z = normal(48, D, seed=step).double()
            hits, mass = [torch.zeros(K).double() for _ in tables], [torch.zeros(K, D).double() for _ in tables]
            rest = z
            for i in range(L):
                j = 0 if shared else i
                tokens = argmin(rest, tables[j])
                hits[j].index_add_(0, tokens, torch.ones(48).double())
                mass[j].index_add_(0, tokens, rest)
                rest = rest - tables[j][tokens]
            vq.update([vq(part) for part in z.split(16)])
            for j in range(len(tables)):
                counts[j] = 0.9 * counts[j] + 0.1 * hits[j]
                sums[j] = 0.9 * sums[j] + 0.1 * mass[j]
                smoothed = (counts[j] + 1e-5) / (counts[j].sum() + K * 1e-5) * counts[j].sum()
                tables[j] = sums[j] / smoothed[:, None]
                torch.testing.assert_close(vq.inner[j].codebook(), tables[j])

    def test_layers_start_and_draw_differently(self):
        vq = residual(places=False, maintenance={"replace": {"patience": 0.1, "cap": 1.0}}, seed=3)
        seeds = [layer.seed for layer in vq.inner]
        assert len(set(seeds)) == L
        assert seeds[0] == 3
        tables = vq.codebook()
        assert not torch.equal(tables[0], tables[1])
        for layer in vq.inner:  # the same codes and latents in every layer: noise alone can differ
            layer.codes.set_rows_(tables[0] + torch.arange(K)[:, None])
        z = normal(20, D)
        for layer in vq.inner:
            assert layer.update(layer(z))["replaced"] > 0
        assert not torch.equal(vq.codebook()[0], vq.codebook()[1])

    def test_events_are_counted_over_layers(self):
        vq = residual(places=False, init="normal", maintenance={"replace": {"patience": 0.1, "cap": 1.0}})
        before = vq.codebook()
        replaced = vq.update(vq(normal(20, D)))["replaced"]
        assert replaced == (vq.codebook() != before).any(-1).sum() > 5
        assert ((vq.codebook() != before).any(-1).sum(1) > 0).all()

    def test_codes_are_placed_layer_after_layer(self):
        z = normal(300, D)
        vq = residual(places=False)
        vq.init_from(z, method="data")
        rest = z
        for layer in vq.inner:
            distance = torch.cdist(layer.codebook().double(), rest.double()).min(1).values
            assert (distance < 1e-6).all()
            rest = rest - layer.codebook()[argmin(rest, layer.codebook())]
        shared = residual(places=False, shared=True)
        shared.init_from(z + 10, method="data")
        sizes = shared.codebook()[0].norm(dim=1)
        assert sizes.min() < 8 < 18 < sizes.max(), "codes for latents and for residuals"

    def test_masked_latents_place_nothing(self):
        z = torch.cat([normal(100, D), torch.full((50, D), 1e4)])
        for shared in (False, True):
            vq = residual(places=False, shared=shared)
            vq.init_from(z, torch.arange(150) < 100)
            assert vq.codebook().abs().max() < 100

    def test_stage_settings_reach_the_layers(self):
        vq = residual()
        vq.configure(weights={"ns": 0.0, "commitment": 0.5}, paused=["replace"])
        assert set(vq(normal(9, D)).losses) == {"codebook", "commitment"}
        assert all(layer.weight("commitment") == 0.5 for layer in vq.inner)
        assert "replaced" not in vq.update(vq(normal(9, D)))
        vq.configure()
        assert set(vq(normal(9, D)).losses) == {"codebook", "commitment", "ns"}
        with pytest.raises(ValueError, match="unknown loss"):
            vq.configure(weights={"adversarial": 1.0})

    def test_a_batch_coupled_loss_inside_is_known_outside(self):
        vq = residual(losses={"ns": {"per_code": True}}, shared=True)
        assert len(vq.batch_coupled) == 1
        assert residual().batch_coupled == ()
        vq.update(vq(normal(9, D)))  # the layers' outputs are no micro-batches: no warning
        with pytest.warns(UserWarning, match="couples all latents"):
            vq.update([vq(normal(9, D)), vq(normal(9, D))])


class TestQuantizerDropout:
    def test_the_number_of_layers_is_drawn_from_seed_and_update(self):
        drawn = {}
        for seed in (0, 0, 1):
            vq = residual(dropout=1.0, seed=seed, inner="vq", num_codes=2, dim=1, places=False)
            found = []
            for _ in range(150):
                found.append(int(vq.active))
                vq.update(vq(torch.zeros(2, 1)))
            assert drawn.setdefault(seed, found) == found
        assert drawn[0] != drawn[1]
        shares = torch.bincount(torch.tensor(drawn[0]), minlength=L + 1)[1:] / 150
        assert ((shares - 1 / L).abs() < 0.12).all()

    def test_dropout_is_a_share_of_steps(self):
        vq = residual(dropout=0.3, inner="vq", num_codes=2, dim=1, places=False)
        fewer = 0
        for _ in range(200):
            fewer += int(vq.active) < L
            vq.update(vq(torch.zeros(2, 1)))
        assert 0.3 * (L - 1) / L * 0.6 < fewer / 200 < 0.3 * (L - 1) / L * 1.5

    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    @pytest.mark.parametrize("masked", [False, True])
    def test_dropped_layers_take_no_part(self, reduction, masked):
        options = {"inner": "ema", "reduction": reduction, "losses": {"codebook": 1.0}}
        vq, small = residual(dropout=1.0, **options), residual(layers=2, **options)
        vq.active.fill_(2)
        for i in range(2):
            small.layer(i).load_state_dict(vq.layer(i).state_dict())
        z = normal(30, D).requires_grad_()
        mask = torch.arange(30) % 3 > 0 if masked else None
        a, b = vq(z, mask), small(z, mask)
        assert (a.indices[:, 2] == -1).all()
        assert torch.equal(a.indices[:, :2], b.indices)
        assert torch.equal(a.z_q, b.z_q)
        torch.testing.assert_close(a.loss, b.loss)
        torch.testing.assert_close(torch.autograd.grad(a.loss, z), torch.autograd.grad(b.loss, z))
        if not masked:
            assert torch.equal(vq.decode(a.indices), a.z_q)
        before = state(vq.layer(2))
        vq.update([a, vq(z, mask)])
        small.update([b, small(z, mask)])
        assert same(before, state(vq.layer(2)))
        for i in range(2):
            assert same(state(vq.layer(i)), state(small.layer(i)))

    def test_every_parameter_has_a_gradient_all_the_same(self):
        """Data-parallel wrappers wait for each of them."""
        vq = residual(dropout=1.0)
        vq.active.fill_(1)
        vq(normal(9, D)).loss.backward()
        assert all(p.grad is not None for p in vq.parameters())
        assert (vq.layer(2).codes.base.grad == 0).all()
        assert (vq.layer(0).codes.base.grad != 0).any()

    def test_evaluation_and_encode_use_all_layers(self):
        vq = residual(dropout=1.0)
        vq.active.fill_(1)
        assert (vq.encode(normal(9, D)) >= 0).all()
        assert (vq.eval()(normal(9, D)).indices >= 0).all()

    def test_a_resumed_run_draws_on(self):
        vq = residual(dropout=1.0)
        for step in range(5):
            vq.update(vq(normal(9, D, seed=step)))
        other = residual(dropout=1.0)
        other.load_state_dict(vq.state_dict())
        for step in range(5):
            assert torch.equal(vq.active, other.active)
            vq.update(vq(normal(9, D, seed=step))), other.update(other(normal(9, D, seed=step)))

    def test_forgetting_update_is_noticed(self):
        vq = residual(dropout=0.5, inner="vq")
        for _ in range(9):
            vq(normal(9, D))
        with pytest.warns(UserWarning, match="without `update`"):
            vq(normal(9, D))


class TestGrouped:
    @pytest.mark.parametrize("shared", [False, True])
    def test_against_a_loop(self, shared):
        vq = steadyvq.build_quantizer("grouped", num_codes=K, dim=D, groups=3, inner="vq", shared=shared).double()
        vq.init_from(normal(200, D, seed=50).double(), method="data")
        z = normal(40, D).double().requires_grad_()
        tables = [vq.layer(g).codes.base for g in range(3)]
        out = vq(z)
        loss, codes, tokens = 0.0, [], []
        for g, table in enumerate(tables):
            part = z[:, 2 * g : 2 * g + 2]
            tokens.append(argmin(part.detach(), table.detach()))
            code = table[tokens[-1]]
            codes.append(code.detach())
            loss = loss + 0.25 * (part - code.detach()).square().sum() + (part.detach() - code).square().sum()
        assert torch.equal(out.indices, torch.stack(tokens, -1))
        assert torch.equal(out.z_q, torch.cat(codes, -1))
        torch.testing.assert_close(out.loss, loss / (40 * D), msg="the mean over all features, as without groups")
        parameters = [z, *tables[: len(vq.inner)]]
        for a, b in zip(
            torch.autograd.grad(out.loss, parameters, retain_graph=True),
            torch.autograd.grad(loss / (40 * D), parameters),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
        upstream = normal(40, D, seed=3).double()
        assert torch.equal(torch.autograd.grad((out.z_q * upstream).sum(), z)[0], upstream)

    def test_one_group_is_the_quantizer_inside(self):
        z = normal(40, D)
        vq, one = (
            steadyvq.build_quantizer("nsvq", num_codes=K, dim=D),
            steadyvq.build_quantizer("grouped", num_codes=K, dim=D, groups=1),
        )
        a, b = vq(z), one(z)
        assert torch.equal(a.indices, b.indices[:, 0])
        assert torch.equal(a.loss, b.loss)

    def test_groups_of_residual_layers(self):
        vq = steadyvq.build_quantizer(
            "grouped", num_codes=K, dim=D, groups=2, inner="residual", inner_options={"layers": 3, "inner": "ema"}
        )
        vq.init_from(normal(200, D, seed=50))
        out = vq(normal(4, 5, D))
        assert out.indices.shape == vq.index_shape((4, 5)) == (4, 5, 2, 3)
        assert torch.equal(vq.decode(out.indices), out.z_q)
        assert torch.equal(vq.encode(normal(4, 5, D)), out.indices)
        assert vq.codebook().shape == (2, 3, K, D // 2)
        entries = vq.entries(out.indices)
        assert vq.num_entries == 6 * K
        rows = vq.codebook().reshape(6 * K, D // 2)[entries]
        torch.testing.assert_close(rows.sum(-2).flatten(-2), out.z_q)
        before = state(vq)
        vq.update(out)
        assert all(not torch.equal(before[n], v) for n, v in state(vq).items() if n.endswith("ema.sums"))
        rebuilt = steadyvq.build_quantizer(**vq.bake().spec)
        rebuilt.load_state_dict(vq.bake().state_dict())
        after = vq(normal(4, 5, D))
        assert torch.equal(rebuilt(normal(4, 5, D)).z_q, after.z_q)

    def test_refuses_what_does_not_divide(self):
        with pytest.raises(ValueError, match="dim is 6, but 4 groups need a multiple of 4"):
            steadyvq.build_quantizer("grouped", num_codes=K, dim=D, groups=4)
        vq = steadyvq.build_quantizer("grouped", num_codes=K, dim=D, groups=2)
        with pytest.raises(ValueError, match="axis -1 of 2 groups"):
            vq.decode(torch.zeros(5, 1, dtype=torch.int64))


def area(x: Tensor, side: int) -> Tensor:
    """Means over the cells [floor(i H / s), ceil((i + 1) H / s))."""
    h, w = x.shape[2:]
    rows = []
    for i in range(side):
        for j in range(side):
            cell = x[:, :, i * h // side : -(-(i + 1) * h // side), j * w // side : -(-(j + 1) * w // side)]
            rows.append(cell.mean((2, 3)))
    return torch.stack(rows, -1).reshape(*x.shape[:2], side, side)


def cubic(side: int, size: int) -> Tensor:
    """The matrix (size, side) of cubic convolution with a = -0.75, edges repeated (Keys 1981)."""
    matrix = torch.zeros(size, side, dtype=torch.float64)
    a = -0.75
    for i in range(size):
        at = (i + 0.5) * side / size - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            x = abs(at - tap)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            matrix[i, min(max(tap, 0), side - 1)] += near if x <= 1 else far
    return matrix


def up(codes: Tensor, size: int) -> Tensor:
    matrix = cubic(codes.shape[-1], size)
    return matrix @ codes @ matrix.T if codes.shape[-1] != size else codes


class TestMultiScale:
    @pytest.mark.parametrize(("shared", "phis"), [(True, 4), (False, 2), (True, 0)])
    def test_against_a_loop(self, shared, phis):
        vq = multiscale(inner="vq", shared=shared, phis=phis, ratio=0.3).double()
        f = images(3).double().requires_grad_()
        out = vq(f)
        total, rest, tokens, loss = torch.zeros_like(f).detach(), f.detach(), [], 0.0
        which = {4: [0, 1, 2, 3], 2: [0, 0, 1, 1], 0: []}[phis]
        for k, side in enumerate(SCALES):
            table = vq.layer(k).codes.base
            rows = area(rest, side).movedim(1, -1).reshape(-1, D)
            tokens.append(argmin(rows, table.detach()))
            codes = table[tokens[-1]].reshape(3, side, side, D).movedim(-1, 1)
            share = up(codes, 5)
            if phis:
                phi = vq.phis[which[k]]
                share = 0.7 * share + 0.3 * F.conv2d(share, phi.weight, phi.bias, padding=1)
            total = total + share
            rest = rest - share.detach()
            n = f.numel()
            loss = loss + (0.25 * (f - total.detach()).square().sum() + (f.detach() - total).square().sum()) / n / 4
        assert torch.equal(out.indices, torch.cat([t.reshape(3, -1) for t in tokens], 1))
        assert out.indices.shape == (3, TOKENS) == vq.index_shape((3, 5, 5))
        torch.testing.assert_close(out.z_q, total)
        torch.testing.assert_close(out.loss, loss)
        assert set(out.losses) == {"commitment", "codebook"}
        parameters = [f, *vq.parameters()]
        for a, b in zip(torch.autograd.grad(out.loss, parameters), torch.autograd.grad(loss, parameters), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("phis", [1, 2, 3, 4, 5, 10])
    def test_phi_of_a_scale_as_released(self, phis):
        """VAR picks the tick nearest to k / (S - 1); the rounding of numpy.linspace decides where two are as near."""
        vq = steadyvq.build_quantizer("multiscale", num_codes=4, dim=2, phis=phis)
        first = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
        ticks = np.linspace(first, 1 - first, phis)
        assert vq._phi_of_scale == [int(np.argmin(np.abs(ticks - k / 9))) for k in range(10)]
        assert len(set(vq._phi_of_scale)) == len(vq.phis) == phis, "none is left without a gradient"
        assert vq.index_shape((2, 16, 16)) == (2, 680)

    def test_other_losses_of_the_inner_quantizer_act_at_every_scale(self):
        vq = multiscale(losses={"ns": 0.3, "commitment": 0.0})
        f = images(3)
        out = vq(f)
        assert set(out.losses) == {"ns", "codebook"}
        values = [layer.losses["ns"] for layer in out.inner]
        torch.testing.assert_close(out.losses["ns"], sum(values) / 4)
        torch.testing.assert_close(out.loss, 0.3 * out.losses["ns"] + out.losses["codebook"])
        rest = f
        for k, (layer, part) in enumerate(zip(out.inner, vq.split(out.indices), strict=True)):
            seen = layer.assignment.z
            torch.testing.assert_close(seen, area(rest, SCALES[k]).movedim(1, -1).reshape(-1, D))
            rest = f - vq.decode(torch.cat([p.flatten(1) for p in vq.split(out.indices)[: k + 1]], 1))
            assert torch.equal(layer.indices, part)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("training", [True, False])
    def test_decode_gives_the_forward_vectors(self, dtype, training):
        vq = multiscale().train(training)
        f = images(3).to(dtype)
        out = vq(f)
        assert out.z_q.dtype == dtype
        assert torch.equal(out.z_q, vq.decode(out.indices, dtype=dtype))
        assert torch.equal(out.indices, vq.encode(f))
        for i in range(3):
            assert torch.equal(vq.decode(out.indices[i : i + 1], dtype=dtype), out.z_q[i : i + 1])
            assert torch.equal(vq.encode(f[i : i + 1]), out.indices[i : i + 1])

    def test_first_scales_decode(self):
        vq = multiscale(size=40)
        f = images(40, seed=50)
        indices = vq.encode(f)
        ends = [1, 5, 14, 39]
        assert indices.shape[1] == ends[-1]
        assert all(torch.equal(a, b) for a, b in zip(vq.split(indices[:, :5]), vq.split(indices)[:2], strict=True))
        shares = [vq.decode(indices[:, :end]) for end in ends]
        assert all(not torch.equal(a, b) for a, b in pairwise(shares))
        with pytest.raises(ValueError, match=r"with 39 tokens, or those of its first scales: \[1, 5, 14, 39\]"):
            vq.decode(indices[:, :6])

    def test_gradients(self):
        vq = multiscale()
        f = images(3).requires_grad_()
        upstream = images(3, seed=4)
        found = torch.autograd.grad((vq(f).z_q * upstream).sum(), [f, *vq.parameters()], allow_unused=True)
        assert torch.equal(found[0], upstream)
        assert found[1:] == (None,) * len(found[1:])
        vq.configure(estimator="direct")
        found = torch.autograd.grad((vq(f).z_q * upstream).sum(), [f, *vq.parameters()], allow_unused=True)
        assert found[0] is None
        assert all((gradient != 0).any() for gradient in found[1:])
        with pytest.raises(ValueError, match="'straight_through'"):
            vq.configure(estimator="each")

    def test_forward_is_pure_and_update_is_not(self):
        vq = multiscale(inner="ema")
        before, generator = state(vq), torch.get_rng_state()
        out = vq(images(3))
        assert torch.equal(vq(images(3)).loss, out.loss)
        assert same(before, state(vq))
        table = vq.codebook()[0]
        hits = torch.bincount(out.indices.flatten(), minlength=K).float()
        vq.update(out)
        torch.testing.assert_close(vq.layer(0).maintenance["ema"].counts, 0.99 + 0.01 * hits)
        assert not torch.equal(vq.codebook()[0], table)
        assert torch.equal(generator, torch.get_rng_state())

    def test_micro_batches_are_the_batch(self):
        large, small = multiscale().double(), multiscale().double()
        for step in range(10):
            f = images(8, seed=step).double()
            large.update(large(f))
            small.update([small(part) for part in f.split(2)])
        torch.testing.assert_close(state(large), state(small))

    @pytest.mark.parametrize("shared", [True, False])
    def test_bake_keeps_every_token_and_vector(self, shared):
        vq = multiscale(shared=shared, scales=[1, [2, 3], 5], phis=2)
        with torch.no_grad():
            vq.phis[1].weight += 0.1
        baked = vq.bake()
        rebuilt = steadyvq.build_quantizer(**baked.spec)
        rebuilt.load_state_dict(baked.state_dict())
        for other in (baked, rebuilt):
            assert torch.equal(other(images(3)).indices, vq(images(3)).indices)
            assert torch.equal(other(images(3)).z_q, vq(images(3)).z_q)
            assert not list(other.parameters())
            assert other(images(3)).loss == 0

    def test_compiled_and_under_autocast(self):
        vq = multiscale()
        f = images(3).requires_grad_()
        a, b = vq(f), torch.compile(vq, fullgraph=True, backend="aot_eager")(f)
        assert torch.equal(a.indices, b.indices)
        torch.testing.assert_close(a.loss, b.loss)
        torch.testing.assert_close(torch.autograd.grad(b.loss, f), torch.autograd.grad(a.loss, f))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = vq(f)
        assert torch.equal(a.z_q, cast.z_q)
        assert torch.equal(a.loss, cast.loss)

    def test_half_precision_parents_leave_the_state_in_float32(self):
        vq = torch.nn.Sequential(multiscale()).half()[0]
        assert all(value.dtype in (torch.float32, torch.int64) for value in vq.state_dict().values())
        assert vq(images(3).half()).loss.dtype == torch.float32

    def test_refuses_what_it_cannot_do(self):
        vq = multiscale()
        with pytest.raises(ValueError, match="a mask was given"):
            vq(images(3), torch.ones(3, 5, 5, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"needs \(B, 6, 5, 5\): its last scale is the size of the latents"):
            vq(normal(3, D, 4, 4))
        for options, message in (
            ({"channel_axis": -1}, "channel_axis is -1"),
            ({"scales": [2, 1]}, "from coarse to fine"),
            ({"scales": 5}, "needs a list of sides"),
            ({"scales": [0, 1]}, "side of a scale is 0"),
            ({"scales": [[1, 2, 3]]}, "a side or a pair"),
            ({"losses": {"commitment": "a"}}, "weight of loss 'commitment' is 'a'"),
            ({"losses": 3}, "losses is 3"),
            ({"phis": -1}, "phis is -1"),
        ):
            with pytest.raises(ValueError, match=message):
                multiscale(**options)
        with pytest.raises(ValueError, match="a MultiScale cannot be an inner quantizer"):
            Residual([vq], 1)


class TestAnyQuantizerInside:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("outer", ["residual", "grouped", "multiscale"])
    def test_trains_decodes_and_bakes(self, name, outer):
        num_codes, dim = methods()[name].example
        options = {"grouped": {"groups": 2}, "residual": {"layers": 2}, "multiscale": {"scales": [1, 2, 3]}}[outer]
        size = dim * 2 if outer == "grouped" else dim
        vq = steadyvq.build_quantizer(
            outer, num_codes=num_codes, dim=size, inner=name, channel_axis=1, inner_options={}, **options
        )
        encoder = torch.nn.Conv2d(size, size, 1)
        optimizer = torch.optim.Adam([*encoder.parameters(), *vq.parameters()], 1e-2)
        for step in range(4):
            x = normal(4, size, 3, 3, seed=step)
            out = vq(encoder(x))
            ((out.z_q - x).square().mean() + out.loss).backward()
            optimizer.step()
            vq.update(out, optimizer)
            optimizer.zero_grad()
        x = normal(4, size, 3, 3)
        out = vq.eval()(x)
        assert out.indices.shape == vq.index_shape((4, 3, 3))
        assert torch.equal(vq.decode(out.indices), out.z_q)
        assert torch.equal(vq.encode(x), out.indices)
        baked = vq.bake()
        rebuilt = steadyvq.build_quantizer(**baked.spec)
        rebuilt.load_state_dict(baked.state_dict())
        assert torch.equal(rebuilt(x).z_q, out.z_q)
        entries = vq.entries(out.indices)
        assert 0 <= entries.min() <= entries.max() < vq.num_entries

    def test_bad_options_are_refused_in_words(self):
        for options, message in (
            ({"layers": 0}, "layers is 0"),
            ({"inner": "nsqv"}, "did you mean 'nsvq'"),
            ({"inner": 3}, "inner is 3"),
            ({"inner_options": 3}, "inner_options is 3"),
            ({"inner_options": {"seed": 3}}, "seed is among the options"),
            ({"lossess": {}}, "did you mean 'losses'"),
            ({"dropout": 1.5}, "dropout is 1.5"),
            ({"reduction": "max"}, "by 'sum' or 'mean'"),
            ({"estimator": "ste"}, "unknown estimator 'ste'"),
        ):
            with pytest.raises(ValueError, match=message):
                residual(**options)

    def test_pytree_and_entries(self):
        vq = residual()
        out = vq(normal(9, D))
        leaves, spec = torch.utils._pytree.tree_flatten(out)
        again = torch.utils._pytree.tree_unflatten(leaves, spec)
        assert isinstance(again, Quantized)
        assert len(again.inner) == L
        assert any(leaf is out.inner[2].losses["ns"] for leaf in leaves)
        z_q, indices, _ = out
        assert z_q is out.z_q
        assert out.num_valid == 9
        assert torch.equal(vq.entries(indices), indices + K * torch.arange(L))
        assert (vq.entries(torch.full_like(indices, -1)) == -1).all()
        assert vq.num_entries == L * K
        shared = residual(shared=True)
        assert shared.num_entries == K
        assert torch.equal(shared.entries(indices), indices)
        assert set(out.stats) == {
            f"{n}_{i}" for n in ("winner_mass", "effective_losers", "ns_grad_max") for i in range(L)
        }
        a = out.assignment
        assert torch.equal(a.table[a.indices], a.selected)
        torch.testing.assert_close(a.distance, (normal(9, D) - out.z_q).square().sum(-1))


class TestTokenizer:
    def build(self, name: str, **options: object) -> Tokenizer:
        config = AutoencoderConfig(channels=8, multipliers=(1, 2), num_res_blocks=1, num_mid_blocks=0, z_channels=D)
        vq = steadyvq.build_quantizer(name, num_codes=K, dim=D, channel_axis=1, **options)
        torch.manual_seed(0)
        return Tokenizer.build(config, vq).eval()

    @pytest.mark.parametrize(
        ("name", "options", "shape"),
        [
            ("residual", {"layers": 3}, (2, 4, 4, 3)),
            ("grouped", {"groups": 2}, (2, 4, 4, 2)),
            ("multiscale", {"scales": [1, 2, 4]}, (2, 21)),
        ],
    )
    def test_saved_and_read(self, name, options, shape, tmp_path):
        tokenizer = self.build(name, **options)
        x = normal(2, 3, 8, 8).clamp(-1, 1)
        indices = tokenizer.encode(x)
        assert indices.shape == shape
        other = Tokenizer.from_pretrained(tokenizer.save_pretrained(tmp_path))
        assert torch.equal(other.encode(x), indices)
        assert torch.equal(other.decode(indices), tokenizer(x)[0].clamp(-1, 1))
        assert other.quantizer.index_map(indices).shape == (2, 4, 4)
        with pytest.raises(ValueError, match=f"decodes indices of {len(shape)} axes|grids"):
            tokenizer.decode(indices[0])

    def test_a_users_file_inside_is_not_run(self, tmp_path):
        import json

        folder = self.build("residual", layers=2).save_pretrained(tmp_path)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for spec in ({"inner": "evil.py:f"}, {"inner": "residual", "inner_options": {"inner": "evil.py:f"}}):
            path.write_text(json.dumps({**config, "quantizer": {**config["quantizer"], **spec}}))
            with pytest.raises(ValueError, match=r"comes from the file 'evil.py:f', which is not run"):
                Tokenizer.from_pretrained(folder)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "quantizer",
        [
            {"name": "residual", "options": {"layers": 3, "dropout": 0.5}, "init": "kmeans"},
            {"name": "multiscale", "options": {"scales": [1, 2, 4, 8], "inner": "ema"}},
        ],
    )
    def test_from_training_to_the_report(self, quantizer, photos, steadyvq_command, tmp_path):
        import json

        import yaml
        from conftest import tiny_recipe

        recipe = tiny_recipe(photos, quantizer={"num_codes": 32, "dim": 8, **quantizer}, micro_batch_size=3)
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
        commands = (
            ("train", "r.yaml", "--out", "run"),
            ("eval", "run"),
            ("encode", "run", "--data", photos, "--out", "t.npz"),
            ("decode", "run", "t.npz", "--out", "pictures"),
            ("report", "run"),
        )
        for command in commands:
            done = steadyvq_command(*command)
            assert done.returncode == 0, done.stderr
        usage = json.loads((tmp_path / "run" / "usage.json").read_text())
        tables = 3 if quantizer["name"] == "residual" else 1
        assert usage["num_codes"] == len(usage["counts"]) == 32 * tables
        assert sum(usage["counts"]) == 16 * (64 * 3 if tables == 3 else 85)
        assert ("idle" in usage) == (tables == 3)
        tokens = np.load(tmp_path / "t.npz")["tokens"]
        assert tokens.shape == ((8, 8, 8, 3) if tables == 3 else (8, 85))
        assert len(list((tmp_path / "pictures").iterdir())) == 8


def test_a_residual_of_one_layer_is_that_layer():
    vq, one = steadyvq.build_quantizer("nsvq", num_codes=K, dim=D, seed=4), residual(layers=1, places=False, seed=4)
    assert isinstance(vq, VectorQuantizer)
    for step in range(5):
        z = normal(40, D, seed=step)
        a, b = vq(z), one(z)
        assert torch.equal(a.indices, b.indices[:, 0])
        assert torch.equal(a.loss, b.loss)
        assert vq.update(a) == one.update(b)


class Model(torch.nn.Module):
    """A linear encoder before a quantizer."""

    def __init__(self, name: str, options: dict[str, object]) -> None:
        super().__init__()
        self.encoder = torch.nn.Conv2d(D, D, 1)
        self.quantizer = steadyvq.build_quantizer(name, num_codes=8, dim=D, channel_axis=1, **options)

    def forward(self, x: Tensor) -> Quantized:
        return self.quantizer(self.encoder(x))


def train(rank: int, world: int, folder: str, name: str, options: dict[str, object]) -> None:
    """Twelve steps on the process's share of each batch; the first one leaves its state in the folder."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Model(name, options).double()
    wrapped: torch.nn.Module = model
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        steadyvq.across_processes(wrapped)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.quantizer.init_from(normal(8, D, 4, 4, seed=99).double().chunk(world)[rank], method="data")
    for step in range(12):
        x = normal(8, D, 4, 4, seed=step).double().chunk(world)[rank]
        out = wrapped(x)
        ((out.z_q - x).square().mean() + out.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.quantizer.update(out, optimizer)
    if rank == 0:
        torch.save(model.state_dict(), f"{folder}/state-{world}.pt")
    if world > 1:
        os._exit(0)  # gloo's threads may abort an interpreter that takes its time to end


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("residual", {"layers": 3, "dropout": 0.7, "maintenance": {"replace": {"patience": 1.0, "cap": 1.0}}}),
        ("residual", {"layers": 3, "shared": True, "inner": "ema"}),
        ("multiscale", {"scales": [1, 2, 4]}),
    ],
)
def test_two_processes_are_one(name, options, tmp_path):
    """Dropped layers included: the wrapper of two processes waits for the gradient of every parameter."""
    train(0, 1, str(tmp_path), name, options)
    torch.multiprocessing.spawn(train, (2, str(tmp_path), name, options), nprocs=2)
    one, two = (torch.load(tmp_path / f"state-{world}.pt") for world in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)
