# SPDX-License-Identifier: Apache-2.0
"""The settings of adversarial training."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class AdversarialConfig:
    """An adversarial loss, off unless a discriminator is named.

    Stages switch it further: `weights: {adversarial: 0}` leaves it out of the tokenizer's loss, `frozen: [discriminator]`
    lets the discriminator rest, `ramp: {adversarial: 2}` brings it back over two epochs.

    Attributes:
        discriminator: `none`, `patch`, `stylegan` or `dino`.
        options: Of the discriminator: channels, layers, norm of `patch`; width of `stylegan`; weights, norm of `dino`.
        generator_loss: `hinge`, `non_saturating`, or `non_saturating_per_image`.
        discriminator_loss: `hinge` or `non_saturating`.
        weight: Of the generator's loss in the tokenizer's.
        adaptive: Multiply it by the ratio of the last layer's gradients, which makes both losses pull alike.
        adaptive_max: Largest such ratio.
        discriminator_weight: Factor on the discriminator's own loss.
        start: Steps before anything adversarial happens.
        head_start: Steps after that in which the discriminator alone learns.
        ramp_steps: Steps after that over which the weight rises linearly.
        lecam: Weight of LeCAM regularisation in the discriminator's loss.
        lecam_decay: Of the running means of its logits.
        leak: Add the generator's weighted loss to the discriminator's as well, as the released training loop of SimVQ does,
            which lets its gradient stand from one backward to the next.
        lr: The discriminator's learning rate (None: `optim.lr`); it follows the same warm-up and decay.
        betas: Its Adam's decay rates (None: `optim.betas`).
    """

    discriminator: Literal["none", "patch", "stylegan", "dino"] = "none"
    options: dict[str, Any] = field(default_factory=dict)
    generator_loss: Literal["hinge", "non_saturating", "non_saturating_per_image"] = "hinge"
    discriminator_loss: Literal["hinge", "non_saturating"] = "hinge"
    weight: float = 0.8
    adaptive: bool = True
    adaptive_max: float = 1e4
    discriminator_weight: float = 1.0
    start: int = 0
    head_start: int = 0
    ramp_steps: int = 0
    lecam: float = 0.0
    lecam_decay: float = 0.999
    leak: bool = False
    lr: float | None = None
    betas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "start", "head_start", "ramp_steps", "lecam", "adaptive_max"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"adversarial.{name} is {getattr(self, name)}, but it must be at least 0")
        if not self.discriminator_weight > 0 or not 0 <= self.lecam_decay < 1:
            raise ValueError(
                f"adversarial.discriminator_weight={self.discriminator_weight} and lecam_decay={self.lecam_decay}, but a "
                "positive weight and a decay in [0, 1) are needed"
            )
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"adversarial.lr is {self.lr}, but a learning rate is positive")
        if self.betas is not None and (len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError(f"adversarial.betas is {list(self.betas)}, but Adam needs two numbers in [0, 1)")
