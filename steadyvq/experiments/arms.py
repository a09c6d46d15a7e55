# SPDX-License-Identifier: Apache-2.0
"""Arms of a comparison: one base recipe, each arm different in named keys, trained side by side in processes.

A comparison recipe has `base` and `arms` (name -> the keys in which the arm differs). Every arm runs in a process of its
own with one thread, as many at a time as there are cores, so that an arm's time does not depend on how many others run. An arm
whose folder holds an unfinished run goes on with it.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from steadyvq.quantizers.names import look_up
from steadyvq.training.config import RunConfig, read_recipe, resolve
from steadyvq.training.strict import merge

POLL_SECONDS = 0.5
LINE_SECONDS = 15.0
GRACE_SECONDS = 5.0
BARS = 12
"""Most bars that are shown at once."""


class Job(Protocol):
    """A piece of work for a process of its own: it leaves all that it finds in its folder and can be begun again."""

    @property
    def path(self) -> Path:
        """Its folder, which no other job has."""

    @property
    def title(self) -> str:
        """What it is called where progress is shown."""

    @property
    def steps(self) -> int:
        """How much work it is, in units that all jobs of a list share."""

    def done(self) -> int:
        """How much of it has been done."""

    def run(self) -> None:
        """Does the work, or the rest of it."""


@dataclass(frozen=True)
class Arm:
    """One run of a comparison: its configuration, its folder, and the command that repeats it."""

    config: RunConfig
    path: Path
    command: str

    @property
    def title(self) -> str:
        """The title of the configuration."""
        return self.config.title

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.config.epochs * self.config.steps_per_epoch

    def done(self) -> int:
        """Steps that its log holds."""
        return last_step(self.path)

    def run(self) -> None:
        """Trains it, or goes on with it."""
        _fit(self)


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


def is_done(run: Path) -> bool:
    """Whether a run has finished."""
    info = run / "run.json"
    return info.is_file() and json.loads(info.read_text())["status"] == "done"


def _work(job: Job, tell: "Connection[str, str]") -> None:
    """Does one job in this process and tells why it failed, if it does; exit codes are those of the command line."""
    import torch

    from steadyvq.training.loop import Diverged, Interrupted

    torch.set_num_threads(1)
    try:
        job.run()
    except (Interrupted, KeyboardInterrupt):
        raise SystemExit(130) from None
    except (ValueError, OSError, Diverged) as error:
        tell.send(" ".join(str(error).split()))
        raise SystemExit(2 if isinstance(error, ValueError) else 3) from None
    except Exception as error:  # of a quantizer that is not ours, or of ours: where it happened matters
        traceback.print_exc()
        tell.send(" ".join(f"{type(error).__name__}: {error}".split()))
        raise SystemExit(3) from None


def _fit(arm: Arm) -> None:
    """Trains an arm in this process, or goes on with it."""
    from steadyvq.experiments.memory import PeakMemory
    from steadyvq.experiments.outcome import photographs_once
    from steadyvq.training.loop import Engine
    from steadyvq.training.run import RunFolder
    from steadyvq.training.tokenizer_task import TokenizerTask

    run = RunFolder(arm.path, arm.config)
    begun = run.log_path.is_file()
    photographs = photographs_once(arm.config.data)
    memory = PeakMemory()
    engine = Engine(TokenizerTask(arm.config, photographs), run, resume=begun, quiet=True)
    if not begun:
        (arm.path / "config.yaml").unlink(missing_ok=True)  # all that a run leaves that was killed as it began
        run.begin(arm.command)
    try:
        engine.fit()
    finally:
        before = json.loads((arm.path / "run.json").read_text()).get("peak_memory")
        peak = memory.read()
        run.write_info(peak_memory=before if peak is None else max(peak, before or 0))


def check_place(path: Path) -> None:
    """Raises ValueError if a file is in the way of making this path, so that nothing is worked out in vain."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"the output {path} lies below {above}, which is a file: choose another place with --out")


class ArmFailed(Exception):
    """An arm's process ended with an error; what went wrong is on stderr."""


@dataclass(frozen=True)
class _Running:
    """A job in its process, and where that says why it failed."""

    job: Job
    process: BaseProcess
    reason: "Connection[str, str]"

    @classmethod
    def start(cls, job: Job) -> "_Running":
        context = _context()
        reason, tell = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(job, tell), daemon=False)  # type: ignore[attr-defined]
        process.start()
        tell.close()
        return cls(job, process, reason)

    def failure(self) -> str | None:
        """Why it failed, if it did.

        Raises:
            KeyboardInterrupt: It was interrupted.
        """
        code = self.process.exitcode
        if code == 130:
            raise KeyboardInterrupt
        if code == 0:
            return None
        try:
            return str(self.reason.recv())
        except EOFError:
            return f"its process ended with exit code {code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")


def train_arms(
    arms: Sequence[Job], workers: int | None = None, *, keep_going: bool = False, later: int = 0
) -> dict[Path, str]:
    """Trains all arms (or does other jobs), some at a time, showing how far each is; what went wrong is said on stderr.

    Args:
        arms: What is trained or done.
        workers: Processes at a time (None: one per core; one on a machine with a GPU).
        keep_going: An arm that fails does not stop the others.
        later: Steps that will follow after these arms, for the time left.

    Returns:
        Why arms failed, by their folders; empty unless `keep_going`.

    Raises:
        KeyboardInterrupt: The user interrupted; arms that ran have saved a checkpoint.
        ArmFailed: An arm failed, and the others were stopped.
    """
    waiting, running, failed = list(arms), list[_Running](), dict[Path, str]()
    limit = workers or _default_workers()
    with _Watch(arms, later) as watch, _terminated_as_interrupted():
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    running.append(_Running.start(waiting.pop(0)))
                time.sleep(POLL_SECONDS)
                watch.look()
                for ended in [one for one in running if one.process.exitcode is not None]:
                    running.remove(ended)
                    if reason := ended.failure():
                        watch.fail(ended.job, reason)
                        _check(ended, keep_going)
                        failed[ended.job.path] = reason
        except KeyboardInterrupt:
            # Ctrl-C on a terminal reaches the arms too; asked a second time they would stop without saving.
            _stop([one.process for one in running], grace=GRACE_SECONDS)
            raise
        except BaseException:
            _stop([one.process for one in running], grace=0.0)
            raise
    return failed


def _context() -> BaseContext:
    """How processes are started: on Linux from one that has imported everything, which saves seconds per arm."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"steadyvq.training.{name}" for name in ("loop", "tokenizer_task", "fabric")])
    return context


def _default_workers() -> int:
    import torch

    if torch.cuda.is_available():
        return 1
    # The cores of this process, which may be fewer than the machine's; only Linux tells.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(ended: _Running, keep_going: bool) -> None:
    if not keep_going:
        raise ArmFailed(f"the arm in {ended.job.path} ended with exit code {ended.process.exitcode}")


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
    """Shows the progress of jobs by what they leave: bars on a terminal, a line now and then elsewhere."""

    def __init__(self, arms: Sequence[Job], later: int = 0) -> None:
        self._totals = {arm.path: arm.steps for arm in arms}
        self._done = {arm.path: arm.done for arm in arms}
        titles = [arm.title for arm in arms]
        self._names = {a.path: t if titles.count(t) == 1 else a.path.name for a, t in zip(arms, titles, strict=True)}
        # What a resumed run has behind it took no time of ours.
        self._before = sum(arm.done() for arm in arms)
        self._later = later
        self._failed: set[Path] = set()
        self._console = Console(stderr=True)
        self._start = self._last = time.monotonic()
        self._ended = False
        self._bars: dict[Path, TaskID] = {}
        self._progress: Progress | None = None
        if self._console.is_terminal and self._totals:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"))
            self._progress = Progress(*columns, TimeRemainingColumn(), console=self._console)
            whole = sum(self._totals.values()) + later
            several = len(self._totals) > BARS
            self._all = self._progress.add_task("all", total=whole, completed=self._before, visible=several)
            self._bars = {p: self._progress.add_task(self._names[p], total=n) for p, n in self._totals.items()}

    def __enter__(self) -> "_Watch":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def fail(self, job: Job, reason: str) -> None:
        """Says why a job failed, and waits for it no more."""
        self._failed.add(job.path)
        self._console.print(f"{job.title}: {reason}", highlight=False, soft_wrap=True, markup=False)

    def look(self) -> None:
        """Reads the logs and shows them."""
        # What a failed arm has left will not be done.
        steps = {path: n if path in self._failed else self._done[path]() for path, n in self._totals.items()}
        if self._progress:
            self._show_bars(self._progress, steps)
            return
        now = time.monotonic()
        done, total = sum(steps.values()), sum(self._totals.values())
        ended = done == total
        if self._ended or (now - self._last < LINE_SECONDS and not ended):
            return
        self._last, self._ended = now, ended
        fresh = done - self._before
        left = f"{(now - self._start) / fresh * (total - done + self._later):.0f} s left" if fresh > 0 else "starting"
        finished = sum(step == self._totals[path] for path, step in steps.items())
        running = {path: step for path, step in steps.items() if 0 < step < self._totals[path]}
        shown = ", ".join(f"{self._names[path]} {step}/{self._totals[path]}" for path, step in running.items())
        shown = f"{finished} of {len(steps)} arms done{', ' if shown else ''}{shown}"
        self._console.print(f"{now - self._start:.0f} s, {left}: {shown}", highlight=False, soft_wrap=True)

    def _show_bars(self, progress: Progress, steps: dict[Path, int]) -> None:
        """A bar for every arm, or, where they would not fit, for all together and for those that run."""
        progress.update(self._all, completed=sum(steps.values()))
        for path, step in steps.items():
            shown = len(steps) <= BARS or 0 < step < self._totals[path]
            progress.update(self._bars[path], completed=step, visible=shown)


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
