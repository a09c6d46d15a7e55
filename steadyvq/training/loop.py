# SPDX-License-Identifier: Apache-2.0
"""The engine: one loop for every task. It owns steps, precision, clipping, averaging, stages, checkpoints, interrupts.

A step is one global batch, whatever the number of objectives. Everything random in a task is a function of (seed,
position), so a resumed run repeats the uninterrupted one.
"""

import contextlib
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from steadyvq.quantizers.names import unknown
from steadyvq.training.average import WeightAverage
from steadyvq.training.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    to_device,
)
from steadyvq.training.progress import ProgressReport
from steadyvq.training.run import RunFolder, differences
from steadyvq.training.stages import Schedule
from steadyvq.training.task import StepOutput, Task

BROKEN_STEPS = 10


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint.

    Attributes:
        signal: The signal that asked.
        checkpoint: Where the state lies.
    """

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; saved {checkpoint}")
        self.signal, self.checkpoint = signal_number, checkpoint


class Diverged(Exception):
    """Loss or gradients were not finite for many steps in a row; the last checkpoint from before is kept."""


class Means:
    """Running means of named numbers, kept on their device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._events: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Takes in one value per name."""
        for name, value in values.items():
            number = value.detach().double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            self._sums[name] = self._sums[name] + number if name in self._sums else number
            self._counts[name] = self._counts.get(name, 0) + 1

    def count(self, name: str) -> None:
        """Counts an event; `read` gives the number of events of that name, not a mean."""
        self._events[name] = self._events.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """The means so far, and the counts of events."""
        return {**{name: float(total) / self._counts[name] for name, total in self._sums.items()}, **self._events}

    def reset(self) -> None:
        """Starts anew."""
        self._sums, self._counts, self._events = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts."""
        return {"sums": dict(self._sums), "counts": dict(self._counts), "events": dict(self._events)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict()`."""
        self._sums, self._counts, self._events = (dict(state[name]) for name in ("sums", "counts", "events"))


class Engine:
    """Trains a task into a run folder.

    Args:
        task: What is trained.
        run: Where it leaves its traces; `run.config` says how long, how fast, how often.
        resume: Continue from the newest checkpoint of the folder.
        quiet: Show no progress.
    """

    def __init__(self, task: Task, run: RunFolder, *, resume: bool = False, quiet: bool = False) -> None:
        self.task, self.run, self.config, self.quiet = task, run, run.config, quiet
        self.fabric = Fabric(accelerator="auto", devices=1, precision=self.config.precision)
        self.model = self.fabric.setup_module(task.module)
        self.optimizers: dict[str, Any] = {
            name: self.fabric.setup_optimizers(task.optimizer(name)) for name in task.objectives
        }
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        self.average = WeightAverage(task.module, self.config.optim.ema_decay)
        self.schedule = Schedule(self.config.stages)
        self.window, self.epoch_means = Means(), Means()
        self.step, self.seconds, self.broken = 0, 0.0, 0
        self._signal: int | None = None
        for stage in self.config.stages:
            if stage.until.plateau is not None and stage.until.plateau not in task.watchable:
                raise unknown(f"metric for the plateau of stage {stage.name!r}", stage.until.plateau, task.watchable)
        checkpoint = latest_checkpoint(run.checkpoints) if resume else None
        if checkpoint is not None:
            self._resume(checkpoint)
        else:
            task.module.to(self.fabric.device)
            task.prepare()
            self.average.align(self.average.live())
        if resume:
            # Without a checkpoint the run begins anew: it was stopped before its first.
            run.truncate_log(self.step if checkpoint else -1)
            run.write_info(status="running")
        task.on_stage(self.schedule)

    @property
    def total_steps(self) -> int:
        """Length of the run."""
        return self.config.epochs * self.config.steps_per_epoch

    def fit(self) -> None:
        """Trains to the end.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint is saved.
            Diverged: Ten steps in a row were not finite.
            OSError: Something could not be written, as on a full disk; the last checkpoint is kept.
        """
        started = time.monotonic() - self.seconds
        label = self.config.title or self.run.path.name
        if self.step == 0:
            self._log_stage()
        previous = self._catch_signals()
        try:
            with ProgressReport(label, self.total_steps, self.step, quiet=self.quiet) as progress:
                while self.step < self.total_steps:
                    self._train_step()
                    self.seconds = time.monotonic() - started
                    self._log_window()
                    if self.step % self.config.steps_per_epoch == 0:
                        self._end_epoch(progress)
                    progress.advance(self._note)
                    if self._signal is not None:
                        self._interrupt()
        except (Diverged, OSError):
            self._mark_failed()
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self.run.write_info(status="done", seconds=round(self.seconds, 2))

    _note = ""

    def _train_step(self) -> None:
        epoch, index = divmod(self.step, self.config.steps_per_epoch)
        batch = to_device(self.task.batch(epoch, index), self.fabric.device)
        logs: dict[str, Tensor | float] = {}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.config.lr_factor(self.step)
            optimizer.zero_grad(set_to_none=True)
            output = self.task.loss(name, self.model, batch)
            self.fabric.backward(output.loss)
            norm = self._clip(optimizer)
            if not bool(torch.isfinite(norm + output.loss.detach())):
                self._skip()
                break
            optimizer.step()
            logs |= {**output.logs, f"grad_norm/{name}": norm, **self._after_step(name, output, optimizer)}
        else:
            self.broken = 0
            self.average.update()
            self.window.add(logs)
            self.epoch_means.add(logs)
        self.step += 1

    def _skip(self) -> None:
        """A step whose loss or gradient is not finite changes nothing and is counted."""
        self.broken += 1
        self.window.count("skipped")
        if self.broken == BROKEN_STEPS:
            raise Diverged(
                f"loss or gradients were not finite in {BROKEN_STEPS} steps in a row (step {self.step}): lower optim.lr or "
                f"optim.codebook_lr; the last checkpoint in {self.run.checkpoints} is kept"
            )

    def _mark_failed(self) -> None:
        with contextlib.suppress(OSError):  # the disk that failed us fails this too
            self.run.write_info(status="failed", seconds=round(self.seconds, 2))

    def _after_step(self, name: str, output: StepOutput, optimizer: Any) -> Mapping[str, float]:
        return self.task.after_step(name, [output], optimizer.optimizer, self.average)

    def _clip(self, optimizer: Any) -> Tensor:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self.config.optim.grad_clip
        return torch.nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)

    def _log_window(self) -> None:
        in_epoch = self.step % self.config.steps_per_epoch
        if in_epoch and in_epoch % self.config.log_every:
            return
        values = self.window.read()
        self.window.reset()
        self._note = f"loss {values.get('loss', float('nan')):.4f}"
        self.run.log("train", **self._where(), stage=self.schedule.stage.name, **values)

    def _where(self) -> dict[str, Any]:
        epoch = (self.step - 1) // self.config.steps_per_epoch if self.step else 0
        return {"step": self.step, "epoch": epoch, "seconds": round(self.seconds, 3)}

    def _log_stage(self) -> None:
        self.run.log("stage", **self._where(), stage=self.schedule.stage.name, reason=self.schedule.reason)

    def _end_epoch(self, progress: ProgressReport) -> None:
        done = self.step // self.config.steps_per_epoch
        means = self.epoch_means.read()
        self.epoch_means.reset()
        probe = self.task.end_epoch(done)
        watched = {name.rpartition("/")[2]: value for name, value in means.items()}
        self.run.log("probe", **self._where(), **{"commitment": watched.get("commitment"), **probe})
        last = done == self.config.epochs
        if done % self.config.eval_every == 0 or last:
            self._validate(progress)
        if not last and self.schedule.step(done, self.config.epochs, watched):
            frozen = set(self.schedule.stage.frozen)
            self.task.on_stage(self.schedule)
            self._align(frozen)
            self._log_stage()
            progress.say(f"step {self.step}: stage {self.schedule.stage.name} ({self.schedule.reason})")
        if done % self.config.checkpoint_every == 0 or last:
            self.save()

    def _align(self, frozen: set[str]) -> None:
        """A frozen part is evaluated as it is: its average would drift on towards it, and tokens with it."""
        for name, modules in self.task.parts().items():
            if name in frozen:
                for module in modules:
                    self.average.align(module.parameters())

    def _validate(self, progress: ProgressReport) -> None:
        with self.average.applied():
            self.task.module.eval()
            values = self.task.validate(self.step, self.run)
            self.task.module.train()
        self.run.log("eval", **self._where(), **values)
        shown = ", ".join(f"{name} {values[name]:.2f}" for name in ("psnr", "utilization") if name in values)
        progress.say(f"step {self.step}: {shown}")

    def save(self) -> Path:
        """Writes a checkpoint of everything that the rest of the run depends on."""
        path = checkpoint_path(self.run.checkpoints, self.step)
        save_checkpoint(path, self._state())
        prune_checkpoints(self.run.checkpoints, self.config.keep_checkpoints)
        return path

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "step": self.step,
            "broken": self.broken,
            "seconds": self.seconds,
            "module": self.task.module.state_dict(),
            "optimizers": {name: optimizer.optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "average": self.average.state_dict(),
            "schedule": self.schedule.state_dict(),
            "window": self.window.state_dict(),
            "epoch_means": self.epoch_means.state_dict(),
            "task": self.task.state_dict(),
        }

    def _resume(self, path: Path) -> None:
        state = load_checkpoint(path)
        changed = differences(state["config"], self.config.to_dict())
        if changed:
            raise ValueError(
                f"{path} was written with another configuration (differs in {', '.join(changed[:5])}): "
                "resume with the configuration of its run, or train anew into another folder with --out"
            )
        self.task.module.load_state_dict(state["module"])
        for name, optimizer in self.optimizers.items():
            optimizer.optimizer.load_state_dict(state["optimizers"][name])
        for part in ("average", "schedule", "window", "epoch_means", "task"):
            target = getattr(self, part)
            target.load_state_dict(state[part])
        self.step, self.seconds, self.broken = state["step"], state["seconds"], state["broken"]

    def _catch_signals(self) -> dict[int, Any]:
        """The first signal asks for a stop after this step, a second one stops at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self._signal is not None:
                raise KeyboardInterrupt
            self._signal = number

        handlers: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                handlers[number] = signal.signal(number, ask)
            except ValueError:
                break  # not in the main thread: a caller's own loop handles its signals
        return handlers

    def _interrupt(self) -> None:
        assert self._signal is not None
        path = self.save()
        self.run.write_info(status="interrupted", seconds=round(self.seconds, 2))
        raise Interrupted(self._signal, path)
