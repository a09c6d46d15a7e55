# SPDX-License-Identifier: Apache-2.0
"""Stages are data: what is trained, with which weights, until when.

NSVQ (arXiv 2606.11363) trains in three: *joint*, until the commitment loss no longer falls; *warmup*, with the encoder
frozen and neither the non-stationary loss nor replacement nor commitment; *refine*, the same with whatever the task adds
for quality (an adversarial loss in the paper).

The same `Schedule` drives our loop and yours:

    schedule = Schedule(nsvq_stages())
    schedule.apply({"encoder": [encoder], "decoder": [decoder]}, vq)
    for epoch in range(epochs):
        ...                                                     # one epoch of your own training
        if schedule.step(epoch + 1, epochs, {"commitment": epoch_mean_commitment}):
            schedule.apply({"encoder": [encoder], "decoder": [decoder]}, vq)
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from steadyvq.quantizers.base import Quantizer


@dataclass(frozen=True)
class Until:
    """When a stage ends: the first of its conditions that holds at the end of an epoch. None holds: it never ends.

    Attributes:
        plateau: Name of an epoch-mean metric; the stage ends when it has not fallen for `patience` epochs.
        patience: Epochs without a new best (10 in the paper).
        min_epochs: The plateau rule is armed after this many epochs of the stage, and its best value is reset then:
            early in training the latents are small and so is their commitment loss, which would freeze an untrained
            encoder.
        min_delta: A new best must be lower by this fraction of the old one.
        max_epochs: Epochs of this stage.
        at_fraction: Fraction of the whole run (0 to 1) at which the stage ends, whatever the metric does.
    """

    plateau: str | None = None
    patience: int = 10
    min_epochs: int = 0
    min_delta: float = 0.0
    max_epochs: int | None = None
    at_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.patience < 1 or self.min_epochs < 0 or (self.max_epochs is not None and self.max_epochs < 1):
            raise ValueError(
                f"patience={self.patience}, min_epochs={self.min_epochs}, max_epochs={self.max_epochs}, but a stage "
                "needs patience >= 1, min_epochs >= 0 and max_epochs >= 1"
            )
        if self.at_fraction is not None and not 0 < self.at_fraction <= 1:
            raise ValueError(f"at_fraction is {self.at_fraction}, but it is a fraction of the run in (0, 1]")


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: Shown in logs and plots.
        until: When it ends.
        frozen: Names of parts whose parameters are not trained.
        weights: Loss weights that differ in this stage, by name of the loss.
        paused: Maintenance of the quantizer that rests, by name (`replace`, `ema`, `temperature`).
        estimator: The gradient estimator of the quantizer in this stage (None: its own). With a frozen encoder,
            `straight_through` loses the reconstruction gradient in it, as in the paper; `direct` hands it to the codes.
        ramp: Epochs over which the weight of a loss that the quantizer does not own rises linearly from 0 at the stage's
            beginning, by name of the loss (`adversarial`).
        place: Places the codes on latents of training images as the stage begins: `kmeans`, `data`, or nothing. With
            `unquantized` as the estimator of the stage before, the codebook starts where the encoder has settled.
    """

    name: str
    until: Until = field(default_factory=Until)
    frozen: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    paused: tuple[str, ...] = ()
    estimator: str | None = None
    ramp: dict[str, float] = field(default_factory=dict)
    place: Literal["", "kmeans", "data"] = ""

    def __post_init__(self) -> None:
        for name, epochs in self.ramp.items():
            if not epochs >= 0:
                raise ValueError(f"stage {self.name!r} ramps {name!r} over {epochs} epochs, but at least 0 are needed")


def nsvq_stages(
    until: Until | None = None,
    *,
    warmup_epochs: int = 1,
    estimator: str | None = None,
    adversarial_ramp: float | None = None,
) -> tuple[Stage, ...]:
    """The three stages of NSVQ: joint, warmup, refine.

    Args:
        until: End of the joint stage; default: commitment loss not fallen for 10 epochs.
        warmup_epochs: Length of the warmup (not in the text).
        estimator: `direct` trains codes by the reconstruction gradient once the encoder is frozen; the paper's reading
            is None (straight-through).
        adversarial_ramp: Epochs over which an adversarial loss returns in refine (2 in the paper), after a warmup without it
            in which the part `discriminator` is frozen; None: there is no adversarial loss. Whoever owns it asks
            `Schedule.weight("adversarial", ...)`.
    """
    consolidated = {"ns": 0.0, "commitment": 0.0}
    judged = adversarial_ramp is not None
    return (
        Stage("joint", until or Until(plateau="commitment", patience=10)),
        Stage(
            "warmup",
            Until(max_epochs=warmup_epochs),
            frozen=("encoder", "discriminator") if judged else ("encoder",),
            weights=consolidated | ({"adversarial": 0.0} if judged else {}),
            paused=("replace",),
            estimator=estimator,
        ),
        Stage(
            "refine",
            frozen=("encoder",),
            weights=consolidated,
            paused=("replace",),
            estimator=estimator,
            ramp={} if adversarial_ramp is None else {"adversarial": adversarial_ramp},
        ),
    )


def steady_stages(share: float = 0.3, paused: tuple[str, ...] = ("ema", "replace")) -> tuple[Stage, ...]:
    """The two stages of the preset `steady`: settle without a codebook, then quantise.

    In a loop of your own, place the codes where a stage asks for it, once as it begins:

        if schedule.step(epoch + 1, epochs, {}):
            schedule.apply(parts, vq)
            if schedule.stage.place:
                vq.init_from(latents, method=schedule.stage.place)

    Args:
        share: Fraction of the run in which the decoder sees the latents themselves.
        paused: Maintenance of the quantizer, which rests until its codes are placed.
    """
    return (
        Stage(
            "settle",
            Until(at_fraction=share),
            estimator="unquantized",
            weights={"commitment": 0.0},
            paused=paused,
        ),
        Stage("quantise", place="kmeans"),
    )


class Schedule:
    """Walks through stages at the ends of epochs.

    Args:
        stages: At least one; the last one runs to the end of training.

    Attributes:
        stage: The present stage.
        reason: Why the last change happened.
    """

    def __init__(self, stages: Iterable[Stage]) -> None:
        self.stages = tuple(stages)
        if not self.stages:
            raise ValueError("a schedule needs at least one stage")
        self.index = 0
        self.reason = "start"
        self._epochs = 0
        self._best = math.inf
        self._stale = 0
        self._trainable: dict[int, bool] = {}

    @property
    def stage(self) -> Stage:
        """The present stage."""
        return self.stages[self.index]

    def step(self, epochs_done: int, epochs_total: int, metrics: Mapping[str, float]) -> bool:
        """Ends an epoch; returns whether a new stage begins (then call `apply`).

        Args:
            epochs_done: Epochs finished since the start of training.
            epochs_total: Planned length of the run.
            metrics: Epoch means over all processes; must hold the metric that the stage watches.
        """
        self._epochs += 1
        reason = self._finished(epochs_done, epochs_total, metrics)
        if reason is None or self.index + 1 == len(self.stages):
            return False
        self.index += 1
        self.reason = reason
        self._epochs, self._best, self._stale = 0, math.inf, 0
        return True

    @property
    def epochs(self) -> int:
        """Epochs that the present stage has lasted."""
        return self._epochs

    def weight(self, name: str, default: float, within: float = 0.0) -> float:
        """The present weight of a loss that the quantizer does not own.

        Args:
            name: Of the loss, as in the stages' `weights` and `ramp`.
            default: Its weight where a stage says nothing.
            within: How much of the present epoch is over when the step is done: (i + 1) / n in its step i of n.
        """
        weight, ramp = self.stage.weights.get(name, default), self.stage.ramp.get(name, 0.0)
        return weight * min(1.0, (self._epochs + within) / ramp) if ramp else weight

    def _finished(self, done: int, total: int, metrics: Mapping[str, float]) -> str | None:
        until = self.stage.until
        plateau = self._plateau(metrics)
        if plateau is not None:
            return plateau
        if until.max_epochs is not None and self._epochs >= until.max_epochs:
            return "1 epoch" if self._epochs == 1 else f"{self._epochs} epochs"
        if until.at_fraction is not None and done >= until.at_fraction * total - 1e-9:
            return f"{until.at_fraction:.0%} of the run"
        return None

    def _plateau(self, metrics: Mapping[str, float]) -> str | None:
        until = self.stage.until
        if until.plateau is None:
            return None
        if until.plateau not in metrics:
            raise ValueError(
                f"stage {self.stage.name!r} watches {until.plateau!r}, but the metrics of this epoch are "
                f"{', '.join(sorted(metrics)) or 'empty'}: watch one of these"
            )
        value = metrics[until.plateau]
        if self._epochs <= until.min_epochs:
            return None
        if value < self._best - until.min_delta * (abs(self._best) if math.isfinite(self._best) else 0.0):
            self._best, self._stale = value, 0
        else:
            self._stale += 1
        if self._stale < until.patience:
            return None
        return f"plateau of {until.plateau} ({until.patience} epochs)"

    def apply(
        self, parts: Mapping[str, Sequence[nn.Module]], quantizer: Quantizer, losses: Collection[str] = ("adversarial",)
    ) -> None:
        """Freezes and thaws parts and sets the quantizer's weights, maintenance and estimator for the present stage.

        Frozen parts go into evaluation mode and all others into training mode: call it after `model.train()`.

        Args:
            parts: What stages may freeze, by name.
            quantizer: Whose losses the stages weigh.
            losses: Names of losses that belong to somebody else, who asks `weight` for theirs.
        """
        for stage in (*self.stages, self.stage):
            # All of them: a mistake in the last stage is told before the first begins. The present one comes last and stays.
            _configure(stage, parts, quantizer, losses)
        for name, modules in parts.items():
            for parameter in (p for module in modules for p in module.parameters()):
                # What was frozen before the first stage stays frozen in all of them.
                trainable = self._trainable.setdefault(id(parameter), parameter.requires_grad)
                parameter.requires_grad_(trainable and name not in self.stage.frozen)
            for module in modules:
                # Running statistics and dropout of a frozen part would change what it computes. A frozen quantizer goes on
                # seeing the batch of all processes, as in training; `configure` rests what could move it.
                module.train(name not in self.stage.frozen or isinstance(module, Quantizer))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next decision depends on."""
        return {
            "index": self.index,
            "reason": self.reason,
            "epochs": self._epochs,
            "best": self._best if math.isfinite(self._best) else None,
            "stale": self._stale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict()`."""
        self.index, self.reason = state["index"], state["reason"]
        self._epochs, self._stale = state["epochs"], state["stale"]
        self._best = math.inf if state["best"] is None else state["best"]


def quantizer_weights(stage: Stage, losses: Collection[str]) -> dict[str, float]:
    """The weights of a stage less those of losses that the quantizer does not own."""
    return {name: weight for name, weight in stage.weights.items() if name not in losses}


def _configure(
    stage: Stage, parts: Mapping[str, Sequence[nn.Module]], quantizer: Quantizer, losses: Collection[str]
) -> None:
    unknown = [name for name in stage.frozen if name not in parts]
    if unknown:
        known = ", ".join(sorted(parts))
        raise ValueError(f"stage {stage.name!r} freezes {unknown[0]!r}, but the parts are {known}")
    wrong = [name for name in stage.ramp if name not in losses]
    if wrong:
        known = ", ".join(sorted(losses)) or "none"
        raise ValueError(f"stage {stage.name!r} ramps {wrong[0]!r}, but the losses that a stage can ramp are {known}")
    quantizer.configure(
        weights=quantizer_weights(stage, losses),
        paused=stage.paused,
        estimator=stage.estimator,
        frozen="quantizer" in stage.frozen,
    )
