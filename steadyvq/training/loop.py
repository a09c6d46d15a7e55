# SPDX-License-Identifier: Apache-2.0
"""The engine: one loop for every task. It owns steps, processes, precision, averaging, stages, checkpoints, interrupts.

A step is one global batch, whatever the number of objectives, processes and micro-batches. Everything random is a
function of (seed, position), so a resumed run repeats the uninterrupted one.
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from steadyvq.files import write_text
from steadyvq.quantizers.names import unknown
from steadyvq.training.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    remove_leftovers,
    save_checkpoint,
)
from steadyvq.training.config import resolve
from steadyvq.training.means import Means
from steadyvq.training.networks import Networks
from steadyvq.training.processes import FailedElsewhere, Processes, seed_step
from steadyvq.training.progress import ProgressReport
from steadyvq.training.run import RunFolder, differences
from steadyvq.training.signals import StopRequest, requested
from steadyvq.training.stages import Schedule
from steadyvq.training.step import GlobalStep
from steadyvq.training.task import StepOutput, Task

BROKEN_STEPS = 10

MAY_CHANGE = (
    "micro_batch_size",
    "data.workers",
    "perceptual_weights",
    "compile",
    "activation_checkpointing",
    "strategy",
)
"""Settings that a resumed run may change: they decide how a step is computed, not what it computes."""


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


class Engine:
    """Trains a task into a run folder.

    Args:
        task: What is trained.
        run: Where it leaves its traces; `run.config` says how long, how fast, how often.
        resume: Continue from the newest checkpoint of the folder.
        quiet: Show no progress.
        processes: Those that train together (None: as a launcher has started them).

    Raises:
        ValueError: Task, configuration, checkpoint or processes do not fit together.
    """

    def __init__(
        self,
        task: Task,
        run: RunFolder,
        *,
        resume: bool = False,
        quiet: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.task, self.run, self.config = task, run, run.config
        self.processes = processes or Processes(self.config.precision, self.config.strategy)
        self.quiet = quiet or not self.processes.is_first
        run.read_only = not self.processes.is_first
        self.fabric = self.processes.fabric
        optim = self.config.optim
        self.stepper = GlobalStep(
            task, self.processes, self.config.batch_size, self.config.micro_batch_size, optim.grad_clip
        )
        self.schedule = Schedule(self.config.planned_stages)
        self._check()
        self.fabric.to_device(task.module)
        checkpoint = self.processes.first(lambda: latest_checkpoint(run.checkpoints)) if resume else None
        state = None if checkpoint is None else self._read(checkpoint)
        if state is None:
            task.prepare()
        self.networks = Networks(task, self.config, self.processes)
        self.stepper.cut = self.networks.cut
        self.optimizers, self.average = self.networks.optimizers, self.networks.average
        self.window, self.epoch_means = Means(), Means()
        self.step, self.seconds, self.broken, self.ended = 0, 0.0, 0, 0
        self.best: dict[str, Any] | None = None
        self._note = ""
        self.models: dict[str, Any] = {}
        self._active: dict[str, nn.Module] = {}
        if state is not None:
            self._restore(state)
        self.processes.connect(task.module)
        self._enter_stage()
        if checkpoint is None:
            self.average.align(task.averaged)
        if resume:
            self.processes.first(lambda: self._continue_folder(begun=checkpoint is not None))

    def _check(self) -> None:
        for stage in self.config.planned_stages:
            if stage.until.plateau is not None and stage.until.plateau not in self.task.watchable:
                raise unknown(
                    f"metric for the plateau of stage {stage.name!r}", stage.until.plateau, self.task.watchable
                )
            parts = self.task.parts()
            left = [module for name, modules in parts.items() if name not in stage.frozen for module in modules]
            if not any(p.requires_grad for module in left for p in module.parameters()):
                raise ValueError(
                    f"stage {stage.name!r} freezes everything there is for a gradient to train ({', '.join(stage.frozen)}): "
                    "leave a part to train"
                )
        if len(self.stepper.shares) > 1:
            self.task.check_accumulation()

    def _continue_folder(self, *, begun: bool) -> None:
        # Without a checkpoint the run begins anew: it was stopped before its first.
        self.run.truncate_log(self.step if begun else -1)
        remove_leftovers(self.run.path)
        self._point_to_best()
        self.run.write_info(status="running")

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
            ValueError: Photographs cannot be read any more, or a stage trains nothing.
            FailedElsewhere: The same, in the first of several processes.
        """
        started = time.monotonic() - self.seconds
        label = self.config.title or self.run.path.name
        try:
            if self.step == 0:
                self.processes.first(self._log_stage)
            with (
                self._feeding(),
                StopRequest() as stop,
                ProgressReport(label, self.total_steps, self.step, quiet=self.quiet) as progress,
            ):
                self._end_epoch_if_due(progress)
                while self.step < self.total_steps:
                    asked = self._train_step(stop)
                    self.seconds = time.monotonic() - started
                    self._log_window()
                    self._log_rows(progress)
                    progress.advance(self._note)
                    if asked is not None:
                        # Before an evaluation, which may take longer than a cluster grants; a resume begins with it.
                        self._interrupt(asked)
                    self._end_epoch_if_due(progress)
        except (Diverged, OSError, ValueError, FailedElsewhere):
            self._mark_failed()
            raise
        self.processes.first(lambda: self.run.write_info(status="done", seconds=round(self.seconds, 2)))

    def _feeding(self) -> contextlib.AbstractContextManager[None]:
        """The task's worker processes, if it has some, prepare the batches of the rest of the run."""
        if self.task.feed is None:
            return contextlib.nullcontext()
        return self.task.feed.running(self.stepper.requests(self.step, self.total_steps, self.config.steps_per_epoch))

    def _log_data(self) -> None:
        """How fast batches came, and which photographs could not be read, in all processes since the last time."""
        if self.task.feed is None:
            return
        row = self.task.feed.learn(self.processes.gather(self.task.feed.report()))
        if "wait" in row:
            self._note += f", waits {row['wait']:.0%} for data"
        if row:
            self.processes.first(lambda: self.run.log("data", **self._where(), **row))

    def _train_step(self, stop: StopRequest) -> int | None:
        """One global batch; returns the signal by which all processes are to stop now, if any was asked."""
        epoch, index = divmod(self.step, self.config.steps_per_epoch)
        seed_step(self.config.seed, self.step, self.processes.rank)
        batches = self.stepper.batches(epoch, index)
        earlier: list[dict[str, StepOutput]] = [{} for _ in batches]
        logs: dict[str, Tensor | float] = {}
        asked = stop.asked
        if not self.models:
            self.task.begin_step(self.step)
            self.models = self.stepper.wrap(self._active, batches[0])
            seed_step(self.config.seed, self.step, self.processes.rank)
        self.task.begin_step(self.step)
        for name, model in self.models.items():
            if not self.task.due(name):
                continue
            optimizer = self.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.config.lr_factor(self.step, group.get("decay"))
            found = self.stepper.gradient(name, model, optimizer, batches, earlier, tuple(stop.asked))
            # In several processes only what all of them know of: a signal may have reached some after the sum.
            asked = found.added if self.processes.count > 1 else asked
            if not found.finite:
                self._skip()
                break
            optimizer.step()
            for done, output in zip(earlier, found.outputs, strict=True):
                done[name] = output
            events = dict(self.task.after_step(name, found.outputs, optimizer.optimizer, self.average))
            for event in self.task.counts & events.keys():
                self.window.count(event, int(events.pop(event)))
            logs |= {**found.logs, f"grad_norm/{name}": found.norm, **events}
        else:
            self.broken = 0
            self.average.update()
            self.window.add(logs)
            self.epoch_means.add(logs)
        self.step += 1
        return requested(asked)

    def _skip(self) -> None:
        """A step whose loss or gradient is not finite changes nothing and is counted.

        Of several objectives, those before the broken one have stepped.
        """
        self.broken += 1
        self.window.count("skipped")
        if self.broken == BROKEN_STEPS:
            raise Diverged(
                f"latents, loss or gradients were not finite in {BROKEN_STEPS} steps in a row (step {self.step + 1}): lower "
                f"optim.lr or optim.codebook_lr; the last checkpoint in {self.run.checkpoints} is kept"
            )

    def _mark_failed(self) -> None:
        with contextlib.suppress(OSError):  # the disk that failed us fails this too
            self.run.write_info(status="failed", seconds=round(self.seconds, 2))

    def _enter_stage(self) -> None:
        """Applies the present stage; the wrappers of the stage before go, and the next step makes new ones."""
        self.task.on_stage(self.schedule)
        self.models = {}
        trained = {name: self.task.trained(name) for name in self.task.objectives}
        self._active = {n: module for n, module in trained.items() if any(p.requires_grad for p in module.parameters())}

    def _trained(self) -> list[str]:
        """Names of the parts that the present stage trains."""
        parts = self.task.parts().items()
        return [n for n, modules in parts if any(p.requires_grad for module in modules for p in module.parameters())]

    def _log_window(self) -> None:
        in_epoch = self.step % self.config.steps_per_epoch
        if in_epoch and in_epoch % self.config.log_every:
            return
        values = self.window.read()
        self.window.reset()
        self._note = f"loss {values.get('loss', float('nan')):.4f}"
        row = {**self._where(), "stage": self.schedule.stage.name, **values}
        self.processes.first(lambda: self.run.log("train", **row))
        self._log_data()

    def _log_rows(self, progress: ProgressReport) -> None:
        rows = self.task.rows()
        for row in rows:
            if row["kind"] == "warning":
                progress.say(row["text"])
        if rows:
            self.processes.first(lambda: self._write_rows(rows))

    def _write_rows(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.run.log(**{**row, **self._where()})

    def _where(self) -> dict[str, Any]:
        epoch = (self.step - 1) // self.config.steps_per_epoch if self.step else 0
        return {"step": self.step, "epoch": epoch, "seconds": round(self.seconds, 3)}

    def _log_stage(self) -> None:
        self.run.log("stage", **self._where(), stage=self.schedule.stage.name, reason=self.schedule.reason)

    def _end_epoch_if_due(self, progress: ProgressReport) -> None:
        done, rest = divmod(self.step, self.config.steps_per_epoch)
        if rest == 0 and done > self.ended:
            self.ended = done
            self._end_epoch(done, progress)

    def _end_epoch(self, done: int, progress: ProgressReport) -> None:
        means = self.epoch_means.read()
        self.epoch_means.reset()
        watched = {name.rpartition("/")[2]: value for name, value in means.items()}
        # An epoch whose steps were all skipped has no means, and has not improved on anything.
        watched = watched or dict.fromkeys(self.task.watchable, math.inf)
        last = done == self.config.epochs
        evaluate = done % self.config.eval_every == 0 or last
        improved = self._measure(done, watched, progress, evaluate=evaluate)
        if not last and self.schedule.step(done, self.config.epochs, watched):
            self._enter_stage()
            self._align(set(self.schedule.stage.frozen))
            self.processes.first(self._log_stage)
            stage, trained = self.schedule.stage, ", ".join(self._trained())
            progress.say(f"step {self.step}: stage {stage.name} ({self.schedule.reason}) trains {trained}")
        # While steps are being skipped the weights are suspect: what was saved before must stay the newest.
        if ((done % self.config.checkpoint_every == 0 or improved) and not self.broken) or last:
            self.save()

    def _measure(self, done: int, watched: Mapping[str, float], progress: ProgressReport, *, evaluate: bool) -> bool:
        """The first process measures for all; returns whether the evaluation is the best so far."""

        def probe() -> None:
            found = self.task.end_epoch(done)
            self.run.log("probe", **self._where(), **{"commitment": watched.get("commitment"), **found})

        best = None
        with self.processes.alone(self.task.module), _evaluating(self.task.module), self.networks.eager():
            with self.networks.whole():
                self.processes.first(probe)
            if evaluate:
                with self.average.applied(), self.networks.whole():
                    best = self.processes.first(lambda: self._validate(progress))
        self.best = best or self.best
        return best is not None

    def _align(self, frozen: set[str]) -> None:
        """A frozen part is evaluated as it is: its average would drift on towards it, and tokens with it."""
        for name, modules in self.task.parts().items():
            if name in frozen:
                for module in modules:
                    self.average.align(module)

    def _validate(self, progress: ProgressReport) -> dict[str, Any] | None:
        """Evaluates the averaged weights; returns what makes it the best evaluation so far, if it is."""
        values = self.task.validate(self.step, self.run)
        self.task.export(self.run.path / self.task.exported)
        best = self._better(values)
        if best is not None:
            self.task.export(self.run.best)
        self.run.log("eval", **self._where(), **values)
        names = ("psnr", "utilization", "cross_entropy", "prediction_error")
        shown = ", ".join(f"{name} {values[name]:.2f}" for name in names if name in values)
        progress.say(f"step {self.step}: {shown}")
        return best

    def _better(self, values: Mapping[str, float]) -> dict[str, Any] | None:
        if self.task.best is None or self.broken:
            return None
        metric, mode = self.task.best
        value = values[metric]
        if not math.isfinite(value):
            return None
        sign = 1 if mode == "max" else -1
        if self.best is not None and not sign * value > sign * self.best["value"]:
            return None
        return {"step": self.step, "metric": metric, "mode": mode, "value": value}

    def save(self) -> Path:
        """Writes a checkpoint of everything that the rest of the run depends on; keeps the newest and the best."""
        self._log_data()  # the checkpoint knows what could not be read
        path = checkpoint_path(self.run.checkpoints, self.step)
        state = self._state()

        def write() -> None:
            save_checkpoint(path, state)
            kept = set() if self.best is None else {checkpoint_path(self.run.checkpoints, self.best["step"])}
            self._point_to_best()
            if not self.broken:
                prune_checkpoints(self.run.checkpoints, self.config.keep_checkpoints, kept)

        self.processes.first(write)
        return path

    def _point_to_best(self) -> None:
        if self.best is not None:
            write_text(self.run.checkpoints / "best.json", json.dumps(self.best) + "\n")

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "step": self.step,
            "ended": self.ended,
            "broken": self.broken,
            "seconds": self.seconds,
            "best": self.best,
            **self.networks.state_dict(),
            "schedule": self.schedule.state_dict(),
            "window": self.window.state_dict(),
            "epoch_means": self.epoch_means.state_dict(),
            "task": self.task.state_dict(),
        }

    def _read(self, path: Path) -> dict[str, Any]:
        """The state of a checkpoint, whose weights the modules have from now on."""
        state = load_checkpoint(path)
        # A setting that the version which wrote it did not know had its default.
        written = resolve(state["config"]).to_dict()
        changed = [n for n in differences(written, self.config.to_dict()) if n not in MAY_CHANGE]
        if changed:
            raise ValueError(
                f"{path} was written with another configuration (differs in {', '.join(changed[:5])}): "
                "resume with the configuration of its run, or train anew into another folder with --out"
            )
        self.task.module.load_state_dict(state["module"])
        return state

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Everything of a checkpoint but the weights."""
        self.networks.load_state_dict(state)
        for part in ("schedule", "window", "epoch_means", "task"):
            target = getattr(self, part)
            target.load_state_dict(state[part])
        self.step, self.seconds, self.broken = state["step"], state["seconds"], state["broken"]
        self.best, self.ended = state["best"], state["ended"]

    def _interrupt(self, signal_number: int) -> None:
        path = self.save()
        self.processes.first(lambda: self.run.write_info(status="interrupted", seconds=round(self.seconds, 2)))
        raise Interrupted(signal_number, path)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Inside this context all parts are in evaluation mode; then each is as it was, the frozen ones still in it."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
