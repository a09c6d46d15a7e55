# SPDX-License-Identifier: Apache-2.0
"""Cluster commands run for real up to the launcher, whose words its own parser reads; what it would start is resolved."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from steadyvq.cli import main

SCRIPTS = Path(__file__).parent.parent / "scripts"
RECORD = 'printf "%s\\0" "$@" > words'
STAND_INS = {
    "torchrun": f"echo torchrun > kind; {RECORD}",
    "srun": f"echo srun > kind; {RECORD}",
    "sbatch": 'while [[ $1 == --* ]]; do shift 2; done; exec bash "$@"',
    "nvidia-smi": 'printf "GPU %s\\n" 0 1 2 3 4 5 6 7',
}


def command_lines(text: str) -> list[str]:
    """The lines of a text that begin with a command of a cluster, continued lines put together."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"([A-Z_]+=\S+ )*(scripts/|sbatch |torchrun )", line)]


def launched(line: str, folder: Path) -> tuple[object, list[str]]:
    """Runs a line in a folder: (what torchrun's parser made of its words, None for srun; the words of `steadyvq`)."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, body in STAND_INS.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    if not (folder / "scripts").exists():
        (folder / "scripts").symlink_to(SCRIPTS)
    told = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=told, capture_output=True, text=True, timeout=30)
    assert (folder / "words").exists(), f"{line}: {done.stderr}"
    words = (folder / "words").read_text().split("\0")[:-1]
    (folder / "words").unlink()
    if (folder / "kind").read_text().strip() == "srun":
        return None, words[words.index("steadyvq") + 1 :]
    options = get_args_parser().parse_args(words)
    assert options.module
    assert options.training_script == "steadyvq"
    return options, options.training_script_args


def resolved(line: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[object, dict[str, object]]:
    """The launcher's options and what every process would train."""
    options, words = launched(line, folder)
    assert words[0] == "train"
    assert words[words.index("--out") + 1]
    assert main([*words, "--dry-run"]) == 0, line
    shown: dict[str, object] = yaml.safe_load(capsys.readouterr().out)
    return options, {**shown, "recipe": words[1], "auto_resume": "--auto-resume" in words}
