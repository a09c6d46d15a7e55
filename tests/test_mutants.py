# SPDX-License-Identifier: Apache-2.0
"""The planted errors of tests/mutants/ fit the code, cover every part, and were all seen; the runner tells what it should."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import mutants
import pytest
import yaml

import steadyvq
from steadyvq.quantizers import bits
from steadyvq.quantizers.assign import ASSIGNMENTS
from steadyvq.quantizers.codebooks import CODEBOOKS
from steadyvq.quantizers.estimators import ESTIMATORS
from steadyvq.quantizers.losses import LOSSES
from steadyvq.quantizers.maintenance import MAINTENANCE

ROOT = Path(__file__).parent.parent
ALL = mutants.read()
RECORD = json.loads((ROOT / "docs" / "evidence" / "mutants.json").read_text())
REGISTERED = {
    "loss": [*LOSSES, *bits.LOSSES],
    "estimator": ESTIMATORS,
    "assignment": ASSIGNMENTS,
    # Experiments register what only they need.
    "maintenance": [name for name, part in MAINTENANCE.items() if part.__module__.startswith("steadyvq.quantizers.")],
    "codebook": CODEBOOKS,
    "preset": steadyvq.list_quantizers(),
}


def test_every_text_is_found_as_often_as_its_entry_says():
    for mutant in ALL:
        text = (ROOT / "steadyvq" / mutant.file).read_text()
        assert mutant.apply(text) != text, f"{mutant.part}: {mutant.wrong}"


def test_entries_are_distinct_and_name_tests_that_exist():
    assert len({(m.file, m.find, m.replace, m.at) for m in ALL}) == len(ALL)
    for mutant in ALL:
        path = ROOT / shlex.split(mutant.tests)[0].partition("::")[0]
        assert path.exists(), f"{mutant.part}: there is no {path}"


@pytest.mark.parametrize("kind", REGISTERED)
def test_every_registered_part_has_a_mutant(kind):
    covered = {m.part for m in ALL}
    assert [name for name in REGISTERED[kind] if f"{kind} {name}" not in covered] == []


def test_every_file_of_methods_and_kernels_has_a_mutant():
    covered = {m.file for m in ALL}
    files = [path for folder in ("quantizers/methods", "kernels") for path in (ROOT / "steadyvq" / folder).glob("*.py")]
    # The package of methods is empty, a baked layer is a plain one, and dense definitions are there to be compared with.
    apart = {"quantizers/methods/__init__.py", "quantizers/methods/baked.py", "kernels/reference.py"}
    assert {path.relative_to(ROOT / "steadyvq").as_posix() for path in files} - covered == apart


def test_the_record_holds_every_entry_and_all_were_killed():
    rows = RECORD["mutants"]
    recorded = [{key: row[key] for key in dataclasses.asdict(ALL[0])} for row in rows]
    advice = "run python tests/mutants.py --json docs/evidence/mutants.json --missing"
    assert recorded == [dataclasses.asdict(mutant) for mutant in ALL], advice
    assert RECORD["killed"] == RECORD["total"] == len(ALL)
    assert all(row["outcome"] == "killed" and row["by"] for row in rows)
    assert all(re.fullmatch(r"[0-9a-f]{40}", row["commit"]) for row in rows), "from a commit, not from a changed tree"


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "tests/mutants.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def entry(wrong: str, find: str, replace: str) -> dict[str, str]:
    return {
        "part": "estimator direct",
        "file": "quantizers/estimators.py",
        "wrong": wrong,
        "find": find,
        "replace": replace,
        "tests": "tests/test_conformance.py::TestContract::test_direct_gradient_goes_to_the_code[vq]",
    }


@pytest.mark.slow
def test_the_runner_tells_killed_survived_hanging_and_broken_apart(tmp_path):
    path, found = tmp_path / "list.yaml", "return assignment.selected\n"
    entries = [
        entry("doubled", found, "return 2 * assignment.selected\n"),
        entry("nothing", found, "return assignment.selected + 0\n"),
        entry("endless", found, "while True:\n        pass\n"),
        entry("a slip", found, "return assignment.selected)\n"),
        entry("crash", found, "import os\n    os.abort()\n"),
    ]
    path.write_text(yaml.safe_dump(entries))
    before = (ROOT / "steadyvq" / "quantizers" / "estimators.py").read_bytes()
    done = run("--list", path, "--timeout", 40, "--json", tmp_path / "record.json")
    assert done.returncode == 1
    assert "mutants killed / total: 3 / 5 = 60 %" in done.stdout
    outcomes = {
        row["wrong"]: (row["outcome"], row["by"])
        for row in json.loads((tmp_path / "record.json").read_text())["mutants"]
    }
    assert outcomes["doubled"] == ("killed", entries[0]["tests"])
    assert outcomes["nothing"] == ("passed", "")
    assert outcomes["endless"] == ("killed", "a hang")
    assert outcomes["a slip"][0] == "broken"
    assert outcomes["crash"][0] == "killed"
    assert "crash" in outcomes["crash"][1]
    assert (ROOT / "steadyvq" / "quantizers" / "estimators.py").read_bytes() == before


@pytest.mark.slow
def test_tests_that_fail_anyway_prove_nothing(tmp_path):
    path = tmp_path / "list.yaml"
    failing = entry("doubled", "return assignment.selected\n", "return 2 * assignment.selected\n")
    path.write_text(yaml.safe_dump([{**failing, "tests": "tests/test_conformance.py -k nothing_is_called_so"}]))
    done = run("--list", path)
    assert done.returncode == 1
    assert "does not pass as the code stands" in done.stderr
    assert "0 / 1" in done.stdout


def test_a_text_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump([entry("doubled", "return nothing like this", "")]))
    done = run("--list", path)
    assert done.returncode == 1
    assert "expected 1, found 0 times: 'return nothing like this'" in done.stderr
    assert "no mutant contains 'xyzzy'" in run("--only", "xyzzy").stderr


@pytest.mark.slow
def test_the_commands_of_the_docs_run():
    """Those that name a part run as they stand; of the whole list, the options exist."""
    text = (ROOT / "docs" / "architecture.md").read_text() + (ROOT / "docs" / "adding-a-quantizer.md").read_text()
    lines = [line.split("#")[0] for line in text.splitlines() if line.startswith("python tests/mutants.py")]
    assert len(lines) >= 2
    for words in map(shlex.split, lines):
        if "--only" in words:
            done = run(*words[2:])
            assert done.returncode == 0, done.stdout + done.stderr
            assert "= 100 %" in done.stdout
        else:
            said = run("--help").stdout
            assert all(word in said for word in words if word.startswith("--"))


def test_an_entry_can_say_which_of_several_it_means():
    mutant = mutants.Mutant("x", "y.py", "z", find="a", replace="b", tests="", at="2 of 3")
    assert mutant.apply("a-a-a") == "a-b-a"
    with pytest.raises(ValueError, match="expected 3, found 2 times"):
        mutant.apply("a-a")
