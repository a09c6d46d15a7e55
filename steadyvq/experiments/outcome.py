# SPDX-License-Identifier: Apache-2.0
"""What a finished training run of an experiment found: numbers, numbers per photograph, curves."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from steadyvq.data import EvaluationCrops
from steadyvq.experiments.verdict import final_record
from steadyvq.metrics import ImageQuality
from steadyvq.models import Tokenizer
from steadyvq.training.photographs import evaluation_crops, photographs_of
from steadyvq.training.run import RunFolder
from steadyvq.training.tokenizer_task import quantizer_of

REPORTED = ("psnr", "ssim", "l1", "utilization", "ceiling", "perplexity", "relative_error", "tokens")
CURVES = {"utilization": "eval", "psnr": "eval", "drift": "probe", "drift_rms": "probe", "churn": "probe"}
"""Curves by the kind of row of the log that has them."""
DIGITS = 5
SETTLED = 0.95

Point = tuple[int, float]

photographs_once = lru_cache(maxsize=1)(photographs_of)
"""The photographs of a run; its process decodes them once for training and for measuring."""


def outcome(path: Path) -> dict[str, Any]:
    """The final evaluation of a run, PSNR by photograph, curves, and the steps to 95 % of its final use."""
    metrics = final_record(path).metrics
    log = read_log(path)
    curves = {name: points(log, kind, name) for name, kind in CURVES.items()}
    found: dict[str, Any] = {name: round(float(metrics[name]), DIGITS) for name in REPORTED}
    found |= {
        name: round(float(value), DIGITS) for name, value in metrics.items() if name in ("lpips_alex", "lpips_vgg")
    }
    found["of_ceiling"] = round(metrics["utilization"] / metrics["ceiling"], DIGITS)
    found["steps_to_95"] = steps_to(curves["utilization"])
    found |= {f"mean_{name}": mean_of(curves[name]) for name in ("drift", "drift_rms", "churn")}
    found["config_hash"] = RunFolder.open(path).config.hash()
    return found | {"photographs": {"psnr": psnr_by_photograph(path)}, "curves": curves}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's log."""
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def points(log: Sequence[dict[str, Any]], kind: str, name: str) -> list[Point]:
    """A number of the log over steps."""
    rows = [row for row in log if row["kind"] == kind and isinstance(row.get(name), int | float)]
    return [(int(row["step"]), round(float(row[name]), DIGITS)) for row in rows]


def mean_of(curve: Sequence[Point]) -> float | None:
    """Mean of a curve's values; None without any."""
    return round(mean(value for _, value in curve), DIGITS) if curve else None


def steps_to(curve: Sequence[Point], share: float = SETTLED) -> int | None:
    """The step of the first evaluation with that share of the last value; None without any evaluation."""
    return next((step for step, value in curve if value >= share * curve[-1][1]), None)


def tokenizer_and_crops(path: Path) -> tuple[Tokenizer, EvaluationCrops, int]:
    """The last saved tokenizer of a run, the held-out crops that it was judged on, and the batch size."""
    run = RunFolder.open(path)
    crops = evaluation_crops(run.config, photographs_once(run.config.data))
    tokenizer = Tokenizer.from_pretrained(run.tokenizer, quantizer=quantizer_of(run.config)).eval()
    return tokenizer, crops, run.config.batch_size


@torch.no_grad()
def psnr_by_photograph(path: Path) -> dict[str, float]:
    """PSNR of the last saved tokenizer of a run on its held-out crops, mean over the crops of each photograph."""
    tokenizer, crops, batch_size = tokenizer_and_crops(path)
    quality, start = ImageQuality(), 0
    for images in crops.batches(batch_size):
        made = tokenizer(images)[0].clamp(-1, 1).float()
        quality.update(images, made, crops.photographs[start : start + len(images)])
        start += len(images)
    return {name: round(value, DIGITS) for name, value in quality.report().psnr.by_photograph.items()}
