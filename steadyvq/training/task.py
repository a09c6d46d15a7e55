# SPDX-License-Identifier: Apache-2.0
"""What the loop knows of the thing it trains: a `Task`. The loop owns steps, processes, precision, checkpoints, interrupts."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from steadyvq.data import CropFeed
from steadyvq.training.average import WeightAverage
from steadyvq.training.run import RunFolder
from steadyvq.training.stages import Schedule


@dataclass
class StepOutput:
    """One forward of an objective on one micro-batch.

    Attributes:
        loss: What is minimised (0-d): a mean over the items of this micro-batch.
        logs: Detached numbers for the log, by name (0-d), means over the same items; the means of an epoch are what
            stages may watch.
        extra: What the task wants back in `after_step` and in later objectives of the same step.
        count: Number of items the means are over (None: the samples of the micro-batch). The step's loss is the mean
            over the items of all micro-batches and processes, so masked latents or padded tokens need their number here.
            Where it is 0, loss and gradient must be finite all the same (clamp a denominator of your own).
        finite: 0-d bool, False where something broke that the loss does not show; the step is then skipped.
    """

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    extra: Any = None
    count: Tensor | None = None
    finite: Tensor | None = None


class Task(ABC):
    """Something to train: modules, one or several objectives with an optimiser each, data, evaluation.

    Attributes:
        module: Everything that is trained or saved.
        objectives: Names of the objectives, in the order in which one step optimises them.
        watchable: Names of the epoch means that the plateau of a stage may watch.
        always_used: Every parameter that a stage trains gets a gradient in every step. False where some get one in some
            steps only; several processes then look for them at each step, which takes time.
        counts: Names of numbers of `after_step` that are added up, not averaged, over the steps of a row of the log.
        best: The metric of `validate` whose best checkpoint is kept, and which end is best; None: no such metric.
        exported: Name of the folder in a run's folder where the last evaluated weights are exported.
        feed: Where `batch` gets its samples from, if worker processes prepare them: the engine tells it what is to come,
            logs what it reports and ends it. None: `batch` prepares them itself.
    """

    module: nn.Module
    objectives: tuple[str, ...]
    watchable: frozenset[str]
    always_used: bool = True
    counts: frozenset[str] = frozenset()
    best: tuple[str, Literal["max", "min"]] | None = None
    feed: CropFeed | None = None
    exported: str = "tokenizer"

    @property
    def averaged(self) -> nn.Module:
        """The part of `module` whose averaged weights are evaluated and exported."""
        return self.module

    @property
    def networks(self) -> list[nn.Module]:
        """Where blocks are that a run may compile or compute twice: `module`, and what its losses look through."""
        return [self.module]

    def cuttable(self) -> tuple[list[tuple[nn.Module, str]], list[nn.Parameter]]:
        """What may be cut up among processes: (modules and names of children of theirs, parameters inside that may not)."""
        return [], []

    @abstractmethod
    def parts(self) -> dict[str, list[nn.Module]]:
        """What a stage may freeze, by name."""

    @abstractmethod
    def optimizer(self, objective: str) -> Optimizer:
        """A fresh optimiser for an objective. No parameter belongs to two of them."""

    def trained(self, objective: str) -> nn.Module:
        """The module that the objective's optimiser trains and whose forward its loss calls; no two share a parameter."""
        return self.module

    @abstractmethod
    def batch(self, epoch: int, positions: range) -> Any:
        """The samples at these positions of an epoch: a pure function of both and of the seed.

        The engine hands every process its part of the global batch, so the data of a step do not depend on how many
        processes or micro-batches there are.
        """

    def begin_step(self, step: int) -> None:  # noqa: B027
        """Called before everything else of a step, with the number of steps before it."""

    def due(self, objective: str) -> bool:
        """Whether an objective is optimised in the present step; the same in every process."""
        return True

    def survey(self, objective: str, batch: Any) -> None:  # noqa: B027
        """Sees every micro-batch of a step before the first `loss`, where a process has more than one.

        For what the loss of each of them needs to know of all: a number of the global batch.
        """

    @abstractmethod
    def loss(self, objective: str, model: nn.Module, batch: Any, earlier: Mapping[str, StepOutput]) -> StepOutput:
        """The loss of an objective on a micro-batch.

        Args:
            objective: Which one.
            model: The engine's wrapper of `trained(objective)`; call it for the forward.
            batch: What `batch` gave, on the device.
            earlier: Outputs of the objectives before it, on the same micro-batch; their optimisers have stepped.
        """

    def prepare(self) -> None:  # noqa: B027
        """Called once before the first step of a new run (not after a resume), with the same effect in every process."""

    def after_step(
        self, objective: str, outputs: Sequence[StepOutput], optimizer: Optimizer, average: WeightAverage
    ) -> Mapping[str, float | Tensor]:
        """Bookkeeping after an optimiser step; returns numbers of the global batch for the log.

        Args:
            objective: Which one was optimised.
            outputs: One per micro-batch of this process.
            optimizer: Its optimiser.
            average: The averaged weights.
        """
        return {}

    def on_stage(self, schedule: Schedule) -> None:  # noqa: B027
        """Applies the present stage."""

    def begin_stage(self, schedule: Schedule, optimizers: Mapping[str, Optimizer], average: WeightAverage) -> None:  # noqa: B027
        """Called once as a stage other than the first begins, after `on_stage`; not at a resume within it.

        Args:
            schedule: The stages; its present one begins.
            optimizers: The optimiser of every objective.
            average: The averaged weights.
        """

    def check_accumulation(self) -> None:  # noqa: B027
        """Raises ValueError if, in the present stage, micro-batches do not add up to the batch."""

    def rows(self) -> list[dict[str, Any]]:
        """Rows for the log that came about since the last call, each with its `kind`; asked for after every step."""
        return []

    def end_epoch(self, epoch: int) -> Mapping[str, float | None]:
        """Measures of the trained (not averaged) weights after an epoch, for the log.

        Called in the first process, with the modules in evaluation mode, as `validate`.
        """
        return {}

    @abstractmethod
    def validate(self, step: int, run: RunFolder) -> Mapping[str, float]:
        """Evaluates `module`, which holds the averaged weights, and leaves pictures and records in the run folder.

        Called in the first process.
        """

    def export(self, folder: Path) -> None:  # noqa: B027
        """Writes `module`, which holds the averaged weights, for use without its run; called in the first process."""

    def state_dict(self) -> dict[str, Any]:
        """State of the task beside its modules."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restores `state_dict()`."""
