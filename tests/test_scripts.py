# SPDX-License-Identifier: Apache-2.0
"""The scripts for clusters: torchrun's for real, SLURM's with a stand-in for the commands of the cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny_recipe
from runs import log

from steadyvq.cli import main

SCRIPTS = Path(__file__).parent.parent / "scripts"


def call(script: str, *arguments: object, cwd: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Runs a script in a folder."""
    # The commands of this environment, as in an activated one.
    path = os.pathsep.join([*filter(None, [variables.pop("first", None)]), str(Path(sys.executable).parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.recovery
def test_torchrun_trains_and_continues(photos, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe(photos)))
    words = ("tiny.yaml", "run", "--set", "epochs=2")
    first = call("torchrun.sh", *words, cwd=tmp_path, PROCESSES="2")
    assert first.returncode == 0, first.stderr
    assert "2 processes" in first.stderr
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    newest.unlink()
    again = call("torchrun.sh", *words, cwd=tmp_path, PROCESSES="2")
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in log(tmp_path / "run") if row["kind"] == "eval"] == [4, 8]


@pytest.mark.recovery
def test_slurm_resolves_its_command_and_queues_itself_again(photos, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe(photos)))
    (tmp_path / "bin").mkdir()
    stand_ins = {"srun": 'shift; exec "$@" --dry-run', "scontrol": 'echo "$@" > requeued'}
    for name, line in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    variables = {"first": str(tmp_path / "bin"), "SLURM_JOB_ID": "17"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"status": "done"}, indent=2))
    new = call("slurm.sh", "tiny.yaml", "run", "--set", "epochs=7", cwd=tmp_path, **variables)
    assert new.returncode == 0, new.stderr
    assert yaml.safe_load(new.stdout)["epochs"] == 7
    assert not (tmp_path / "requeued").exists()
    (tmp_path / "run" / "config.yaml").write_text(new.stdout)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"status": "interrupted"}, indent=2))
    changed = ("--set", "epochs=7", "--set", "micro_batch_size=2")
    again = call("slurm.sh", "tiny.yaml", "run", *changed, cwd=tmp_path, **variables)
    assert again.returncode == 0, again.stderr
    assert yaml.safe_load(again.stdout)["micro_batch_size"] == 2, "what may change at a resume"
    assert (tmp_path / "requeued").read_text().strip() == "requeue 17"
    other = call("slurm.sh", "tiny.yaml", "run", "--set", "epochs=9", cwd=tmp_path, **variables)
    assert other.returncode == 2
    assert "was trained with another configuration (differs in epochs)" in other.stderr


@pytest.mark.parametrize("opted", [False, True])
def test_ci_tests_the_triton_kernels_where_it_is_asked_to(opted, tmp_path):
    """The script itself, with commands that only say how they were called."""
    (tmp_path / "bin").mkdir()
    said, name = tmp_path / "said", tmp_path / "bin" / "python3"
    name.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "${{TRITON_INTERPRET:-}} $(basename "$0") $*" >> {said}\n'
        'if [ "$1 $2" = "-m venv" ]; then\n'
        '    mkdir -p "$3/bin"\n'
        '    echo "PATH=$3/bin:\\$PATH" > "$3/bin/activate"\n'
        '    for one in python python3 pip pytest ruff mypy; do cp "$0" "$3/bin/$one"; done\n'
        "fi\n"
    )
    name.chmod(0o755)
    variables = {"STEADYVQ_CI_TRITON": "1"} if opted else {}
    variables |= {"PATH": f"{name.parent}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("STEADYVQ_", "TRITON_"))}
    done = subprocess.run(
        ["bash", str(SCRIPTS.parent / ".ci" / "run")], env=environment | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    calls = said.read_text().splitlines()
    assert any("pip install -q -c constraints/cpu.txt -e .[dev]" in call for call in calls)
    assert ("1 python -m pytest tests/test_triton.py -n 2" in calls) == opted
    assert ("0 python -m pytest tests/test_triton_compile.py -n 2" in calls) == opted
    assert any(call.startswith(" pip install -q --no-deps triton==") for call in calls) == opted
    assert (" ruff check ." in calls) != opted
    assert (" pytest -n 2 --dist loadscope" in calls) != opted


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sh"])
def test_scripts_say_what_they_need(script, tmp_path):
    done = call(script, "three_stages", cwd=tmp_path)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_two_ways_to_continue_are_refused(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("{}\n")
    assert main(["train", "--resume", str(tmp_path), "--auto-resume"]) == 2
    assert "leave out one of them" in capsys.readouterr().err
