# SPDX-License-Identifier: Apache-2.0
"""Arms of a comparison: one base recipe, each arm different in named keys, trained side by side in processes.

A comparison recipe has `base` and `arms` (name -> the keys in which the arm differs). Every arm runs in a process of its
own with one thread, as many at a time as there are cores, so that an arm's time does not depend on how many others run.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from steadyvq.quantizers.names import look_up
from steadyvq.training.config import RunConfig, read_recipe, resolve
from steadyvq.training.strict import merge

POLL_SECONDS = 0.5
LINE_SECONDS = 15.0
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Arm:
    """One run of a comparison: its configuration, its folder, and the command that repeats it."""

    config: RunConfig
    path: Path
    command: str


def arm_configs(
    recipe: str, arms: Sequence[str] | None, overrides: dict[str, Any], sets: Sequence[str] = ()
) -> list[RunConfig]:
    """The configurations of the arms of a comparison recipe, each titled by its arm.

    Args:
        recipe: Name or path of a recipe with `arms`.
        arms: Which of them (None: all); spaces around a name do not matter.
        overrides: Keys for all arms.
        sets: `key=value` pairs for all arms.

    Raises:
        ValueError: An arm is unknown or named twice, or a setting is wrong.
    """
    data = dict(read_recipe(recipe))
    if "arms" not in data:
        raise ValueError(f"the recipe {recipe} has no arms to compare: name one that has (`steadyvq list recipes`)")
    known: dict[str, Any] = data.pop("arms")
    chosen = list(known) if arms is None else [arm.strip() for arm in arms]
    twice = [arm for arm in chosen if chosen.count(arm) > 1]
    if twice:
        raise ValueError(f"the arm {twice[0]!r} is named {chosen.count(twice[0])} times: name every arm once")
    return [
        resolve(merge(merge(data, {"title": arm}), merge(look_up("arm", arm, known) or {}, overrides)), sets)
        for arm in chosen
    ]


def _train(arm: Arm) -> None:
    """Trains one arm in this process; exit codes are those of the command line."""
    import torch

    from steadyvq.training.loop import Diverged, Engine, Interrupted
    from steadyvq.training.run import RunFolder
    from steadyvq.training.tokenizer_task import TokenizerTask

    torch.set_num_threads(1)
    run = RunFolder(arm.path, arm.config)
    try:
        engine = Engine(TokenizerTask(arm.config), run, quiet=True)
        run.begin(arm.command)
        engine.fit()
    except Interrupted:
        raise SystemExit(130) from None
    except (ValueError, OSError, Diverged) as error:
        print(f"{arm.config.title}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(error, ValueError) else 3) from None


def check_place(path: Path) -> None:
    """Raises ValueError if a file is in the way of making this path, so that nothing is worked out in vain."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"the output {path} lies below {above}, which is a file: choose another place with --out")


class ArmFailed(Exception):
    """An arm's process ended with an error; what went wrong is on stderr."""


def train_arms(arms: Sequence[Arm], workers: int | None = None) -> None:
    """Trains all arms, some at a time, showing how far each is.

    Args:
        arms: What is trained.
        workers: Processes at a time (None: one per core; one on a machine with a GPU).

    Raises:
        KeyboardInterrupt: The user interrupted; arms that ran have saved a checkpoint.
        ArmFailed: An arm failed; the others were stopped.
    """
    waiting = list(arms)
    running: dict[str, BaseProcess] = {}
    context = multiprocessing.get_context("spawn")
    limit = workers or _default_workers()
    with _Watch(arms) as watch, _terminated_as_interrupted():
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    arm = waiting.pop(0)
                    process = context.Process(target=_train, args=(arm,), daemon=False)
                    process.start()
                    running[str(arm.path)] = process
                time.sleep(POLL_SECONDS)
                watch.look()
                for name, exitcode in [(name, process.exitcode) for name, process in running.items()]:
                    if exitcode is not None:
                        running.pop(name)
                        _check(name, exitcode)
        except KeyboardInterrupt:
            # Ctrl-C on a terminal reaches the arms too; asked a second time they would stop without saving.
            _stop(list(running.values()), grace=GRACE_SECONDS)
            raise
        except BaseException:
            _stop(list(running.values()), grace=0.0)
            raise


def _default_workers() -> int:
    import torch

    if torch.cuda.is_available():
        return 1
    # The cores of this process, which may be fewer than the machine's; only Linux tells.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(name: str, exitcode: int) -> None:
    if exitcode == 130:
        raise KeyboardInterrupt
    if exitcode != 0:
        raise ArmFailed(f"the arm in {name} ended with exit code {exitcode}")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Turns SIGTERM into KeyboardInterrupt, so that the arms do not outlive this process."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: the caller handles its signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(processes: Sequence[BaseProcess], grace: float) -> None:
    """Waits a while for the arms to end by themselves, asks those that are left to save and stop, and waits for them."""
    deadline = time.monotonic() + grace
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGTERM)
    for process in processes:
        process.join()


class _Watch:
    """Shows the progress of runs by reading their logs: bars on a terminal, a line now and then elsewhere."""

    def __init__(self, arms: Sequence[Arm]) -> None:
        self._totals = {arm.path: arm.config.epochs * arm.config.steps_per_epoch for arm in arms}
        self._names = {arm.path: arm.config.title for arm in arms}
        self._console = Console(stderr=True)
        self._start = self._last = time.monotonic()
        self._ended = False
        self._bars: dict[Path, TaskID] = {}
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"))
            self._progress = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._bars = {p: self._progress.add_task(self._names[p], total=n) for p, n in self._totals.items()}

    def __enter__(self) -> "_Watch":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def look(self) -> None:
        """Reads the logs and shows them."""
        steps = {path: last_step(path) for path in self._totals}
        if self._progress:
            for path, step in steps.items():
                self._progress.update(self._bars[path], completed=step)
            return
        now = time.monotonic()
        done, total = sum(steps.values()), sum(self._totals.values())
        ended = done == total
        if self._ended or (now - self._last < LINE_SECONDS and not ended):
            return
        self._last, self._ended = now, ended
        left = f"{(now - self._start) / done * (total - done):.0f} s left" if done else "starting"
        finished = sum(step == self._totals[path] for path, step in steps.items())
        running = {path: step for path, step in steps.items() if 0 < step < self._totals[path]}
        shown = ", ".join(f"{self._names[path]} {step}/{self._totals[path]}" for path, step in running.items())
        shown = f"{finished} of {len(steps)} arms done{', ' if shown else ''}{shown}"
        self._console.print(f"{now - self._start:.0f} s, {left}: {shown}", highlight=False, soft_wrap=True)


def last_step(run: Path) -> int:
    """The step of the last row in a run's log; 0 before the first."""
    try:
        with (run / "log.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line).get("step", 0))
        except (json.JSONDecodeError, AttributeError):
            continue
    return 0
