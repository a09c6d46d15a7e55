# SPDX-License-Identifier: Apache-2.0
"""Proves that the tests can fail: plants one error at a time and asks the tests that should see it.

    python tests/mutants.py                                  # all of them, about ten minutes on one core
    python tests/mutants.py --only "loss ns" --jobs 2        # those whose part, file or error contains a text

The errors are in tests/mutants/*.yaml, one entry each: the part it belongs to, the file under steadyvq/, the exact text to find
(it must occur once, or `at: 2 of 3` says which), its replacement, what is wrong with it, and the tests that should fail, as
pytest is given them. The checkout is not touched: package and tests are copied, one copy per job. Every selection of tests has
to pass without any error first (those of one file are run together). A mutant is killed by a test that fails, by a crash, or by
a hang (said so); one that cannot be imported proves nothing and counts as a failure here. The exit code is 0 if all are killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LISTS = ROOT / "tests" / "mutants"
COPIED = ("steadyvq", "tests", "pyproject.toml")
# Loaded once; every selection of tests then starts from there, in a process of its own.
PRELOADED = ["torch", "torch._dynamo", "numpy", "pytest", "yaml", "safetensors.torch"]


@dataclass(frozen=True)
class Mutant:
    """One planted error; see the module."""

    part: str
    file: str
    wrong: str
    find: str
    replace: str
    tests: str
    at: str = "1 of 1"

    def apply(self, text: str) -> str:
        """The file with the error; ValueError unless the text occurs as often as the entry says."""
        number, _, total = self.at.partition(" of ")
        pieces = text.split(self.find)
        if len(pieces) - 1 != int(total):
            raise ValueError(f"{self.file}: expected {total}, found {len(pieces) - 1} times: {self.find!r}")
        k = int(number)
        return self.find.join(pieces[:k]) + self.replace + self.find.join(pieces[k:])


def read(lists: Path = LISTS) -> list[Mutant]:
    """All entries of a file or of the files in a folder."""
    files = sorted(lists.glob("*.yaml")) if lists.is_dir() else [lists]
    return [Mutant(**entry) for file in files for entry in yaml.safe_load(file.read_text())]


class Watch:
    """Notes the first test that fails, and how many ran."""

    def __init__(self) -> None:
        self.by, self.ran = "", 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran += report.when == "call"
        if report.failed and not self.by:
            self.by = report.nodeid


def _child(folder: str, tests: str) -> None:
    """Runs a selection of tests in a copy; leaves its verdict in a file."""
    os.setsid()
    os.chdir(folder)
    os.environ["PYTHONPATH"] = folder
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, folder)
    with open("output.txt", "wb", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    watch = Watch()
    code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *shlex.split(tests)], [watch]))
    used = getattr(sys.modules.get("steadyvq"), "__file__", "") or ""
    verdict = {"code": code, "by": watch.by, "ran": watch.ran, "own": used.startswith(folder + os.sep)}
    Path("verdict.json").write_text(json.dumps(verdict))
    sys.stdout.flush()
    os._exit(0)


def copy(folder: Path) -> Path:
    """Package and tests in a folder of their own, compiled so that a changed file is seen whatever its time stamp."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    # A time stamp of one second does not tell a mutant from the file before it.
    line = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", str(folder / "steadyvq")]
    subprocess.run(line, check=True)
    return folder


def run_all(
    tasks: list[tuple[str, Mutant | None]], folders: list[Path], timeout: float
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Runs every (tests, mutant) in the first free copy; yields (number of the task, verdict) as they end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting, free = list(enumerate(tasks))[::-1], list(folders)
    running: dict[int, tuple[Any, int, Path, float]] = {}
    while waiting or running:
        while waiting and free:
            number, (tests, mutant) = waiting.pop()
            folder = free.pop()
            (folder / "verdict.json").unlink(missing_ok=True)
            if mutant:
                path = folder / "steadyvq" / mutant.file
                path.write_text(mutant.apply(path.read_text()))
            process = context.Process(target=_child, args=(str(folder), tests))
            process.start()
            running[process.sentinel] = (process, number, folder, time.monotonic())
        wait(list(running), timeout=0.5)
        for sentinel, (process, number, folder, start) in list(running.items()):
            late = time.monotonic() - start > timeout
            if process.is_alive() and not late:
                continue
            # Tests may have left processes of their own behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            del running[sentinel]
            mutant = tasks[number][1]
            if mutant:
                shutil.copy(ROOT / "steadyvq" / mutant.file, folder / "steadyvq" / mutant.file)
            free.append(folder)
            yield number, _verdict(folder, process.exitcode, late)


def _verdict(folder: Path, exitcode: int, late: bool) -> dict[str, Any]:
    """What became of a run: `passed`, `killed` or `broken`, and by what."""
    if late:
        return {"outcome": "killed", "by": "a hang"}
    file = folder / "verdict.json"
    if not file.exists():
        return {"outcome": "killed", "by": f"a crash (exit code {exitcode})"}
    seen = json.loads(file.read_text())
    if seen["code"] == 1 and seen["by"]:
        return {"outcome": "killed", "by": seen["by"]}
    if seen["code"] == 0 and seen["ran"] and seen["own"]:
        return {"outcome": "passed", "by": ""}
    tail = (folder / "output.txt").read_text(errors="replace").strip().splitlines()[-6:]
    return {"outcome": "broken", "by": "no test ran: " + " | ".join(tail)}


def unions(selections: list[str]) -> dict[str, list[str]]:
    """Selections of the same file as one, which is much quicker to run: union -> what it stands for."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for tests in dict.fromkeys(selections):
        words = shlex.split(tests)
        groups.setdefault((words[0].partition("::")[0], "-k" in words), []).append(tests)
    found = {}
    for (file, by_expression), members in groups.items():
        expressions = " or ".join(f"({shlex.split(tests)[2]})" for tests in members) if by_expression else ""
        found[f"{file} -k {shlex.quote(expressions)}" if by_expression else " ".join(members)] = members
    return found


def check_baseline(mutants: list[Mutant], folders: list[Path], timeout: float) -> dict[str, str]:
    """Selections of tests that do not pass as the code stands, and why."""
    whole = unions([m.tests for m in mutants])
    names = list(whole)
    wrong = {}
    for number, verdict in run_all([(name, None) for name in names], folders, 10 * timeout):
        members = whole[names[number]]
        if verdict["outcome"] != "passed":
            wrong |= dict.fromkeys(members, verdict["by"])
        file = shlex.split(members[0])[0].partition("::")[0]
        print(f"without any error: {file}: {len(members)} selections of tests: {verdict['outcome']}", flush=True)
    return wrong


def commit() -> str:
    """The commit that was tested, with a plus where tracked files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", *COPIED], capture_output=True, text=True).stdout.strip()
    return head + ("+" if changed else "")


def known(path: Path) -> dict[Mutant, dict[str, Any]]:
    """The rows of a record by their entries."""
    names = [field.name for field in fields(Mutant)]
    rows = json.loads(path.read_text())["mutants"] if path.exists() else []
    return {Mutant(*(row[name] for name in names)): row for row in rows}


def write(path: Path, mutants: list[Mutant], verdicts: dict[Mutant, dict[str, Any]]) -> None:
    """Writes verdicts to a record, in the order of the list; those that are there already stay if their entries do."""
    rows = known(path) | {m: {**asdict(m), **verdict} for m, verdict in verdicts.items()}
    kept = [rows[m] for m in mutants if m in rows]
    killed = sum(row["outcome"] == "killed" for row in kept)
    record = {"experiment": "mutants", "killed": killed, "total": len(mutants), "mutants": kept}
    path.write_text(json.dumps(record, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs the chosen mutants; 0 if all were killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants whose part, file or error contains this")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="how many at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results into this record")
    parser.add_argument("--missing", action="store_true", help="only those that the record does not have as killed")
    parser.add_argument("--list", type=Path, default=LISTS, metavar="PATH", help="other mutants: a file or a folder")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="longer than this is a hang")
    given = parser.parse_args(arguments)
    listed = read(given.list)
    mutants = [m for m in listed if any(given.only in text for text in (m.part, m.file, m.wrong))]
    if given.missing and given.json:
        done = known(given.json)
        mutants = [m for m in mutants if done.get(m, {}).get("outcome") != "killed"]
    missing = []
    for mutant in mutants:
        try:
            mutant.apply((ROOT / "steadyvq" / mutant.file).read_text())
        except ValueError as error:
            missing.append(str(error))
    if missing or not mutants:
        print("\n".join(missing) or f"no mutant contains {given.only!r}", file=sys.stderr)
        return 1
    tested = commit()
    with tempfile.TemporaryDirectory() as temporary:
        folders = [copy(Path(temporary).resolve() / f"copy{i}") for i in range(max(1, given.jobs))]
        failing = check_baseline(mutants, folders, given.timeout)
        for tests, why in failing.items():
            print(f"does not pass as the code stands: {tests}: {why}", file=sys.stderr)
        chosen = [m for m in mutants if m.tests not in failing]
        verdicts: dict[Mutant, dict[str, Any]] = {}
        for number, verdict in run_all([(m.tests, m) for m in chosen], folders, given.timeout):
            m = chosen[number]
            verdicts[m] = {**verdict, "commit": tested}
            if given.json:
                write(given.json, listed, verdicts)
            word = {"passed": "SURVIVED", "killed": "killed by", "broken": "BROKEN"}[verdict["outcome"]]
            print(f"[{len(verdicts)}/{len(chosen)}] {m.part}: {m.wrong}: {word} {verdict['by'] or m.tests}", flush=True)
    killed = sum(verdict["outcome"] == "killed" for verdict in verdicts.values())
    print(f"mutants killed / total: {killed} / {len(mutants)} = {100 * killed / len(mutants):.0f} %")
    return int(killed < len(mutants))


if __name__ == "__main__":
    sys.exit(main())
