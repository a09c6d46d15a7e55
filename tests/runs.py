# SPDX-License-Identifier: Apache-2.0
"""What the tests of whole runs share: starting toys as processes, reading and comparing what runs leave."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from steadyvq.training.checkpoint import latest_checkpoint, load_checkpoint

TOYS = Path(__file__).with_name("toys.py")
SECONDS = 120


def heed_interrupts() -> None:
    """For `preexec_fn`: what a shell starts in the background ignores Ctrl-C, and so would all that tests start in turn."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def environment(rank: int, processes: int, port: int | None = None) -> dict[str, str]:
    """What torchrun tells a process."""
    several = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port or free_port()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    return {**os.environ, "OMP_NUM_THREADS": "1", **several}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def start(*arguments: object, processes: int = 1) -> list["subprocess.Popen[str]"]:
    """Starts `python ARGUMENTS` as the processes of one run, as torchrun would; one alone without a launcher."""
    port = free_port()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, arguments)]
    if processes == 1:
        return [subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)]
    told = {"TORCHELASTIC_RUN_ID": "test"}
    return [
        subprocess.Popen(command, env=environment(rank, processes, port) | told, **pipes) for rank in range(processes)
    ]


def wait(started: list["subprocess.Popen[str]"], code: int = 0) -> str:
    """Waits for all processes, which must end with this code; returns what they wrote to stderr."""
    errors = []
    try:
        for process in started:
            errors.append(process.communicate(timeout=SECONDS)[1])
    finally:
        for process in started:
            process.kill()
    said = "\n".join(errors)
    assert [process.returncode for process in started] == [code] * len(started), said
    return said


def toy(*arguments: object, processes: int = 1, code: int = 0) -> str:
    """Trains a toy to its end."""
    return wait(start(TOYS, *arguments, processes=processes), code)


def state(run: Path) -> dict[str, object]:
    """The newest checkpoint of a run as a flat mapping, less times and settings."""
    newest = latest_checkpoint(run / "checkpoints")
    assert newest is not None
    loaded = load_checkpoint(newest)
    for name in ("seconds", "config"):
        del loaded[name]
    return dict(_flat(loaded, ""))


def _flat(value: object, path: str) -> list[tuple[str, object]]:
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat(item, f"{path}/{key}")]
    if isinstance(value, list):
        return [pair for i, item in enumerate(value) for pair in _flat(item, f"{path}/{i}")]
    return [(path, value)]


def assert_same(a: dict[str, object], b: dict[str, object], tolerance: float = 0.0) -> None:
    """Two states agree: to the last bit, or numbers within a tolerance of 1 or of their size if that is larger."""
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        if isinstance(x, torch.Tensor) and x.is_floating_point() and tolerance:
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
        elif isinstance(x, torch.Tensor):
            assert torch.equal(x, y), name
        elif isinstance(x, float) and tolerance:
            assert abs(x - y) <= tolerance * max(1.0, abs(x)), name
        else:
            assert x == y, name


def log(run: Path) -> list[dict[str, object]]:
    """The rows of a run's log, less times."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def check_a_kill_leaves_no_trace(folder: Path) -> None:
    """Trains r.yaml of a folder through the command line, in one go and killed after a checkpoint: the same, bit for bit.

    The runs are left in `whole` and `killed`.
    """

    def train(*words: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "steadyvq", "train", *words]
        return subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})

    whole, killed = folder / "whole", folder / "killed"
    assert train("r.yaml", "--out", "whole").wait(timeout=240) == 0
    started = train("r.yaml", "--out", "killed")
    while not list(killed.glob("checkpoints/*.safetensors")) and started.poll() is None:
        time.sleep(0.005)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    assert train("--resume", "killed").wait(timeout=240) == 0
    assert_same(state(whole), state(killed))
    assert log(whole) == log(killed)
