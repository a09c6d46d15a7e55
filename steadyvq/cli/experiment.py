# SPDX-License-Identifier: Apache-2.0
"""`steadyvq experiment`."""

import argparse
from pathlib import Path

import yaml

from steadyvq.cli import FAILED, INTERRUPTED
from steadyvq.cli.common import check_output, say, table
from steadyvq.experiments.runner import Experiment
from steadyvq.experiments.study import studies, study_of


def experiment(arguments: argparse.Namespace) -> int:
    """Runs an experiment, or lists them; 3 if any of its cells failed."""
    if arguments.list:
        table([{"name": study.name, "what it is": study.question} for study in studies().values()])
        return 0
    if arguments.name is None:
        raise ValueError(f"no experiment is named: choose one of {', '.join(studies())}, or see --list")
    study = study_of(arguments.name)
    out: Path = arguments.out or Path("runs") / "experiments" / f"{study.name}-{arguments.profile}"
    check_output(out, folder=True)
    seeds = study.seeds if arguments.seeds is None else arguments.seeds
    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers is {arguments.workers}, but the work needs at least 1 process")
    cells: Path | None = arguments.cells or (None if arguments.out else out.parent / "cells")
    plan = Experiment(study, arguments.profile, seeds, out, cells, arguments.data)
    if arguments.dry_run:
        print(yaml.safe_dump(plan.described(), sort_keys=False, width=120), end="")
        return 0
    say(f"{len(plan.plans)} arms, {plan.seeds} seed(s): {len(plan.missing())} of {len(plan.jobs)} cells to do")
    try:
        plan.run(arguments.workers)
    except KeyboardInterrupt:
        say(f"stopped; finished cells are kept, and the others go on with: {plan.command}")
        return INTERRUPTED
    files = plan.write()
    decided = plan.record()["claims"]
    table([{"claim": c["claim"], "found": c["found"], "verdict": c["verdict"]} for c in decided])
    for (arm, seed), reason in plan.failed.items():
        say(f"{arm} with seed {seed} failed: {reason}")
    say(f"tables, numbers and pictures: {', '.join(str(file) for file in files[:3])}")
    return FAILED if plan.failed else 0
