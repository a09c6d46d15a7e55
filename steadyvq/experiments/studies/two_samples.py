# SPDX-License-Identifier: Apache-2.0
"""Why codes that nobody chose go stale: a step for one sample moves the latents of all others, by what first order says."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from steadyvq.experiments.claims import Claim, Decision, Results, above, one_each
from steadyvq.experiments.runner import fresh_run, run_config
from steadyvq.experiments.study import Cell, Computed, Measure, Study, Trained, Values
from steadyvq.models import Tokenizer
from steadyvq.training.loop import Engine
from steadyvq.training.tokenizer_task import TokenizerTask

PAPER = "arXiv 2606.11363, Eqs 30-31"


def pairs(cell: Cell) -> Values:
    """Steps of the encoder for single images, and what they do to the latents of other images."""
    s = cell.settings
    config = run_config(
        Trained("quickstart", {**s["training"], "quantizer": {"name": "vq", "init": "data"}}), cell.seed
    )
    task = TokenizerTask(config)
    if s["trained"]:
        Engine(task, fresh_run(cell.folder, config), quiet=True).fit()
    images = task.train_crops.batch(10**6, 0, s["images"])
    task.tokenizer.requires_grad_(True)
    found = [_pair(task.tokenizer, images, first, s["rate"]) for first in range(s["images"] // 2)]
    return {name: round(mean(one[name] for one in found), 4) for name in found[0]}


def _pair(tokenizer: Tokenizer, images: Tensor, first: int, rate: float) -> dict[str, float]:
    """A step of gradient descent of the encoder for image `first`, predicted and made.

    To first order  z_2' - z_2 = -rate J_2 J_1^T g_1,  with J_i the Jacobian of the latents of image i by the encoder's
    parameters and g_1 the gradient of image 1's loss by its latents, as the straight-through estimator gives it.
    """
    encoder = torch.nn.ModuleDict({"encoder": tokenizer.encoder, "pre_quant": tokenizer.pre_quant})
    parameters = {name: p.detach().clone() for name, p in encoder.named_parameters()}

    def latents(given: Mapping[str, Tensor]) -> Tensor:
        own: dict[str, dict[str, Tensor]] = {"encoder": {}, "pre_quant": {}}
        for name, value in given.items():
            part, _, rest = name.partition(".")
            own[part][rest] = value
        hidden = torch.func.functional_call(tokenizer.encoder, own["encoder"], (images,))
        made: Tensor = torch.func.functional_call(tokenizer.pre_quant, own["pre_quant"], (hidden,))
        return made

    tokenizer.zero_grad()
    reconstruction, quantized = tokenizer(images[first : first + 1])
    loss = (reconstruction - images[first : first + 1]).square().mean() + quantized.loss
    gradients = torch.autograd.grad(loss, list(encoder.parameters()))
    step = {name: -rate * g for name, g in zip(parameters, gradients, strict=True)}
    before, predicted, *_ = torch.func.jvp(latents, (parameters,), (step,))
    after = latents({name: value + step[name] for name, value in parameters.items()})
    moved = (after - before).detach()
    others = [i for i in range(len(images)) if i != first]
    actual, first_order = moved[others].flatten(1), predicted[others].flatten(1).detach()
    size = moved.flatten(1).norm(dim=1)
    rows = moved[others].movedim(1, -1).reshape(-1, moved.shape[1])
    common = rows.mean(0).square().sum() / rows.square().sum(1).mean()
    chosen = quantized.indices.unique()
    unchosen = ~torch.isin(tokenizer.encode(images[others]), chosen)
    return {
        "agreement": float(torch.nn.functional.cosine_similarity(actual, first_order, dim=1).mean()),
        "spill": float(size[others].mean() / size[first]),
        "unchosen": float(_norms(moved[others])[unchosen].mean() / _norms(moved[first : first + 1]).mean()),
        "common": float(common),
    }


def _norms(moves: Tensor) -> Tensor:
    """Lengths of the moves of latents (B, d, h, w), as (B, h, w)."""
    lengths: Tensor = moves.norm(dim=1)
    return lengths


def arms(settings: Mapping[str, Any]) -> dict[str, Computed]:
    """An encoder at its start, and after some training."""
    own = {name: settings[name] for name in ("training", "images", "rate")}
    return {
        "at the start": Computed(pairs, {**own, "trained": False}),
        "trained": Computed(pairs, {**own, "trained": True}),
    }


def _over(measure: str, threshold: float, what: str, form: str = ".2f") -> Any:
    def decide(results: Results) -> Decision:
        return above(one_each(results.values("trained", measure)), threshold, what, form)

    return decide


STUDY = Study(
    name="two-samples",
    title="One sample moves the other",
    question="Does a step of the encoder for one image move the latents of images, and codes, that had no part in it?",
    protocol=(
        "The quickstart's encoder with plain VQ, at its start and after training. For each of half of {images} crops: one "
        "step of gradient descent (rate {rate}) of the encoder on that crop's loss, and the movement of the latents of "
        "all others, beside the first-order prediction -rate J_2 J_1^T g_1. The public text of the paper that we could "
        "read does not hold Eqs 30-31 themselves; this is what they are described to say."
    ),
    profiles={
        "tiny": {"training": {"epochs": 1, "eval_every": 1}, "images": 16, "rate": 1e-3},
        "small": {"training": {"epochs": 10, "eval_every": 10}, "images": 64, "rate": 1e-3},
        "full": {"training": {"epochs": 100, "eval_every": 100}, "images": 256, "rate": 1e-3},
    },
    arms=arms,
    claims=(
        Claim("First order says where the others go (cosine above 0.9)", PAPER, _over("agreement", 0.9, "cosine")),
        Claim(
            "Latents of other images move at least half as far as the image's own",
            PAPER,
            _over("spill", 0.5, "movement of others over own"),
        ),
        Claim(
            "Latents whose codes had no hit move at least half as far too",
            PAPER,
            _over("unchosen", 0.5, "movement over that of the image's own"),
        ),
        Claim("Most of that movement is one common shift", "ours", _over("common", 0.5, "share of a common shift")),
    ),
    measures=(
        Measure("agreement", "cosine with first order"),
        Measure("spill", "others' movement over own"),
        Measure("unchosen", "of latents with other codes"),
        Measure("common", "share of a common shift"),
    ),
    curves=(),
)
