# SPDX-License-Identifier: Apache-2.0
"""The adversarial side of a tokenizer's training: the discriminator and all that belongs to it.

One step, on one global batch: the tokenizer minimises

    nll + w g + quantizer's losses        w = weight * ramps (* w_adaptive)

and then the discriminator learns to tell the same reconstructions, as they were before that step, from the photographs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from steadyvq.models.adversarial import Critic, LastLayer, Reduce, discriminator_loss, generator_loss
from steadyvq.models.discriminator import build_discriminator
from steadyvq.models.tokenizer import Tokenizer
from steadyvq.training.adversarial_config import AdversarialConfig
from steadyvq.training.stages import Schedule
from steadyvq.training.task import StepOutput

LOSS = "adversarial"
"""The name of g in logs and in the weights and ramps of stages."""

DISCRIMINATOR = "discriminator"
"""The name of the objective, of its loss, and of the part that stages freeze."""

NOT_FINITE = "adversarial/not_finite"

Likeness = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
"""Images to the loss by which they are like the originals (0-d), and its named parts."""


class Adversary:
    """The discriminator of a run and everything adversarial that a tokenizer's task does.

    Args:
        config: Settings; a discriminator is named.
        tokenizer: What it judges.
        image_size: Side of the training crops.
        steps_per_epoch: Length of an epoch, for ramps of stages.
        seed: Of the discriminator's first weights.
        half: Run the discriminator in bfloat16 where that is safe.

    Attributes:
        critic: The discriminator and the means of its logits, which the discriminator's objective trains.

    Raises:
        ValueError: The discriminator cannot be built so.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        steps_per_epoch: int,
        seed: int,
        half: bool = False,
    ) -> None:
        self.config, self.half, self.steps_per_epoch = config, half, steps_per_epoch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_discriminator(config.discriminator, image_size, **config.options)
        self.critic = Critic(network, config.lecam_decay)
        self.weight, self.learns = 0.0, False
        self._decoder = tokenizer.decoder
        self._reduce: Reduce = lambda tensor: tokenizer.quantizer.reduce(tensor)
        self._last = LastLayer(
            self._decoder.to_images, self._decoder.conv_out.weight, config.adaptive_max, lambda sums: self._reduce(sums)
        )
        self._balance: tuple[Tensor, Tensor] | None = None
        self._features: Tensor | None = None
        self._surveyed = False
        self._decoder.conv_out.register_forward_pre_hook(self._keep_features)

    @property
    def couples_batch(self) -> bool:
        """Whether micro-batches do not add up to the batch."""
        return any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in self.critic.modules())

    def optimizer(self, lr: float, betas: Sequence[float], eps: float) -> Optimizer:
        """Adam, with the tokenizer's settings where there are none of its own."""
        first, second = self.config.betas or betas
        trained = [p for p in self.critic.parameters() if p.requires_grad]
        return Adam(trained, lr=self.config.lr or lr, betas=(first, second), eps=eps)

    def check(self, schedule: Schedule) -> None:
        """Raises ValueError where a stage asks for a balance that cannot be measured."""
        for stage in schedule.stages:
            if self.config.adaptive and "decoder" in stage.frozen and stage.weights.get(LOSS, self.config.weight):
                raise ValueError(
                    f"stage {stage.name!r} freezes the decoder, but the adaptive weight is measured at its last layer: set "
                    f"adversarial.adaptive=false, or weights: {{{LOSS}: 0}} in this stage"
                )

    def begin_step(self, step: int, schedule: Schedule) -> None:
        """What happens in this step: the discriminator learns or rests, the weight of g before it is balanced."""
        config = self.config
        since = step - config.start
        led = since - config.head_start
        within = (step % self.steps_per_epoch + 1) / self.steps_per_epoch
        ramp = min(1.0, (led + 1) / config.ramp_steps) if config.ramp_steps else 1.0
        self.learns = since >= 0
        self.weight = schedule.weight(LOSS, config.weight, within) * ramp if led >= 0 else 0.0
        self._balance, self._surveyed = None, False

    def images(self, reconstruction: Tensor) -> Tensor:
        """The images that the losses look at: where a balance is measured, cut off from what made them.

        Both losses are differentiated by the images once; the last layer's gradients follow from that, and so does the
        gradient that goes on into the decoder (`join`). Nothing is gone through twice.
        """
        return reconstruction.detach().requires_grad_() if self._balanced else reconstruction

    def survey(self, model: Tokenizer, batch: Tensor, likeness: Likeness) -> None:
        """Measures the gradients of one of several micro-batches beforehand; the balance is that of the global batch."""
        if not self._balanced:
            return
        with torch.no_grad(), self._autocast(batch):
            reconstruction, _ = model(batch)
        images = reconstruction.to(batch.dtype).requires_grad_()
        self._measure(images, likeness(images)[0], self._generator_loss(images))
        self._surveyed = True

    def join(
        self, reconstruction: Tensor, images: Tensor, nll: Tensor, logs: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """nll + w g of a micro-batch, with its gradient by the reconstruction; the logs with what is adversarial.

        Args:
            reconstruction: (B, 3, H, W), as the model gave it.
            images: What `images` made of it.
            nll: What makes it like the originals, computed on `images`.
            logs: To be extended.
        """
        if not self.weight:
            return nll, logs
        g = self._generator_loss(images)
        logs = {**logs, f"loss/{LOSS}": g}
        if images is reconstruction:
            return nll + self.weight * g, {**logs, f"{LOSS}/weight": nll.new_tensor(self.weight)}
        by_image = self._gradients(images, nll, g)
        if not self._surveyed:
            self._add(by_image, len(images))
        # One sum over processes, at the first micro-batch of a step.
        self._balance = self._balance or self._last.balance()
        balance, finite = (value.to(nll) for value in self._balance)
        weight = self.weight * balance
        # A discriminator that has broken is left out, and its NaN with it, whatever it is multiplied by.
        gradient = torch.where(finite > 0, by_image[0] + weight * by_image[1], by_image[0])
        value = torch.where(finite > 0, nll + weight * g, nll).detach()
        carried = (gradient.to(reconstruction) * reconstruction).sum()
        logs |= {f"{LOSS}/weight": weight, f"{LOSS}/adaptive_weight": balance}
        return value + (carried - carried.detach()), logs

    def judge(self, model: nn.Module, real: Tensor, fake: Tensor) -> StepOutput:
        """The discriminator's loss on photographs and on what the tokenizer made of them before its step.

        Args:
            model: The engine's wrapper of `critic`.
            real: (B, 3, H, W).
            fake: The same shape, without gradient.
        """
        logits = model(real, fake)
        # Where the wrapper computes in half precision, losses do not.
        on_real, on_fake = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in logits)
        total = self.config.discriminator_weight * discriminator_loss(self.config.discriminator_loss, on_real, on_fake)
        logs = {f"loss/{DISCRIMINATOR}": total}
        if self.config.lecam:
            regularisation = self.critic.lecam(on_real, on_fake)
            total = total + self.config.lecam * regularisation
            logs["loss/lecam"] = regularisation
        if self.config.leak and self.weight:
            weight = self.weight if self._balance is None else self.weight * self._balance[0].to(total)
            total = total + weight * generator_loss(self.config.generator_loss, on_fake)
        logs |= {"adversarial/logits_real": on_real.mean(), "adversarial/logits_fake": on_fake.mean()}
        return StepOutput(total, {name: value.detach() for name, value in logs.items()}, len(real))

    def after_discriminator(self, outputs: Sequence[StepOutput]) -> None:
        """Moves the means of the logits."""
        means = [(o.logs["adversarial/logits_real"], o.logs["adversarial/logits_fake"]) for o in outputs]
        self.critic.update(means, [o.extra for o in outputs], self._reduce)

    def events(self) -> Mapping[str, float]:
        """1 where the balance of the present step was not finite."""
        return {} if self._balance is None else {NOT_FINITE: float(not bool(self._balance[1]))}

    @property
    def _balanced(self) -> bool:
        return self.config.adaptive and self.weight > 0

    def _generator_loss(self, images: Tensor) -> Tensor:
        with self._autocast(images):
            logits = self.critic.network(images)
        return generator_loss(self.config.generator_loss, logits.to(torch.promote_types(logits.dtype, torch.float32)))

    @staticmethod
    def _gradients(images: Tensor, nll: Tensor, g: Tensor) -> list[Tensor]:
        return [torch.autograd.grad(loss, images)[0] for loss in (nll, g)]

    def _measure(self, images: Tensor, nll: Tensor, g: Tensor) -> None:
        self._add(self._gradients(images, nll, g), len(images))

    def _add(self, by_image: Sequence[Tensor], count: int) -> None:
        features, self._features = self._features, None
        assert features is not None, "the decoder has made no images since the last balance"
        self._last.add(features, by_image, count)

    def _keep_features(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if self._balanced and module.training:
            self._features = arguments[0].detach()

    @contextmanager
    def _autocast(self, like: Tensor) -> Iterator[None]:
        with torch.autocast(like.device.type, torch.bfloat16, enabled=self.half):
            yield
