# SPDX-License-Identifier: Apache-2.0
"""A diffusion prior over the latents of a tokenizer: diffusers' UNet2DModel or DiT, and its schedulers.

Latents z are normalised per channel, x_0 = (z - mean) / deviation, over the training images. With alpha-bar_t of the schedule

    x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) noise            (arXiv 2006.11239, equation 4)
    epsilon: the network gives the noise; v: sqrt(alpha-bar_t) noise - sqrt(1 - alpha-bar_t) x_0  (arXiv 2202.00512, appendix D)

and with flow matching, for s in (0, 1], x_s = (1 - s) x_0 + s noise, of which the network gives d x_s / d s = noise - x_0
(arXiv 2209.03003, equation 1). The network is told t, or T s. Samples are quantized at the end, as in latent diffusion
(arXiv 2112.10752), where quantization is the first layer of the decoder.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steadyvq.generation.priors import Drawing, PriorModel
from steadyvq.training.diffusion_config import DiffusionConfig

MISSING = "the diffusion prior is built on diffusers: pip install 'steadyvq[diffusion]'"
SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "flow": "FlowMatchEulerDiscreteScheduler",
}
"""diffusers' classes by our names; `flow` is for flow matching, the others for the noise and v."""
_SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}


def diffusers_part(name: str) -> Any:
    """A class of diffusers.

    Raises:
        ValueError: diffusers is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(MISSING) from error
    return getattr(diffusers, name)


@dataclass(frozen=True)
class DiffusionDrawing(Drawing):
    """How latents are drawn.

    Attributes:
        scheduler: A name of `SCHEDULERS` (None: `flow` for flow matching, otherwise `ddim`).
        steps: Evaluations of the network on the way from noise to latents (None: 50, or fewer where T has no such divisor).
    """

    scheduler: str | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise ValueError(f"the scheduler is {self.scheduler!r}, but it must be one of {', '.join(SCHEDULERS)}")
        if (self.steps is not None and self.steps < 1) or not self.guidance >= 0:
            raise ValueError(
                f"steps are {self.steps} and guidance {self.guidance}, but steps >= 1 and guidance >= 0 are needed"
            )


class DiffusionPrior(PriorModel):
    """A network that sees what noise has made of latents, and the class.

    Args:
        config: Its size, and what it predicts.
        shape: Of the latents of an image (d, h, w).
        num_classes: Classes; 0 for a prior that knows none.

    Attributes:
        mean: Of each channel of the training images' latents (d, 1, 1).
        deviation: Likewise.

    Raises:
        ValueError: The network cannot have latents of this shape.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: DiffusionConfig, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.num_classes = self.null = num_classes
        self.body = (_unet if config.network == "unet" else _dit)(config, shape, num_classes)
        self.register_buffer("mean", torch.zeros(shape[0], 1, 1))
        self.register_buffer("deviation", torch.ones(shape[0], 1, 1))
        self.noising = None if config.prediction == "flow" else make_scheduler(config, "ddpm")

    def forward(
        self, noisy: Float[Tensor, "B d h w"], times: Float[Tensor, "B"], labels: Int[Tensor, "B"]
    ) -> Float[Tensor, "B d h w"]:
        """What the network predicts, of normalised latents and noise, at times in [0, T]."""
        found: Tensor = self.body(noisy, timestep=times, class_labels=labels, return_dict=False)[0]
        return found

    def normalise(self, latents: Float[Tensor, "B d h w"]) -> Float[Tensor, "B d h w"]:
        """x_0 of latents."""
        return (latents - self.mean) / self.deviation

    def noised(
        self, clean: Float[Tensor, "B d h w"], noise: Float[Tensor, "B d h w"], where: Float[Tensor, "B"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the network sees, at which times, and what it should give.

        Args:
            clean: x_0.
            noise: Standard normal.
            where: Uniform in [0, 1): which t of 0, ..., T - 1, or s = 1 - where.
        """
        if self.noising is None:
            s = (1 - where)[:, None, None, None]
            return (1 - s) * clean + s * noise, (1 - where) * self.config.times, noise - clean
        times = (where * self.config.times).long()
        noisy = self.noising.add_noise(clean, noise, times)
        wanted = noise if self.config.prediction == "epsilon" else self.noising.get_velocity(clean, noise, times)
        return noisy, times.to(clean.dtype), wanted


def _unet(config: DiffusionConfig, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    size = config.unet
    levels = len(size.widths)
    smallest = 1 << (levels - 1)
    if shape[1] % smallest or shape[2] % smallest:
        raise ValueError(
            f"the latents are {shape[1]}x{shape[2]}, but a UNet of {levels} levels halves both sides {levels - 1} times: give "
            "diffusion.unet.widths fewer numbers"
        )
    body: nn.Module = diffusers_part("UNet2DModel")(
        sample_size=shape[1:],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=size.widths,
        layers_per_block=size.blocks,
        down_block_types=["AttnDownBlock2D" if i in size.attention else "DownBlock2D" for i in range(levels)],
        up_block_types=["AttnUpBlock2D" if i in size.attention else "UpBlock2D" for i in reversed(range(levels))],
        attention_head_dim=size.head_width,
        norm_num_groups=math.gcd(32, *size.widths),
        dropout=config.dropout,
        num_class_embeds=num_classes + 1,
    )
    return body


def _dit(config: DiffusionConfig, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    size = config.dit
    if shape[1] != shape[2] or shape[1] % size.patch:
        raise ValueError(
            f"the latents are {shape[1]}x{shape[2]}, but the DiT cuts squares into patches of {size.patch}: change "
            "diffusion.dit.patch, or use diffusion.network=unet"
        )
    body: Any = diffusers_part("DiTTransformer2DModel")(
        num_attention_heads=size.heads,
        attention_head_dim=size.width // size.heads,
        in_channels=shape[0],
        num_layers=size.layers,
        dropout=config.dropout,
        sample_size=shape[1],
        patch_size=size.patch,
        num_embeds_ada_norm=num_classes,
    )
    for block in body.transformer_blocks:
        # Classes are hidden by whoever makes the batch, so that it does not depend on the processes.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
        _zero(block.norm1.linear)
    # The paper's section 3.2: blocks begin as the identity, and the output as 0.
    _zero(body.proj_out_1)
    _zero(body.proj_out_2)
    found: nn.Module = body
    return found


def _zero(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def make_scheduler(config: DiffusionConfig, name: str) -> Any:
    """One of diffusers' schedulers for what a prior predicts.

    Raises:
        ValueError: It is for another kind of prediction.
    """
    flows = config.prediction == "flow"
    if flows != (name == "flow"):
        suited = "flow" if flows else ", ".join(other for other in SCHEDULERS if other != "flow")
        raise ValueError(
            f"the scheduler {name!r} does not fit a prior that predicts {config.prediction!r}: use {suited}"
        )
    scheduler = diffusers_part(SCHEDULERS[name])
    if flows:
        return scheduler(num_train_timesteps=config.times)
    settings = {
        "num_train_timesteps": config.times,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": _SCHEDULES[config.schedule],
        "prediction_type": _PREDICTIONS[config.prediction],
        # From the last level on, down to the clean latents (arXiv 2305.08891, section 3.3).
        "timestep_spacing": "trailing",
    }
    # Latents are not bounded as pixels are.
    return scheduler(**settings) if name == "dpm++" else scheduler(**settings, clip_sample=False)


def timed_scheduler(config: DiffusionConfig, drawing: DiffusionDrawing) -> Any:
    """The scheduler of a drawing, with its steps.

    Raises:
        ValueError: It does not fit the prior, or the number of steps.
    """
    name = drawing.scheduler or ("flow" if config.prediction == "flow" else "ddim")
    scheduler = make_scheduler(config, name)
    usual = max(steps for steps in range(1, 51) if config.times % steps == 0)
    steps = usual if drawing.steps is None else drawing.steps
    if name == "flow":
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
        return scheduler
    if steps > config.times:
        raise ValueError(f"steps are {steps}, but there are {config.times} noise levels: use fewer")
    if name != "dpm++" and config.times % steps:
        raise ValueError(
            f"steps are {steps}, but {name} goes through {config.times} noise levels in equal steps: use a divisor of "
            f"{config.times}, such as {usual}"
        )
    scheduler.set_timesteps(steps)
    return scheduler


def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Float[Tensor, "B d h w"],
    generators: Sequence[torch.Generator] = (),
) -> Float[Tensor, "B d h w"]:
    """From noise to x_0.

    Args:
        predict: (x_t, t) to what the prior predicts.
        scheduler: Of `timed_scheduler`.
        noise: What is begun with.
        generators: One for each sample, for schedulers that add noise on the way.
    """
    x = noise
    for time in scheduler.timesteps:
        x = scheduler.step(predict(x, time), time, x, generator=list(generators) or None, return_dict=False)[0]
    return x


@torch.no_grad()
def sample_latents(
    prior: DiffusionPrior, labels: Int[Tensor, "B"], seed: int, numbers: Sequence[int], drawing: DiffusionDrawing
) -> Float[Tensor, "B d h w"]:
    """Latents of samples, in the tokenizer's units, float64 on the CPU.

    Noise and steps are float64 on the CPU whatever the network computes in, so precision and device change little. A sample
    depends on (seed, number) and its class; in a float64 network not on those beside it but for the last bits.

    Args:
        prior: In evaluation mode.
        labels: The class of each; `prior.null` for none.
        seed: Of the whole set.
        numbers: Number of each in the set.
        drawing: How they are drawn.

    Raises:
        ValueError: The drawing does not fit the prior.
    """
    if drawing.guidance != 1 and not prior.num_classes:
        raise ValueError(f"guidance is {drawing.guidance}, but this prior knows no classes: leave it at 1")
    scheduler = timed_scheduler(prior.config, drawing)
    weight = next(prior.parameters())
    guided = drawing.guidance != 1
    labels = labels.to(weight.device)
    classes = torch.cat([labels, torch.full_like(labels, prior.null)]) if guided else labels

    def predict(x: Tensor, time: Tensor) -> Tensor:
        inputs = x.to(weight.device, weight.dtype)
        inputs = torch.cat([inputs, inputs]) if guided else inputs
        found: Tensor = prior(inputs, time.to(weight.device).expand(len(inputs)), classes).cpu().double()
        if not guided:
            return found
        given, without = found[: len(x)], found[len(x) :]
        return without + drawing.guidance * (given - without)

    generators = [sample_generator(seed, number) for number in numbers]
    noise = torch.stack([torch.randn(prior.shape, generator=g, dtype=torch.float64) for g in generators])
    return denoise(predict, scheduler, noise, generators) * prior.deviation.cpu().double() + prior.mean.cpu().double()


def sample_generator(seed: int, number: int) -> torch.Generator:
    """The source of all random numbers of one sample."""
    key = np.random.SeedSequence([seed % (1 << 64), number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(key >> np.uint64(1)))
