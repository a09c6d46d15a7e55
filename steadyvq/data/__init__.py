# SPDX-License-Identifier: Apache-2.0
"""Photographs: folders and the built-in set, reproducible training crops, fixed evaluation crops."""

from steadyvq.data.collection import Collection, load_collection
from steadyvq.data.crops import CropDataset
from steadyvq.data.decode import decode_image, load_image, to_float
from steadyvq.data.evaluation import CropSource, EvaluationCrops
from steadyvq.data.mvtb import BUILT_IN, Scene, mvtb_scenes

__all__ = [
    "BUILT_IN",
    "Collection",
    "CropDataset",
    "CropSource",
    "EvaluationCrops",
    "Scene",
    "decode_image",
    "load_collection",
    "load_image",
    "mvtb_scenes",
    "to_float",
]
