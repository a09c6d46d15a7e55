# SPDX-License-Identifier: Apache-2.0
"""The loss that needs no decoder: how far what the decoder gets is from what the encoder gave."""

from typing import Any

from torch import Tensor, nn

from steadyvq.models import Tokenizer

RECONSTRUCTION, LATENT = "reconstruction", "latent"
"""Names of the losses of a tokenizer's task in the weights and ramps of stages."""


class LatentLoss:
    """mean (r(z_q) - sg z)^2 over all numbers of a batch; r is the rectifier, or nothing.

    The first loss of VQ-Transplant (a quantizer of any kind learns to give latents back) and, with a rectifier, ReVQ's. Where a
    straight-through estimator hands the gradient of z_q to frozen latents, plain codes learn by their own losses alone.

    Args:
        tokenizer: Whose forwards are watched.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._latents: Tensor | None = None
        self._given: Tensor | None = None
        tokenizer.quantizer.register_forward_pre_hook(self._keep_latents)
        tokenizer.rectifier.register_forward_hook(self._keep_given)

    def __call__(self) -> Tensor:
        """The loss of the last forward (0-d); a forward is looked at once."""
        latents, given = self._latents, self._given
        self._latents = self._given = None
        assert latents is not None, "the tokenizer has had no forward since the last loss"
        assert given is not None, "the tokenizer has had no forward since the last loss"
        return (given.float() - latents.float()).square().mean()

    def _keep_latents(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._latents = arguments[0].detach() if module.training else None

    def _keep_given(self, module: nn.Module, arguments: tuple[Any, ...], given: Tensor) -> None:
        self._given = given
