# SPDX-License-Identifier: Apache-2.0
"""Runs an experiment: every arm with every seed is a cell with a folder and a key, and no finished cell is run again.

The key of a cell is a hash of all that decides its result: the arm's settings, the seed, and the keys of the cells it
needs. It is part of the folder's name, so a changed setting makes a new cell and leaves the old one where it is.
"""

import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import steadyvq
from steadyvq.experiments.arms import Arm, check_place, last_step, train_arms
from steadyvq.experiments.claims import Results
from steadyvq.experiments.study import ArmPlan, Cell, Computed, Study, Trained
from steadyvq.files import write_text
from steadyvq.training.config import RunConfig, read_recipe, resolve
from steadyvq.training.run import RunFolder, source_commit
from steadyvq.training.strict import merge

RESULT = "result.json"
RECORD = "experiment.json"
STEP_SECONDS, RUN_SECONDS = 0.05, 6.0
"""About what a step of 8 crops of 32x32 takes on one core, and what begins, evaluates and measures a run."""


@dataclass(frozen=True)
class CellJob:
    """One arm with one seed, as a job for a process of its own.

    Attributes:
        arm: Name of the arm.
        plan: The arm.
        seed: The seed.
        key: What decides the result, hashed.
        path: Its folder.
        inputs: Folders of the cells that it needs.
        command: What the user typed.
    """

    arm: str
    plan: ArmPlan
    seed: int
    key: str
    path: Path
    inputs: Mapping[str, Path] = field(default_factory=dict)
    command: str = ""

    @property
    def title(self) -> str:
        """What is shown."""
        return f"{self.arm} {self.seed}"

    @property
    def steps(self) -> int:
        """Optimiser steps of a training run, what the arm says of a computed one."""
        if isinstance(self.plan, Computed):
            return self.plan.steps
        config = run_config(self.plan, self.seed)
        return config.epochs * config.steps_per_epoch

    def done(self) -> int:
        """Steps behind it; a training run counts as done only when it has been measured too."""
        return self.steps if self.result() is not None else min(last_step(self.path), self.steps - 1)

    def result(self) -> dict[str, Any] | None:
        """What it found, or None while it has not been run."""
        return json.loads(self._file.read_text()) if self._file.is_file() else None

    @property
    def _file(self) -> Path:
        """Where its result is; experiments that share a run may measure it differently."""
        measure = self.plan.measure if isinstance(self.plan, Trained) else None
        return self.path / (RESULT if measure is None else f"result-{measure.__name__}.json")

    def run(self) -> None:
        """Computes or trains, and writes the result."""
        self.path.mkdir(parents=True, exist_ok=True)
        # Time of the processor: a busy machine makes no experiment longer.
        started = time.process_time()
        if isinstance(self.plan, Computed):
            found = self.plan.run(Cell(self.plan.settings, self.seed, self.path, self.inputs))
        else:
            found = self._train(self.plan)
        seconds = round(time.process_time() - started, 1)
        facts = {"key": self.key, "commit": source_commit(), "seconds": seconds}
        write_text(self._file, json.dumps({**facts, "found": found}, allow_nan=False) + "\n")

    def _train(self, plan: Trained) -> dict[str, Any]:
        from steadyvq.experiments.outcome import outcome

        config = run_config(plan, self.seed)
        if plan.start is not None:
            config = replace(config, init_from=str((self.inputs[plan.start]).resolve()))
        info = self.path / "run.json"
        # Not the arm, which another experiment that goes on with this run may call otherwise.
        arm = Arm(replace(config, title=self.path.name), self.path, self.command)
        if not (info.is_file() and json.loads(info.read_text())["status"] == "done"):
            arm.run()
        return merge(outcome(self.path), plan.measure(self.path) if plan.measure else {})


recipe_once = lru_cache(maxsize=8)(read_recipe)
"""A recipe; a plan of a hundred cells reads it once."""


def run_config(plan: Trained, seed: int) -> RunConfig:
    """The configuration of a training run; where it starts from is only the name of an arm."""
    recipe = dict(recipe_once(plan.recipe))
    chosen = plan.settings.get("quantizer", {}).get("name")
    if chosen and chosen != recipe.get("quantizer", {}).get("name"):
        # Options are those of the method that the recipe is for.
        recipe["quantizer"] = {**recipe["quantizer"], "options": {}}
    started = {} if plan.start is None else {"init_from": plan.start}
    return resolve(merge(merge(recipe, dict(plan.settings)), {"seed": seed, **started}))


def with_data(plan: ArmPlan, data: str | None) -> ArmPlan:
    """An arm on other photographs; what is computed stays as it is."""
    if data is None or isinstance(plan, Computed):
        return plan
    return replace(plan, settings=merge(plan.settings, {"data": {"source": data}}))


def fresh_run(folder: Path, config: RunConfig) -> RunFolder:
    """A run folder for a computed arm, which begins anew where it was interrupted."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    return RunFolder.create(folder / "run", config, "an arm of an experiment")


def _key(plan: ArmPlan, seed: int, needed: Mapping[str, str]) -> str:
    """Twelve hexadecimal digits that name what decides a cell's result."""
    if isinstance(plan, Computed):
        own: dict[str, Any] = {"run": f"{plan.run.__module__}.{plan.run.__qualname__}", "settings": dict(plan.settings)}
    else:
        own = {"config": replace(run_config(plan, seed), title="").hash()}
    text = json.dumps({**own, "seed": seed, "needs": dict(needed)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Experiment:
    """The plan of an experiment in one folder.

    Args:
        study: What is done.
        profile: Its size.
        seeds: How many seeds: 0, 1, ...
        out: The folder.
        cells: Where cells are kept (None: in `out`); experiments that share it share cells.
        data: Photographs of training runs (None: as their recipes say).

    Raises:
        ValueError: There is no such profile, or the folder cannot be made. Nothing was written.
    """

    def __init__(
        self, study: Study, profile: str, seeds: int, out: Path, cells: Path | None = None, data: str | None = None
    ) -> None:
        if seeds < 1:
            raise ValueError(f"--seeds is {seeds}, but an experiment needs at least 1 (and 3 for a verdict)")
        self._cells = cells or out / "cells"
        self._options = (["--cells", str(cells)] if cells else []) + (["--data", data] if data else [])
        check_place(self._cells)
        self.study, self.profile, self.seeds, self.out = study, profile, seeds, out
        self.plans = {arm: with_data(plan, data) for arm, plan in study.arms(study.settings(profile)).items()}
        self.jobs: dict[tuple[str, int], CellJob] = {}
        for seed in range(seeds):
            for arm in self.plans:
                self._job(arm, seed)
        self.failed: dict[tuple[str, int], str] = {}

    def _job(self, arm: str, seed: int) -> CellJob:
        """The job of a cell, made after those that it needs."""
        if (arm, seed) not in self.jobs:
            plan = self.plans[arm]
            needed = {name: self._job(name, seed) for name in plan.needs}
            key = _key(plan, seed, {name: job.key for name, job in needed.items()})
            inputs = {name: job.path for name, job in needed.items()}
            self.jobs[arm, seed] = CellJob(arm, plan, seed, key, self._place(arm, seed, key), inputs, self.command)
        return self.jobs[arm, seed]

    def _place(self, arm: str, seed: int, key: str) -> Path:
        """The folder of a cell, which may be there under the name that another experiment gives the arm."""
        found = sorted(self._cells.glob(f"*-{seed}-{key}"))
        return found[0] if found else self._cells / f"{arm}-{seed}-{key}"

    @property
    def command(self) -> str:
        """The command that makes the experiment, or goes on with it."""
        words = ["steadyvq", "experiment", self.study.name, "--profile", self.profile, "--seeds", str(self.seeds)]
        return shlex.join([*words, "--out", str(self.out), *self._options])

    def described(self) -> dict[str, Any]:
        """What would be run, as plain data: every arm with its recipe, what differs from it, and its steps."""
        arms: dict[str, Any] = {}
        for (arm, seed), job in self.jobs.items():
            if seed == 0:
                plan = job.plan
                made = {"recipe": plan.recipe} if isinstance(plan, Trained) else {"function": plan.run.__qualname__}
                arms[arm] = {**made, "needs": list(plan.needs), "steps": job.steps, "settings": plan.settings}
        cells = {"all": len(self.jobs), "to_do": len(self.missing())}
        plain = {
            "experiment": self.study.name,
            "profile": self.profile,
            "seeds": self.seeds,
            "cells": cells,
            "arms": arms,
        }
        described: dict[str, Any] = json.loads(json.dumps(plain))
        return described

    def expected_seconds(self) -> float | None:
        """Roughly the processor time of the profile `tiny`; None where arms are computed, of which nothing is known."""
        if not all(isinstance(job.plan, Trained) for job in self.jobs.values()):
            return None
        configs = [run_config(job.plan, job.seed) for job in self.jobs.values() if isinstance(job.plan, Trained)]
        steps = sum(c.epochs * c.steps_per_epoch * (c.data.crop_size / 32) ** 2 for c in configs)
        return STEP_SECONDS * steps + RUN_SECONDS * len(configs)

    def missing(self) -> list[CellJob]:
        """Cells that have no result yet."""
        return [job for job in self.jobs.values() if job.result() is None]

    def run(self, workers: int | None = None) -> None:
        """Runs every cell that has no result, those first that others need.

        Raises:
            KeyboardInterrupt: The user interrupted; finished cells are kept, and running this again goes on.
            ValueError: A library is missing; nothing was run.
        """
        if self.study.check is not None and self.missing():
            self.study.check()
        while waiting := [job for job in self.missing() if (job.arm, job.seed) not in self.failed]:
            ready, later = [], 0
            for job in waiting:
                needed = [(name, job.seed) for name in job.plan.needs]
                broken = [name for name, seed in needed if (name, seed) in self.failed]
                if broken:
                    self.failed[job.arm, job.seed] = f"it needs {broken[0]}, which failed"
                elif all(self.jobs[cell].result() is not None for cell in needed):
                    ready.append(job)
                else:
                    later += job.steps
            reasons = train_arms(ready, workers, keep_going=True, later=later) if ready else {}
            self.failed |= {(job.arm, job.seed): reasons[job.path] for job in ready if job.path in reasons}

    def results(self) -> Results:
        """What the finished cells found."""
        cells: dict[str, dict[int, Any]] = {}
        for (arm, seed), job in self.jobs.items():
            if (result := job.result()) is not None:
                cells.setdefault(arm, {})[seed] = result["found"]
        return Results(cells, list(self.plans))

    def record(self) -> dict[str, Any]:
        """Everything about the experiment as plain data, with no trace of the machine but the seconds."""
        study, results = self.study, self.results()
        cells = []
        for (arm, seed), job in self.jobs.items():
            if (result := job.result()) is not None:
                hidden = job.plan.hidden
                facts = {name: result[name] for name in ("key", "commit", "seconds")}
                cells.append({"arm": arm, "seed": seed, "hidden": hidden, **facts, "found": result["found"]})
        commits = sorted({str(cell["commit"]) for cell in cells})
        return {
            "experiment": study.name,
            "profile": self.profile,
            "settings": dict(study.settings(self.profile)),
            "seeds": self.seeds,
            "command": f"steadyvq experiment {study.name} --profile {self.profile} --seeds {self.seeds}",
            "commits": commits,
            "steadyvq": steadyvq.__version__,
            "torch": torch.__version__,
            "seconds": round(sum(cell["seconds"] for cell in cells), 1),
            "claims": study.judge(results),
            "failed": [{"arm": arm, "seed": seed, "reason": why} for (arm, seed), why in self.failed.items()],
            "cells": cells,
        }

    def write(self) -> list[Path]:
        """Writes experiment.json, experiment.md, experiment.html and plots/; returns the files."""
        from steadyvq.experiments.pages import as_html, as_markdown, plots

        record, out = self.record(), self.out
        pictures: Sequence[Path] = ()
        if self.study.draw is not None:
            folders = {cell: job.path for cell, job in self.jobs.items() if job.result() is not None}
            pictures = self.study.draw(out / "plots", folders, read_results(record))
        files = {RECORD: as_text(record), "experiment.md": as_markdown(self.study, record)}
        files["experiment.html"] = as_html(self.study, record, pictures)
        files |= {f"plots/{name}.svg": svg for name, svg in plots(self.study, record).items()}
        for name, content in files.items():
            write_text(out / name, content)
        return [out / name for name in files] + list(pictures)


def as_text(record: Mapping[str, Any]) -> str:
    """A record as JSON, every cell on a line of its own."""
    head = json.dumps({**record, "cells": []}, indent=1, allow_nan=False)
    cells = ",\n".join(json.dumps(cell, allow_nan=False, separators=(",", ":")) for cell in record["cells"])
    return head.removesuffix("[]\n}") + f"[\n{cells}\n]\n}}\n"


def read_results(record: Mapping[str, Any]) -> Results:
    """The results inside a record."""
    cells: dict[str, dict[int, Any]] = {}
    for cell in record["cells"]:
        cells.setdefault(cell["arm"], {})[cell["seed"]] = cell["found"]
    return Results(cells, list(cells))
