# SPDX-License-Identifier: Apache-2.0
"""Small tasks on real photographs for tests of the engine, and a program that trains one as a process of a run.

python tests/toys.py TASK RUN PHOTOS [--resume] [--set KEY=VALUE ...] [--record FILE] [--harm WHAT STEP]

masked      an autoencoder of pixel patches in float64 with masks, k-means start, replacement and a freeze
fixed       a codebook on latents that do not move, in float32
gan         two optimisers: a generator of patches against a discriminator
adversarial the image tokenizer in float64 against a discriminator, with LeCAM, a late start and a head start
table       the same with a table that is cut among processes
recipe      the recipe nsvq_tiny in float64, smaller still: joint to a plateau, warmup, refine with its discriminator
next_token  a recurrent model of grey levels, lines of unequal length
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from steadyvq.data import CropDataset, load_collection
from steadyvq.data.crops import uniforms
from steadyvq.quantizers import VectorQuantizer, build_quantizer
from steadyvq.training import checkpoint
from steadyvq.training.config import read_recipe, resolve
from steadyvq.training.loop import Diverged, Engine, Interrupted
from steadyvq.training.processes import FailedElsewhere, Processes, leave
from steadyvq.training.run import RunFolder
from steadyvq.training.strict import merge
from steadyvq.training.task import StepOutput, Task
from steadyvq.training.tokenizer_task import TokenizerTask

PATCH, GRID, NOISE = 4, 4, 8
LEVELS = 16


class Toy(Task):
    """What the toys share: patches of crops of real photographs, Adam, a validation that any change of weights shows."""

    watchable = frozenset({"loss", "commitment"})
    best = ("size", "max")
    frozen = "encoder"

    def __init__(self, config):
        self.config = config
        photographs = load_collection(config.data.source, min_side=PATCH * GRID, max_side=160)
        self.crops = CropDataset(photographs, PATCH * GRID, config.data.epoch_samples, config.seed)
        torch.manual_seed(config.seed)
        self.module = self.build()

    def patches(self, epoch: int, positions: range) -> Tensor:
        """(B, 16, 48): the 4x4 pixel patches of each crop, in [-1, 1]."""
        images = self.crops.batch(epoch, positions.start, len(positions))
        cut = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
        return cut.movedim(1, 3).reshape(len(positions), GRID * GRID, -1)

    def parts(self):
        return {name: [child] for name, child in self.module.named_children()}

    def optimizer(self, objective):
        return Adam(self.trained(objective).parameters(), lr=self.config.optim.lr)

    def on_stage(self, schedule):
        for name, (part,) in self.parts().items():
            part.requires_grad_(name not in schedule.stage.frozen)

    def validate(self, step, run):
        return {"size": sum(float(p.detach().double().square().sum()) for p in self.module.parameters())}


class Autoencoder(nn.Module):
    """Patches -> latents -> codes -> patches."""

    def __init__(self, quantizer):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, quantizer.dim))
        self.quantizer = quantizer
        self.decoder = nn.Linear(quantizer.dim, 48)

    def forward(self, patches, mask):
        out = self.quantizer(self.encoder(patches), mask)
        return self.decoder(out.z_q), out


class Masked(Toy):
    """An autoencoder of patches in float64; in the second half of a batch fewer patches are there."""

    objectives = ("all",)
    dtype = torch.float64

    def build(self):
        settings = self.config.quantizer
        options = {} if settings.name == "lfq" else settings.options  # a fixed grid has nothing to maintain
        quantizer = build_quantizer(
            settings.name, num_codes=settings.num_codes, dim=settings.dim, seed=self.config.seed, **options
        )
        self.records = {"indices": [], "table": [], "replaced": []}
        self.quantizer = quantizer
        if isinstance(quantizer, VectorQuantizer):
            forget = quantizer.codes.forget_rows

            def note(rows, *rest):
                self.replaced[rows] += 1
                forget(rows, *rest)

            quantizer.codes.forget_rows = note
        return Autoencoder(quantizer).to(self.dtype)

    def batch(self, epoch, positions):
        """Patches, and which are there: all 16 in the first half of the global batch, 4 to 6 in the second, or about 3:1."""
        patches = self.patches(epoch, positions).to(self.dtype)
        mask = torch.ones(patches.shape[:2], dtype=torch.bool)
        for i, position in enumerate(positions):
            if position % self.config.batch_size >= self.config.batch_size // 2:
                mask[i, 4 + position % 3 :] = False
        return [patches, mask]

    @torch.no_grad()
    def prepare(self):
        patches, mask = self.batch(0, range(2 * self.config.batch_size))
        if not self.quantizer.places_codes:
            return
        latents = self.module.encoder(patches)
        self.quantizer.init_from(latents, mask, method="kmeans", seed=self.config.seed)

    def loss(self, objective, model, batch, earlier):
        patches, mask = batch
        guess, out = model(patches, mask)
        error = ((guess - patches).square().mean(-1) * mask).sum() / mask.sum().clamp_min(1)
        total = error + out.loss
        logs = {"loss": total, "loss/reconstruction": error, **{f"loss/{k}": v for k, v in out.losses.items()}}
        return StepOutput(total, {name: value.detach() for name, value in logs.items()}, out, count=out.num_valid)

    def after_step(self, objective, outputs, optimizer, average):
        self.replaced = torch.zeros(self.quantizer.num_codes, dtype=torch.int64)
        events = self.quantizer.update([o.extra for o in outputs], optimizer, average)
        self.records["indices"].append(self.quantizer.gather(torch.cat([o.extra.indices for o in outputs])))
        self.records["replaced"].append(self.replaced)
        self.records["table"].append(self.quantizer.codebook())
        return events

    def on_stage(self, schedule):
        schedule.apply(self.parts(), self.quantizer)

    def check_accumulation(self):
        if self.quantizer.batch_coupled:
            raise ValueError(f"{self.quantizer.batch_coupled[0]} couples the batch")


class Fixed(Masked):
    """The same in float32 with an encoder that is never trained: the latents of a position do not move."""

    dtype = torch.float32

    def build(self):
        module = super().build()
        module.encoder.requires_grad_(False)
        return module


class Gan(Toy):
    """A generator of patches against a discriminator, with dropout, so that steps draw random numbers."""

    frozen = "generator"
    objectives = ("generator", "discriminator")

    def build(self):
        generator = nn.Sequential(nn.Linear(NOISE, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 48))
        discriminator = nn.Sequential(nn.Linear(48, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
        return nn.ModuleDict({"generator": generator, "discriminator": discriminator})

    def trained(self, objective):
        return self.module[objective]

    def batch(self, epoch, positions):
        noise = [uniforms(NOISE, self.config.seed, epoch, position, 1).tolist() for position in positions]
        return [self.patches(epoch, positions)[:, 5], torch.tensor(noise, dtype=torch.float32)]

    def loss(self, objective, model, batch, earlier):
        """Hinge losses; the discriminator judges what the generator made before its step."""
        real, noise = batch
        if objective == "generator":
            fake = model(noise)
            total = -self.module["discriminator"](fake).mean()
            return StepOutput(total, {"loss": total.detach()}, fake.detach())
        if "generator" in earlier:
            fake = earlier["generator"].extra
        else:  # it rests, since it is frozen
            fake = self.module["generator"](noise).detach()
        scores = model(torch.cat([real, fake]))
        total = (1 - scores[: len(real)]).relu().mean() + (1 + scores[len(real) :]).relu().mean()
        return StepOutput(total, {"loss/discriminator": total.detach()})


class Recurrent(nn.Module):
    """The next grey level from those before it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(LEVELS, 16)
        self.recurrent = nn.GRU(16, 24, batch_first=True)
        self.head = nn.Linear(24, LEVELS)

    def forward(self, tokens):
        return self.head(self.recurrent(self.embedding(tokens))[0])


class NextToken(Toy):
    """Grey levels of a line of pixels; lines differ in length, so batches are padded."""

    frozen = "embedding"
    objectives = ("next",)
    watchable = frozenset({"loss"})

    def build(self):
        return Recurrent().double()

    def batch(self, epoch, positions):
        images = self.crops.batch(epoch, positions.start, len(positions))
        tokens = ((images[:, :, 3].mean(1) + 1) / 2 * (LEVELS - 1)).round().long()
        for i, position in enumerate(positions):
            tokens[i, 6 + position % 10 :] = -100
        return tokens

    def loss(self, objective, model, batch, earlier):
        target = batch[:, 1:]
        logits = model(batch[:, :-1].clamp_min(0))
        total = cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
        return StepOutput(total, {"loss": total.detach()}, count=(target >= 0).sum())


ADVERSARIAL = {
    "model": {"channels": 8, "multipliers": [1, 2], "num_res_blocks": 1, "num_mid_blocks": 0, "z_channels": 6},
    "adversarial": {
        "discriminator": "patch",
        "options": {"channels": 8, "layers": 2, "norm": "group"},
        "adaptive": False,
        "weight": 0.1,
        "start": 3,
        "head_start": 2,
        "ramp_steps": 4,
        "lecam": 0.1,
        "lecam_decay": 0.9,
    },
    "stages": [
        {"name": "joint", "until": {"plateau": "commitment", "patience": 9, "max_epochs": 2}},
        {
            "name": "warmup",
            "until": {"max_epochs": 1},
            "frozen": ["encoder", "discriminator"],
            "weights": {"ns": 0.0, "commitment": 0.0, "adversarial": 0.0},
            "paused": ["replace"],
        },
        {
            "name": "refine",
            "frozen": ["encoder"],
            "weights": {"ns": 0.0, "commitment": 0.0},
            "paused": ["replace"],
            "ramp": {"adversarial": 2},
        },
    ],
}


class Adversarial(TokenizerTask):
    """The image tokenizer in float64; joint, a warmup without the adversarial loss, and its return over two epochs."""

    frozen = "encoder"
    best = ("size", "max")

    def __init__(self, config):
        super().__init__(config, load_collection(config.data.source, min_side=16, max_side=160))
        self.module.double()

    def batch(self, epoch, positions):
        return super().batch(epoch, positions).double()

    def prepare(self):
        """In float32, as crops come."""
        self.module.float()
        super().prepare()
        self.module.double()

    def end_epoch(self, epoch):
        return {}

    def validate(self, step, run):
        return {"size": sum(float(p.detach().square().sum()) for p in self.tokenizer.parameters())}


TABLE = {
    "data": {"epoch_samples": 45},
    "quantizer": {
        "num_codes": 33,
        "init": "data",
        "init_samples": 16,
        "sharded": True,
        "options": {
            "maintenance": {"replace": {"patience": 0.5, "cap": 0.1}},
            "temperature": {"effective_losers": 4.0},
        },
    },
    "optim": {"codebook_lr": 3e-3, "grad_clip": 0.3},
    "adversarial": {"adaptive": True},
    "batch_size": 9,
    "epochs": 4,
    "checkpoint_every": 1,
}
"""33 codes and 9 crops in a step, so that halves differ; gradients are clipped in most steps, so that their norm counts."""

RECIPE = {
    "data": {"crop_size": 16, "epoch_samples": 45, "eval_crops": 8},
    "model": {"channels": 8, "z_channels": 6},
    "quantizer": {"num_codes": 32, "dim": 6},
    "perceptual": 0.0,
    "adversarial": {"options": {"channels": 8, "layers": 2, "norm": "group"}},
    "batch_size": 9,
    "epochs": 10,
}
"""What is smaller than in `nsvq_tiny`. Group norms, since statistics of a batch are not those of its halves; batches of 9,
which two processes cannot share evenly; no LPIPS, since crops are too small for it."""


def recipe_of(photos):
    """The recipe `nsvq_tiny` in this size; the rule that ends its joint stage is as impatient as 5 steps per epoch ask for."""
    recipe = merge(read_recipe("nsvq_tiny"), RECIPE)
    joint, *rest = recipe["stages"]
    stages = [merge(joint, {"until": {"patience": 1, "min_epochs": 1}}), *rest]
    engine = {"eval_every": 2, "checkpoint_every": 1, "log_every": 1, "keep_checkpoints": 2}
    return merge(recipe, {"data": {"source": str(photos)}, "stages": stages, **engine})


TASKS = {
    "adversarial": Adversarial,
    "recipe": Adversarial,
    "table": Adversarial,
    "masked": Masked,
    "fixed": Fixed,
    "gan": Gan,
    "next_token": NextToken,
}


def toy_config(task, photos, sets=()):
    """60 steps of 8 crops, a freeze after 30, checkpoints at 20, 40 and 60; `recipe`: 50 steps of 9, checkpoints every 5.

    `table`: 20 steps of 9, a freeze after 10, checkpoints every 5.
    """
    if task == "recipe":
        return resolve(recipe_of(photos), sets)
    recipe = {
        "title": "toy",
        "data": {"source": str(photos), "crop_size": 16, "epoch_samples": 80},
        "model": {"multipliers": [1, 2]},
        "quantizer": {
            "name": "nsvq",
            "num_codes": 32,
            "dim": 6,
            "options": {"maintenance": {"replace": {"patience": 2.0, "cap": 0.1}}},
        },
        "optim": {"lr": 1e-3},
        "stages": [
            {"name": "joint", "until": {"plateau": "loss", "patience": 9, "max_epochs": 3}},
            {"name": "refine", "frozen": [TASKS[task].frozen]},
        ],
        "epochs": 6,
        "batch_size": 8,
        "eval_every": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "keep_checkpoints": 2,
    }
    own = {"adversarial": ADVERSARIAL, "table": merge(ADVERSARIAL, TABLE)}
    return resolve(merge(recipe, own.get(task, {})), sets)


def main() -> int:
    """Trains a toy as one process of a run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("run", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--harm", nargs=2, metavar=("WHAT", "STEP"), help="one of HARMS, in this step")
    arguments = parser.parse_args()
    config = toy_config(arguments.task, arguments.photos, arguments.set)
    torch.set_num_threads(1)
    processes = Processes(config.precision, config.strategy)
    task = TASKS[arguments.task](config)
    run = RunFolder(arguments.run, config)
    engine = Engine(task, run, resume=arguments.resume, quiet=True, processes=processes)
    if not arguments.resume:
        processes.first(lambda: run.begin("test"))
    if arguments.harm:
        HARMS[arguments.harm[0]](engine, int(arguments.harm[1]))
    try:
        engine.fit()
    except Interrupted as stop:
        return 130 if stop.signal == signal.SIGINT else 0
    except (Diverged, OSError, FailedElsewhere) as error:
        print(error, file=sys.stderr)
        return 3
    if arguments.record and processes.is_first:
        torch.save({name: torch.stack(values) for name, values in task.records.items()}, arguments.record)
    processes.close()
    return 0


def die_in_step(engine, step):
    """Kills the process between the optimiser and the bookkeeping of a step."""
    after_step = engine.task.after_step

    def die(*arguments):
        if engine.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return after_step(*arguments)

    engine.task.after_step = die


def die_in_write(engine, step):
    """Kills the process when half of the first checkpoint after a step is written."""
    save_file = checkpoint.save_file

    def die(tensors, path, **options):
        save_file(tensors, path, **options)
        if engine.step > step:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = die


def fill_log(engine, step):
    """From a step on the log lies on a full disk."""
    batch = engine.task.batch

    def full(*arguments):
        if engine.step == step:
            engine.run.log_path.unlink()
            engine.run.log_path.symlink_to("/dev/full")
        return batch(*arguments)

    engine.task.batch = full


HARMS = {"die": die_in_step, "die_in_write": die_in_write, "fill_log": fill_log}


if __name__ == "__main__":
    sys.exit(leave(main()))
