# SPDX-License-Identifier: Apache-2.0
"""Models: encoder and decoder, the tokenizer that puts a quantizer between them, discriminators that judge it."""

from steadyvq.models.adversarial import Critic, adaptive_weight, discriminator_loss, generator_loss
from steadyvq.models.autoencoder import AUTOENCODERS, AutoencoderConfig, Decoder, Encoder, autoencoder_config
from steadyvq.models.continuous import Autoencoder, save_autoencoder
from steadyvq.models.discriminator import DISCRIMINATORS, build_discriminator
from steadyvq.models.features import FeatureNetwork, load_features
from steadyvq.models.perceptual import LPIPS
from steadyvq.models.perceptual_weights import load_lpips
from steadyvq.models.tokenizer import Tokenizer
from steadyvq.models.vqgan import VqganDecoder, VqganEncoder

__all__ = [
    "AUTOENCODERS",
    "DISCRIMINATORS",
    "LPIPS",
    "Autoencoder",
    "AutoencoderConfig",
    "Critic",
    "Decoder",
    "Encoder",
    "FeatureNetwork",
    "Tokenizer",
    "VqganDecoder",
    "VqganEncoder",
    "adaptive_weight",
    "autoencoder_config",
    "build_discriminator",
    "discriminator_loss",
    "generator_loss",
    "load_features",
    "load_lpips",
    "save_autoencoder",
]
