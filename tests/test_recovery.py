# SPDX-License-Identifier: Apache-2.0
"""What clusters do to jobs cannot change a result: kills anywhere, full disks, impatient people. Real processes throughout."""

import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import tiny_recipe
from runs import assert_same, log, start, state, toy

from steadyvq.training.checkpoint import latest_checkpoint, load_checkpoint

pytestmark = pytest.mark.recovery


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory):
    """Uninterrupted runs of the toys."""
    folder = tmp_path_factory.mktemp("whole")

    def run(task: str) -> Path:
        if not (folder / task).exists():
            toy(task, folder / task, photos)
        return folder / task

    return run


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, averages, optimisers, stages, metrics and log agree to the last bit."""
    assert_same(state(a), state(b))
    assert log(a) == log(b)
    assert json.loads((b / "run.json").read_text())["status"] == "done"
    names = [{path.name for path in (run / "checkpoints").iterdir()} for run in (a, b)]
    assert names[0] == names[1], "no half-written file is left"


@pytest.mark.parametrize("task", ["masked", "gan", "adversarial", "next_token"])
def test_killed_after_a_checkpoint_and_resumed(whole, photos, tmp_path, task):
    step = random.SystemRandom().randint(21, 39)
    toy(task, tmp_path / "run", photos, "--harm", "die", step, code=-9)
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").stem == "step-00000020"
    toy(task, tmp_path / "run", photos, "--resume")
    assert_same_run(whole(task), tmp_path / "run")


def test_killed_ten_times(photos, tmp_path):
    """Each of the ten dies somewhere in the ten steps after the last one's grave, or in a write."""
    dice = random.SystemRandom()
    settings = ["--set", "checkpoint_every=1"]
    toy("masked", tmp_path / "whole", photos, *settings)
    resume: list[str] = []
    for life in range(10):
        how, step = dice.choice(["die", "die", "die_in_write"]), min(58, 6 * life + dice.randint(0, 5))
        # A life that starts from a checkpoint behind its grave would outlive it: step is where it is at most.
        begun = latest_checkpoint(tmp_path / "run" / "checkpoints") if resume else None
        at = int(begun.stem.removeprefix("step-")) if begun else 0
        toy("masked", tmp_path / "run", photos, *settings, *resume, "--harm", how, max(step, at), code=-9)
        resume = ["--resume"]
    toy("masked", tmp_path / "run", photos, *settings, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_the_three_stages_of_nsvq_killed_ten_times(whole, photos, tmp_path):
    """In every stage of the recipe, and at both borders in the step before, in the checkpoint and in the step after."""
    stages = [row for row in log(whole("recipe")) if row["kind"] == "stage"]
    assert [row["stage"] for row in stages] == ["joint", "warmup", "refine"]
    assert stages[1]["reason"] == "plateau of commitment (1 epochs)"
    freeze, back, end = stages[1]["step"], stages[2]["step"], 50
    assert 10 <= freeze < back == freeze + 5 < end - 10, "the ramp of two epochs ends before the run"
    dice = random.SystemRandom()
    graves = [("die", dice.randrange(freeze - 1))]
    graves += [("die", freeze - 1), ("die_in_write", freeze - 1), ("die", freeze), ("die", freeze + 2)]
    graves += [("die", back - 1), ("die_in_write", back - 1), ("die", back)]
    graves += [("die", dice.randrange(back + 1, end - 5)), ("die_in_write", end - 1)]
    resume: list[str] = []
    for how, step in graves:
        toy("recipe", tmp_path / "run", photos, *resume, "--harm", how, step, code=-9)
        resume = ["--resume"]
    toy("recipe", tmp_path / "run", photos, "--resume")
    assert_same_run(whole("recipe"), tmp_path / "run")


def test_killed_in_the_middle_of_a_write(whole, photos, tmp_path):
    toy("masked", tmp_path / "run", photos, "--harm", "die_in_write", 21, code=-9)
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.suffix == ".safetensors")
    assert len(left) == 2, "the old checkpoint, and half of a temporary file"
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").stem == "step-00000020"
    toy("masked", tmp_path / "run", photos, "--resume")
    assert_same_run(whole("masked"), tmp_path / "run")


def test_a_full_disk_under_the_log(whole, photos, tmp_path):
    said = toy("masked", tmp_path / "run", photos, "--harm", "fill_log", 25, code=3)
    assert "No space left on device" in said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints"))["step"] == 20


@pytest.fixture
def long_run(photos: Path, tmp_path: Path) -> Path:
    """A recipe that takes longer than any test."""
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(photos, epochs=5000, eval_every=5000, keep_checkpoints=2)))
    return path


def begin(recipe: Path, folder: Path, *options: object) -> "subprocess.Popen[str]":
    """Starts `steadyvq train` and waits for its second checkpoint."""
    (process,) = start("-m", "steadyvq", "train", recipe, "--out", folder, *options)
    deadline = time.monotonic() + 60
    while not (folder / "checkpoints" / "step-00000008.safetensors").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prlimit is a call of Linux")
def test_a_full_disk_under_a_checkpoint_keeps_the_old_one(long_run, tmp_path):
    process = begin(long_run, tmp_path / "run")
    largest = (tmp_path / "run" / "checkpoints" / "step-00000008.safetensors").stat().st_size
    # Smaller than a checkpoint and larger than everything else; the write fails in its middle.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 3, said
    assert "File too large" in said
    assert "Traceback" not in said
    kept = sorted((tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    assert all(load_checkpoint(path)["step"] > 0 for path in kept)
    assert 1 <= len(kept) <= 2
    assert not list((tmp_path / "run" / "checkpoints").glob(".*")), "nothing half-written is left"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_a_second_interrupt_stops_at_once(long_run, tmp_path):
    """Steps of many seconds: the first Ctrl-C would wait for the end of one."""
    (process,) = start(
        *("-m", "steadyvq", "train", long_run, "--out", tmp_path / "run"),
        *("--set", "batch_size=20000", "--set", "data.epoch_samples=20000"),
    )
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None, "the step is not over"
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - asked < 5
    assert process.returncode == 130
    assert "stopped at once; nothing was saved since the last checkpoint" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_hands_a_signal_on_and_both_processes_save(long_run, tmp_path, number):
    (process,) = start(
        *("-m", "torch.distributed.run", "--nproc_per_node", 2, "-m", "steadyvq", "train", long_run),
        *("--out", tmp_path / "run"),
    )
    run = tmp_path / "run"
    while not (run / "checkpoints" / "step-00000008.safetensors").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert said.count("resume with: steadyvq train --resume") == 1, said
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    saved = load_checkpoint(latest_checkpoint(run / "checkpoints"))["step"]
    assert saved >= max(row["step"] for row in log(run))


def test_bad_input_of_several_processes_is_told_once(long_run, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").touch()
    started = start("-m", "steadyvq", "train", long_run, "--out", tmp_path / "taken", processes=2)
    said = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    assert "already holds a run" in said[0]
    assert "already holds a run" not in said[1]
    assert "Traceback" not in said[0] + said[1]


def test_more_processes_than_a_batch_has_crops_are_refused_before_anything_is_written(long_run, tmp_path):
    """A number that merely does not divide the batch is fine (tests/test_processes.py has 9 crops in two processes)."""
    options = ("--out", tmp_path / "run", "--set", "batch_size=2")
    started = start("-m", "steadyvq", "train", long_run, *options, processes=3)
    said = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2, 2], said
    assert (
        said[0] == "steadyvq train: batch_size is 2, but 3 processes share it: give every process at least one item\n"
    )
    assert said[1:] == ["", ""]
    assert not (tmp_path / "run").exists()
