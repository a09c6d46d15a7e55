# SPDX-License-Identifier: Apache-2.0
"""Training a prior over stored tokens, as a task of the loop."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from steadyvq.data.crops import uniforms
from steadyvq.data.shards import read_json
from steadyvq.files import read_tensors, write_atomically, write_text
from steadyvq.generation.autoregressive import AutoregressivePrior
from steadyvq.generation.sampling import balanced_labels, sample_tokens
from steadyvq.generation.tokens import TokenSet, refuse_other_tokenizer
from steadyvq.metrics import to_uint8
from steadyvq.models import Tokenizer
from steadyvq.models.tokenizer import check_fit
from steadyvq.report import image_grid
from steadyvq.training.config import RunConfig
from steadyvq.training.prior_config import PriorConfig
from steadyvq.training.run import RunFolder
from steadyvq.training.stages import Schedule
from steadyvq.training.strict import from_dict
from steadyvq.training.task import StepOutput, Task

OBJECTIVE = "prior"
WEIGHTS, FACTS = "prior.safetensors", "prior.json"
_ORDER, _CHOICE = 4, 5
"""What numbers are drawn for: the order of a pass; the view, and whether the class is hidden."""


@dataclass(frozen=True)
class TrainedPrior:
    """A prior with what it was trained on.

    Attributes:
        model: In evaluation mode.
        classes: Names of its classes.
        tokenizer_hash: Of the tokenizer whose tokens it knows.
        tokenizer_name: What that was called.
        tokens: The folder of the tokens.
    """

    model: AutoregressivePrior
    classes: list[str]
    tokenizer_hash: str
    tokenizer_name: str
    tokens: Path


def load_prior(folder: Path) -> TrainedPrior:
    """The prior in a folder that `PriorTask.export` wrote.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    if not (folder / FACTS).is_file():
        raise ValueError(
            f"{folder} holds no prior (no {FACTS}): give the run of a prior (`steadyvq train ar_tiny --data TOKENS`) that has "
            "trained to its first evaluation"
        )
    facts = read_json(folder / FACTS)
    config = from_dict(PriorConfig, facts["config"], "prior")
    model = AutoregressivePrior(config, facts["vocabulary"], tuple(facts["grid"]), facts["num_classes"])
    state = read_tensors(folder / WEIGHTS)
    check_fit(model.state_dict(), state, folder)
    model.load_state_dict(state)
    known = facts["tokenizer"]
    return TrainedPrior(model.eval(), facts["classes"], known["hash"], known["name"], Path(facts["tokens"]))


def with_counted_tokens(config: RunConfig, tokens: TokenSet) -> RunConfig:
    """The configuration with `data.epoch_samples` a number: where it is null, that of the training images."""
    if config.data.epoch_samples is not None:
        return config
    return replace(config, data=replace(config.data, epoch_samples=len(_rows(tokens, "train"))))


def _rows(tokens: TokenSet, split: str) -> NDArray[np.int64]:
    """The images of a split; all of them where tokens have only one."""
    return tokens.rows(split if len(tokens.splits) > 1 else "all")


class PriorTask(Task):
    """An autoregressive prior on stored tokens.

    Args:
        config: The run's configuration.
        tokens: The tokens (None: opened as the configuration says).

    Raises:
        ValueError: The tokens do not fit the configuration.
    """

    objectives = (OBJECTIVE,)
    watchable = frozenset({"loss", "cross_entropy"})
    best = ("cross_entropy", "min")
    exported = "prior"

    def __init__(self, config: RunConfig, tokens: TokenSet | None = None) -> None:
        self.config = config
        self.tokens = tokens = TokenSet(config.data.source) if tokens is None else tokens
        settings = config.prior
        if len(tokens.shape) != 2:
            raise ValueError(
                f"the tokens in {tokens.folder} have shape {tokens.shape} for an image, but this prior knows grids of one code "
                "per place: tokenise with a quantizer that gives a latent one code"
            )
        vocabulary = settings.vocabulary or tokens.num_codes
        if tokens.num_codes > vocabulary:
            raise ValueError(
                f"the tokens in {tokens.folder} are of {tokens.num_codes:,} codes, but prior.vocabulary is {vocabulary:,}: "
                "raise it, or leave it out"
            )
        known = bool(tokens.classes) and bool((tokens.labels >= 0).all())
        conditional = known if settings.conditional is None else settings.conditional
        if conditional and not known:
            raise ValueError(
                f"prior.conditional is true, but the tokens in {tokens.folder} have no labels: tokenise a folder with one "
                "sub-folder per class, or set prior.conditional=false"
            )
        self.classes = tokens.classes if conditional else []
        self.train_rows, self.held_out = _rows(tokens, "train"), _rows(tokens, config.data.eval_split)
        self._orders: dict[int, NDArray[np.int64]] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.prior = AutoregressivePrior(
                settings, vocabulary, (tokens.shape[0], tokens.shape[1]), len(self.classes)
            )
        self.module = self.prior
        self._tokenizer: Tokenizer | None = None

    def parts(self) -> dict[str, list[nn.Module]]:
        """The prior is one part."""
        return {OBJECTIVE: [self.prior]}

    def optimizer(self, objective: str) -> Optimizer:
        """AdamW whose decay is for matrices alone."""
        optim, decay = self.config.optim, self.config.prior.weight_decay
        matrices = [p for p in self.prior.parameters() if p.dim() >= 2]
        vectors = [p for p in self.prior.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        return AdamW(groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)

    def batch(self, epoch: int, positions: range) -> list[Tensor]:
        """Tokens (B, n) and classes (B,): every image once per pass, in one of its views, some without their class."""
        place = np.arange(positions.start, positions.stop) + epoch * self.config.epoch_samples
        turns, inside = np.divmod(place, len(self.train_rows))
        rows = np.array([self._order(turn)[i] for turn, i in zip(turns.tolist(), inside.tolist(), strict=True)])
        drawn = np.stack([uniforms(2, self.config.seed, epoch, position, _CHOICE) for position in positions])
        tokens = self.tokens.read(rows, (drawn[:, 0] * self.tokens.num_views).astype(np.int64))
        labels = self._labels(rows)
        labels[torch.from_numpy(drawn[:, 1] < self.config.prior.label_dropout)] = self.prior.null
        return [torch.from_numpy(tokens.astype(np.int64)), labels]

    def _order(self, turn: int) -> NDArray[np.int64]:
        """The images in the order of a pass."""
        if turn not in self._orders:
            # A batch may lie in two passes; what came before is not needed again.
            self._orders = {t: order for t, order in self._orders.items() if abs(t - turn) == 1}
            draws = uniforms(len(self.train_rows), self.config.seed, turn, 0, _ORDER)
            self._orders[turn] = self.train_rows[np.argsort(draws, kind="stable")]
        return self._orders[turn]

    def _labels(self, rows: NDArray[np.int64]) -> Tensor:
        if not self.classes:
            return torch.full((len(rows),), self.prior.null)
        return torch.from_numpy(self.tokens.labels[rows].astype(np.int64))

    def loss(self, objective: str, model: nn.Module, batch: Any, earlier: Mapping[str, StepOutput]) -> StepOutput:
        """Mean of -log p over the tokens, in nats."""
        loss = model(*batch).mean()
        return StepOutput(loss, {"loss": loss.detach(), "loss/cross_entropy": loss.detach()})

    def on_stage(self, schedule: Schedule) -> None:
        """A frozen prior does not learn; there is nothing else to set."""
        self.prior.requires_grad_(OBJECTIVE not in schedule.stage.frozen)

    @torch.no_grad()
    def validate(self, step: int, run: RunFolder) -> Mapping[str, float]:
        """Cross-entropy of held-out images in their first view; some samples as a picture."""
        rows = self.held_out[: self.config.data.eval_crops]
        device = next(self.prior.parameters()).device
        total = 0.0
        for start in range(0, len(rows), self.config.batch_size):
            part = rows[start : start + self.config.batch_size]
            tokens = torch.from_numpy(self.tokens.read(part).astype(np.int64))
            total += float(self.prior(tokens.to(device), self._labels(part).to(device)).double().sum())
        self._show(step, run, device)
        nats = total / (len(rows) * self.prior.num_tokens)
        bits = nats * self.prior.num_tokens / math.log(2)
        return {"cross_entropy": nats, "bits_per_image": bits, "held_out_images": float(len(rows))}

    def _show(self, step: int, run: RunFolder, device: torch.device) -> None:
        count = self.config.prior.shown
        if not count:
            return
        if self._tokenizer is None:
            self._tokenizer = self.tokens.tokenizer()
        numbers = range(count)
        labels = balanced_labels(self.prior, (), numbers).to(device)
        tokens = sample_tokens(self.prior, labels, self.config.seed, numbers).cpu()
        grid = image_grid(to_uint8(self._tokenizer.decode(self.tokens.grids(tokens))))
        write_atomically(run.path / "pictures" / f"step-{step:08d}.png", grid.save)

    def export(self, folder: Path) -> None:
        """Saves the prior with what it was trained on."""
        prior = self.prior
        facts = {
            "config": asdict(self.config.prior),
            "vocabulary": prior.vocabulary,
            "grid": prior.grid,
            "num_classes": prior.num_classes,
            "classes": self.classes,
            "tokenizer": {"hash": self.tokens.tokenizer_hash, "name": self.tokens.tokenizer_name},
            "tokens": str(self.tokens.folder),
        }
        state = {name: value.detach().cpu().contiguous() for name, value in prior.state_dict().items()}
        write_atomically(folder / WEIGHTS, lambda path: save_file(state, path))
        write_text(folder / FACTS, json.dumps(facts, indent=2) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Which tokens it learns."""
        shards = [shard.sha256 for shard in self.tokens.shards]
        return {"tokenizer": self.tokens.tokenizer_hash, "shards": shards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuses to go on with other tokens."""
        whose = "the tokens that this run began with"
        refuse_other_tokenizer(state["tokenizer"], whose, self.tokens.tokenizer_hash, self.tokens.tokenizer_name)
        if state["shards"] != [shard.sha256 for shard in self.tokens.shards]:
            raise ValueError(
                f"{self.tokens.folder} holds other tokens than those that this run began with: put them back, or train anew "
                "into another folder with --out"
            )
