# SPDX-License-Identifier: Apache-2.0
"""The contest that the preset `steady` has to win: contestants with their rates, sizes, and the judge of the test photographs.

Everybody has the same autoencoder, photographs, batches, number of steps, decay of rates and averaged weights, and the best of
the same three learning rates on the photographs of `val`, or of more where an edge was the best. Nobody's settings were chosen
on the test photographs, which only `judged` opens.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from steadyvq.data import EvaluationCrops
from steadyvq.experiments.closed import DATA_INIT, EMA, NSVQ, REPLACEMENT, freeze
from steadyvq.experiments.held_out import open_test
from steadyvq.experiments.outcome import DIGITS, photographs_once
from steadyvq.experiments.study import Trained, Values
from steadyvq.experiments.tracking import decibels, distortion_of
from steadyvq.models import Tokenizer, load_lpips
from steadyvq.models.features import load_features
from steadyvq.quantizers import Quantized, VectorQuantizer
from steadyvq.quantizers.initialise import lloyd
from steadyvq.training.config import read_recipe
from steadyvq.training.evaluation import evaluate
from steadyvq.training.photographs import training_crops
from steadyvq.training.run import RunFolder
from steadyvq.training.strict import merge
from steadyvq.training.tokenizer_task import quantizer_of

EPOCH = 25
"""Steps of an epoch; stages end with epochs."""
BATCH = 8
TOKENS = 64
"""Of a crop."""
JUDGED = {"crop_size": 64, "count": 140}
"""Two crops of 64x64 of each test photograph."""
FEATURES = {"crop_size": 64, "count": 70, "seeds": 3, "from_steps": 300}
"""FD-Lite0 and KID-Lite0 cost as much as a short run: one crop of each photograph, three seeds, and the larger budget alone."""
FITTED_CROPS = 1024
"""Training crops whose latents k-means is fitted to, for the regret."""


def steady() -> Values:
    """The preset, as its recipe has it."""
    recipe = read_recipe("steady")
    return {"quantizer": {part: recipe["quantizer"][part] for part in ("name", "options")}, "stages": recipe["stages"]}


def late(method: Values) -> Values:
    """A method with the stages of the preset."""
    return merge(method, {"stages": read_recipe("steady")["stages"]})


METHODS: Mapping[str, Values] = {
    "vq + replacement": merge(REPLACEMENT, DATA_INIT),
    "ema + k-means + replacement": EMA,
    "simvq": {"quantizer": {"name": "simvq"}},
    "nsvq": merge(NSVQ, freeze()),
    "nsvq_kernel": {"quantizer": {"name": "nsvq_kernel"}},
    "fvq": {"quantizer": {"name": "fvq"}, "optim": {"codebook_lr": 1e-1}},
    "cvq": {"quantizer": {"name": "cvq"}},
    "rotation": merge({"quantizer": {"name": "rotation"}}, DATA_INIT),
}
"""The rivals. NSVQ has its losses as published and its freeze in the last fifth, without plateau rule or warm-up;
codes of `fvq` have the rate of `steadyvq compare`."""

CONTROLS: Mapping[str, Values] = {"vq + replacement, late": REPLACEMENT, "nsvq, late": NSVQ}
"""Rivals with the preset's start: what is left of its lead is its own."""


RATES: Mapping[str, float] = {
    "steady": 4e-3,
    "vq + replacement": 4e-3,
    "ema + k-means + replacement": 2e-3,
    "simvq": 8e-3,
    "nsvq": 4e-3,
    "nsvq_kernel": 4e-3,
    "fvq": 1e-3,
    "cvq": 4e-3,
    "rotation": 4e-3,
    "vq + replacement, late": 4e-3,
    "nsvq, late": 4e-3,
}
"""The best of three rates, or of four or five where an edge was best, in docs/evidence/experiments/steady-search.json."""


@cache
def everybody() -> Mapping[str, Values]:
    """The preset, its rivals and the controls."""
    return {"steady": steady(), **METHODS, **{name: late(method) for name, method in CONTROLS.items()}}


def arm(method: str, codes: int, steps: int, lr: float, judge: bool = False) -> Trained:
    """A run of a contestant.

    Args:
        method: Its name.
        codes: K.
        steps: Optimiser steps.
        lr: Learning rate of all but a free codebook.
        judge: It is judged on the test photographs when it is done.
    """
    # Two latents per code or more for those who place their codes.
    samples = max(256, 2 * codes // TOKENS)
    patch = {"options": {"patch": 8}} if method == "fvq" and codes >= 16384 else {}
    common: Values = {
        "data": {"source": "corpus", "max_scale": 2.0, "epoch_samples": EPOCH * BATCH, "eval_crops": 104},
        "quantizer": {"num_codes": codes, "init_samples": samples, **patch},
        "optim": {"lr": lr},
        "epochs": steps // EPOCH,
        "eval_every": steps // EPOCH,
        "checkpoint_every": 1000,
    }
    return Trained("quickstart", merge(common, everybody()[method]), measure=judged if judge else None)


def judged(path: Path) -> Values:
    """What a finished run makes of the test photographs, and its regret over k-means there.

    k-means is fitted to latents of training crops, some of Lloyd's iterations from random ones of them, and both tables are
    judged on the latents of the test photographs.
    """
    run = RunFolder.open(path)
    tokenizer = Tokenizer.from_pretrained(run.tokenizer, quantizer=quantizer_of(run.config)).eval()
    photographs = open_test("steady", run.config.hash())
    crops = EvaluationCrops(photographs, **JUDGED)
    found = evaluate(tokenizer, crops, 20, [load_lpips("alex")])
    metrics = found.metrics
    values: Values = {
        "test_psnr": metrics["psnr"],
        "test_lpips": metrics["lpips_alex"],
        "test_use": metrics["utilization"],
        "test_perplexity": metrics["perplexity"],
        "test_regret": regret(tokenizer, run, crops),
    }
    if run.config.seed < FEATURES["seeds"] and run.config.epochs * EPOCH >= FEATURES["from_steps"]:
        few = EvaluationCrops(photographs, FEATURES["crop_size"], FEATURES["count"])
        distances = evaluate(tokenizer, few, 20, features=[load_features("lite0")]).metrics
        values |= {"test_fd": distances["fd_lite0"], "test_kid": distances["kid_lite0"]}
    single = {f"test_{name}": found.by_photograph[key] for name, key in (("psnr", "psnr"), ("lpips", "lpips_alex"))}
    digits = {k: {name: round(v, DIGITS) for name, v in values.items()} for k, values in single.items()}
    return {**{k: round(float(v), DIGITS) for k, v in values.items()}, "photographs": digits}


@torch.no_grad()
def regret(tokenizer: Tokenizer, run: RunFolder, crops: EvaluationCrops, iterations: int = 3) -> float:
    """dB that a codebook's error on held-out latents is above that of k-means fitted to training latents."""
    quantizer = tokenizer.quantizer
    assert isinstance(quantizer, VectorQuantizer)
    images = training_crops(run.config, photographs_once(run.config.data)).batch
    fitted = torch.cat([_latents(tokenizer, images(0, start, 64)) for start in range(0, FITTED_CROPS, 64)])
    generator = torch.Generator().manual_seed(run.config.seed)
    start = fitted[torch.randperm(len(fitted), generator=generator)[: quantizer.num_codes]]
    best = lloyd(fitted, start, iterations)
    judged_on = torch.cat([_latents(tokenizer, batch) for batch in crops.batches(20)])
    return decibels(distortion_of(judged_on, quantizer.codebook()), distortion_of(judged_on, best))


def _latents(tokenizer: Tokenizer, images: torch.Tensor) -> torch.Tensor:
    out: Quantized = tokenizer.quantizer(tokenizer.latents(images))
    return out.assignment.z
