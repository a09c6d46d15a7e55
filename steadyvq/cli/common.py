# SPDX-License-Identifier: Apache-2.0
"""What the commands share: plain lines, tables, opening a trained tokenizer."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from steadyvq.experiments.arms import check_place
from steadyvq.models import Tokenizer
from steadyvq.training.config import RunConfig
from steadyvq.training.run import RunFolder
from steadyvq.training.tokenizer_task import quantizer_of

LEFT = ("run", "name", "kind", "paper", "status", "cost", "what it is", "method", "note")
"""Columns of words."""


def say(line: str) -> None:
    """A line of progress on stderr, where results on stdout are not disturbed."""
    print(line, file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows of text on stdout, headed by their keys."""
    shown = Table(show_edge=False)
    for name in rows[0]:
        shown.add_column(name, justify="left" if name in LEFT else "right")
    for row in rows:
        shown.add_row(*(str(value) for value in row.values()))
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(shown)


def check_output(path: Path, *, folder: bool = False) -> None:
    """Refuses an output that cannot be written, before there is any work to lose.

    Args:
        path: Where results are to go.
        folder: They are several files in a folder of that name, not one file.
    """
    if folder and path.exists() and not path.is_dir():
        raise ValueError(f"the output {path} is a file, but the results need a folder: name another with --out")
    if not folder and path.is_dir():
        raise ValueError(f"the output {path} is a folder, but the result is one file: name the file with --out")
    check_place(path)


def open_tokenizer(path: Path, quantizer: str | None) -> tuple[Tokenizer, RunConfig | None]:
    """The last saved tokenizer of a run, or a saved tokenizer, in evaluation mode.

    Args:
        path: A run folder, or a folder written by `save_pretrained`.
        quantizer: file.py:function of a quantizer of the user's own, if it is not where the configuration says.
    """
    if quantizer == "":
        raise ValueError("--quantizer is empty: give file.py:function, or leave it out")
    if (path / "config.yaml").is_file():
        run = RunFolder.open(path)
        if not run.tokenizer.is_dir():
            raise ValueError(f"{path} has saved no tokenizer yet: let it train to its first evaluation")
        own = quantizer is not None or ":" in run.config.quantizer.name
        built = quantizer_of(run.config, quantizer) if own else None
        return Tokenizer.from_pretrained(run.tokenizer, quantizer=built).eval(), run.config
    if quantizer is not None:
        raise ValueError(f"--quantizer needs a run folder that says its size, but {path} holds no config.yaml")
    return Tokenizer.from_pretrained(path).eval(), None
