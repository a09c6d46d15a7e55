# SPDX-License-Identifier: Apache-2.0
"""Models: encoder and decoder, and the tokenizer that puts a quantizer between them."""

from steadyvq.models.autoencoder import AUTOENCODERS, AutoencoderConfig, Decoder, Encoder, autoencoder_config
from steadyvq.models.tokenizer import Tokenizer
from steadyvq.models.vqgan import VqganDecoder, VqganEncoder

__all__ = [
    "AUTOENCODERS",
    "AutoencoderConfig",
    "Decoder",
    "Encoder",
    "Tokenizer",
    "VqganDecoder",
    "VqganEncoder",
    "autoencoder_config",
]
