# SPDX-License-Identifier: Apache-2.0
"""`steadyvq train` and `steadyvq demo`."""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from steadyvq.cli import FAILED, INTERRUPTED
from steadyvq.cli.common import check_output, say, table
from steadyvq.experiments.arms import ArmFailed
from steadyvq.experiments.demo import NOTE, run_demo
from steadyvq.experiments.generate import run_generate
from steadyvq.generation.priors import KINDS, prior_task
from steadyvq.generation.token_task import TokenTask
from steadyvq.report import comparison_table, write_report
from steadyvq.training.config import RunConfig, read_recipe, resolve, with_absolute_paths
from steadyvq.training.loop import MAY_CHANGE, Diverged, Engine, Interrupted
from steadyvq.training.photographs import load_photographs, with_counted_epoch
from steadyvq.training.processes import Processes
from steadyvq.training.run import RunFolder, check_free, differences
from steadyvq.training.strict import merge
from steadyvq.training.task import Task
from steadyvq.training.tokenizer_task import TokenizerTask


def train(arguments: argparse.Namespace) -> int:
    """Trains a recipe, or resumes a run."""
    if arguments.resume is not None:
        return _resume(arguments)
    if arguments.recipe is None:
        raise ValueError("no recipe given: name one (`steadyvq list recipes`), a YAML file, or --resume RUN")
    config = _config(arguments)
    path = arguments.out or Path("runs") / Path(arguments.recipe).stem
    if (
        config.task == "tokenizer"
        and config.init_from is None
        and all("encoder" in stage.frozen for stage in config.stages)
    ):
        raise ValueError(
            "no stage trains the encoder, and there are no weights to start from: name a run with --init-from, or use "
            "`steadyvq transplant`"
        )
    if arguments.auto_resume:
        return _begin_or_go_on(config, path, dry_run=arguments.dry_run)
    return begin(config, path, dry_run=arguments.dry_run)


def _begin_or_go_on(config: RunConfig, path: Path, *, dry_run: bool) -> int:
    """What a launcher may start again with the same words: it begins a run, or goes on with it."""
    processes = None if dry_run else Processes(config.precision, config.strategy)

    def begun() -> bool:
        return (path / "config.yaml").is_file()

    # One process looks for all: other machines may not see the folder yet.
    if begun() if processes is None else processes.first(begun):
        return _go_on(RunFolder.open(path), config, processes, dry_run=dry_run)
    return begin(config, path, processes, dry_run=dry_run)


def begin(config: RunConfig, path: Path, processes: Processes | None = None, *, dry_run: bool) -> int:
    """Trains a configuration into a new run folder, or only prints it."""
    if dry_run:
        print(config.to_yaml(), end="")
        return 0
    processes = processes or Processes(config.precision, config.strategy)
    processes.first(lambda: check_free(path))
    processes.first(lambda: processes.shares(config.batch_size))
    task = make_task(config)
    if processes.is_first:
        _tell_about_data(task)
    return _fit(task, RunFolder(path, task.config), processes, resume=False)


def make_task(config: RunConfig) -> TokenizerTask | TokenTask:
    """What a configuration trains; `task.config` has the length of an epoch, where that was to be counted."""
    if config.task in KINDS:
        return prior_task(config)
    photographs = load_photographs(config)
    return TokenizerTask(with_counted_epoch(config, photographs), photographs)


def _config(arguments: argparse.Namespace) -> RunConfig:
    recipe = read_recipe(arguments.recipe)
    if arguments.quantizer:
        quantizer = dict(recipe.get("quantizer", {}))
        if quantizer.get("name") != arguments.quantizer:
            # Options of one method mean nothing, or something else, for another.
            quantizer = {**quantizer, "name": arguments.quantizer, "options": {}}
        recipe = {**recipe, "quantizer": quantizer}
    overrides: dict[str, object] = {"data": {"source": arguments.data}} if arguments.data else {}
    if arguments.init_from:
        overrides["init_from"] = str(arguments.init_from)
    if arguments.train:
        overrides["train"] = arguments.train
    return with_absolute_paths(resolve(merge({"title": Path(arguments.recipe).stem}, recipe), arguments.set, overrides))


def _resume(arguments: argparse.Namespace) -> int:
    run = RunFolder.open(arguments.resume)
    if arguments.auto_resume:
        raise ValueError(
            "--auto-resume and --resume were both given: --resume RUN continues a run that is there, --auto-resume that in "
            "--out, so leave out one of them"
        )
    if arguments.out is not None:
        raise ValueError("--out and --resume were both given: a resumed run goes on in its own folder, leave out --out")
    if arguments.init_from is not None:
        raise ValueError(
            "--init-from and --resume were both given: a resumed run has its weights, leave out --init-from"
        )
    asked = None
    if arguments.recipe or arguments.set or arguments.data or arguments.quantizer or arguments.train:
        asked = _config(arguments) if arguments.recipe else _changed(run.config, arguments)
    return _go_on(run, asked, dry_run=arguments.dry_run)


def _go_on(run: RunFolder, asked: RunConfig | None, processes: Processes | None = None, *, dry_run: bool) -> int:
    """Continues a run, with other settings where they may change."""
    if asked is not None:
        if asked.data.epoch_samples is None:
            # Counted when the run began.
            asked = replace(asked, data=replace(asked.data, epoch_samples=run.config.data.epoch_samples))
        changed = [n for n in differences(asked.to_dict(), run.config.to_dict()) if n not in MAY_CHANGE]
        if changed:
            raise ValueError(
                f"{run.path} was trained with another configuration (differs in {', '.join(changed[:5])}): "
                f"resume it without recipe, and with --set for {', '.join(MAY_CHANGE)} alone, or train anew into another "
                "folder with --out"
            )
        run = RunFolder(run.path, asked)
    if dry_run:
        print(run.config.to_yaml(), end="")
        return 0
    processes = processes or Processes(run.config.precision, run.config.strategy)
    processes.first(lambda: processes.shares(run.config.batch_size))
    return _fit(make_task(run.config), run, processes, resume=True)


def _changed(config: RunConfig, arguments: argparse.Namespace) -> RunConfig:
    overrides: dict[str, object] = {"data": {"source": arguments.data}} if arguments.data else {}
    if arguments.quantizer:
        overrides["quantizer"] = {"name": arguments.quantizer}
    if arguments.train:
        overrides["train"] = arguments.train
    return with_absolute_paths(resolve(config.to_dict(), arguments.set, overrides))


def _tell_about_data(task: TokenizerTask | TokenTask) -> None:
    if isinstance(task, TokenTask):
        classes = f"{len(task.classes)} classes" if task.classes else "no classes"
        say(
            f"tokens of {len(task.train_rows)} images, {task.tokens.num_views} views each, {task.tokens.num_codes:,} codes, "
            f"{classes}; {len(task.held_out)} images held out{'' if len(task.tokens.splits) > 1 else ' (the same ones)'}"
        )
        return
    photographs = task.photographs
    held_out = photographs.split(task.config.data.eval_split)
    say(f"{len(photographs)} photographs from {photographs.data}, {len(held_out)} held out")
    if task.val_crops.skipped:
        say(f"{len(task.val_crops.skipped)} files skipped:")
        _list(task.val_crops.skipped)


def _list(files: Sequence[tuple[str, str]], shown: int = 10) -> None:
    for path, reason in files[:shown]:
        say(f"  {path}: {reason}")
    if len(files) > shown:
        say(f"  and {len(files) - shown} more")


def _tell_about_feed(task: Task, run: RunFolder) -> None:
    """What could not be read of streamed photographs."""
    if task.feed is None:
        return
    found = task.feed.total
    run.write_info(replaced=found.replaced, unreadable=len(found.reasons))
    if found.reasons and not run.read_only:
        say(
            f"{len(found.reasons)} photographs could not be read; others stood in for them in {found.replaced} samples "
            f"(all of them in {run.log_path}):"
        )
        _list(sorted(found.reasons.items()))


def _fit(task: Task, run: RunFolder, processes: Processes, *, resume: bool) -> int:
    tell = say if processes.is_first else _say_nothing
    engine = Engine(task, run, resume=resume, processes=processes)
    if not resume:
        # Only now: whatever is wrong with the input has been said, and nothing was written.
        processes.first(lambda: run.begin(shlex.join(["steadyvq", *sys.argv[1:]])))
    parameters = sum(p.numel() for p in task.module.parameters())
    tell(
        f"{run.config.title}: {parameters / 1e6:.2f} M parameters, {engine.total_steps} steps of "
        f"{run.config.batch_size} images{_cut(engine)}, configuration {run.config.hash()}"
    )
    code = 0
    try:
        try:
            engine.fit()
        finally:
            _tell_about_feed(task, run)
    except Diverged as error:
        tell(f"steadyvq train: {error}")
        code = FAILED
    except Interrupted as stop:
        tell(f"{stop}\nresume with: steadyvq train --resume {shlex.quote(str(run.path))}")
        code = INTERRUPTED if stop.signal == signal.SIGINT else 0
        processes.close()
        return code
    # All processes get here together; an error of one alone must reach the launcher without waiting for the others.
    processes.close()
    if code:
        return code
    if not processes.is_first:
        return 0
    page = write_report([run.path], run.path / "report.html")
    table(final_rows(run, task.columns) if isinstance(task, TokenTask) else comparison_table([run.path]))
    say(f"report: {page}")
    return 0


def final_rows(run: RunFolder, columns: Mapping[str, tuple[str, str]]) -> list[dict[str, str]]:
    """The last evaluation of a prior: metrics and their formats by heading."""
    rows = [json.loads(line) for line in run.log_path.read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    return [{"run": run.config.title} | {title: format(last[key], form) for title, (key, form) in columns.items()}]


def _say_nothing(line: str) -> None:
    """What all processes but the first say."""


def _cut(engine: Engine) -> str:
    """How the batch is cut, if it is."""
    shares, count = engine.stepper.shares, engine.processes.count
    if count == 1 and len(shares) == 1:
        return ""
    cut = engine.networks.cut
    held = "" if cut is None else f", about {cut.share:.0%} of the weights"
    return f" ({count} processes, {len(shares)} micro-batches of up to {len(shares[0])} in each{held})"


def demo(arguments: argparse.Namespace) -> int:
    """Trains the arms of the demo and shows them side by side."""
    if arguments.what == "generate":
        return _generate(arguments)
    if arguments.prior is not None:
        raise ValueError("--prior is for `steadyvq demo generate`: leave it out")
    arms = None if arguments.arms is None else arguments.arms.split(",")
    arguments.out = arguments.out or Path("runs/demo")
    try:
        runs = run_demo(arguments.out, data=arguments.data, arms=arms, seed=arguments.seed, sets=arguments.set)
    except KeyboardInterrupt:
        say(
            f"stopped; every arm that ran has saved a checkpoint: steadyvq train --resume {shlex.quote(str(arguments.out))}/ARM"
        )
        return INTERRUPTED
    except ArmFailed as error:
        say(f"steadyvq demo: {error}; its message stands above")
        return FAILED
    page = write_report(runs, arguments.out / "report.html", title="A codebook dies, ours lives", note=NOTE)
    table(comparison_table(runs))
    say(f"pictures and curves: {page}")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    """From photographs to new pictures."""
    if arguments.arms is not None:
        raise ValueError("--arms is for the demo of collapse: leave it out")
    kind = arguments.prior or "autoregressive"
    # Each has its folder: they keep other things of the photographs.
    out = arguments.out or Path("runs") / ("generate" if kind == "autoregressive" else f"generate-{kind}")
    check_output(out, folder=True)
    try:
        made = run_generate(out, data=arguments.data, prior=kind, seed=arguments.seed, sets=arguments.set)
    except (Interrupted, KeyboardInterrupt):
        say(f"stopped; what is done is kept, go on with: steadyvq {shlex.join(sys.argv[1:])}")
        return INTERRUPTED
    except Diverged as error:
        say(f"steadyvq demo: {error}")
        return FAILED
    table(made.rows)
    say(", ".join(f"{name} {seconds:.0f} s" for name, seconds in made.seconds.items()))
    say(f"pictures: {out / 'samples'}; report: {made.page}")
    return 0
