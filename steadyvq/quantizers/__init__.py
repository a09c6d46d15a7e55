# SPDX-License-Identifier: Apache-2.0
"""Quantizers: layers that replace latents by codes. One file per published method lives in `methods/`."""

from steadyvq.quantizers.base import Assignment, Quantized, Quantizer
from steadyvq.quantizers.codebooks import Codebook, FreeCodebook, FrozenCodebook, LinearCodebook, TransformedCodebook
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.processes import across_processes, process_shards
from steadyvq.quantizers.registry import Method, accepts, build_quantizer, list_quantizers, methods, register
from steadyvq.quantizers.sharded import ShardedQuantizer
from steadyvq.quantizers.shards import Shards
from steadyvq.quantizers.vector import VectorQuantizer

__all__ = [
    "Assignment",
    "Codebook",
    "FreeCodebook",
    "FrozenCodebook",
    "LinearCodebook",
    "Method",
    "Quantized",
    "Quantizer",
    "ShardedQuantizer",
    "Shards",
    "TransformedCodebook",
    "VectorQuantizer",
    "accepts",
    "across_processes",
    "build_quantizer",
    "compose",
    "list_quantizers",
    "methods",
    "process_shards",
    "register",
]
