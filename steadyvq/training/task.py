# SPDX-License-Identifier: Apache-2.0
"""What the loop knows of the thing it trains: a `Task`. The loop owns steps, precision, checkpoints and interrupts."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from steadyvq.training.average import WeightAverage
from steadyvq.training.run import RunFolder
from steadyvq.training.stages import Schedule


@dataclass
class StepOutput:
    """One forward of an objective.

    Attributes:
        loss: What is minimised (0-d).
        logs: Detached numbers for the log, by name (0-d); their epoch means are what stages may watch.
        extra: What the task wants back in `after_step`.
    """

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    extra: Any = None


class Task(ABC):
    """Something to train: modules, one or several objectives with an optimiser each, data, evaluation.

    Attributes:
        module: Everything that is trained or saved.
        objectives: Names of the objectives, in the order in which one step optimises them.
        watchable: Names of the epoch means that the plateau of a stage may watch.
    """

    module: nn.Module
    objectives: tuple[str, ...]
    watchable: frozenset[str]

    @abstractmethod
    def parts(self) -> dict[str, list[nn.Module]]:
        """What a stage may freeze, by name."""

    @abstractmethod
    def optimizer(self, objective: str) -> Optimizer:
        """A fresh optimiser for an objective."""

    @abstractmethod
    def batch(self, epoch: int, index: int) -> Any:
        """The global batch number `index` of an epoch: a pure function of both and of the seed."""

    @abstractmethod
    def loss(self, objective: str, model: nn.Module, batch: Any) -> StepOutput:
        """The loss of an objective; call `model`, the engine's wrapper of `module`, for the forward."""

    def prepare(self) -> None:  # noqa: B027
        """Called once before the first step of a new run (not after a resume)."""

    def after_step(
        self, objective: str, outputs: Sequence[StepOutput], optimizer: Optimizer, average: WeightAverage
    ) -> Mapping[str, float]:
        """Bookkeeping after an optimiser step; returns numbers for the log."""
        return {}

    def on_stage(self, schedule: Schedule) -> None:  # noqa: B027
        """Applies the present stage."""

    def end_epoch(self, epoch: int) -> Mapping[str, float | None]:
        """Measures of the trained (not averaged) weights after an epoch, for the log."""
        return {}

    @abstractmethod
    def validate(self, step: int, run: RunFolder) -> Mapping[str, float]:
        """Evaluates `module`, which holds the averaged weights, and leaves pictures and records in the run folder."""

    def state_dict(self) -> dict[str, Any]:
        """State of the task beside its modules."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restores `state_dict()`."""
