# SPDX-License-Identifier: Apache-2.0
"""Tokens of photographs for the tests of priors: 32 crops of 16x16, each of a class of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conftest import tiny_recipe
from PIL import Image

from steadyvq.data import EvaluationCrops, load_collection, open_source
from steadyvq.generation import TokenSet, TokenWriter, Views
from steadyvq.training.config import resolve
from steadyvq.training.strict import merge
from steadyvq.training.tokenizer_task import build_tokenizer


def store(folder: Path, quantizer: Mapping[str, Any], size: int = 16, classes: int = 32) -> TokenSet:
    """Tokens in `folder / "tokens"` of an untrained tokenizer; all images are of the split `train`."""
    tokenizer = build_tokenizer(resolve(tiny_recipe(folder, quantizer=dict(quantizer)))).eval()
    crops = EvaluationCrops(load_collection("mvtb", max_side=160), 16, 32)
    for i, image in enumerate(crops.images):
        place = folder / "data" / f"class{i % classes:02d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    TokenWriter(tokenizer, "mine", open_source(folder / "data"), folder / "tokens", Views(size=size)).write()
    tokens = TokenSet(folder / "tokens")
    # All images are trained on, whatever the hash of their names says.
    tokens._splits[:] = 0
    return tokens


def recipe(kind: str, tokens: TokenSet, **changes: Any) -> dict[str, Any]:
    """A small prior of a kind over these tokens."""
    base = {
        "title": "prior",
        "task": kind,
        "data": {"source": str(tokens.folder), "epoch_samples": 32, "eval_crops": 8},
        "prior": {"layers": 2, "heads": 2, "width": 64, "shown": 0},
        "optim": {"lr": 3e-3, "betas": [0.9, 0.95]},
        "epochs": 6,
        "batch_size": 8,
        "eval_every": 3,
        "log_every": 1,
    }
    return merge(base, changes)


BY_HEART = {
    "prior": {"label_dropout": 0.0, "dropout": 0.0, "weight_decay": 0.0},
    "optim": {"lr": 5e-3, "decay": "cosine", "ema_decay": 0.0},
    "epochs": 350,
    "batch_size": 32,
    "eval_every": 350,
    "checkpoint_every": 350,
}
"""Settings with which a prior learns 32 grids by heart."""
