# SPDX-License-Identifier: Apache-2.0
"""The configuration of a transplant: encoder and decoder of a trained tokenizer around a new quantizer.

Nothing here trains: the result is an ordinary run whose first stage freezes encoder and decoder and whose second freezes the
encoder (VQ-Transplant, ICLR 2026), started from the weights of the source.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steadyvq.models import AutoencoderConfig
from steadyvq.models.tokenizer import WEIGHTS_FILE, read_config
from steadyvq.quantizers import Quantizer
from steadyvq.training.checkpoint import load_checkpoint
from steadyvq.training.config import DataConfig, RunConfig, read_recipe, resolve, with_absolute_paths
from steadyvq.training.run import RunFolder
from steadyvq.training.strict import assignments, from_dict, merge
from steadyvq.training.tokenizer_task import quantizer_of
from steadyvq.training.weights import averaged_weights

TOKENS_ACROSS = 16
"""Side of the token grid of the training crops, where the source does not say how large its crops were."""


@dataclass(frozen=True)
class Source:
    """What a transplant needs to know of the tokenizer that it starts from.

    Attributes:
        path: Where its weights are.
        model: The size of encoder and decoder.
        dim: Features of a latent, as the encoder (and `pre_quant`) gives it.
        data: The photographs it was trained on, if it says so.
    """

    path: Path
    model: AutoencoderConfig
    dim: int
    data: DataConfig | None


def read_source(path: Path) -> Source:
    """Reads size and latents of a run folder, a checkpoint or a saved tokenizer; what its quantizer was does not matter.

    Raises:
        ValueError: It is none of these, or has no encoder and decoder.
    """
    data: DataConfig | None = None
    if (path / "config.yaml").is_file():
        config = RunFolder.open(path).config
        model, data = config.model, config.data
    elif path.is_file() and path.suffix == ".safetensors" and path.name != WEIGHTS_FILE:
        config = resolve(load_checkpoint(path)["config"])
        model, data = config.model, config.data
    elif path.is_dir():
        model = from_dict(AutoencoderConfig, read_config(path)["autoencoder"], "autoencoder")
    else:
        what = "is no tokenizer of ours: turn somebody else's checkpoint into one with `steadyvq import`"
        raise ValueError(
            f"{path} {what if path.is_file() else 'does not exist'}; give a run folder or a saved tokenizer"
        )
    weights = averaged_weights(path)
    for part in ("encoder", "decoder"):
        if not any(name.startswith(f"{part}.") for name in weights):
            raise ValueError(f"{path} has no {part}, and a transplant keeps the {part}: give a trained tokenizer")
    return Source(path, replace(model, rectifier=0), _dim(weights, model), data)


def _dim(weights: Mapping[str, Tensor], model: AutoencoderConfig) -> int:
    projection = weights.get("pre_quant.weight")
    return model.z_channels if projection is None else projection.shape[0]


def plan(
    path: Path,
    *,
    recipe: str = "transplant",
    quantizer: str | None = None,
    num_codes: int | None = None,
    data: str | None = None,
    train: str = "all",
    sets: Sequence[str] = (),
) -> tuple[RunConfig, list[str]]:
    """The run that puts a new quantizer into a trained tokenizer, and what the user should know about it.

    Args:
        path: The tokenizer: a run folder, a checkpoint or a saved tokenizer.
        recipe: Stages, rates and losses.
        quantizer: The new method (None: the recipe's).
        num_codes: Its number of codes (None: the recipe's).
        data: The photographs (None: those of the source).
        train: `codebook` keeps the decoder as it is and only the stages that do so; `decoder` keeps the codes where they are
            placed at the start, and only the stages in which the decoder learns; `all` neither.
        sets: `key=value` pairs; they win.

    Raises:
        ValueError: The source cannot be used, or the new quantizer does not fit its latents.
    """
    source = read_source(path)
    asked = assignments(sets)
    if data is None and source.data is None and "source" not in asked.get("data", {}):
        raise ValueError(f"{path} does not say which photographs it was trained on: pass --data DIR")
    settings = dict(merge(_from_source(source), read_recipe(recipe)))
    chosen: dict[str, Any] = dict(settings.get("quantizer", {}))
    if quantizer is not None and quantizer != chosen.get("name"):
        chosen = {**chosen, "name": quantizer, "options": {}}
    if num_codes is not None:
        chosen["num_codes"] = num_codes
    settings["quantizer"] = chosen
    if source.data is not None and source.data.epoch_samples is not None:
        settings["batch_size"] = min(settings.get("batch_size", RunConfig.batch_size), source.data.epoch_samples)
    overrides: dict[str, Any] = {"data": {"source": data}} if data else {}
    start = {"init_from": str(path), "init_parts": "autoencoder", "train": train}
    config = resolve(settings, sets, {**overrides, **start})
    if train != "all" and "stages" not in asked:
        stages = tuple(s for s in config.stages if ("decoder" in s.frozen) == (train == "codebook"))
        config = replace(config, stages=stages or config.stages)
    return _fitted(with_absolute_paths(config), source, asked)


def _from_source(source: Source) -> dict[str, Any]:
    """What a run takes over from the tokenizer it starts from."""
    data = {"crop_size": TOKENS_ACROSS * source.model.downsampling} if source.data is None else asdict(source.data)
    return {"title": "transplant", "data": data, "model": asdict(source.model), "quantizer": {"dim": source.dim}}


def _fitted(config: RunConfig, source: Source, asked: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """The configuration with what the method of its quantizer makes impossible left out, unless it was asked for."""
    notes: list[str] = []
    quantizer = _new_quantizer(config, source)
    name = config.quantizer.name
    if "init" not in asked.get("quantizer", {}) and config.quantizer.init != "none":
        reason = _cannot_place(quantizer, config)
        if reason:
            config = replace(config, quantizer=replace(config.quantizer, init="none"))
            notes.append(f"{name} has no codes to place on the latents, so it starts as it is")
    learns = config.model.rectifier or any(p.requires_grad for p in quantizer.parameters())
    kept = tuple(s for s in config.stages if not {"encoder", "decoder"} <= set(s.frozen))
    if not learns and "stages" not in asked and kept and len(kept) < len(config.stages):
        config = replace(config, stages=kept)
        notes.append(f"{name} has nothing that a gradient trains, so training begins with the decoder")
    return config, notes


def _new_quantizer(config: RunConfig, source: Source) -> Quantizer:
    settings = config.quantizer
    if settings.num_codes < 1:
        raise ValueError(
            f"the number of codes is {settings.num_codes}, but a codebook needs at least 1: pass --codes K"
        )
    around = (
        f"a method of other features goes inside one that projects: --quantizer projected --set quantizer.options.inner="
        f"{settings.name} --set quantizer.options.inner_dim=N"
    )
    if settings.dim != source.dim:
        raise ValueError(
            f"quantizer.dim is {settings.dim}, but the latents of {source.path} have {source.dim} features: leave it out or "
            f"pass --set quantizer.dim={source.dim}; {around}"
        )
    try:
        return quantizer_of(config)
    except ValueError as error:
        if not re.search(r"\bdim\b", str(error)):
            raise
        raise ValueError(
            f"{str(error).rstrip('.')}; here quantizer.dim is that of the latents of {source.path}, {source.dim}, which "
            f"--set quantizer.dim= cannot change; {around}"
        ) from error


@torch.no_grad()
def _cannot_place(quantizer: Quantizer, config: RunConfig) -> str | None:
    """Why the codes of this method cannot be placed on latents, if they cannot; moves those of `quantizer`."""
    side = config.data.crop_size // config.model.downsampling
    try:
        quantizer.init_from(torch.randn(1, quantizer.dim, side, side), method="data", seed=0)
    except ValueError as error:
        return str(error)
    return None
