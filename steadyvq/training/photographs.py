# SPDX-License-Identifier: Apache-2.0
"""The photographs that a configuration names, and the crops that it trains and is evaluated on."""

import os
from dataclasses import replace

from steadyvq.data import (
    Collection,
    CropDataset,
    CropRule,
    EvaluationCrops,
    ImageSource,
    StreamedCrops,
    open_photographs,
    read_tars,
    unread_tars,
)
from steadyvq.training.config import DataConfig, RunConfig
from steadyvq.training.progress import ProgressReport


def load_photographs(config: RunConfig) -> Collection | ImageSource:
    """The photographs of a configuration: decoded, or on disk where they are streamed."""
    return photographs_of(config.data)


def photographs_of(data: DataConfig) -> Collection | ImageSource:
    """The photographs of a source; shows how far it is where tar files must be read through first."""
    if total := unread_tars(data.source):
        told_elsewhere = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) > 0
        with ProgressReport("index (bytes)", total, quiet=told_elsewhere) as progress:
            read_tars(data.source, progress.advance_by)
    return open_photographs(data.source, data.streaming, data.crop_size, data.max_side, data.test_fraction)


def with_counted_epoch(config: RunConfig, photographs: Collection | ImageSource) -> RunConfig:
    """The configuration with `data.epoch_samples` a number: where it is null, that of the training photographs."""
    if config.data.epoch_samples is not None:
        return config
    return replace(config, data=replace(config.data, epoch_samples=len(photographs.split("train"))))


def training_crops(config: RunConfig, photographs: Collection | ImageSource) -> CropDataset | StreamedCrops:
    """The crops that a configuration trains on."""
    data, chosen = config.data, photographs.split("train")
    scales = (data.min_scale, data.max_scale)
    if isinstance(chosen, ImageSource):
        return StreamedCrops(chosen, CropRule(data.crop_size, scales, data.flip), config.epoch_samples, config.seed)
    return CropDataset(chosen, data.crop_size, config.epoch_samples, config.seed, scales, data.flip)


def evaluation_crops(config: RunConfig, photographs: Collection | ImageSource) -> EvaluationCrops:
    """The crops that a configuration is evaluated on; of streamed photographs no more are decoded than there are crops."""
    data, chosen = config.data, photographs.split(config.data.eval_split)
    if isinstance(chosen, ImageSource):
        chosen = chosen.load(data.eval_crops)
    return EvaluationCrops(chosen, data.crop_size, data.eval_crops, scale=data.min_scale)
