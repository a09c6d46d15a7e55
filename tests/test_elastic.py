# SPDX-License-Identifier: Apache-2.0
"""Launchers that start dead workers again: the run goes on by itself, with as many processes as there are left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import tiny_recipe
from runs import assert_same, free_port, log, start, state

from steadyvq import Tokenizer
from steadyvq.training.checkpoint import latest_checkpoint

pytestmark = [
    pytest.mark.recovery,
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are found in /proc"),
]


PATIENCE = 300


@pytest.fixture(scope="module")
def recipe(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few seconds, a checkpoint every fourth step."""
    path = tmp_path_factory.mktemp("elastic") / "elastic.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(photos, epochs=10, eval_every=10, strategy="fsdp")))
    return path


def launched(*words: object) -> "subprocess.Popen[str]":
    """A torchrun of `steadyvq train`, which is told how long to wait for the others."""
    command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "2", *map(str, words), "--auto-resume"]
    told = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"}
    told["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return subprocess.Popen(command, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """The run of two processes that nobody disturbs."""
    path = recipe.parent / "whole"
    launcher = launched("--standalone", "--nproc_per_node", 2, "-m", "steadyvq", "train", recipe, "--out", path)
    said = launcher.communicate(timeout=PATIENCE)[1]
    assert launcher.returncode == 0, said
    return path


def workers(launcher: "subprocess.Popen[str]") -> list[int]:
    """The processes that a launcher has started."""
    return [int(child) for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def until_trained(run: Path, launchers: list["subprocess.Popen[str]"], step: int) -> None:
    """Waits for a checkpoint."""
    deadline = time.monotonic() + PATIENCE
    while (newest := latest_checkpoint(run / "checkpoints")) is None or int(newest.stem.removeprefix("step-")) < step:
        for launcher in launchers:
            assert launcher.poll() is None, launcher.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_worker_is_started_again(recipe, whole):
    """One of two dies without a word: torchrun starts both again, and they go on from the last checkpoint, bit for bit."""
    run = recipe.parent / "killed"
    words = ("-m", "steadyvq", "train", recipe, "--out", run)
    launcher = launched("--standalone", "--nproc_per_node", 2, *words)
    until_trained(run, [launcher], 4)
    os.kill(workers(launcher)[1], signal.SIGKILL)
    said = launcher.communicate(timeout=PATIENCE)[1]
    assert launcher.returncode == 0, said
    assert said.count("40 steps of 6 images (2 processes") == 2, "it was begun twice"
    assert said.count("in each, about 5") == 2, "half of the networks"
    assert_same(state(whole), state(run))
    assert log(whole) == log(run)
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    assert Tokenizer.from_pretrained(run / "tokenizer").encode
    # A third start finds nothing left to do.
    before = (run / "log.jsonl").read_bytes()
    (again,) = start(*words, "--auto-resume")
    assert again.wait(timeout=PATIENCE) == 0
    assert (run / "log.jsonl").read_bytes() == before


def test_a_lost_machine_leaves_the_run_to_the_other(recipe, whole):
    """Two launchers of one process each, as on two machines; one is lost with its worker, the other goes on alone."""
    run, place = recipe.parent / "lost", f"localhost:{free_port()}"
    meeting = (
        "--nnodes",
        "1:2",
        "--nproc_per_node",
        1,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        place,
        "--rdzv-id",
        "x",
    )
    patience = ("--rdzv-conf", "last_call_timeout=8,join_timeout=100")
    words = ("-m", "steadyvq", "train", recipe, "--out", run)
    stays = launched(*meeting, *patience, *words)
    time.sleep(1.0)  # who comes first holds the meeting place
    goes = launched(*meeting, *patience, *words)
    until_trained(run, [stays, goes], 4)
    for process in (goes.pid, *workers(goes)):
        os.kill(process, signal.SIGKILL)
    goes.communicate(timeout=30)
    said = stays.communicate(timeout=PATIENCE)[1]
    assert stays.returncode == 0, said
    assert said.count("6 images (2 processes") == 1
    assert said.count("40 steps of 6 images,") == 1, "then by one process alone"
    assert_same(state(whole), state(run), 1e-2)
    assert [row["step"] for row in log(whole)] == [row["step"] for row in log(run)]


def test_more_processes_than_images(recipe, tmp_path):
    """One sentence, and nothing is written."""
    words = ("-m", "steadyvq", "train", recipe, "--out", tmp_path / "run", "--set", "batch_size=1")
    started = start(*words, processes=2)
    said = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    assert "batch_size is 1, but 2 processes share it: give every process at least one item" in said[0]
    assert "Traceback" not in said[0] + said[1]
    assert not (tmp_path / "run").exists()
