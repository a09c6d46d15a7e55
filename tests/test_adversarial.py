# SPDX-License-Identifier: Apache-2.0
"""Adversarial training: losses, LeCAM and the adaptive weight against loops, discriminators against plain functions."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadyvq.data import load_collection
from steadyvq.models import Critic, adaptive_weight, build_discriminator, discriminator_loss, generator_loss
from steadyvq.models.adversarial import LastLayer


@pytest.fixture(scope="module")
def images(photos: Path) -> Tensor:
    """Four crops of real photographs, (4, 3, 32, 32) in [-1, 1]."""
    from steadyvq.data import CropDataset

    return CropDataset(load_collection(str(photos), min_side=32, max_side=160), 32, 16, 0).batch(0, 0, 4)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


class TestLosses:
    real = torch.tensor([[[2.0, 0.5]], [[-1.5, 0.2]], [[1.0, -0.1]]], dtype=torch.float64)
    fake = torch.tensor([[[-2.0, 0.7]], [[0.3, -0.4]], [[-1.0, 1.6]]], dtype=torch.float64)

    def test_generator(self):
        """Lim and Ye 1705.02894 eq. 7; Goodfellow et al. 1406.2661 section 3: maximise log D, D the sigmoid."""
        per_image = [[-2.0, 0.7], [0.3, -0.4], [-1.0, 1.6]]
        flat = [x for row in per_image for x in row]
        expected = {
            "hinge": -sum(flat) / 6,
            "non_saturating": sum(-math.log(1 / (1 + math.exp(-x))) for x in flat) / 6,
            "non_saturating_per_image": sum(softplus(-(a + b) / 2) for a, b in per_image) / 3,
        }
        for kind, value in expected.items():
            assert float(generator_loss(kind, self.fake)) == pytest.approx(value, rel=1e-12), kind

    def test_generator_gradients(self):
        """It is steepest where the generator is worst: -sigmoid(-x) / n, and not the other way round."""
        fake = self.fake.clone().requires_grad_()
        generator_loss("non_saturating", fake).backward()
        expected = torch.tensor([-1 / (1 + math.exp(x)) / 6 for x in fake.flatten().tolist()], dtype=torch.float64)
        torch.testing.assert_close(fake.grad.flatten(), expected, rtol=1e-12, atol=0)

    def test_discriminator(self):
        real, fake = self.real.flatten().tolist(), self.fake.flatten().tolist()
        hinge = sum(max(0, 1 - x) for x in real) / 6 + sum(max(0, 1 + x) for x in fake) / 6
        entropy = sum(softplus(-x) for x in real) / 6 + sum(softplus(x) for x in fake) / 6
        assert float(discriminator_loss("hinge", self.real, self.fake)) == pytest.approx(hinge / 2, rel=1e-12)
        got = float(discriminator_loss("non_saturating", self.real, self.fake))
        assert got == pytest.approx(entropy / 2, rel=1e-12)

    def test_unknown_names_are_refused(self):
        with pytest.raises(ValueError, match="no generator loss is called 'wgan'"):
            generator_loss("wgan", self.fake)
        with pytest.raises(ValueError, match="no discriminator loss is called 'wgan'"):
            discriminator_loss("wgan", self.real, self.fake)

    def test_lecam(self):
        """Tseng et al. 2104.03310, eq. 3 and 4: r and f are of the steps before; two unequal micro-batches."""
        critic = Critic(nn.Identity(), decay=0.9).double()
        r = f = 0.0
        for step in range(4):
            real, fake = self.real + 0.3 * step, self.fake - 0.2 * step
            over = sum(max(0.0, x - f) ** 2 for x in real.flatten().tolist()) / 6
            under = sum(max(0.0, r - x) ** 2 for x in fake.flatten().tolist()) / 6
            assert float(critic.lecam(real, fake)) == pytest.approx(over + under, rel=1e-12)
            pieces = [(real[:2].mean(), fake[:2].mean()), (real[2:].mean(), fake[2:].mean())]
            critic.update(pieces, [2, 1], lambda tensor: tensor)
            r = 0.9 * r + 0.1 * float(real.mean())
            f = 0.9 * f + 0.1 * float(fake.mean())
            assert float(critic.real_mean) == pytest.approx(r, rel=1e-12)
            assert float(critic.fake_mean) == pytest.approx(f, rel=1e-12)
        assert {"real_mean", "fake_mean"} <= critic.state_dict().keys()

    def test_lecam_of_all_processes(self):
        """The other process has three images with logits of 4 and -8."""
        critic = Critic(nn.Identity(), decay=0.0)
        other = torch.tensor([12.0, -24.0, 3.0], dtype=torch.float64)
        critic.update([(torch.tensor(1.0), torch.tensor(2.0))], [1], lambda tensor: tensor + other)
        assert float(critic.real_mean) == (1 + 12) / 4
        assert float(critic.fake_mean) == (2 - 24) / 4


class TestAdaptiveWeight:
    def test_by_hand(self):
        """Esser et al. 2012.09841 eq. 7, with the 1e-4 of the code."""
        one, two = torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8])
        assert float(adaptive_weight(one, two)) == pytest.approx(5 / (1 + 1e-4), rel=1e-6)
        assert float(adaptive_weight(one, two, largest=2.0)) == 2.0
        assert float(adaptive_weight(one, 0 * two)) == 1e4, "clamped: 5 / 1e-4 is 50,000"
        for broken in (math.nan, math.inf, -math.inf):
            assert math.isnan(adaptive_weight(one, torch.tensor([broken, 0.0])))
            assert math.isnan(adaptive_weight(torch.tensor([broken, 0.0]), one))

    def test_the_last_layer_of_a_global_batch(self):
        """Micro-batches of 3 and 1 of this process and 2 of another: as one batch of 6 by plain autograd."""
        torch.manual_seed(0)
        layer = nn.Conv2d(5, 3, 3, padding=1).double()
        features, target = torch.randn(6, 5, 8, 8).double(), torch.randn(6, 3, 8, 8).double()
        judge = nn.Conv2d(3, 1, 4, 2).double()

        def losses(part: slice) -> tuple[Tensor, Tensor, Tensor]:
            made = layer(features[part]).detach().requires_grad_()
            return made, (made - target[part]).abs().mean(), -judge(made).mean()

        made = layer(features)
        nll, g = (made - target).abs().mean(), -judge(made).mean()
        by_nll, by_g = (torch.autograd.grad(x, layer.weight, retain_graph=True)[0] for x in (nll, g))
        expected = float(by_nll.norm() / (by_g.norm() + 1e-4))

        def add(last: LastLayer, part: slice) -> None:
            leaf, *own = losses(part)
            grads = [torch.autograd.grad(x, leaf)[0] for x in own]
            last.add(features[part], grads, part.stop - part.start)

        other = LastLayer(layer, layer.weight)
        add(other, slice(4, 6))
        last = LastLayer(layer, layer.weight, reduce=lambda sums: sums + other._sums)
        for _ in range(2):  # a step leaves nothing behind for the next
            add(last, slice(0, 3))
            add(last, slice(3, 4))
            weight, finite = last.balance()
            assert bool(finite)
            assert float(weight) == pytest.approx(expected, rel=1e-12)

    def test_in_float32_under_autocast(self):
        layer = nn.Conv2d(4, 3, 3)
        last, plain = LastLayer(layer, layer.weight), LastLayer(layer, layer.weight)
        features, grads = torch.randn(2, 4, 8, 8), [torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)]
        plain.add(features, grads, 2)
        with torch.autocast("cpu", torch.bfloat16):
            last.add(features, grads, 2)
            weight, _ = last.balance()
        assert float(weight) == float(plain.balance()[0])

    def test_not_finite_is_zero_and_told(self):
        layer = nn.Conv2d(4, 3, 3)
        last = LastLayer(layer, layer.weight)
        grad = torch.randn(2, 3, 6, 6)
        last.add(torch.randn(2, 4, 8, 8), [grad, torch.where(grad > 2, math.inf, grad)], 2)
        last.add(torch.randn(2, 4, 8, 8), [grad, grad * math.nan], 2)
        weight, finite = last.balance()
        assert (float(weight), bool(finite)) == (0.0, False)
        last.add(torch.randn(2, 4, 8, 8), [grad, grad], 2)
        assert bool(last.balance()[1])
        with pytest.raises(RuntimeError, match="no gradients were added"):
            last.balance()


def plain_patch(state: dict[str, Tensor], x: Tensor, layers: int, group: bool) -> Tensor:
    """PatchGAN by the table of its layers (1611.07004, appendix 6.1.2), from the tensors alone."""
    x = F.leaky_relu(F.conv2d(x, state["layers.0.weight"], state["layers.0.bias"], 2, 1), 0.2)
    for level in range(1, layers + 1):
        at = 3 * level - 1
        x = F.conv2d(x, state[f"layers.{at}.weight"], None, 2 if level < layers else 1, 1)
        scale, shift = (state[f"layers.{at + 1}.{n}"][:, None, None] for n in ("weight", "bias"))
        if group:
            groups = max(g for g in range(1, 33) if x.shape[1] % g == 0 and x.shape[1] // g >= 4)
            cut = x.reshape(len(x), groups, -1)
            mean, var = cut.mean(-1, keepdim=True), cut.var(-1, unbiased=False, keepdim=True)
            x = ((cut - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
        else:
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
            x = (x - mean) / (var + 1e-5).sqrt()
        x = F.leaky_relu(x * scale + shift, 0.2)
    at = 3 * layers + 2
    return F.conv2d(x, state[f"layers.{at}.weight"], state[f"layers.{at}.bias"], 1, 1)


def plain_stylegan(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    def conv(name: str, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    x = F.leaky_relu(conv("start.0", x, padding=1), 0.2)
    for i in range(blocks):
        y = F.leaky_relu(conv(f"blocks.{i}.body.0", x, padding=1), 0.2)
        y = F.leaky_relu(conv(f"blocks.{i}.body.2", y, padding=1), 0.2)
        padded = F.pad(y, (1, 1, 1, 1), mode="reflect")
        blurred = torch.zeros_like(y)
        for dy, a in enumerate((1, 2, 1)):
            for dx, b in enumerate((1, 2, 1)):
                blurred += a * b / 16 * padded[:, :, dy : dy + y.shape[2], dx : dx + y.shape[3]]
        y = conv(f"blocks.{i}.down.1", blurred, stride=2, padding=1)
        x = (y + conv(f"blocks.{i}.skip", x, stride=2)) / math.sqrt(2)
    x = F.leaky_relu(conv("end.0", x, padding=1), 0.2).flatten(1)
    x = F.leaky_relu(x @ state["logit.0.weight"].T + state["logit.0.bias"], 0.2)
    return x @ state["logit.2.weight"].T + state["logit.2.bias"]


DIM, DEPTH = 128, 4


def dino_checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """A vision transformer with the names of facebookresearch/dino (vision_transformer.py) and random weights."""
    torch.manual_seed(seed)
    state = {
        "cls_token": torch.randn(1, 1, DIM),
        "pos_embed": torch.randn(1, 1 + 14 * 14, DIM) * 0.5,
        "patch_embed.proj.weight": torch.randn(DIM, 3, 8, 8) * 0.1,
        "patch_embed.proj.bias": torch.randn(DIM),
        "norm.weight": torch.ones(DIM),
        "norm.bias": torch.zeros(DIM),
    }
    for i in range(DEPTH):
        linear = {
            "attn.qkv": (3 * DIM, DIM),
            "attn.proj": (DIM, DIM),
            "mlp.fc1": (4 * DIM, DIM),
            "mlp.fc2": (DIM, 4 * DIM),
        }
        for name, shape in linear.items():
            state[f"blocks.{i}.{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
            state[f"blocks.{i}.{name}.bias"] = torch.randn(shape[0]) * 0.1
        for name in ("norm1", "norm2"):
            state[f"blocks.{i}.{name}.weight"] = 1 + torch.randn(DIM) * 0.1
            state[f"blocks.{i}.{name}.bias"] = torch.randn(DIM) * 0.1
    return state


def plain_dino(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """Token states of a vision transformer, head by head and with an explicit softmax."""

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((x + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    side = round(x.shape[1] ** 0.5)
    grid = state["pos_embed"][:, 1:].reshape(1, 14, 14, DIM).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic").flatten(2).movedim(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1) + state["pos_embed"][:, :1], x + grid], 1)
    states = [x]
    for i in range(DEPTH):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        mixed = []
        for head in range(DIM // 64):
            q, k, v = (qkv[..., part * DIM + head * 64 : part * DIM + (head + 1) * 64] for part in range(3))
            mixed.append((q @ k.transpose(1, 2) / 8).softmax(-1) @ v)
        x = x + linear(f"blocks.{i}.attn.proj", torch.cat(mixed, -1))
        hidden = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(f"blocks.{i}.mlp.fc2", hidden)
        states.append(x)
    return states


class TestDiscriminators:
    @pytest.mark.parametrize("norm", ["batch", "group"])
    @pytest.mark.parametrize("layers", [2, 3])
    def test_patch(self, images, layers, norm):
        torch.manual_seed(1)
        network = build_discriminator("patch", 32, channels=16, layers=layers, norm=norm)
        for parameter in network.parameters():  # biases too, or a dropped one would not show
            nn.init.normal_(parameter, 0.1, 0.2)
        expected = plain_patch(dict(network.named_parameters()), images, layers, norm == "group")
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)
        side = 32 // 2**layers - 2
        assert expected.shape == (4, 1, side, side)

    def test_patch_has_the_published_size_and_start(self):
        torch.manual_seed(0)
        network = build_discriminator("patch", 128)
        convs = 3 * 64 * 16 + 64 + (64 * 128 + 128 * 256 + 256 * 512) * 16 + 512 * 16 + 1
        assert sum(p.numel() for p in network.parameters()) == convs + 2 * (128 + 256 + 512)
        weights = torch.cat([m.weight.flatten() for m in network.modules() if isinstance(m, nn.Conv2d)])
        assert float(weights.detach().std()) == pytest.approx(0.02, rel=0.01)
        scales = torch.cat([m.weight for m in network.modules() if isinstance(m, nn.BatchNorm2d)])
        assert float(scales.detach().mean()) == pytest.approx(1, abs=0.005)
        assert float(scales.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert not list(network.buffers()), "no running statistics"

    def test_stylegan(self, images):
        torch.manual_seed(2)
        network = build_discriminator("stylegan", 32, width=1 / 32)
        for parameter in network.parameters():
            nn.init.normal_(parameter, 0.02, 0.1)
        expected = plain_stylegan(dict(network.named_parameters()), images, 3)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
        assert expected.shape == (4, 1)

    def test_stylegan_has_the_published_widths(self):
        with torch.device("meta"):
            network = build_discriminator("stylegan", 256)
        widths = [module.weight.shape[0] for name, module in network.named_modules() if name.endswith("skip")]
        assert network.start[0].weight.shape[0] == 64
        assert widths == [128, 256, 512, 512, 512, 512]
        assert network.logit[0].weight.shape == (512, 8192)

    @pytest.mark.parametrize("form", ["bare", "teacher", "safetensors"])
    def test_dino(self, images, tmp_path, form):
        from safetensors.torch import save_file

        state, path = dino_checkpoint(), tmp_path / ("dino.safetensors" if form == "safetensors" else "dino.pth")
        if form == "safetensors":
            save_file(state, path)
        elif form == "teacher":
            torch.save({"teacher": {f"module.backbone.{k}": v for k, v in state.items()}, "epoch": 3}, path)
        else:
            torch.save(state, path)
        network = build_discriminator("dino", 32, weights=str(path), norm="group")
        expected = plain_dino(state, images)
        for got, wanted in zip(network.features(images), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        # Heads on the input and on the ends of the quarters, here every block, and every patch has a logit.
        assert network.taps == [0, 1, 2, 3, 4]
        logits = network(images)
        assert logits.shape == (4, 5 * 16)
        head = network.heads[3]
        alone = head(expected[3][:, 1:].movedim(1, 2))
        torch.testing.assert_close(logits[:, 48:64], alone, rtol=1e-3, atol=1e-3)

    def test_dino_is_frozen_and_is_not_saved(self, images, tmp_path):
        torch.save(dino_checkpoint(), tmp_path / "dino.pth")
        network = build_discriminator("dino", 32, weights=str(tmp_path / "dino.pth"))
        assert all(name.startswith("heads.") for name, _ in network.named_parameters())
        assert all(name.startswith("heads.") for name in network.state_dict())
        fake = images.clone().requires_grad_()
        network(fake).mean().backward()
        assert fake.grad.abs().sum() > 0, "but the generator learns through it"

    @pytest.mark.parametrize(
        ("name", "size", "options", "message"),
        [
            ("patches", 32, {}, "no discriminator is called 'patches': the names are patch, stylegan, dino"),
            ("patch", 32, {"layer": 2}, "'patch' has no option 'layer': its options are channels, layers, norm"),
            ("patch", 16, {}, "16 pixels wide, but a patch discriminator of 3 layers needs at least 24"),
            ("patch", 32, {"norm": "instance"}, "norm is 'instance', but a discriminator normalises by 'batch' or"),
            ("patch", 32, {"layers": 0}, "layers=0, but a patch discriminator needs one of each"),
            ("stylegan", 48, {}, "48 pixels wide, but a StyleGAN discriminator halves them down to 4"),
            ("dino", 32, {}, "needs the weights of a DINO and none are given: put the path of a checkpoint"),
            ("dino", 32, {"weights": "nowhere.pth"}, "there is no file nowhere.pth with the weights of a DINO"),
            ("dino", 20, {"weights": "good.pth"}, "20 pixels wide, but this DINO cuts them into patches of 8"),
            ("dino", 16, {"weights": "good.pth"}, "4 patches of this DINO, but its heads look at 9"),
            ("dino", 32, {"weights": "torn.pth"}, "torn.pth cannot be read as a checkpoint"),
            ("dino", 32, {"weights": "code.pth"}, "code.pth cannot be read as a checkpoint"),
            ("dino", 32, {"weights": "other.pth"}, r"is no DINO vision transformer: cls_token is missing \(\d+ names"),
        ],
    )
    def test_refusals(self, tmp_path, monkeypatch, name, size, options, message):
        monkeypatch.chdir(tmp_path)
        torch.save(dino_checkpoint(), "good.pth")
        Path("torn.pth").write_bytes(Path("good.pth").read_bytes()[:1000])
        torch.save({"run": Path}, "code.pth")
        torch.save({"weight": torch.zeros(3)}, "other.pth")
        with pytest.raises(ValueError, match=message) as raised:
            build_discriminator(name, size, **options)
        assert "\n" not in str(raised.value)

    def test_batch_normalisation_sees_photographs_and_reconstructions_apart(self, images):
        critic = Critic(build_discriminator("patch", 32, channels=8, norm="batch"))
        real, fake = critic(images, images * 0.3)
        torch.testing.assert_close(fake, critic.network(images * 0.3))
        together = critic.network(torch.cat([images, images * 0.3]))
        assert (together[:4] - real).abs().max() > 1e-3
