# SPDX-License-Identifier: Apache-2.0
"""Adversarial training: losses of both sides, LeCAM regularisation, the adaptive weight.

    critic = Critic(build_discriminator("patch", image_size=128, norm="group"))
    g = generator_loss("hinge", critic.network(reconstruction))          # added to the tokenizer's loss with a weight
    real, fake = critic(images, reconstruction.detach())
    d = discriminator_loss("hinge", real, fake) + critic.lecam(real, fake)

D(x) are logits of any shape whose first axis is the images; a mean is over all of them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GENERATOR_LOSSES = ("hinge", "non_saturating", "non_saturating_per_image")
DISCRIMINATOR_LOSSES = ("hinge", "non_saturating")

Reduce = Callable[[Tensor], Tensor]


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """What the generator minimises, of the logits of its images.

        hinge                     -mean D(x^)                                   Lim and Ye, arXiv 1705.02894, eq. 7
        non_saturating            mean softplus(-D(x^)) = -mean log sigmoid     Goodfellow et al., arXiv 1406.2661, sec. 3
        non_saturating_per_image  mean_i softplus(-mean_p D(x^)_ip)

    The last one is the form in the code of SimVQ and Open-MAGVIT2, which averages the logits of an image first.

    Args:
        kind: One of `GENERATOR_LOSSES`.
        fake: Logits of generated images, (B, ...).

    Raises:
        ValueError: There is no such loss.
    """
    if kind == "hinge":
        return -fake.mean()
    if kind == "non_saturating":
        return F.softplus(-fake).mean()
    if kind == "non_saturating_per_image":
        return F.softplus(-fake.flatten(1).mean(1)).mean()
    raise ValueError(f"no generator loss is called {kind!r}: the names are {', '.join(GENERATOR_LOSSES)}")


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises, half the sum of its errors on both kinds of images.

        hinge           (mean relu(1 - D(x)) + mean relu(1 + D(x^))) / 2
        non_saturating  (mean softplus(-D(x)) + mean softplus(D(x^))) / 2, the cross-entropy

    Source: VQGAN, arXiv 2012.09841, official code, for the factor of a half.

    Args:
        kind: One of `DISCRIMINATOR_LOSSES`.
        real: Logits of photographs, (B, ...).
        fake: Logits of generated images, (B, ...).

    Raises:
        ValueError: There is no such loss.
    """
    if kind == "hinge":
        return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    if kind == "non_saturating":
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    raise ValueError(f"no discriminator loss is called {kind!r}: the names are {', '.join(DISCRIMINATOR_LOSSES)}")


class Critic(nn.Module):
    """A discriminator with the running means of its logits, which LeCAM regularisation holds it to.

        R = mean relu(D(x) - f)^2 + mean relu(r - D(x^))^2
        r <- gamma r + (1 - gamma) mean D(x),  f <- gamma f + (1 - gamma) mean D(x^)

    Source: LeCAM, arXiv 2104.03310, eq. 3 and 4, with the one-sided squares of its code (and of Open-MAGVIT2's).

    Differs from the source: r and f are buffers, so they are saved, and are means over all processes; they are moved after
    a step and not before its loss, so that a forward changes nothing.

    Args:
        network: Images (B, 3, H, W) to logits (B, ...).
        decay: gamma.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        super().__init__()
        self.network = network
        self.decay = decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of photographs and of generated images.

        In two passes, so that batch normalisation sees the two kinds apart, as in all published recipes.
        """
        return self.network(real), self.network(fake)

    def lecam(self, real: Tensor, fake: Tensor) -> Tensor:
        """R of the logits of both kinds of images."""
        over = (real - self.fake_mean).relu().square().mean()
        under = (self.real_mean - fake).relu().square().mean()
        return over + under

    @torch.no_grad()
    def update(self, means: Sequence[tuple[Tensor, Tensor]], counts: Sequence[int], reduce: Reduce) -> None:
        """Moves r and f after a step.

        Args:
            means: Mean logits (real, fake) of each micro-batch, 0-d.
            counts: Images in each.
            reduce: Adds a tensor up over processes.
        """
        rows = [torch.stack([*pair, pair[0].new_ones(())]).double() * n for pair, n in zip(means, counts, strict=True)]
        real, fake, count = reduce(torch.stack(rows).sum(0))
        for mean, total in ((self.real_mean, real), (self.fake_mean, fake)):
            mean.lerp_((total / count).to(mean), 1 - self.decay)


class LastLayer:
    """The gradients by the decoder's last layer that balance reconstruction and adversarial loss over a global batch.

        w = clamp(|grad_L nll| / (|grad_L g| + 1e-4), 0, largest)

    nll is the mean reconstruction (and perceptual) loss of all images of the step, g the mean adversarial loss, L the
    weight of the last layer. Both gradients are added up over micro-batches and processes before their lengths are
    taken, in float32 or better whatever the autocast state, so every process has the same weight.

    Source: VQGAN, arXiv 2012.09841, eq. 7 (delta = 1e-6 there, 1e-4 in the code).

    Args:
        apply: The last layer, features to images.
        weight: Its weight.
        largest: Of w.
        reduce: Adds a tensor up over processes.
    """

    def __init__(
        self, apply: Callable[[Tensor], Tensor], weight: Tensor, largest: float = 1e4, reduce: Reduce | None = None
    ) -> None:
        self.apply, self.weight, self.largest = apply, weight, largest
        self.reduce: Reduce = reduce or (lambda tensor: tensor)
        self._sums: Tensor | None = None

    def add(self, features: Tensor, by_image: Sequence[Tensor], count: int) -> None:
        """Takes in a micro-batch.

        Args:
            features: What the last layer was applied to, (B, C, h, w).
            by_image: Gradients of the micro-batch's mean nll and mean g by the images, (B, 3, H, W) each.
            count: Images in it.
        """
        with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
            images = self.apply(features.detach().to(self.weight.dtype))
            grads = [
                torch.autograd.grad(images, self.weight, gradient.to(images), retain_graph=True)[0]
                for gradient in by_image
            ]
        rows = [gradient.detach().flatten() * count for gradient in grads]
        sums = torch.cat([*rows, rows[0].new_tensor([float(count)])])
        self._sums = sums if self._sums is None else self._sums + sums

    def balance(self) -> tuple[Tensor, Tensor]:
        """(w, whether it is finite) of what was added since the last call, 0-d; w is 0 where it is not finite."""
        if self._sums is None:
            raise RuntimeError("no gradients were added: call `add` for every micro-batch first")
        sums, self._sums = self.reduce(self._sums), None
        reconstruction, adversarial = (sums[:-1] / sums[-1]).double().chunk(2)
        weight = adaptive_weight(reconstruction, adversarial, self.largest)
        finite = weight.isfinite()
        return torch.where(finite, weight, 0.0), finite


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, largest: float = 1e4) -> Tensor:
    """|reconstruction| / (|adversarial| + 1e-4), at most `largest`, of two gradients; NaN unless both are finite."""
    weight = reconstruction.norm() / (adversarial.norm() + 1e-4)
    finite = reconstruction.isfinite().all() & adversarial.isfinite().all()
    return torch.where(finite, weight.clamp(0, largest), torch.nan).detach()
