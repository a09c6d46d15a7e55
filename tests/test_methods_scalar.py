# SPDX-License-Identifier: Apache-2.0
"""FSQ, LFQ and BSQ against loops from their papers' equations, and what quantizers on a fixed grid promise."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cases import normal
from conftest import tiny_recipe

import steadyvq
from steadyvq.quantizers.bits import sum_of_joints
from steadyvq.quantizers.scalar import Grid, ScalarQuantizer

LEVELS = [[8, 6, 5], [8, 5, 5, 5], [2, 3, 4, 7], [9], [2, 2]]


def build(name: str, num_codes: int, dim: int, **options: object) -> steadyvq.Quantizer:
    return steadyvq.build_quantizer(name, num_codes=num_codes, dim=dim, **options)


def grid(name: str, levels: list[int], **options: object) -> steadyvq.Quantizer:
    return build(name, math.prod(levels), len(levels), levels=levels, **options)


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    """Latents that reach every level, in float64."""
    return 2 * normal(*shape, seed=seed).double()


class TestFSQ:
    @pytest.mark.parametrize("form", ["official", "centred"])
    @pytest.mark.parametrize("levels", LEVELS, ids=str)
    def test_against_a_loop_of_the_equations(self, form, levels):
        vq = grid("fsq", levels, form=form).double()
        z = spread(400, len(levels)).requires_grad_()
        upstream = normal(400, len(levels), seed=1).double()
        out = vq(z)
        (out.z_q * upstream).sum().backward()
        for i, row in enumerate(z.tolist()):
            index, step = 0, 1
            for k, (x, count) in enumerate(zip(row, levels, strict=True)):
                half = (count - 1) * (1 - 1e-3 if form == "official" else 1 + 1e-3) / 2
                offset = 0.5 if count % 2 == 0 else 0.0
                shift = math.tan(offset / half) if form == "official" else math.atanh(offset / half)
                bounded = math.tanh(x + shift) * half - offset
                level = round(bounded)
                index += (level + count // 2) * step
                step *= count
                assert out.z_q[i, k].item() == pytest.approx(level / (count // 2), abs=1e-7)
                slope = half * (1 - math.tanh(x + shift) ** 2) / (count // 2)
                assert z.grad[i, k].item() == pytest.approx(slope * upstream[i, k].item(), abs=1e-6)
            assert out.indices[i] == index
        assert len(out.indices.unique()) > 0.5 * min(vq.num_codes, 100), "the latents reach the levels"
        assert out.loss == 0
        assert out.losses == {}

    @pytest.mark.parametrize("levels", LEVELS, ids=str)
    def test_symmetric_against_a_loop_of_its_equation(self, levels):
        vq = grid("fsq_symmetric", levels).double()
        z = spread(400, len(levels)).requires_grad_()
        out = vq(z)
        out.z_q.sum().backward()
        for i, row in enumerate(z.tolist()):
            index, step = 0, 1
            for k, (x, count) in enumerate(zip(row, levels, strict=True)):
                level = math.floor((count - 1) * (math.tanh(x) + 1) / 2 + 0.5)
                index += level * step
                step *= count
                assert out.z_q[i, k].item() == pytest.approx(2 / (count - 1) * level - 1, abs=1e-7)
                assert z.grad[i, k].item() == pytest.approx(1 - math.tanh(x) ** 2, abs=1e-7)
            assert out.indices[i] == index

    @pytest.mark.parametrize("levels", [[17, 17], [5, 3, 9], [7]], ids=str)
    def test_ifsq_against_a_loop_of_its_equation(self, levels):
        vq = grid("ifsq", levels).double()
        z = spread(400, len(levels)).requires_grad_()
        out = vq(z)
        out.z_q.sum().backward()
        for i, row in enumerate(z.tolist()):
            index, step = 0, 1
            for k, (x, count) in enumerate(zip(row, levels, strict=True)):
                half, sigmoid = (count - 1) // 2, 1 / (1 + math.exp(-1.6 * x))
                level = round((2 * sigmoid - 1) * half)
                index += (level + half) * step
                step *= count
                assert out.z_q[i, k].item() == pytest.approx(level / half, abs=1e-7)
                assert z.grad[i, k].item() == pytest.approx(3.2 * sigmoid * (1 - sigmoid), abs=1e-7)
            assert out.indices[i] == index

    def test_the_bound_of_ifsq_makes_normal_latents_almost_uniform(self):
        """The largest distance of the distribution functions; that of tanh is twice as large."""
        z = torch.special.ndtri((torch.arange(1000) + 0.5).double() / 1000)[:, None]
        uniform = 2 * (torch.arange(1000) + 0.5).double() / 1000 - 1
        distance = {
            name: (grid(name, [17]).double().project(z)[:, 0] - uniform).abs().max() / 2
            for name in ("fsq_symmetric", "ifsq")
        }
        assert distance["ifsq"] < 0.021
        assert distance["fsq_symmetric"] > 2 * distance["ifsq"]

    def test_levels_of_ifsq(self):
        """As many in every feature where the size is such a power of an odd number, else those of FSQ."""
        assert build("ifsq", 17**4, 4).grid.levels == [17] * 4
        assert build("ifsq", 1125, 4, levels=[9, 5, 5, 5]).grid.levels == [9, 5, 5, 5]
        assert build("ifsq", 1000, 4).grid.levels == [8, 5, 5, 5]
        with pytest.raises(ValueError, match=r"recommends no levels"):
            build("ifsq", 100, 2)
        with pytest.raises(ValueError, match="num_codes is True"):
            build("ifsq", True, 1)

    def test_where_zero_lies(self):
        """Centred: exactly where the code 0 is; official: nearly. Symmetric with even levels: above the middle."""
        zero = torch.zeros(1, 4)
        official, centred = (grid("fsq", [8, 5, 4, 2], form=form) for form in ("official", "centred"))
        assert torch.equal(centred(zero).z_q, zero)
        torch.testing.assert_close(centred(zero).assignment.z, zero)
        torch.testing.assert_close(official(zero).assignment.z[0, :3], zero[0, :3], atol=1e-3, rtol=0)
        assert official(zero).assignment.z[0, 3] < -0.04, "the tangent of two levels is far from the hyperbolic one"
        even = grid("fsq_symmetric", [2, 4, 6])
        torch.testing.assert_close(even(zero[:, :3]).z_q, torch.tensor([[1.0, 1 / 3, 1 / 5]]))

    def test_symmetric_levels_are_symmetric_and_official_even_ones_are_not(self):
        for levels in LEVELS:
            table = grid("fsq_symmetric", levels).codebook()
            torch.testing.assert_close(table, -table.flip(0), atol=1e-7, rtol=0)
        values = grid("fsq", [8, 5]).codebook()
        assert values[:8, 0].tolist() == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75]
        assert (values[:8, 1] == -1).all(), "the first feature changes fastest"
        assert values[::8, 1].tolist() == [-1, -0.5, 0, 0.5, 1]

    def test_every_code_is_its_own_token(self):
        for name, levels in (("fsq", [8, 6, 5]), ("fsq_symmetric", [4, 4, 3])):
            vq = grid(name, levels)
            table = vq.codebook()
            assert len(table.unique(dim=0)) == vq.num_codes
            inside = torch.atanh(table.clamp(-0.999, 0.999)) if name == "fsq_symmetric" else None
            if inside is not None:
                assert torch.equal(vq.encode(inside), torch.arange(vq.num_codes))

    @pytest.mark.parametrize(
        ("asked", "levels"),
        [
            (240, [8, 6, 5]),
            (256, [8, 6, 5]),
            (1024, [8, 5, 5, 5]),
            (4096, [7, 5, 5, 5, 5]),
            (16384, [8, 8, 8, 6, 5]),
            (64000, [8, 8, 8, 5, 5, 5]),
            (65536, [8, 8, 8, 5, 5, 5]),
        ],
    )
    def test_sizes_of_the_paper(self, asked, levels):
        vq = build("fsq", asked, len(levels))
        assert vq.grid.levels == levels
        assert vq.num_codes == math.prod(levels)

    @pytest.mark.parametrize(
        ("num_codes", "dim", "options", "message"),
        [
            (1024, 32, {}, r"dim is 32, but .* \[8, 5, 5, 5\]: set dim=4, and project"),
            (
                3000,
                5,
                {},
                r"recommends no levels.*levels=\[5, 5, 5, 5, 5\] with num_codes=3125 and dim=5 or levels=\[7, 5",
            ),
            (1024, 4, {"levels": [8, 5, 5, 5]}, r"make 1000 codes of dim=4, but num_codes=1024.*\[6, 6, 6, 5\]"),
            (1000, 3, {"levels": [8, 5, 5, 5]}, r"levels=\[10, 10, 10\] with num_codes=1000 and dim=3"),
            (8, 2, {"levels": [8, 1]}, "integers from 2 to 1000"),
            (8, 1, {"levels": 8}, "a list of integers"),
            (True, 1, {}, "num_codes is True"),
            (240, 3, {"form": "tan"}, "unknown form 'tan': known are centred, official"),
            (240, 3, {"temperature": 1.0}, "unknown option 'temperature'"),
            (240, 3, {"losses": {"ns": 0.1}}, "unknown loss 'ns'"),
            (240, 3, {"channel_axis": 1.5}, "channel_axis is 1.5"),
            (240, 3, {"estimator": 1}, "estimator is 1"),
        ],
    )
    def test_sizes_that_cannot_be_say_what_can(self, num_codes, dim, options, message):
        with pytest.raises(ValueError, match=message):
            build("fsq", num_codes, dim, **options)

    def test_commitment_is_measured_where_the_codes_live(self):
        vq = grid("fsq", [8, 6, 5], losses={"commitment": 0.5}).double()
        z = spread(50, 3)
        out = vq(z)
        error = (out.assignment.z - out.z_q).square().mean()
        torch.testing.assert_close(out.assignment.distance, (out.assignment.z - out.z_q).square().sum(-1))
        torch.testing.assert_close(out.loss, 0.5 * error)
        assert error < 0.1 < (z - out.z_q).square().mean()


def dense(z, codes, tau):
    """(N, K) softmax of -|z - c|^2 / tau, as the released codes have it."""
    return torch.softmax(-(z[:, None] - codes[None]).square().sum(-1) / tau, 1)


class TestBits:
    def test_lfq_against_a_loop_of_the_equations(self):
        vq = build("lfq", 8, 3, temperature=0.7).double()
        z = spread(5, 3)
        z[0, 0] = 0.0
        out = vq(z)
        commitment, sample, mean = 0.0, 0.0, [0.0] * 8
        for i, row in enumerate(z.tolist()):
            bits = [1 if x > 0 else 0 for x in row]
            assert out.indices[i] == sum(bit * 2**b for b, bit in enumerate(bits))
            assert out.z_q[i].tolist() == [2.0 * bit - 1 for bit in bits]
            commitment += sum((x - (2 * bit - 1)) ** 2 for x, bit in zip(row, bits, strict=True)) / 15
            logits = [sum(2 * x * (2 * (j >> b & 1) - 1) for b, x in enumerate(row)) / 0.7 for j in range(8)]
            total = sum(math.exp(value) for value in logits)
            p = [math.exp(value) / total for value in logits]
            sample -= sum(q * math.log(q) for q in p) / 5
            mean = [m + q / 5 for m, q in zip(mean, p, strict=True)]
        batch = -sum(q * math.log(q + 1e-5) for q in mean)
        assert out.losses["commitment"].item() == pytest.approx(commitment)
        assert out.losses["sample_entropy"].item() == pytest.approx(sample)
        assert out.losses["batch_entropy"].item() == pytest.approx(-batch)
        assert out.loss.item() == pytest.approx(0.25 * commitment + 0.1 * (sample - batch))
        assert vq.batch_coupled == ("batch_entropy",)

    @pytest.mark.parametrize("eps", [1e-5, 0.0])
    @pytest.mark.parametrize("tau", [0.01, 2.0])
    def test_entropies_and_their_gradients_equal_the_dense_form(self, tau, eps):
        vq = build("lfq", 2**7, 7, temperature=tau, losses={"batch_entropy": {"eps": eps}}).double()
        z = (0.3 * spread(60, 7)).requires_grad_()
        out = vq(z)
        p = dense(z, vq.codebook(), vq.temperature)
        mean = p.mean(0)
        expected = {
            "sample_entropy": -torch.xlogy(p, p.clamp_min(1e-300)).sum(1).mean(),
            "batch_entropy": (mean * (mean + eps + 1e-300).log()).sum(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(out.losses[name], value)
            mine, theirs = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (out.losses[name], value))
            torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-6)
            assert theirs.abs().max() > 1e-3

    def test_float32_equals_the_dense_form_at_65536_codes(self):
        vq = build("lfq", 2**16, 16)
        z = (0.02 * normal(48, 16)).requires_grad_()
        out = vq(z)
        exact = z.detach().double().requires_grad_()
        mean = dense_mean(exact, 16, 0.01)
        expected = (mean * (mean + 1e-5).log()).sum()
        assert out.losses["batch_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)
        mine = torch.autograd.grad(out.losses["batch_entropy"], z)[0]
        theirs = torch.autograd.grad(expected, exact)[0]
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()

    @pytest.mark.parametrize("group_size", [1, 2, 3, 6])
    def test_bsq_against_the_dense_form_of_its_groups(self, group_size):
        vq = build("bsq", 64, 6, losses={"batch_entropy": {"group_size": group_size}}, temperature=0.2).double()
        z = spread(40, 6).requires_grad_()
        out = vq(z)
        u = z / z.norm(dim=1, keepdim=True)
        sample = dense(u, vq.codebook(), 0.2)
        torch.testing.assert_close(
            out.losses["sample_entropy"], -(sample * sample.log()).sum(1).mean(), rtol=1e-6, atol=0
        )
        batch = 0.0
        for start in range(0, 6, group_size):
            signs = torch.tensor([[2.0 * (j >> b & 1) - 1 for b in range(group_size)] for j in range(2**group_size)])
            p = dense(u[:, start : start + group_size], signs.double() / math.sqrt(6), 0.2).mean(0)
            batch = batch - (p * (p + 1e-8).log()).sum()
        torch.testing.assert_close(out.losses["batch_entropy"], -batch, rtol=1e-6, atol=0)
        torch.testing.assert_close(out.loss, 0.1 * (out.losses["sample_entropy"] - batch), rtol=1e-6, atol=0)
        mine, theirs = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (out.losses["batch_entropy"], -batch))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)

    def test_bsq_codes_lie_on_the_sphere_and_the_gradient_passes_through_it(self):
        vq = build("bsq", 64, 6).double()
        z = spread(30, 6).requires_grad_()
        upstream = spread(30, 6, seed=1)
        out = vq(z)
        torch.testing.assert_close(out.z_q, z.sign() / math.sqrt(6), atol=1e-7, rtol=0)
        (out.z_q * upstream).sum().backward()
        length = z.detach().norm(dim=1, keepdim=True)
        u = z.detach() / length
        expected = (upstream - u * (u * upstream).sum(1, keepdim=True)) / length / math.sqrt(6)
        torch.testing.assert_close(z.grad, expected)
        assert list(out.losses) == ["sample_entropy", "batch_entropy"]

    def test_bit_orders(self):
        z = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0]])
        assert build("lfq", 32, 5)(z).indices.item() == 0b11001
        assert build("lfq", 32, 5, order="big")(z).indices.item() == 0b10011
        assert build("bsq", 32, 5)(z).indices.item() == 0b10011
        for order in ("little", "big"):
            vq = build("lfq", 32, 5, order=order)
            assert torch.equal(vq.decode(vq.encode(z)), z)
        mixed = ScalarQuantizer(Grid([[0.0], [-1.0, 1.0], [0.0]], [[0, 1], [0, 1, 2], [0, 1]], order="big"))
        assert mixed.codebook()[7].tolist() == [1, 0, 1]

    def test_masked_latents_are_no_part_of_the_batch(self):
        for name in ("lfq", "bsq"):
            vq = build(name, 64, 6, temperature=0.5).double()
            z = spread(30, 6)
            mask = torch.arange(30) % 3 != 0
            masked, alone = z.clone().requires_grad_(), z[mask].clone().requires_grad_()
            a, b = vq(masked, mask), vq(alone)
            for loss in a.losses:
                torch.testing.assert_close(a.losses[loss], b.losses[loss])
            a.loss.backward()
            b.loss.backward()
            torch.testing.assert_close(masked.grad[mask], alone.grad)
            assert (masked.grad[~mask] == 0).all()

    def test_nothing_of_the_size_of_the_codebook_by_the_batch(self):
        """Every tensor of forward and backward is far smaller than N x K."""
        largest = 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                outputs = out if isinstance(out, tuple | list) else [out]
                largest = max([largest, *(t.numel() for t in outputs if isinstance(t, torch.Tensor))])
                return out

        vq = build("lfq", 2**16, 16)
        z = normal(1024, 16).requires_grad_()
        with Watch():
            vq(z).loss.backward()
        assert 2**16 <= largest < 1024 * 2**16 / 100

    @pytest.mark.parametrize(
        ("name", "num_codes", "dim", "options", "message"),
        [
            ("lfq", 1000, 10, {}, "power of two from 2 on: the nearest is num_codes=1024 with dim=10"),
            ("lfq", 1024, 32, {}, "1024 codes of one bit per feature need dim=10: set it, and project"),
            ("lfq", 0, 1, {}, "num_codes is 0"),
            ("lfq", 1, 1, {}, "nearest is num_codes=2 with dim=1"),
            ("lfq", 2**36, 36, {}, "group_size=0 with 36 bits.*choose one of 1, 2, 3, 4, 6, 9, 12, 18$"),
            ("bsq", 64, 6, {"losses": {"batch_entropy": {"group_size": 4}}}, "choose one of 1, 2, 3, 6"),
            ("bsq", 2**70, 70, {}, "more than 2"),
            ("lfq", 64, 6, {"order": "up"}, "unknown order 'up': known are big, little"),
            ("lfq", 64, 6, {"temperature": 0}, "temperature is 0"),
            ("lfq", 64, 6, {"temperature": {"effective_losers": 4}}, "need a positive number"),
            ("lfq", 64, 6, {"losses": {"codebook": 1.0}}, "unknown loss 'codebook'"),
        ],
    )
    def test_what_cannot_be_says_what_can(self, name, num_codes, dim, options, message):
        with pytest.raises(ValueError, match=message):
            build(name, num_codes, dim, **options)


def dense_mean(z, bits, tau):
    """The mean assignment over all 2^bits codes, by the softmax over all of them, latent by latent."""
    codes = 2.0 * (torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1).double() - 1
    return sum(torch.softmax(2 * codes @ row / tau, 0) for row in z) / len(z)


def test_sum_of_joints_orders_patterns_by_bit():
    odds = spread(7, 6)
    p = torch.sigmoid(odds)
    weight = torch.tensor([1.0, 0, 1, 1, 2, 1, 0]).double()
    sums = sum_of_joints(odds, 3, weight).reshape(2, 8)
    for group in range(2):
        for pattern in range(8):
            parts = [p[:, 3 * group + b] if pattern >> b & 1 else 1 - p[:, 3 * group + b] for b in range(3)]
            torch.testing.assert_close(sums[group, pattern], (weight * parts[0] * parts[1] * parts[2]).sum())


GRIDS = {"fsq": (240, 3), "fsq_symmetric": (240, 3), "lfq": (64, 6), "bsq": (64, 6)}


@pytest.mark.parametrize("name", GRIDS)
class TestGrids:
    def test_the_token_of_a_latent_on_a_threshold_is_the_same_everywhere(self, name):
        """Latents on and beside every threshold: alone, in a batch, strided, in float64, on the other axis."""
        vq = build(name, *GRIDS[name])
        edges = vq.thresholds.flatten()
        edges = edges[edges.isfinite()]
        near = torch.cat([edges, edges.nextafter(torch.tensor(9.0)), edges.nextafter(torch.tensor(-9.0))])
        z = near[torch.randint(len(near), (97, vq.dim), generator=torch.Generator().manual_seed(0))]
        tokens = vq.encode(z)
        assert torch.equal(torch.cat([vq.encode(row[None]) for row in z]), tokens)
        assert torch.equal(vq.encode(z.repeat_interleave(2, 1)[:, ::2]), tokens)
        assert torch.equal(build(name, *GRIDS[name], channel_axis=0).encode(z.t()), tokens)
        assert torch.equal(build(name, *GRIDS[name]).double().encode(z.double()), tokens)

    def test_infinite_latents_have_the_outermost_levels_and_nan_the_first(self, name):
        vq = build(name, *GRIDS[name])
        for value, expected in ((math.inf, vq.num_codes - 1), (-math.inf, 0), (math.nan, 0)):
            out = vq(torch.full((1, vq.dim), value))
            assert out.indices.item() == expected
        assert not out.assignment.counted.any()

    def test_no_codes_to_place_and_none_to_train(self, name):
        vq = build(name, *GRIDS[name])
        assert not vq.places_codes
        with pytest.raises(
            ValueError, match=r"fixed grid and no codes to place: leave it out \(in a recipe: quantizer.init"
        ):
            vq.init_from(normal(50, vq.dim))
        with pytest.raises(ValueError, match="the codes of a fixed grid do not move"):
            build(name, *GRIDS[name], estimator="direct")
        with pytest.raises(ValueError, match="the codes of a fixed grid do not move"):
            vq.configure(estimator="direct")
        assert not list(vq.parameters())
        assert not vq.state_dict(), "nothing to save: the arguments say it all"

    def test_baked_grids_can_be_saved_and_read(self, name):
        vq = build(name, *GRIDS[name], channel_axis=1)
        baked = vq.bake()
        assert type(baked) is ScalarQuantizer
        again = steadyvq.build_quantizer(**baked.spec)
        again.load_state_dict(baked.state_dict())
        z = 2 * normal(3, vq.dim, 20)
        for other in (baked, again):
            assert torch.equal(other(z).z_q, vq(z).z_q)
            assert torch.equal(other.encode(z), vq.encode(z))
            assert torch.equal(other.codebook(), vq.codebook())
        assert torch.equal(again(z.double()).z_q, vq(z.double()).z_q)

    def test_stages_set_weights_and_give_them_back(self, name):
        vq = build(name, *GRIDS[name])
        z = normal(40, vq.dim)
        before = vq(z)
        vq.configure(weights=dict.fromkeys(["ns", *vq.losses], 0.0), paused=["replace"])
        assert vq(z).loss == 0
        assert vq(z).losses == {}
        assert vq.batch_coupled == ()
        with pytest.raises(ValueError, match="unknown loss of this quantizer 'ns'"):
            vq.configure(weights={"ns": 0.1})
        for loss in vq.losses:
            vq.configure(weights={loss: 3.0})
            torch.testing.assert_close(
                vq(z).loss - before.loss, (3 - vq.losses[loss].weight) * before.losses[loss], rtol=1e-4, atol=1e-5
            )
        vq.configure()
        assert torch.equal(vq(z).loss, before.loss)


class TestLargeCodebooks:
    @pytest.mark.parametrize(
        ("name", "num_codes", "dim", "options"),
        [
            ("lfq", 2**18, 18, {}),
            ("bsq", 2**18, 18, {}),
            ("fsq", 2**18, 6, {"levels": [8] * 6}),
            ("bsq", 2**36, 36, {}),
            ("bsq", 2**62, 62, {}),
            ("fsq", 2**60, 20, {"levels": [8] * 20}),
            ("lfq", 2**36, 36, {"losses": {"batch_entropy": {"group_size": 18}}}),
        ],
    )
    def test_encode_and_decode_without_a_table(self, name, num_codes, dim, options):
        vq = build(name, num_codes, dim, **options)
        z = 3 * normal(50, dim)
        z[0], z[1] = 9.0, -9.0
        out = vq(z)
        assert out.indices.dtype == torch.int64
        assert out.indices[:2].tolist() == [num_codes - 1, 0]
        assert torch.equal(vq.decode(out.indices), out.z_q)
        assert sum(buffer.numel() for buffer in vq.buffers()) < 1000
        assert out.assignment.table.numel() == 0
        if num_codes * dim <= 2**30:
            assert torch.equal(vq.codebook()[out.indices], out.z_q)
        else:
            with pytest.raises(ValueError, match="too large to be written out: decode the indices you need"):
                vq.codebook()
        with pytest.raises(ValueError, match="codes: decode with the quantizer that encoded them"):
            vq.decode(torch.tensor([num_codes]))


def halves_of_a_batch(name: str, part: slice) -> tuple[steadyvq.Quantizer, torch.Tensor, torch.Tensor]:
    """A quantizer and a part of 40 latents of which 26 are there."""
    mask = torch.arange(40) % 4 != 1
    mask[25:30] = False
    return build(name, 64, 6, temperature=0.5).double(), spread(40, 6)[part].clone().requires_grad_(), mask[part]


def one_of_two(rank: int, where: str) -> None:
    """What each process of the test below does."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{where}/meet", rank=rank, world_size=2)
    for name in ("lfq", "bsq"):
        vq, z, mask = halves_of_a_batch(name, slice(0, 25) if rank == 0 else slice(25, 40))
        steadyvq.across_processes(vq)
        out = vq(z, mask)
        out.loss.backward()
        if rank == 1:
            vq.eval()(z.detach(), mask)  # evaluation in one process alone waits for nobody
        found = {"grad": z.grad, "count": out.num_valid, "entropy": out.losses["batch_entropy"].detach()}
        torch.save(found, f"{where}/{name}{rank}.pt")


def test_two_processes_have_the_gradient_of_the_global_batch(tmp_path):
    """With unequal numbers of valid latents; the losses are weighted by `num_valid`, as data parallel training does."""
    # A group's threads may hang at the interpreter's own end, so that is skipped.
    code = "import os, sys, test_methods_scalar as t; t.one_of_two(int(sys.argv[1]), sys.argv[2]); os._exit(0)"
    command, folder = [sys.executable, "-c", code], str(Path(__file__).parent)
    running = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=folder) for rank in (0, 1)]
    assert [process.wait(60) for process in running] == [0, 0]
    for name in ("lfq", "bsq"):
        vq, z, mask = halves_of_a_batch(name, slice(None))
        out = vq(z, mask)
        out.loss.backward()
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in (0, 1))
        assert first["count"] != second["count"]
        assert first["count"] + second["count"] == out.num_valid
        joined = torch.cat([part["grad"] * part["count"] / out.num_valid for part in (first, second)])
        torch.testing.assert_close(joined, z.grad)
        torch.testing.assert_close(first["entropy"], out.losses["batch_entropy"].detach())
        assert torch.equal(first["entropy"], second["entropy"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"name": "fsq", "num_codes": 1024, "dim": 4}, {"name": "lfq", "num_codes": 64, "dim": 6}]
)
def test_a_run_with_eval_encode_decode(photos, steadyvq_command, tmp_path, settings):
    """The tokenizer of a tiny run, read again, gives the tokens and images of the command line."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe(photos, quantizer=settings)))
    for arguments in (
        ("train", "tiny.yaml", "--out", "run"),
        ("eval", "run"),
        ("encode", "run", "--data", photos, "--out", "tokens.npz"),
        ("decode", "run", "tokens.npz", "--out", "decoded"),
    ):
        done = steadyvq_command(*arguments)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "decoded").iterdir())) == 8
    tokenizer = steadyvq.Tokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = tokenizer.encode(images)
    before = tokenizer.decode(tokens)
    tokenizer.quantizer = tokenizer.quantizer.bake()
    assert torch.equal(tokenizer.encode(images), tokens)
    assert torch.equal(tokenizer.decode(tokens), before)
    tokenizer.save_pretrained(tmp_path / "baked")
    assert torch.equal(steadyvq.Tokenizer.from_pretrained(tmp_path / "baked").decode(tokens), before)
