# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: resolved configuration, log, checkpoints, pictures, records, report."""

import json
import math
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import steadyvq
from steadyvq.files import write_text
from steadyvq.training.config import RunConfig, resolve
from steadyvq.training.strict import read_yaml


class RunFolder:
    """Where a run leaves everything. A new one is made by `create`, or by `begin` once all is known to be well.

    Args:
        path: The folder.
        config: The resolved configuration.

    Attributes:
        read_only: Nothing is written: another process of the run does.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path, self.config = path, config
        self.read_only = False

    @classmethod
    def create(cls, path: Path, config: RunConfig, command: str) -> "RunFolder":
        """Makes a new run folder; refuses one that holds a run already."""
        run = cls(path, config)
        run.begin(command)
        return run

    def begin(self, command: str) -> None:
        """Writes what a new run starts with; refuses a folder that holds a run already."""
        check_free(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"the output folder {self.path} cannot be made ({error}): choose another") from error
        write_text(self.path / "config.yaml", self.config.to_yaml())
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self.write_info(command=command, started=started, status="running", commit=source_commit())
        self.log_path.touch()

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Opens the folder of an earlier run."""
        if not (path / "config.yaml").is_file():
            raise ValueError(f"{path} holds no run (no config.yaml): give a folder written by steadyvq train")
        return cls(path, resolve(read_yaml(path / "config.yaml")))

    @property
    def log_path(self) -> Path:
        """One JSON object per line."""
        return self.path / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """Folder of the last saved tokenizer (averaged weights)."""
        return self.path / "tokenizer"

    @property
    def best(self) -> Path:
        """Folder of the saved tokenizer with the best evaluation."""
        return self.path / "best"

    def write_info(self, **changes: Any) -> None:
        """Updates run.json."""
        if self.read_only:
            return
        path = self.path / "run.json"
        try:
            old = json.loads(path.read_text()) if path.is_file() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no valid JSON ({error}): delete it to go on without it") from error
        info = {
            "steadyvq": steadyvq.__version__,
            "title": self.config.title,
            "config_hash": self.config.hash(),
            **old,
            **changes,
        }
        write_text(path, json.dumps(info, indent=2) + "\n")

    def log(self, kind: str, **values: Any) -> None:
        """Appends a row to the log; numbers that JSON does not have become null."""
        if self.read_only:
            return
        row = {"kind": kind, **{key: _finite(value) for key, value in values.items()}}
        with self.log_path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def truncate_log(self, step: int) -> None:
        """Drops the rows after a step, so that a resumed run writes them once."""
        kept = []
        # A run that was killed as it began has no log yet.
        text = self.log_path.read_text() if self.log_path.exists() else ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row.get("step", 0) <= step:
                kept.append(line + "\n")
        write_text(self.log_path, "".join(kept))


def source_commit() -> str | None:
    """The commit of the checkout that this code runs from, with `-dirty` if it was changed; None if it is none."""
    root = Path(steadyvq.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return f"{head}-dirty" if head and changed else head or None


def check_free(path: Path) -> None:
    """Raises ValueError if a run lies in that folder, or something that is no folder."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"the output {path} is a file, but a run needs a folder: choose another with --out")
    if any((path / name).exists() for name in ("config.yaml", "log.jsonl", "checkpoints")):
        raise ValueError(
            f"{path} already holds a run: choose another folder with --out, or continue it with "
            f"`steadyvq train --resume {path}`"
        )


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two plain configurations differ."""
    names = []
    for key in sorted({*a, *b}):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            names += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            names.append(f"{prefix}{key}")
    return names
