# SPDX-License-Identifier: Apache-2.0
"""Photographs: folders, shards, other data sets and the built-in one; reproducible training crops, fixed evaluation crops."""

from steadyvq.data.addresses import absolute_address, short_name
from steadyvq.data.built_in import BUILT_IN
from steadyvq.data.collection import Collection, load_collection
from steadyvq.data.crops import CropDataset, CropRule
from steadyvq.data.decode import decode_image, load_image, to_float
from steadyvq.data.evaluation import CropSource, EvaluationCrops
from steadyvq.data.feed import CropFeed, Request, usable_workers
from steadyvq.data.mvtb import Scene, mvtb_scenes
from steadyvq.data.sharding import ShardWriter, verify_shards
from steadyvq.data.sources import ImageSource, always_streamed, open_photographs, open_source
from steadyvq.data.stream import StreamedCrops
from steadyvq.data.tarsets import read_tars, unread_tars

__all__ = [
    "BUILT_IN",
    "Collection",
    "CropDataset",
    "CropFeed",
    "CropRule",
    "CropSource",
    "EvaluationCrops",
    "ImageSource",
    "Request",
    "Scene",
    "ShardWriter",
    "StreamedCrops",
    "absolute_address",
    "always_streamed",
    "decode_image",
    "load_collection",
    "load_image",
    "mvtb_scenes",
    "open_photographs",
    "open_source",
    "read_tars",
    "short_name",
    "to_float",
    "unread_tars",
    "usable_workers",
    "verify_shards",
]
