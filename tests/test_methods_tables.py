# SPDX-License-Identifier: Apache-2.0
"""Methods whose table is made in another way: naive forms of every transform, and the table that is kept in evaluation."""

import copy
import io
import math

import pytest
import torch
from cases import NAMES, build, normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import steadyvq
from steadyvq.quantizers import TransformedCodebook, VectorQuantizer, compose
from steadyvq.quantizers.methods.fvq import BridgeCodebook
from steadyvq.quantizers.methods.grit import Radius
from steadyvq.quantizers.registry import methods
from steadyvq.training.average import WeightAverage
from steadyvq.training.config import OptimConfig, RunConfig

K, D = 24, 6
TABLES = [name for name in NAMES if isinstance(build(name), VectorQuantizer)]
TRANSFORMED = [name for name in TABLES if isinstance(build(name).codes, TransformedCodebook)]


def everything(out: steadyvq.Quantized) -> Tensor:
    """A loss that reaches the table of methods without losses of their own, too."""
    return out.loss + out.z_q.sum()


def trained(vq: steadyvq.Quantizer, z: Tensor) -> set[str]:
    """Names of the parameters that the losses of these latents reach."""
    vq.zero_grad()
    vq(z).loss.backward()
    return {name for name, p in vq.named_parameters() if p.grad is not None and p.grad.any()}


class TestUnitSphere:
    def test_losses_and_gradients_against_a_loop(self):
        vq = build("vqgan_fc").double()
        raw = vq.codes.base
        with torch.no_grad():
            raw *= 0.1 + torch.rand(K, 1, generator=torch.Generator().manual_seed(1)) * 3
        z = (4 * normal(30, D)).double().requires_grad_()
        out = vq(z)
        upstream = normal(30, D, seed=3).double()
        (out.loss + (out.z_q * upstream).sum()).backward()
        for i in range(30):
            direction = z[i].detach() / z[i].detach().pow(2).sum().sqrt()
            cosines = [float(raw[j].detach() @ direction / raw[j].detach().norm()) for j in range(K)]
            q = max(range(K), key=cosines.__getitem__)
            assert out.indices[i] == q
            code = raw[q].detach() / raw[q].detach().norm()
            torch.testing.assert_close(out.z_q[i].detach(), code)
            by_direction = upstream[i] + 0.25 * 2 * (direction - code) / (30 * D)
            along = (by_direction @ direction) * direction
            torch.testing.assert_close(z.grad[i], (by_direction - along) / z[i].detach().norm())
        expected = torch.zeros_like(raw)
        for i, q in enumerate(out.indices.tolist()):
            length = raw[q].detach().norm()
            code, direction = raw[q].detach() / length, z[i].detach() / z[i].detach().norm()
            pull = 2 * (code - direction) / (30 * D)
            expected[q] += (pull - (pull @ code) * code) / length
        torch.testing.assert_close(raw.grad, expected)

    def test_a_loss_is_that_of_unit_vectors(self):
        vq = build("vqgan_fc").double()
        z = normal(30, D).double()
        out = vq(z)
        error = (z / z.norm(dim=1, keepdim=True) - vq.codebook()[out.indices]).square().mean()
        torch.testing.assert_close(out.loss, 1.25 * error)
        torch.testing.assert_close(vq(1000 * z).loss, out.loss)

    def test_codes_start_as_directions_and_their_base_too(self):
        vq = steadyvq.build_quantizer("vqgan_fc", num_codes=4096, dim=8)
        torch.testing.assert_close(vq.codes.base.norm(dim=1), torch.ones(4096))
        torch.testing.assert_close(vq.codebook().norm(dim=1), torch.ones(4096))

    @pytest.mark.parametrize("tiny", [0.0, 1e-30])
    def test_a_latent_without_direction_is_harmless(self, tiny):
        vq = build("vqgan_fc")
        z = normal(5, D)
        z[2] = tiny
        z.requires_grad_()
        out = vq(z)
        (out.loss + out.z_q.sum()).backward()
        assert out.loss.isfinite()
        assert z.grad.isfinite().all()
        assert z.grad[2].abs().max() < 10
        assert vq.codes.base.grad.isfinite().all()

    def test_baking_keeps_the_layer_and_can_be_saved(self):
        baked = build("vqgan_fc").bake()
        z = 5 * normal(50, D)
        assert baked.spec["unit_sphere"] == "latents"
        other = steadyvq.build_quantizer(**baked.spec)
        other.load_state_dict(baked.state_dict())
        assert torch.equal(other(z).z_q, build("vqgan_fc")(z).z_q)
        assert torch.equal(other.bake()(z).loss, other(z).loss)

    def test_moving_averages_keep_directions(self):
        """The average of unit latents, divided by its length; an unused code keeps its direction for ever."""
        vq = compose(K, D, {"codebook": "frozen", "maintenance": {"ema": {"decay": 0.5}}, "unit_sphere": True})
        rows = torch.cat([normal(K - 1, D), -9 * torch.ones(1, D)])
        vq.codes.set_rows_(rows)
        for part in vq.maintenance.values():
            part.rows_set(vq.codebook())
        unused, sums, counts = vq.codebook()[-1], vq.codebook(), torch.ones(K)
        z = normal(300, D).abs() + 1
        for _ in range(400):
            out = vq(z)
            vq.update(out)
            for j in range(K):
                mine = z[out.indices == j]
                sums[j] = 0.5 * sums[j] + 0.5 * (mine / mine.norm(dim=1, keepdim=True)).sum(0)
                counts[j] = 0.5 * counts[j] + 0.5 * len(mine)
        assert counts[-1] == 0
        torch.testing.assert_close(vq.codebook()[-1], unused)
        used = counts > 1
        torch.testing.assert_close(vq.codebook()[used], sums[used] / sums[used].norm(dim=1, keepdim=True))

    def test_replacement_jitters_directions(self):
        """Noise of a radius is that of unit vectors, whatever the lengths of the rows behind them."""
        vq = build("vqgan_fc", maintenance={"replace": {"jitter": 0.1}})
        with torch.no_grad():
            vq.codes.base[:4] *= 50
        noise = 0.01 * normal(3, D)
        before = vq.codebook()
        dst, src = torch.tensor([10, 11, 12]), torch.tensor([0, 1, 2])

        class Once(torch.nn.Module):
            def forward(self, batch):
                batch.rewrite(dst, src, noise)
                return {}

        vq.maintenance["once"] = Once()
        vq.update(vq(normal(9, D)))
        expected = before[src] + noise
        torch.testing.assert_close(vq.codebook()[dst], expected / expected.norm(dim=1, keepdim=True))

    def test_init_from_places_directions(self):
        vq = steadyvq.build_quantizer("vqgan_fc", num_codes=K, dim=D)
        centres = normal(K, D, seed=2)
        lengths = 0.1 + 10 * torch.rand(K * 40, 1, generator=torch.Generator().manual_seed(1))
        z = (centres.repeat(40, 1) / centres.norm(dim=1).repeat(40)[:, None] + 0.01 * normal(K * 40, D)) * lengths
        vq.init_from(z)
        assert vq(z).losses["commitment"] < 1e-3

    def test_other_values_are_refused(self):
        with pytest.raises(ValueError, match="unit_sphere is 'codes', but"):
            build("vq", unit_sphere="codes")


def changes(name: str) -> dict[str, object]:
    """What changes a layer's table: name -> function of (layer, another layer of this method)."""

    def step(make):
        def run(vq, other):
            parameters = list(vq.parameters())
            if not parameters:
                return
            optimizer = make(parameters)
            vq.train()
            everything(vq(normal(64, vq.dim))).backward()
            vq.eval()
            vq.codebook()
            vq.train()
            optimizer.step()
            vq.eval()

        return run

    def fused(training):
        """Fused optimisers do not count their writes, and here no mode changes."""

        def run(vq, other):
            if list(vq.parameters()):
                optimizer = torch.optim.Adam(vq.parameters(), 0.1, fused=True)
                vq.train(training)
                vq.codebook()
                everything(vq(normal(64, vq.dim))).backward()
                if training:
                    vq.codebook()
                optimizer.step()

        return run

    def data(vq, other):
        for p in vq.parameters():
            p.data = p.data + 0.1

    def update(vq, other):
        vq.train()
        for seed in range(3):
            vq.update(vq(normal(400, vq.dim, seed=seed)))
            vq.codebook()
        vq.eval()

    def rows(vq, other):
        if not vq.codes.cannot_copy:
            vq.codes.copy_rows_(torch.tensor([1, 2]), torch.tensor([3, 4]), 0.1 * normal(2, vq.dim))

    def place(vq, other):
        if vq.places_codes:
            vq.init_from(3 * normal(200, vq.dim, seed=8))

    return {
        "load": lambda vq, other: vq.load_state_dict(other.state_dict()),
        "load by assignment": lambda vq, other: vq.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
        "sgd": step(lambda p: torch.optim.SGD(p, 0.1)),
        "adam": step(lambda p: torch.optim.Adam(p, 0.1)),
        "fused adam": step(lambda p: torch.optim.Adam(p, 0.1, fused=True)),
        "fused in training": fused(True),
        "fused in evaluation": fused(False),
        "data": data,
        "update": update,
        "rows": rows,
        "place": place,
        "double": lambda vq, other: vq.double(),
        "there and back": lambda vq, other: vq.double().load_state_dict(other.double().state_dict()) and vq.float(),
    }


@pytest.mark.parametrize("name", TABLES)
class TestTheTableIsThatOfTheState:
    def fresh(self, vq: steadyvq.Quantizer) -> Tensor:
        """The table of a layer that has never computed one, in this state."""
        other = steadyvq.build_quantizer(**vq.spec).to(vq.codes.base.dtype)
        other.load_state_dict(vq.state_dict())
        return other.eval().codebook()

    @pytest.mark.parametrize("change", changes("vq"))
    def test_after_every_change(self, name, change):
        vq, other = build(name).eval(), build(name).eval()
        with torch.no_grad():
            for p in other.parameters():
                p += 0.3 * normal(*p.shape, seed=4)
        z = normal(20, vq.dim)
        before = vq.codebook()
        vq.encode(z)
        changes(name)[change](vq, other)
        after = vq.codebook()
        assert torch.equal(after, self.fresh(vq))
        moved = change in (
            "load",
            "load by assignment",
            "there and back",
            "sgd",
            "adam",
            "data",
            "fused adam",
            "fused in training",
            "fused in evaluation",
        )
        if moved and list(vq.parameters()):
            assert not torch.equal(after, before.to(after))
        if not vq.exact_in_training:
            vq.eval()
        with torch.no_grad():
            dtype = after.dtype
            assert torch.equal(vq(z.to(dtype)).z_q, after[vq.encode(z.to(dtype))])

    def test_under_averaged_weights_and_after(self, name):
        vq = build(name)
        average = WeightAverage(vq, 0.5)
        for seed in range(3):
            optimizer = torch.optim.SGD([*vq.parameters(), torch.nn.Parameter(torch.ones(1))], 0.5)
            out = vq(normal(64, vq.dim, seed=seed))
            if everything(out).requires_grad:
                everything(out).backward()
            optimizer.step()
            vq.update(out)
            average.update()
        vq.eval()
        before = vq.codebook()
        with average.applied():
            inside = vq.codebook()
            assert not torch.equal(inside, before)
            assert torch.equal(inside, self.fresh(vq))
        assert torch.equal(vq.codebook(), before)

    def test_copies_and_pickles_are_on_their_own(self, name):
        vq = build(name).eval()
        vq.codebook()
        names = set(vq.state_dict())
        other, file = copy.deepcopy(vq), io.BytesIO()
        torch.save(vq, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
        assert names == set(other.state_dict()) == set(read.state_dict())
        for twin in (other, read):
            assert getattr(twin.codes, "_kept", None) is None
            assert torch.equal(twin.codebook(), vq.codebook())
            with torch.no_grad():
                for tensor in (*twin.codes.parameters(), *twin.codes.buffers()):
                    tensor += 0.1 * normal(*tensor.shape, seed=2)
            assert not torch.equal(twin.codebook(), vq.codebook())
            assert torch.equal(vq.codebook(), self.fresh(vq))

    def test_inference_mode_leaves_a_table_that_others_can_use(self, name):
        vq = build(name).eval()
        with torch.inference_mode():
            vq(normal(9, vq.dim))
        for p in vq.parameters():
            p.requires_grad_(False)
        z = normal(9, vq.dim).requires_grad_()
        (vq(z).loss + vq(z).z_q.sum()).backward()
        assert z.grad is not None


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_transform_that_has_learned_places_codes_on_latents(name):
    vq = build(name)
    if vq.places_codes:
        z = 3 * normal(200, vq.dim, seed=8)
        vq.init_from(z, method="data")
        assert torch.cdist(vq.codebook().double(), z.double()).amin(1).max() < 1e-5


@pytest.mark.parametrize("name", TRANSFORMED)
class TestTheKeptTable:
    def counted(self, name, monkeypatch):
        vq = build(name).eval()
        calls = []
        transform = type(vq.codes).transform
        monkeypatch.setattr(type(vq.codes), "transform", lambda codes: calls.append(1) or transform(codes))
        return vq, calls

    def test_is_computed_once_in_evaluation(self, name, monkeypatch):
        vq, calls = self.counted(name, monkeypatch)
        z = normal(9, vq.dim)
        with torch.no_grad():
            out = vq(z)
            vq.decode(out.indices)
            vq.encode(z)
        vq.codebook()
        with torch.inference_mode():
            vq(z)
        assert len(calls) == 1

    def test_is_computed_once_per_training_forward(self, name, monkeypatch):
        vq, calls = self.counted(name, monkeypatch)
        vq.train()
        for count in range(1, 4):
            vq(normal(9, vq.dim)).loss.backward()
            assert len(calls) == count

    def test_carries_the_gradient_in_evaluation_too(self, name):
        vq = build(name).eval()
        vq.codebook()
        assert trained(vq, normal(64, vq.dim))

    def test_a_spoiled_table_is_not_used_again(self, name):
        vq = build(name).eval()
        before = vq.codebook()
        with torch.no_grad():
            vq.codes().zero_()
        assert torch.equal(vq.codebook(), before)

    def test_is_float32_under_autocast(self, name):
        vq = build(name).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = vq.codebook()
        assert inside.dtype == torch.float32
        assert torch.equal(inside, build(name).eval().codebook())


def layer_norm(x: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()


class TestBridge:
    def naive(self, codes: BridgeCodebook, patch: int) -> Tensor:
        """Token by token, head by head."""
        num_codes, dim = codes.base.shape
        size = patch * patch
        tokens = [torch.cat([codes.base[t * size + s] for s in range(size)]) for t in range(num_codes // size)]
        x = [codes.compress.weight @ token + codes.compress.bias for token in tokens]
        if codes.registers is not None:
            x += list(codes.registers)
        for block in codes.blocks:
            normed = [layer_norm(token, 1e-6) for token in x]
            hidden = len(normed[0])
            part = hidden // 4
            q, k, v = (
                [(block.qkv.weight @ t + block.qkv.bias)[i * hidden : (i + 1) * hidden] for t in normed]
                for i in range(3)
            )
            for t in range(len(x)):
                heads = []
                for h in range(4):
                    cut = slice(h * part, (h + 1) * part)
                    scores = torch.stack([q[t][cut] @ k[s][cut] / math.sqrt(part) for s in range(len(x))]).softmax(0)
                    heads.append(sum(w * v[s][cut] for s, w in enumerate(scores)))
                x[t] = x[t] + block.out.weight @ torch.cat(heads) + block.out.bias
            for t, token in enumerate(x):
                wide = block.wide.weight @ layer_norm(token, 1e-6) + block.wide.bias
                wide = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
                x[t] = token + block.narrow.weight @ wide + block.narrow.bias
        out = [codes.recover.weight @ layer_norm(t, 1e-6) + codes.recover.bias for t in x[: num_codes // size]]
        return torch.stack([row for token in out for row in token.reshape(size, dim)])

    @pytest.mark.parametrize(("patch", "registers"), [(2, 0), (2, 3), (1, 2), (4, 0)])
    @pytest.mark.parametrize("start", ["zeros", "residual"])
    def test_table_and_gradient_against_loops(self, patch, registers, start):
        vq = build("fvq", num_codes=16, patch=patch, registers=registers, hidden=8, init="normal", start=start).double()
        codes = vq.codes
        expected = self.naive(codes, patch) + (codes.base if start == "residual" else 0)
        torch.testing.assert_close(codes(), expected)
        upstream = normal(16, D, seed=9).double()
        got = torch.autograd.grad((codes() * upstream).sum(), list(codes.parameters()))
        want = torch.autograd.grad((expected * upstream).sum(), list(codes.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)

    def test_faithful_start_is_zero_and_leaves_it(self):
        vq = steadyvq.build_quantizer("fvq", num_codes=64, dim=D)
        assert not vq.codebook().any()
        optimizer = torch.optim.Adam(vq.parameters(), 1e-2)
        for step in range(60):
            optimizer.zero_grad()
            vq(normal(256, D, seed=step)).loss.backward()
            optimizer.step()
        assert len(vq.codebook().unique(dim=0)) == 64
        assert len(vq(normal(2000, D)).indices.unique()) > 20

    def test_other_starts_differ_from_the_first_step(self):
        assert len(steadyvq.build_quantizer("fvq", num_codes=64, dim=D, start="xavier").codebook().unique(dim=0)) == 64
        residual = steadyvq.build_quantizer("fvq", num_codes=64, dim=D, start="residual")
        assert torch.equal(residual.codebook(), residual.codes.base)
        z = normal(200, D)
        residual.init_from(z, method="data")
        assert torch.cdist(residual.codebook().double(), z.double()).min(1).values.max() < 1e-6

    def test_every_part_is_trained(self):
        vq = build("fvq", registers=2)
        assert trained(vq, normal(64, D)) == {name for name, _ in vq.named_parameters()}
        assert vq.codes.trainable

    def test_patches_by_size_and_sizes_that_do_not_fit(self):
        assert steadyvq.build_quantizer("fvq", num_codes=65536, dim=2, hidden=8, depth=0).codes.per_token == 64
        assert steadyvq.build_quantizer("fvq", num_codes=16384, dim=2, hidden=8, depth=0).codes.per_token == 16
        with pytest.raises(ValueError, match=r"num_codes is 1000, .*use 992 or 1008"):
            steadyvq.build_quantizer("fvq", num_codes=1000, dim=4)
        with pytest.raises(ValueError, match="use 16 or 32"):
            steadyvq.build_quantizer("fvq", num_codes=7, dim=4)
        for options in ({"hidden": 6}, {"patch": 0}, {"registers": -1}, {"depth": -1}):
            with pytest.raises(ValueError, match="but a bridge needs"):
                steadyvq.build_quantizer("fvq", num_codes=16, dim=4, **options)
        with pytest.raises(ValueError, match="start is 'ones'"):
            steadyvq.build_quantizer("fvq", num_codes=16, dim=4, start="ones")

    def test_single_codes_are_not_written(self):
        with pytest.raises(ValueError, match=r"share tokens.*leave out the replacement"):
            build("fvq", maintenance={"replace": {}})
        with pytest.raises(ValueError, match=r"cannot place these codes on data: .*start='residual'"):
            build("fvq").init_from(normal(50, D))

    @pytest.mark.parametrize(("name", "num_codes"), [("fvq", 65536), ("fvq", 262144), ("transvq", 65536)])
    def test_no_array_of_codes_by_codes(self, name, num_codes):
        """The largest tensor of a forward and backward of the table stays in the order of K (h + d)."""
        largest = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                out = func(*args, **(kwargs or {}))
                for item in out if isinstance(out, tuple | list) else (out,):
                    largest = max(largest, item.numel() if isinstance(item, Tensor) else 0)
                return out

        codes = steadyvq.build_quantizer(name, num_codes=num_codes, dim=4, hidden=16).codes
        with Watch():
            codes().square().sum().backward()
        # In a bridge K x d elements are the longest; patches by patches may be held where attention is not fused.
        assert largest <= max(num_codes * 4, (num_codes // 64) ** 2 * 4 if name == "fvq" else num_codes * 32)


class TestTransformer:
    def naive(self, codes) -> Tensor:
        def norm(x, layer):
            return layer_norm(x, 1e-5) * layer.weight + layer.bias

        x = [codes.enter.weight @ codes.base[j] + codes.positions[j] for j in range(len(codes.base))]
        for block in codes.blocks:
            normed = [norm(t, block.norm_attention) for t in x]
            phi = [
                [torch.where(y > 0, y + 1, y.exp()) for y in (layer.weight @ t for t in normed)]
                for layer in (block.query, block.key)
            ]
            value = [block.value.weight @ t for t in normed]
            for i in range(len(x)):
                weights = [float_dot(phi[0][i], phi[1][j]) for j in range(len(x))]
                mixed = sum(w * v for w, v in zip(weights, value, strict=True)) / (sum(weights) + 1e-6)
                x[i] = x[i] + block.out.weight @ mixed
            for i, t in enumerate(x):
                wide = block.wide.weight @ norm(t, block.norm_mlp) + block.wide.bias
                wide = 0.5 * wide * (1 + torch.erf(wide / math.sqrt(2)))
                x[i] = t + block.narrow.weight @ wide + block.narrow.bias
        return torch.stack([codes.leave.weight @ norm(t, codes.norm) for t in x])

    def test_table_and_gradient_against_loops(self):
        codes = build("transvq", hidden=10, depth=2).double().codes
        expected = self.naive(codes)
        torch.testing.assert_close(codes(), expected)
        upstream = normal(K, D, seed=9).double()
        got = torch.autograd.grad((codes() * upstream).sum(), list(codes.parameters()))
        want = torch.autograd.grad((expected * upstream).sum(), list(codes.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)

    def test_the_table_is_frozen_and_the_rest_is_trained(self):
        vq = build("transvq")
        assert trained(vq, normal(64, D)) == {name for name, _ in vq.named_parameters()}
        assert "codes.base" in dict(vq.named_buffers())
        assert (
            sum(p.numel() for p in vq.parameters())
            == K * 256 + 2 * D * 256 + 4 * 256**2 + (2 * 2 * 256**2 + 3 * 256) + 3 * 2 * 256
        )

    def test_start(self):
        codes = steadyvq.build_quantizer("transvq", num_codes=512, dim=64).codes
        assert codes.base.std().item() == pytest.approx(64**-0.5, rel=0.05)
        assert codes.positions.std().item() == pytest.approx(1, rel=0.05)
        assert codes.leave.weight.abs().max() <= 256**-0.5

    def test_copied_codes_are_copies_at_the_distance_of_the_noise(self):
        vq = build("transvq")
        dst, src = torch.tensor([3, 9]), torch.tensor([20, 1])
        vq.codes.copy_rows_(dst, src, torch.zeros(2, D))
        table = vq.codebook()
        assert torch.equal(table[dst], table[src])
        noise = 0.01 * normal(2, D)
        vq.codes.copy_rows_(dst, src, noise)
        table = vq.codebook()
        torch.testing.assert_close((table[dst] - table[src]).norm(dim=1), noise.norm(dim=1), rtol=0.1, atol=0)

    def test_moments_of_copied_rows_are_reset(self):
        vq = build("transvq")
        optimizer = torch.optim.Adam(vq.parameters(), 0.1)
        vq(normal(64, D)).loss.backward()
        optimizer.step()
        average = WeightAverage(vq, 0.9)
        vq.codes.copy_rows_(torch.tensor([3]), torch.tensor([4]), torch.zeros(1, D))
        vq.codes.forget_rows(torch.tensor([3]), optimizer, average)
        moments = optimizer.state[vq.codes.positions]["exp_avg"]
        assert not moments[3].any()
        assert moments[4].any()
        assert torch.equal(average.shadow["codes.positions"][3], vq.codes.positions[3])

    def test_placing_is_refused(self):
        with pytest.raises(ValueError, match="cannot place these codes on data: a transformer"):
            build("transvq").init_from(normal(50, D))


def float_dot(a: Tensor, b: Tensor) -> Tensor:
    return sum(x * y for x, y in zip(a, b, strict=True))


class TestFeatures:
    @pytest.fixture
    def file(self, tmp_path):
        from safetensors.torch import save_file

        def write(tensors, name="features.safetensors"):
            save_file(tensors, tmp_path / name)
            return str(tmp_path / name)

        return write

    def test_codes_are_projections_of_the_file(self, file):
        features = normal(K, 17)
        vq = steadyvq.build_quantizer("vqgan_lc", num_codes=K, dim=D, features=file({"clip": features}))
        codes = vq.codes
        for j in range(K):
            row = [sum(codes.weight[i] * features[j]) + codes.bias[i] for i in range(D)]
            torch.testing.assert_close(vq.codebook()[j], torch.stack(row))
        assert trained(vq, normal(64, D)) == {"codes.weight", "codes.bias"}
        with pytest.raises(ValueError, match=r"cannot place .* leave out `features`"):
            vq.init_from(normal(60, D))

    def test_start_of_the_projection(self, file):
        path = file({"f": normal(8, 700)})
        vq = steadyvq.build_quantizer("vqgan_lc", num_codes=8, dim=64, features=path)
        assert vq.codes.weight.std().item() == pytest.approx(64**-0.5, rel=0.02)

    def test_loss_weights(self):
        vq = build("vqgan_lc").double()
        z = normal(30, D).double().requires_grad_()
        out = vq(z)
        (grad,) = torch.autograd.grad(out.loss, z)
        error = z.detach() - vq.codebook()[out.indices]
        torch.testing.assert_close(out.loss, 0.1 * (1 + 0.33) * error.square().mean())
        torch.testing.assert_close(grad, 0.1 * 2 * error / z.numel())

    def test_latents_as_features(self):
        vq = steadyvq.build_quantizer("vqgan_lc", num_codes=K, dim=D)
        z = normal(500, D)
        vq.init_from(z)
        assert torch.equal(vq.codebook(), vq.codes.base)
        assert trained(vq, z) == {"codes.weight", "codes.bias"}

    def test_a_saved_layer_is_read_back_without_the_file(self, file, tmp_path):
        path = file({"f": normal(K, 17)})
        vq = steadyvq.build_quantizer("vqgan_lc", num_codes=K, dim=D, features=path)
        (tmp_path / "features.safetensors").unlink()
        other = steadyvq.build_quantizer(**vq.spec)
        other.load_state_dict(vq.state_dict())
        assert torch.equal(other.codebook(), vq.codebook())
        assert other.spec == vq.spec

    def test_wrong_files_are_named(self, file, tmp_path):
        def make(path, **options):
            return steadyvq.build_quantizer("vqgan_lc", num_codes=K, dim=D, features=path, **options)

        with pytest.raises(ValueError, match="there is no such file"):
            make(str(tmp_path / "none.safetensors"))
        with pytest.raises(ValueError, match=r"shape \(25, 9\) .* num_codes=24 needs .* \(24, d'\), one row per code"):
            make(file({"f": normal(25, 9)}))
        with pytest.raises(ValueError, match=r"shape \(24, 3, 3\)"):
            make(file({"f": normal(24, 3, 3)}))
        with pytest.raises(ValueError, match=r"2 tensors \(a, b\), but the features must be its only one"):
            make(file({"a": normal(24, 3), "b": normal(24, 3)}))
        with pytest.raises(ValueError, match="not all finite"):
            make(file({"f": torch.full((24, 3), float("nan"))}))
        with pytest.raises(ValueError, match=r"dtype torch\.int64"):
            make(file({"f": torch.ones(24, 3, dtype=torch.int64)}))
        (tmp_path / "text").write_text("no tensors at all")
        with pytest.raises(ValueError, match="is no safetensors file"):
            make(str(tmp_path / "text"))
        with pytest.raises(ValueError, match="give one"):
            make(file({"f": normal(24, 3)}), feature_dim=3)


class TestSimVQ:
    def test_what_is_trained(self):
        z = normal(64, D)
        assert trained(build("simvq"), z) == {"codes.weight", "codes.bias"}
        assert trained(build("simvq", bias=False), z) == {"codes.weight"}
        assert trained(build("simvq", train_base=True), z) == {"codes.base", "codes.weight", "codes.bias"}
        assert build("simvq", train_base=True).codes.trainable
        assert not build("simvq").codes.trainable

    def test_a_trained_base_moves_selected_codes_alone_and_the_map_moves_all(self):
        vq = build("simvq", train_base=True).double()
        z = normal(5, D).double()
        out = vq(z)
        table = vq.codebook()
        (grad,) = torch.autograd.grad(out.losses["codebook"], vq.codes.base)
        expected = torch.zeros_like(table)
        for i, q in enumerate(out.indices.tolist()):
            expected[q] += 2 * (table[q] - z[i]) @ vq.codes.weight.detach() / (5 * D)
        torch.testing.assert_close(grad, expected)

    def test_copied_codes_get_noise_of_that_size(self):
        vq = build("simvq").double()
        with torch.no_grad():
            vq.codes.weight.mul_(5)
        before, noise = vq.codebook(), normal(2000, D).double()
        moved = []
        for row in noise:
            vq.codes.copy_rows_(torch.tensor([3]), torch.tensor([20]), row[None])
            moved.append((vq.codebook()[3] - before[20]).square().sum())
        assert torch.stack(moved).mean().item() == pytest.approx(D, rel=0.1)


class TestAnnealing:
    def config(self, **optim: object) -> RunConfig:
        return RunConfig(epochs=40, optim=OptimConfig(**optim))

    def test_linear_after_a_hold(self):
        config = self.config(decay="linear", warmup_steps=200, hold=0.37, final=0.01)
        total = 40 * config.steps_per_epoch
        assert config.lr_factor(0) == pytest.approx(1 / 200)
        assert config.lr_factor(199) == 1
        assert config.lr_factor(200) == config.lr_factor(int(0.37 * total)) == 1
        for step in range(int(0.37 * total) + 1, total, 97):
            u = step / total
            assert config.lr_factor(step) == pytest.approx(0.01 + 0.99 * (1 - u) / (1 - 0.37))
        assert config.lr_factor(total - 1) == pytest.approx(0.01, abs=1e-3)

    def test_cosine_after_a_hold(self):
        config = self.config(decay="cosine", hold=0.5, final=0.2)
        total = 40 * config.steps_per_epoch
        assert config.lr_factor(total // 2) == 1
        assert config.lr_factor(3 * total // 4) == pytest.approx(0.6)
        assert self.config(decay="cosine").lr_factor(total // 2) == pytest.approx(0.5)

    def test_wrong_fractions_are_refused(self):
        for optim in ({"hold": 1.0}, {"hold": -0.1}, {"final": 1.5}, {"final": -0.1}):
            with pytest.raises(ValueError, match=r"hold is a fraction of the run in \[0, 1\)"):
                OptimConfig(**optim)


def test_examples_fit_their_methods():
    for name in TRANSFORMED:
        num_codes, dim = methods()[name].example
        assert isinstance(steadyvq.build_quantizer(name, num_codes=num_codes, dim=dim), VectorQuantizer)


class TestAffine:
    def test_table_and_gradients_against_loops(self):
        vq = build("affine").double()
        codes, z = vq.codes, normal(40, D).double()
        table = vq.codebook()
        for j in range(K):
            for k in range(D):
                value = (1 + 10 * codes.scale[k]) * codes.base[j, k] + 10 * codes.shift[k]
                torch.testing.assert_close(table[j, k], value)
        out = vq(z)
        grads = torch.autograd.grad(out.loss, (codes.base, codes.scale, codes.shift))
        want = [torch.zeros_like(g) for g in grads]
        for i, q in enumerate(out.indices.tolist()):
            pull = 0.95 * 2 * (table[q] - z[i]) / (40 * D)
            want[0][q] += pull * (1 + 10 * codes.scale.detach())
            want[1] += pull * 10 * codes.base[q].detach()
            want[2] += pull * 10
        for a, b in zip(grads, want, strict=True):
            torch.testing.assert_close(a, b)

    def test_starts_as_the_base(self):
        vq = steadyvq.build_quantizer("affine", num_codes=K, dim=D)
        assert torch.equal(vq.codebook(), vq.codes.base)
        assert trained(vq, normal(64, D)) == {"codes.base", "codes.scale", "codes.shift"}
        assert vq.codes.trainable

    def test_codes_hear_a_fifth_of_the_decoder(self):
        vq = build("affine", losses={"commitment": None, "codebook": None}).double()
        z, upstream = normal(40, D).double().requires_grad_(), normal(40, D, seed=2).double()
        out = vq(z)
        grad_z, grad_base = torch.autograd.grad((out.z_q * upstream).sum(), (z, vq.codes.base))
        assert torch.equal(grad_z, upstream)
        expected = torch.zeros_like(grad_base)
        for i, q in enumerate(out.indices.tolist()):
            expected[q] += 0.2 * upstream[i] * (1 + 10 * vq.codes.scale.detach())
        torch.testing.assert_close(grad_base, expected)

    def test_copied_codes_get_the_noise_in_the_table(self):
        vq = build("affine").double()
        before, noise = vq.codebook(), normal(2, D).double()
        dst, src = torch.tensor([3, 9]), torch.tensor([20, 1])
        vq.codes.copy_rows_(dst, src, noise)
        sign = (1 + 10 * vq.codes.scale.detach()).sign()
        torch.testing.assert_close(vq.codebook()[dst], before[src] + noise * sign)

    def test_impossible_rates_are_refused(self):
        with pytest.raises(ValueError, match="rate is 0"):
            build("affine", rate=0.0)


class TestGrit:
    @pytest.mark.parametrize("rho", ["log", "identity", "clipped", "constant"])
    def test_gradients_against_loops(self, rho):
        vq = build("grit", losses={"commitment": None, "codebook": None}).double()
        vq.estimator = Radius(rho, limit=1.2)
        z, upstream = normal(40, D).double().requires_grad_(), normal(40, D, seed=2).double()
        out = vq(z)
        grad_z, grad_bias = torch.autograd.grad(
            (out.z_q * upstream).sum(), (z, vq.codes.bias), allow_unused=True, materialize_grads=True
        )
        table, expected_bias, seen_sides = vq.codebook(), torch.zeros(D).double(), set()
        for i, q in enumerate(out.indices.tolist()):
            step = table[q] - z[i].detach()
            r = step.pow(2).sum().sqrt()
            slope = {"log": 1 / (1 + r), "identity": 1.0, "clipped": float(r < 1.2), "constant": 0.0}[rho]
            seen_sides.add(bool(r < 1.2))
            along = slope * (upstream[i] @ step / r) * step / r
            torch.testing.assert_close(grad_z[i], upstream[i] - along)
            expected_bias += along
        assert seen_sides == {True, False}
        torch.testing.assert_close(grad_bias, expected_bias)

    def test_a_latent_on_its_code_has_a_finite_gradient(self):
        vq = build("grit")
        z = vq.codebook()[:3].requires_grad_()
        (vq(z).z_q.square().sum()).backward()
        torch.testing.assert_close(z.grad, 2 * z.detach())
        assert all(p.grad is None or p.grad.isfinite().all() for p in vq.parameters())

    def test_low_rank_map_against_loops(self):
        codes = build("grit", rank=2).double().codes
        for j in range(K):
            down = [codes.base[j] @ codes.down[:, r] for r in range(2)]
            row = codes.base[j] + sum(down[r] * codes.up[:, r] for r in range(2))
            torch.testing.assert_close(codes()[j], row)
        fresh = steadyvq.build_quantizer("grit", num_codes=K, dim=D, rank=2)
        assert torch.equal(fresh.codebook(), fresh.codes.base)
        assert {name for name, _ in fresh.named_parameters()} == {"codes.down", "codes.up"}
        with pytest.raises(ValueError, match="a rank from 1 to 6"):
            build("grit", rank=7)

    def test_copied_codes_get_noise_of_that_size(self):
        vq = build("grit", rank=3).double()
        with torch.no_grad():
            vq.codes.up *= 9
        before, noise = vq.codebook(), normal(2000, D).double()
        moved = []
        for row in noise:
            vq.codes.copy_rows_(torch.tensor([3]), torch.tensor([20]), row[None])
            moved.append((vq.codebook()[3] - before[20]).square().sum())
        assert torch.stack(moved).mean().item() == pytest.approx(D, rel=0.1)

    def test_its_status_is_told(self):
        assert methods()["grit"].status == "reconstructed"
        with pytest.raises(ValueError, match="rho='square'"):
            Radius("square")


class TestCodebooksByName:
    @pytest.mark.parametrize(
        "codebook",
        [
            {"bridge": {"patch": 2, "hidden": 8, "start": "xavier"}},
            {"transformer": {"hidden": 8}},
            "affine",
            {"low_rank": {"rank": 2}},
            {"linear": {"train_base": True, "bias": False}},
        ],
    )
    def test_any_codebook_with_any_loss(self, codebook):
        parts = {"codebook": codebook, "maintenance": {"replace": None}, "init": "normal"}
        vq = steadyvq.build_quantizer("nsvq", num_codes=K, dim=D, **parts)
        out = vq(normal(64, D))
        assert set(out.losses) == {"commitment", "codebook", "ns"}
        assert torch.autograd.grad(out.losses["ns"], list(vq.parameters()), allow_unused=True)
        again = steadyvq.build_quantizer(**vq.spec)
        assert torch.equal(again.codebook(), vq.codebook())

    def test_wrong_settings_are_named(self):
        with pytest.raises(ValueError, match=r"unknown setting of codebook 'bridge' 'pach'.*did you mean 'patch'"):
            build("vq", codebook={"bridge": {"pach": 2}})
        with pytest.raises(ValueError, match="patch of codebook 'bridge' is 'two'"):
            build("vq", codebook={"bridge": {"patch": "two"}})
        with pytest.raises(ValueError, match=r"needs a name, {name: settings} or a Codebook"):
            build("vq", codebook={"bridge": {}, "affine": {}})
        with pytest.raises(ValueError, match="EMA cannot maintain a AffineCodebook"):
            build("vq", codebook="affine", maintenance={"ema": {}})


def test_the_list_of_methods_stays_a_function_when_they_are_loaded():
    assert steadyvq.list_quantizers()
    assert set(steadyvq.quantizers.methods()) == set(steadyvq.list_quantizers())
