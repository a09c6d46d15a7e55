# SPDX-License-Identifier: Apache-2.0
"""Training an image tokenizer: encoder, quantizer and decoder by reconstruction plus the quantizer's losses."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from steadyvq.data import Collection, CropFeed, ImageSource, StreamedCrops, usable_workers
from steadyvq.files import write_atomically, write_text
from steadyvq.metrics import Probe, write_record
from steadyvq.models import LPIPS, Tokenizer, load_lpips
from steadyvq.quantizers import (
    Codebook,
    Quantized,
    Quantizer,
    ShardedQuantizer,
    VectorQuantizer,
    accepts,
    build_quantizer,
)
from steadyvq.quantizers.maintenance import ReplaceDead
from steadyvq.quantizers.names import coupling
from steadyvq.report import code_map, picture_grid
from steadyvq.training.adversary import DISCRIMINATOR, LOSS, NOT_FINITE, Adversary
from steadyvq.training.average import WeightAverage
from steadyvq.training.config import RunConfig
from steadyvq.training.evaluation import evaluate, record_of
from steadyvq.training.latent_loss import LATENT, RECONSTRUCTION, LatentLoss
from steadyvq.training.photographs import evaluation_crops, load_photographs, training_crops
from steadyvq.training.processes import launched
from steadyvq.training.run import RunFolder
from steadyvq.training.stages import Schedule, quantizer_weights
from steadyvq.training.tables import shard
from steadyvq.training.task import StepOutput, Task
from steadyvq.training.watch import CodebookWatch
from steadyvq.training.weights import load_weights

OBJECTIVE = "tokenizer"
LOSSES = (LOSS, RECONSTRUCTION, LATENT)
"""Losses that are not the quantizer's own, which stages may weigh too."""


class Made(NamedTuple):
    """What a forward of the tokenizer leaves for the rest of the step.

    Attributes:
        quantized: What its quantizer returned.
        images: The reconstruction without gradient, where a discriminator will judge it.
    """

    quantized: Quantized
    images: Tensor | None


def quantizer_of(config: RunConfig, name: str | None = None) -> Quantizer:
    """The quantizer of a configuration, built by `name` instead of the configured one if it is given."""
    settings = config.quantizer
    name = name or settings.name
    options = {**settings.options, "channel_axis": 1}
    if accepts(name, "seed"):
        options = {"seed": config.seed, **options}
    return build_quantizer(name, num_codes=settings.num_codes, dim=settings.dim, **options)


def build_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of a configuration, initialised from its seed; its table is cut up where that is asked for."""
    quantizer = quantizer_of(config)
    if config.quantizer.sharded:
        quantizer = shard(quantizer, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Tokenizer.build(config.model, quantizer)


def build_adversary(config: RunConfig, tokenizer: Tokenizer) -> Adversary | None:
    """What judges a tokenizer, if the configuration asks for it; initialised from its seed."""
    if config.adversarial.discriminator == "none":
        return None
    return Adversary(
        config.adversarial,
        tokenizer,
        image_size=config.data.crop_size,
        steps_per_epoch=config.steps_per_epoch,
        seed=config.seed + 1,
        half=config.precision == "bf16-mixed",
    )


def load_perceptual(config: RunConfig) -> LPIPS | None:
    """LPIPS as the configuration asks for it, or None.

    Raises:
        ValueError: It is asked for, and its weights are missing or damaged.
    """
    if not config.perceptual:
        return None
    try:
        return load_lpips(config.perceptual_net, config.perceptual_weights)
    except ValueError as error:
        raise ValueError(
            f"perceptual is {config.perceptual}, but {error}; --set perceptual_weights=PATH names them, --set perceptual=0 "
            "trains without"
        ) from error


class TokenizerTask(Task):
    """An image tokenizer on crops of photographs.

    Args:
        config: The run's configuration.
        photographs: The photographs (None: loaded as the configuration says); sharing them between runs saves time.
    """

    counts = frozenset({NOT_FINITE})
    best = ("psnr", "max")

    def __init__(self, config: RunConfig, photographs: Collection | ImageSource | None = None) -> None:
        self.config = config
        # First, since photographs take long to load; and no part of `module`, so that it is neither saved nor wrapped.
        self.perceptual = load_perceptual(config)
        photographs = load_photographs(config) if photographs is None else photographs
        self.photographs = photographs
        self.tokenizer = build_tokenizer(config)
        _check_places(config, self.quantizer)
        self.adversary = build_adversary(config, self.tokenizer)
        self.module, self.objectives = self.tokenizer, (OBJECTIVE,)
        if self.adversary is not None:
            self.module = nn.ModuleDict({OBJECTIVE: self.tokenizer, DISCRIMINATOR: self.adversary.critic})
            self.objectives = (OBJECTIVE, DISCRIMINATOR)
        self.latent_loss = LatentLoss(self.tokenizer) if config.latent else None
        self.schedule: Schedule | None = None
        self._within = 1.0
        self.train_crops = training_crops(config, photographs)
        self.val_crops = evaluation_crops(config, photographs)
        if isinstance(self.train_crops, StreamedCrops):
            workers = config.data.workers
            self.feed = CropFeed(
                self.train_crops, usable_workers(launched(os.environ)[0]) if workers is None else workers
            )
        self.probe = Probe()
        self.watch: CodebookWatch | None = None
        if isinstance(self.quantizer, VectorQuantizer):
            self.watch = CodebookWatch(self.quantizer, config.steps_per_epoch)
        self._encoder_learns = True
        losses = getattr(self.quantizer, "losses", {})
        own = {"perceptual"} if self.perceptual is not None else set()
        own |= {"latent"} if config.latent else set()
        self.watchable = frozenset({"loss", "reconstruction", "relative_error", *losses, *own})

    def rows(self) -> list[dict[str, Any]]:
        """What the monitor of the codebook measured and said."""
        return [] if self.watch is None else self.watch.rows()

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer being trained."""
        return self.tokenizer.quantizer

    @property
    def averaged(self) -> nn.Module:
        """The tokenizer; nobody evaluates a discriminator."""
        return self.tokenizer

    @property
    def networks(self) -> list[nn.Module]:
        """Tokenizer, discriminator, LPIPS."""
        return [self.module, *([] if self.perceptual is None else [self.perceptual])]

    def cuttable(self) -> tuple[list[tuple[nn.Module, str]], list[nn.Parameter]]:
        """Encoder, decoder, rectifier, discriminator; the last layer of the decoder measures the adaptive weight."""
        names = [n for n in ("encoder", "decoder", "rectifier") if [*getattr(self.tokenizer, n).parameters()]]
        homes: list[tuple[nn.Module, str]] = [(self.tokenizer, name) for name in names]
        homes += [] if self.adversary is None else [(self.adversary.critic, "network")]
        return homes, list(self.tokenizer.decoder.conv_out.parameters())

    def parts(self) -> dict[str, list[nn.Module]]:
        """Encoder (with pre_quant), decoder (with post_quant), quantizer; the discriminator, if there is one."""
        judges: list[nn.Module] = [] if self.adversary is None else [self.adversary.critic]
        return {**self.tokenizer.parts(), DISCRIMINATOR: judges}

    def trained(self, objective: str) -> nn.Module:
        """The tokenizer, or its discriminator."""
        return self.tokenizer if self.adversary is None or objective == OBJECTIVE else self.adversary.critic

    def optimizer(self, objective: str) -> Optimizer:
        """Adam with a group of its own for a trainable codebook, and for an encoder with a rate of its own."""
        optim = self.config.optim
        if self.adversary is not None and objective == DISCRIMINATOR:
            return self.adversary.optimizer(optim.lr, optim.betas, optim.eps)
        own = codebook_parameters(self.quantizer)
        apart = self._encoder_group()
        grouped = {id(p) for p in (*own, *(p for group in apart for p in group["params"]))}
        rest = [p for p in self.tokenizer.parameters() if id(p) not in grouped]
        groups: list[dict[str, Any]] = [{"params": rest, "lr": optim.lr, "eps": optim.eps}, *apart]
        if own:
            eps = optim.eps if optim.codebook_eps is None else optim.codebook_eps
            groups.append({"params": own, "lr": optim.codebook_lr, "eps": eps})
        return Adam(groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]))

    def _encoder_group(self) -> list[dict[str, Any]]:
        """The encoder's group of the optimiser, where its rate is not that of all."""
        optim = self.config.optim
        if optim.encoder_lr is None and optim.encoder_decay is None:
            return []
        moved = [p for module in self.tokenizer.parts()["encoder"] for p in module.parameters()]
        lr = optim.lr if optim.encoder_lr is None else optim.encoder_lr
        return [{"params": moved, "lr": lr, "eps": optim.eps, "decay": optim.encoder_decay}]

    def batch(self, epoch: int, positions: range) -> Tensor:
        """Crops at these positions of an epoch, (B, 3, S, S) in [-1, 1]."""
        if self.feed is not None:
            return self.feed.batch(epoch, positions)
        return self.train_crops.batch(epoch, positions.start, len(positions))

    @torch.no_grad()
    def prepare(self) -> None:
        """Loads the weights to start from, or places the codes on the first latents, as the configuration asks."""
        settings = self.config.quantizer
        if self.config.init_from is not None:
            load_weights(self.tokenizer, Path(self.config.init_from), self.config.init_parts)
        if self.config.init_from is not None and self.config.init_parts == "all":
            return
        if settings.init != "none":
            self._place(settings.init)

    def _place(self, method: str) -> None:
        """Places the codes on latents of training crops, the same in every process."""
        settings = self.config.quantizer
        device = next(self.tokenizer.parameters()).device
        count = min(settings.init_samples, len(self.train_crops))
        starts = range(0, count, self.config.batch_size)
        batches = [self.train_crops.batch(0, s, min(self.config.batch_size, count - s)) for s in starts]
        latents = torch.cat([self.tokenizer.latents(images.to(device)) for images in batches])
        self.quantizer.init_from(latents, method=method, seed=self.config.seed)

    def begin_step(self, step: int) -> None:
        """Where the step stands in the run decides what the discriminator does and what ramps weigh."""
        self._within = (step % self.config.steps_per_epoch + 1) / self.config.steps_per_epoch
        if self.adversary is not None and self.schedule is not None:
            self.adversary.begin_step(step, self.schedule)

    def due(self, objective: str) -> bool:
        """The discriminator begins at its step."""
        return self.adversary is None or objective == OBJECTIVE or self.adversary.learns

    def survey(self, objective: str, batch: Tensor) -> None:
        """The adaptive weight is that of the global batch."""
        if self.adversary is not None and objective == OBJECTIVE:
            self.adversary.survey(self.tokenizer, batch, lambda images: self._likeness(images, batch))

    def loss(self, objective: str, model: nn.Module, batch: Tensor, earlier: Mapping[str, StepOutput]) -> StepOutput:
        """Reconstruction plus the quantizer's weighted losses plus what a discriminator adds; or the discriminator's."""
        if self.adversary is not None and objective == DISCRIMINATOR:
            return self.adversary.judge(model, batch, self._made(batch, earlier))
        reconstruction, quantized = model(batch)
        reconstruction = reconstruction.to(batch.dtype)
        images = reconstruction if self.adversary is None else self.adversary.images(reconstruction)
        nll, logs = self._likeness(images, batch)
        if self.adversary is not None:
            nll, logs = self.adversary.join(reconstruction, images, nll, logs)
        total = quantized.loss
        if weight := self._weight(RECONSTRUCTION, 1.0):
            total = total + weight * nll
        if self.latent_loss is not None:
            logs["loss/latent"] = self.latent_loss()
            total = total + self._weight(LATENT, self.config.latent) * logs["loss/latent"]
        logs = {"loss": total, **logs}
        logs |= {f"loss/{name}": value for name, value in quantized.losses.items()}
        logs |= {f"vq/{name}": value for name, value in quantized.stats.items()}
        finite = quantized.assignment.distance.isfinite().all()
        made = Made(quantized, None if self.adversary is None else reconstruction.detach())
        return StepOutput(total, {name: value.detach() for name, value in logs.items()}, made, finite=finite)

    def _weight(self, name: str, default: float) -> float:
        """The present weight of a loss of this task."""
        return default if self.schedule is None else self.schedule.weight(name, default, self._within)

    def _likeness(self, images: Tensor, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What makes reconstructions like their originals (pixels, and LPIPS if it has a weight), and its parts for the log."""
        error = images - batch
        pixel = error.square().mean() if self.config.reconstruction == "mse" else error.abs().mean()
        total, logs = pixel, {"loss/reconstruction": pixel}
        if self.perceptual is not None:
            logs["loss/perceptual"] = self.perceptual.to(batch.device)(images, batch).mean()
            total = total + self.config.perceptual * logs["loss/perceptual"]
        return total, logs

    @torch.no_grad()
    def _made(self, batch: Tensor, earlier: Mapping[str, StepOutput]) -> Tensor:
        """What the tokenizer made of a batch before its step; where all of it is frozen, what it makes."""
        if OBJECTIVE in earlier:
            made: Made = earlier[OBJECTIVE].extra
            assert made.images is not None
            return made.images
        images: Tensor = self.tokenizer(batch)[0]
        return images.to(batch.dtype)

    def after_step(
        self, objective: str, outputs: Sequence[StepOutput], optimizer: Optimizer, average: WeightAverage
    ) -> Mapping[str, float | Tensor]:
        """The quantizer's own bookkeeping, or the discriminator's."""
        if self.adversary is not None and objective == DISCRIMINATOR:
            self.adversary.after_discriminator(outputs)
            return {}
        made = [output.extra.quantized for output in outputs]
        events = self.quantizer.update(made, optimizer, average)
        if self.watch is not None:
            self.watch.step(made, [output.logs for output in outputs], encoder_learns=self._encoder_learns)
        logs: dict[str, float | Tensor] = {f"vq/{name}": value for name, value in events.items()}
        logs["vq/relative_error"] = _relative_error(made, self.quantizer)
        logs |= {} if self.adversary is None else self.adversary.events()
        largest = [float(out.stats["ns_grad_max"]) for out in made if "ns_grad_max" in out.stats]
        if isinstance(self.quantizer, VectorQuantizer | ShardedQuantizer) and largest:
            logs["vq/temperature"] = float(self.quantizer.temperature)
            own = codebook_parameters(self.quantizer)
            eps = [g["eps"] for g in optimizer.param_groups if own and any(p is own[0] for p in g["params"])]
            if eps:
                # alpha * max |g_ns| below Adam's epsilon means that the loss moves next to nothing.
                logs["vq/ns_grad_over_eps"] = self.quantizer.weight("ns") * max(largest) / eps[0]
        return logs

    def on_stage(self, schedule: Schedule) -> None:
        """Freezes parts and sets the quantizer's weights."""
        self.schedule = schedule
        if self.adversary is not None:
            self.adversary.check(schedule)
        schedule.apply(self.parts(), self.quantizer, losses=LOSSES)
        encoder = self.parts()["encoder"]
        self._encoder_learns = any(p.requires_grad for part in encoder for p in part.parameters())

    @torch.no_grad()
    def begin_stage(self, schedule: Schedule, optimizers: Mapping[str, Optimizer], average: WeightAverage) -> None:
        """Places the codes where the stage asks for it; what optimiser and average knew of them is forgotten."""
        if not schedule.stage.place:
            return
        self._place(schedule.stage.place)
        base = codebook_parameters(self.quantizer)
        for parameter in base:
            for value in optimizers[OBJECTIVE].state.get(parameter, {}).values():
                if value.shape == parameter.shape:
                    value.zero_()
        average.align(self.quantizer)

    def check_accumulation(self) -> None:
        """Refuses losses that couple the latents of a batch, in any stage, and batch normalisation that couples images."""
        if self.adversary is not None and self.adversary.couples_batch:
            raise ValueError(
                f"micro_batch_size is {self.config.micro_batch_size}, but batch normalisation of the discriminator couples all "
                "images of a batch, so that micro-batches do not add up to it: leave out micro_batch_size, or set "
                "adversarial.options.norm=group"
            )
        for stage in self.config.planned_stages:
            self.quantizer.configure(weights=quantizer_weights(stage, LOSSES))
            for name in self.quantizer.batch_coupled:
                raise ValueError(
                    f"micro_batch_size is {self.config.micro_batch_size}, but {coupling(name)} of this quantizer couples all "
                    "latents of a batch, so that micro-batches do not add up to it: leave out micro_batch_size, use more "
                    "processes, or set the weight of that loss to 0"
                )

    @torch.no_grad()
    def end_epoch(self, epoch: int) -> Mapping[str, float | None]:
        """Drift and churn of the probe images since the epoch before, under the trained weights."""
        device = next(self.tokenizer.parameters()).device
        images = next(self.val_crops.batches(self.config.probe_images)).to(device)
        out = self.quantizer(self.tokenizer.latents(images).float())
        z_q = out.z_q.movedim(1, -1)
        # The record has the latents where the codes live; some methods bound or normalise them first.
        return self.probe(out.assignment.z.reshape(z_q.shape), z_q, out.indices)

    def validate(self, step: int, run: RunFolder) -> Mapping[str, float]:
        """Evaluates on the held-out photographs and saves a picture, a record and the code counts."""
        perceptual = [] if self.perceptual is None else [self.perceptual]
        result = evaluate(self.tokenizer, self.val_crops, self.config.batch_size, perceptual)
        record = record_of(result, self.val_crops, self.config.hash(), step)
        write_record(run.path / "evaluations" / f"step-{step:08d}.json", record)
        write_text(run.path / "usage.json", json.dumps(_usage(self.quantizer, result.counts)))
        grid = picture_grid(result.originals, result.reconstructions)
        write_atomically(run.path / "pictures" / f"step-{step:08d}.png", lambda path: grid.save(path))
        codes = code_map(_side_by_side(self.quantizer.index_map(result.tokens)), self.quantizer.num_codes)
        write_atomically(run.path / "codes.png", lambda path: codes.save(path))
        return result.metrics

    def export(self, folder: Path) -> None:
        """Saves the tokenizer."""
        self.tokenizer.save_pretrained(folder)

    def state_dict(self) -> dict[str, Any]:
        """The probe's memory, which LPIPS trained, and what could not be read."""
        perceptual = {} if self.perceptual is None else {"perceptual": self.perceptual.weights_hash}
        feed = {} if self.feed is None else {"feed": self.feed.state_dict()}
        monitor = {} if self.watch is None else {"monitor": self.watch.monitor.state_dict()}
        return {"probe": self.probe.state_dict(), **monitor, **perceptual, **feed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`; refuses to go on with another LPIPS."""
        if self.perceptual is not None and self.perceptual.weights_hash != state["perceptual"]:
            raise ValueError(
                f"the run was trained with weights of LPIPS of SHA-256 {state['perceptual'][:12]}, but those found now have "
                f"{self.perceptual.weights_hash[:12]}: name the same ones with --set perceptual_weights=PATH"
            )
        self.probe.load_state_dict(state["probe"])
        if self.watch is not None and "monitor" in state:
            self.watch.monitor.load_state_dict(state["monitor"])
        if self.feed is not None:
            self.feed.load_state_dict(state["feed"])


def _side_by_side(tokens: Tensor, columns: int = 8) -> Tensor:
    """Token grids (B, h, w) as one grid with a gap of one masked position between them."""
    padded = torch.nn.functional.pad(tokens, (0, 1, 0, 1), value=-1)
    empty = -len(padded) % columns
    padded = torch.cat([padded, torch.full((empty, *padded.shape[1:]), -1, dtype=padded.dtype)])
    height, width = padded.shape[1:]
    return padded.reshape(-1, columns, height, width).movedim(2, 1).reshape(-1, columns * width)


def _check_places(config: RunConfig, quantizer: Quantizer) -> None:
    """Raises ValueError if a stage places codes that cannot be placed, or not as it begins."""
    first, *later = config.planned_stages
    if first.place:
        raise ValueError(
            f"stage {first.name!r} is the first and has place={first.place}: set quantizer.init={first.place}, which places "
            "the codes before the first step"
        )
    if config.quantizer.sharded:
        return
    placing = [stage for stage in later if stage.place]
    tables = [module for module in quantizer.modules() if isinstance(module, VectorQuantizer)]
    reasons = [table.codes.cannot_place for table in tables] or ["it has no table of codes"]
    if placing and reasons[0]:
        raise ValueError(
            f"stage {placing[0].name!r} has place={placing[0].place}, but codes of {config.quantizer.name} cannot be placed on "
            f"latents: {reasons[0]}; leave out `place`"
        )


def codebook_parameters(quantizer: Quantizer) -> list[nn.Parameter]:
    """Rows that a learning rate of their own moves: the bases of trainable codebooks."""
    codebooks = [module for module in quantizer.modules() if isinstance(module, Codebook) and module.trainable]
    return [codebook.base for codebook in codebooks if isinstance(codebook.base, nn.Parameter)]


@torch.no_grad()
def _relative_error(outputs: Sequence[Quantized], quantizer: Quantizer) -> Tensor:
    """|z_q - z|^2 over the spread of z in a global batch: quantisation error in a unit that small latents cannot fool."""
    parts = []
    for out in outputs:
        a = out.assignment
        z, distance = a.z[a.counted].double(), a.distance[a.counted].double()
        moments = torch.stack([z.new_tensor(len(z)), z.square().sum(), distance.sum()])
        parts.append(torch.cat([moments, z.sum(0)]))
    count, squares, error, *total = quantizer.reduce(torch.stack(parts).sum(0))
    spread = squares - torch.stack(total).square().sum() / count.clamp_min(1)
    ratio: Tensor = error / spread.clamp_min(1e-12)
    return ratio


def _usage(quantizer: Quantizer, counts: Tensor) -> dict[str, Any]:
    """Hits per code on the held-out images and, where replacement counts it, how long each code has gone without one."""
    usage: dict[str, Any] = {"num_codes": quantizer.num_entries, "counts": counts.tolist()}
    # Where replacement rests, its counts stand still and say nothing of the present.
    layers = [part for part in quantizer.modules() if isinstance(part, VectorQuantizer)]
    parts = [part for vq in layers for part in vq.active_maintenance() if isinstance(part, ReplaceDead)]
    idle = [hits for part in parts for hits in (part.idle / part.idle.numel()).tolist()]
    if parts and len(idle) == len(counts):
        usage |= {"idle": idle, "patience": parts[0].patience}
    return usage
