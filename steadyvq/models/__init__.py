# SPDX-License-Identifier: Apache-2.0
"""Models: encoder and decoder, and the tokenizer that puts a quantizer between them."""

from steadyvq.models.autoencoder import AUTOENCODERS, AutoencoderConfig, Decoder, Encoder, autoencoder_config
from steadyvq.models.perceptual import LPIPS
from steadyvq.models.perceptual_weights import load_lpips
from steadyvq.models.tokenizer import Tokenizer

__all__ = [
    "AUTOENCODERS",
    "LPIPS",
    "AutoencoderConfig",
    "Decoder",
    "Encoder",
    "Tokenizer",
    "autoencoder_config",
    "load_lpips",
]
