# SPDX-License-Identifier: Apache-2.0
"""What all priors over stored tokens share as tasks of the loop: data, classes, pictures, saving."""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from steadyvq.data.crops import uniforms
from steadyvq.files import write_atomically, write_text
from steadyvq.generation.priors import FACTS, WEIGHTS, Drawing, PriorModel
from steadyvq.generation.sampling import balanced_labels
from steadyvq.generation.tokens import TokenSet, refuse_other_tokenizer
from steadyvq.metrics import to_uint8
from steadyvq.models import Tokenizer
from steadyvq.report import image_grid
from steadyvq.training.config import RunConfig
from steadyvq.training.run import RunFolder
from steadyvq.training.stages import Schedule
from steadyvq.training.task import Task

OBJECTIVE = "prior"
_ORDER, _CHOICE = 4, 5
"""What numbers are drawn for: the order of a pass; the view, and whether the class is hidden."""


class PriorSettings(Protocol):
    """The settings that all kinds of priors have."""

    @property
    def conditional(self) -> bool | None:
        """By class; None: where the tokens have classes."""

    @property
    def label_dropout(self) -> float:
        """Share of training samples whose class is hidden."""

    @property
    def weight_decay(self) -> float:
        """Of AdamW, on matrices alone."""

    @property
    def shown(self) -> int:
        """Pictures that are sampled at every evaluation."""


class TokenTask(Task):
    """A prior on stored tokens.

    A subclass makes `self.prior` in `make_prior` and has `loss`, `validate`, `facts`, `build` and `draw`.

    Args:
        config: The run's configuration.
        tokens: The tokens (None: opened as the configuration says).

    Attributes:
        kind: Name of the task in configurations and saved priors.
        group: Where its settings stand in a configuration.
        drawing: How it is drawn from.
        columns: Of the table at the end of a run: the name of a metric of `validate` and its format, by heading.

    Raises:
        ValueError: The tokens do not fit the configuration.
    """

    objectives = (OBJECTIVE,)
    exported = "prior"
    kind: ClassVar[str]
    group: ClassVar[str] = "prior"
    drawing: ClassVar[type[Drawing]]
    columns: ClassVar[Mapping[str, tuple[str, str]]]
    prior: PriorModel

    def __init__(self, config: RunConfig, tokens: TokenSet | None = None) -> None:
        self.config = config
        self.tokens = tokens = TokenSet(config.data.source) if tokens is None else tokens
        self.settings: PriorSettings = getattr(config, self.group)
        self._tokenizer: Tokenizer | None = None
        self.check_tokens()
        known = bool(tokens.classes) and bool((tokens.labels >= 0).all())
        conditional = known if self.settings.conditional is None else self.settings.conditional
        if conditional and not known:
            raise ValueError(
                f"{self.group}.conditional is true, but the tokens in {tokens.folder} have no labels: tokenise a folder with "
                f"one sub-folder per class, or set {self.group}.conditional=false"
            )
        self.classes = tokens.classes if conditional else []
        self.train_rows, self.held_out = tokens.rows_or_all("train"), tokens.rows_or_all(config.data.eval_split)
        self._orders: dict[int, NDArray[np.int64]] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.prior = self.make_prior()
        self.module = self.prior

    def check_tokens(self) -> None:
        """Raises ValueError if this kind of prior cannot learn these tokens."""

    @abstractmethod
    def make_prior(self) -> PriorModel:
        """A fresh prior; everything random comes from torch's generator, which is seeded."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What `build` needs, as plain data, beside what all priors save."""

    @staticmethod
    @abstractmethod
    def build(facts: Mapping[str, Any]) -> PriorModel:
        """The prior that `facts`, with what all priors save, describes; its weights are loaded after."""

    @staticmethod
    def check_drawing(model: Any, drawing: Any) -> None:
        """Raises ValueError if a prior cannot be drawn from like this; asked before anything is written."""

    @staticmethod
    @abstractmethod
    def draw(
        model: Any, labels: Int[Tensor, "B"], seed: int, numbers: Sequence[int], drawing: Any, tokenizer: Tokenizer
    ) -> Int[Tensor, "B ..."]:
        """Tokens as `Tokenizer.decode` takes them, each a function of (seed, number) and of its class.

        Args:
            model: The prior in evaluation mode.
            labels: Classes, on its device.
            seed: Of the set.
            numbers: Of the samples in the set.
            drawing: An instance of the kind's `drawing`.
            tokenizer: Whose tokens they are.
        """

    def parts(self) -> dict[str, list[nn.Module]]:
        """The prior is one part."""
        return {OBJECTIVE: [self.prior]}

    def optimizer(self, objective: str) -> Optimizer:
        """AdamW whose decay is for matrices alone."""
        optim, decay = self.config.optim, self.settings.weight_decay
        matrices = [p for p in self.prior.parameters() if p.dim() >= 2]
        vectors = [p for p in self.prior.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        return AdamW(groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)

    def choose(self, epoch: int, positions: range) -> tuple[NDArray[np.int64], NDArray[np.int64], Tensor]:
        """Images, views and classes (B,) of a batch: every image once per pass, in one of its views, some without class."""
        place = np.arange(positions.start, positions.stop) + epoch * self.config.epoch_samples
        turns, inside = np.divmod(place, len(self.train_rows))
        rows = np.array([self._order(turn)[i] for turn, i in zip(turns.tolist(), inside.tolist(), strict=True)])
        drawn = np.stack([uniforms(2, self.config.seed, epoch, position, _CHOICE) for position in positions])
        labels = self.labels(rows)
        labels[torch.from_numpy(drawn[:, 1] < self.settings.label_dropout)] = self.prior.null
        return rows, (drawn[:, 0] * self.tokens.num_views).astype(np.int64), labels

    def _order(self, turn: int) -> NDArray[np.int64]:
        """The images in the order of a pass."""
        if turn not in self._orders:
            # A batch may lie in two passes; what came before is not needed again.
            self._orders = {t: order for t, order in self._orders.items() if abs(t - turn) == 1}
            draws = uniforms(len(self.train_rows), self.config.seed, turn, 0, _ORDER)
            self._orders[turn] = self.train_rows[np.argsort(draws, kind="stable")]
        return self._orders[turn]

    def labels(self, rows: NDArray[np.int64]) -> Tensor:
        """Classes (B,) of images."""
        if not self.classes:
            return torch.full((len(rows),), self.prior.null)
        return torch.from_numpy(self.tokens.labels[rows].astype(np.int64))

    @property
    def tokenizer(self) -> Tokenizer:
        """The one that is stored with the tokens."""
        if self._tokenizer is None:
            self._tokenizer = self.tokens.tokenizer()
        return self._tokenizer

    def on_stage(self, schedule: Schedule) -> None:
        """A frozen prior does not learn; there is nothing else to set."""
        self.prior.requires_grad_(OBJECTIVE not in schedule.stage.frozen)

    @torch.no_grad()
    def show(self, step: int, run: RunFolder) -> None:
        """Draws some samples as a picture of an evaluation."""
        count = self.settings.shown
        if not count:
            return
        numbers = range(count)
        labels = balanced_labels(self.prior, (), numbers).to(next(self.prior.parameters()).device)
        tokens = self.draw(self.prior, labels, self.config.seed, numbers, self.drawing(), self.tokenizer)
        grid = image_grid(to_uint8(self.tokenizer.decode(tokens.cpu())))
        write_atomically(run.path / "pictures" / f"step-{step:08d}.png", grid.save)

    def export(self, folder: Path) -> None:
        """Saves the prior with what it was trained on."""
        facts = {
            "kind": self.kind,
            "config": asdict(self.settings),  # type: ignore[call-overload]
            **self.facts(),
            "num_classes": self.prior.num_classes,
            "classes": self.classes,
            "tokenizer": {"hash": self.tokens.tokenizer_hash, "name": self.tokens.tokenizer_name},
            "tokens": str(self.tokens.folder),
        }
        state = {name: value.detach().cpu().contiguous() for name, value in self.prior.state_dict().items()}
        write_atomically(folder / WEIGHTS, lambda path: save_file(state, path))
        write_text(folder / FACTS, json.dumps(facts, indent=2) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Which tokens it learns."""
        shards = [shard.sha256 for shard in (*self.tokens.shards, *self.tokens.latent_shards)]
        return {"tokenizer": self.tokens.tokenizer_hash, "shards": shards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuses to go on with other tokens."""
        whose = "the tokens that this run began with"
        refuse_other_tokenizer(state["tokenizer"], whose, self.tokens.tokenizer_hash, self.tokens.tokenizer_name)
        if state["shards"] != self.state_dict()["shards"]:
            raise ValueError(
                f"{self.tokens.folder} holds other tokens than those that this run began with: put them back, or train anew "
                "into another folder with --out"
            )
