# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM of 8-bit images, with intervals by photograph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor

_SSIM_WINDOW = 11


def to_uint8(images: Num[Tensor, "B C H W"]) -> UInt8[Tensor, "B C H W"]:
    """Map images to 8 bits: floats in [-1, 1] are clamped and rounded to 0 to 255, uint8 is returned as it is.

    Raises:
        ValueError: The images are integers other than uint8.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(
            f"images have dtype {images.dtype}, but need uint8 (0 to 255) or floats in [-1, 1]: convert them"
        )
    return ((images.detach().float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def psnr(reference: Num[Tensor, "B C H W"], reconstruction: Num[Tensor, "_ _ _ _"]) -> Float[Tensor, "B"]:
    """Peak signal-to-noise ratio of each image in dB, on 8-bit rounded images.

    PSNR = 10 log10(255**2 / MSE), the mean over the channels and pixels of one image. A data set's PSNR is the mean of
    these values, not the PSNR of the mean error. Identical images count as if a single value differed by one level,
    which keeps the mean finite (83 dB at 32 x 32, 101 dB at 256 x 256).

    Args:
        reference: uint8, or floats in [-1, 1].
        reconstruction: The same shape; floats outside [-1, 1] are clamped.

    Returns:
        dB per image, float64.
    """
    first, second = _pair(reference, reconstruction)
    error = (first.to(torch.float64) - second.to(torch.float64)).square().flatten(1).mean(1)
    return 10.0 * torch.log10(255.0**2 / error.clamp_min(1.0 / first[0].numel()))


def ssim(reference: Num[Tensor, "B C H W"], reconstruction: Num[Tensor, "_ _ _ _"]) -> Float[Tensor, "B"]:
    """Structural similarity of each image, on 8-bit rounded images.

    Settings (Wang et al. 2004): 11 x 11 Gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03, data range 255, windows
    that lie fully inside the image, every colour channel by itself and then their mean; the map is computed by
    torchmetrics.

    It is not torchmetrics' own mean, which in some versions (1.9 among them) also covers windows over the mirrored
    border: that moves the value by up to 0.06 on crops of 24 pixels.

    Args:
        reference: uint8, or floats in [-1, 1], at least 11 pixels on each side.
        reconstruction: The same shape.

    Returns:
        One value per image in [-1, 1], 1 for identical images.
    """
    # Importing torchmetrics takes longer than everything else in this package together.
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = _pair(reference, reconstruction)
    if min(first.shape[2:]) < _SSIM_WINDOW:
        raise ValueError(
            f"images are {first.shape[3]} x {first.shape[2]}, but SSIM has a window of {_SSIM_WINDOW} x "
            f"{_SSIM_WINDOW}: evaluate larger crops"
        )
    result = structural_similarity_index_measure(
        second.float(),
        first.float(),
        gaussian_kernel=True,
        sigma=1.5,
        kernel_size=_SSIM_WINDOW,
        reduction="none",
        data_range=255.0,
        k1=0.01,
        k2=0.03,
        return_full_image=True,
    )
    border = _SSIM_WINDOW // 2
    similarity: Tensor = result[1][..., border:-border, border:-border]
    return similarity.flatten(1).mean(1)


@dataclass(frozen=True)
class Estimate:
    """The mean of a per-image measure, with its spread over photographs.

    Attributes:
        mean: Mean over all images.
        low: Lower end of the 95 % bootstrap interval over photographs; None with fewer than two photographs.
        high: Upper end, likewise.
        by_photograph: Mean per photograph.
    """

    mean: float
    low: float | None
    high: float | None
    by_photograph: dict[str, float]

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.mean:.3f}{interval}"


@dataclass(frozen=True)
class QualityReport:
    """PSNR in dB and SSIM of a set of images, and whatever else was measured, by name."""

    psnr: Estimate
    ssim: Estimate
    images: int
    photographs: int
    others: dict[str, Estimate] = field(default_factory=dict)


class ImageQuality:
    """Accumulates PSNR, SSIM and what else is measured over batches.

    Crops of one photograph are not independent samples, so the intervals resample photographs.
    """

    def __init__(self) -> None:
        self._psnr: list[float] = []
        self._ssim: list[float] = []
        self._others: dict[str, list[float]] = {}
        self._photographs: list[str] = []

    def update(
        self,
        reference: Num[Tensor, "B C H W"],
        reconstruction: Num[Tensor, "_ _ _ _"],
        photographs: Sequence[str],
        others: Mapping[str, Float[Tensor, "B"]] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            reference: uint8, or floats in [-1, 1].
            reconstruction: The same shape.
            photographs: The name of the photograph that each image was cut from.
            others: Further measures of the same images, one value each, by name; the same names in every batch.
        """
        if len(photographs) != reference.shape[0]:
            raise ValueError(
                f"{len(photographs)} photographs are named for {reference.shape[0]} images: name one for each image"
            )
        self._psnr += psnr(reference, reconstruction).tolist()
        self._ssim += ssim(reference, reconstruction).tolist()
        for name, values in (others or {}).items():
            self._others.setdefault(name, []).extend(values.tolist())
        self._photographs += photographs

    def report(self, seed: int = 0) -> QualityReport:
        """Summarise everything added so far; the seed is that of the bootstrap."""
        return QualityReport(
            psnr=estimate(self._psnr, self._photographs, seed=seed),
            ssim=estimate(self._ssim, self._photographs, seed=seed),
            images=len(self._psnr),
            photographs=len(set(self._photographs)),
            others={name: estimate(found, self._photographs, seed=seed) for name, found in self._others.items()},
        )


def estimate(values: Sequence[float], photographs: Sequence[str], resamples: int = 2000, seed: int = 0) -> Estimate:
    """Return the mean of per-image values with a 95 % percentile bootstrap interval over photographs.

    One resample draws as many photographs as there are, with replacement, and takes the mean over all of their images.

    Args:
        values: One number per image.
        photographs: The photograph of each image.
        resamples: Number of resamples.
        seed: Of the resampling.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("no images were measured: call update with at least one image first")
    names = sorted(set(photographs))
    row = {name: i for i, name in enumerate(names)}
    group = torch.tensor([row[name] for name in photographs])
    totals = torch.zeros(len(names), dtype=torch.float64)
    totals.index_add_(0, group, torch.tensor(values, dtype=torch.float64))
    counts = torch.bincount(group, minlength=len(names)).to(torch.float64)
    low = high = None
    if len(names) > 1:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(names), (resamples, len(names)), generator=generator)
        means = totals[drawn].sum(1) / counts[drawn].sum(1)
        low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    by_photograph = dict(zip(names, (totals / counts).tolist(), strict=True))
    return Estimate(float(totals.sum() / counts.sum()), low, high, by_photograph)


def _pair(reference: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
    if reference.shape != reconstruction.shape:
        raise ValueError(
            f"reference has shape {tuple(reference.shape)}, but reconstruction has {tuple(reconstruction.shape)}: "
            "compare images of one shape"
        )
    return to_uint8(reference), to_uint8(reconstruction)
