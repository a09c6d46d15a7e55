# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a tokenizer on held-out photographs: numbers with provenance, code counts, pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

import steadyvq
from steadyvq.data import EvaluationCrops, to_float
from steadyvq.metrics import EvaluationRecord, ImageQuality, UsageMeter, conditions, protocol_id, to_uint8
from steadyvq.models import LPIPS, Tokenizer
from steadyvq.models.features import FeatureNetwork
from steadyvq.training.distances import FeatureDistances

PROTOCOL = (
    "PSNR is the mean over images of the per-image dB on 8-bit rounded images; SSIM likewise; utilization counts codes "
    "hit at least once; intervals are 95 % bootstraps over photographs"
)
LPIPS_PROTOCOL = "; LPIPS v0.1 likewise, on the same 8-bit images brought back to [-1, 1]"
SHOWN = 16


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    Attributes:
        metrics: psnr, psnr_low, psnr_high (dB), ssim, l1 (mean absolute error on the scale of [-1, 1]), utilization, ceiling,
            active, tokens, num_codes, perplexity, relative_error; lpips_NET, lpips_NET_low, lpips_NET_high and
            lpips_NET_weights (the SHA-256 of the network's weights) where LPIPS was measured; likewise rfid and kid, fd_lite0
            and kid_lite0 with networks of features.
        counts: Hits per code (K,); of all tables one after the other where the quantizer has several.
        originals: Some of the evaluated images, spread evenly over all of them.
        reconstructions: What the tokenizer made of them.
        tokens: Their indices, as `Tokenizer.encode` gives them.
        protocol: How the metrics were computed, in one sentence.
        by_photograph: PSNR and LPIPS of every photograph, mean over its crops.
    """

    metrics: dict[str, Any]
    counts: Int[Tensor, "K"]
    originals: UInt8[Tensor, "B 3 H W"]
    reconstructions: UInt8[Tensor, "B 3 H W"]
    tokens: Int[Tensor, "B ..."]
    protocol: str = PROTOCOL
    by_photograph: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    tokenizer: Tokenizer,
    crops: EvaluationCrops,
    batch_size: int,
    perceptual: Sequence[LPIPS] = (),
    features: Sequence[FeatureNetwork] = (),
) -> Evaluation:
    """Reconstructs all crops and measures; the tokenizer should be in evaluation mode.

    Args:
        tokenizer: What is evaluated; its device is used.
        crops: Held-out crops.
        batch_size: Images per forward; the numbers do not depend on it.
        perceptual: Networks of LPIPS to measure with; they are moved to the tokenizer's device.
        features: Networks to measure Frechet and kernel distances with; likewise.
    """
    device = next(tokenizer.parameters()).device
    meter = UsageMeter(tokenizer.quantizer.num_entries)
    quality, sets = ImageQuality(), FeatureDistances(features, len(crops), device)
    shown: list[tuple[Tensor, Tensor, Tensor]] = []
    picked = range(0, len(crops), max(1, len(crops) // SHOWN))[:SHOWN]
    error = total = squares = absolute = 0.0
    sums = torch.zeros(tokenizer.quantizer.dim, dtype=torch.float64)
    for start, images in zip(range(0, len(crops), batch_size), crops.batches(batch_size), strict=True):
        reconstruction, quantized = tokenizer(images.to(device))
        reconstruction = reconstruction.clamp(-1, 1).float().cpu()
        absolute += float((reconstruction - images).abs().mean(dim=(1, 2, 3), dtype=torch.float64).sum())
        meter.update(tokenizer.quantizer.entries(quantized.indices).cpu())
        photographs = crops.photographs[start : start + len(images)]
        pair = _eight_bits(images, reconstruction, device) if perceptual or features else ()
        distances = {f"lpips_{network.net}": network.to(device)(*pair).cpu() for network in perceptual}
        quality.update(images, reconstruction, photographs, distances)
        if pair:
            sets.update(*pair, photographs)
        z = quantized.assignment.z.double().cpu()
        error += float(quantized.assignment.distance.double().sum())
        squares += float(z.square().sum())
        sums += z.sum(0)
        total += len(z)
        some = [i - start for i in picked if start <= i < start + len(images)]
        shown.append((to_uint8(images[some]), to_uint8(reconstruction[some]), quantized.indices[some].cpu()))
    usage, report = meter.report(), quality.report()
    spread = squares - float(sums.square().sum()) / total
    metrics: dict[str, Any] = {
        "psnr": report.psnr.mean,
        "psnr_low": report.psnr.low,
        "psnr_high": report.psnr.high,
        "ssim": report.ssim.mean,
        "l1": absolute / len(crops),
        "utilization": usage.utilization,
        "ceiling": usage.ceiling,
        "active": usage.active,
        "num_codes": usage.num_codes,
        "tokens": usage.tokens,
        "perplexity": usage.perplexity,
        "relative_error": error / spread if spread > 0 else None,
    }
    for network in perceptual:
        name = f"lpips_{network.net}"
        found = report.others[name]
        metrics |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        metrics[f"{name}_weights"] = network.weights_hash
    metrics |= sets.metrics()
    protocol = PROTOCOL + (LPIPS_PROTOCOL if perceptual else "") + sets.protocol()
    originals, reconstructions, tokens = (torch.cat(images) for images in zip(*shown, strict=True))
    single = {name: found.by_photograph for name, found in {"psnr": report.psnr, **report.others}.items()}
    return Evaluation(metrics, meter.counts, originals, reconstructions, tokens, protocol, single)


def _eight_bits(images: Tensor, reconstruction: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both rounded to 8 bits, as floats in [-1, 1] again."""
    first, second = (to_float(to_uint8(part)).to(device) for part in (images, reconstruction))
    return first, second


def record_of(evaluation: Evaluation, crops: EvaluationCrops, config_hash: str, step: int) -> EvaluationRecord:
    """The evaluation as a record that names data, split, crop, count and configuration."""
    facts = crops.record
    found = conditions(int(facts["crop"]), int(facts["count"]), str(facts["hash"]), evaluation.metrics)
    return EvaluationRecord(
        metrics=evaluation.metrics,
        data=str(facts["data"]),
        split=str(facts["split"]),
        crop=int(facts["crop"]),
        count=int(facts["count"]),
        photographs=int(facts["photographs"]),
        tokens=evaluation.metrics["tokens"],
        pixels_hash=str(facts["hash"]),
        config_hash=config_hash,
        step=step,
        version=steadyvq.__version__,
        protocol=evaluation.protocol,
        conditions=found,
        protocol_id=protocol_id(found),
    )
