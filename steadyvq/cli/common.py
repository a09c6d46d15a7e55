# SPDX-License-Identifier: Apache-2.0
"""What the commands share: plain lines, tables, opening a trained tokenizer."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from steadyvq.models import Tokenizer
from steadyvq.quantizers import build_quantizer
from steadyvq.training.config import RunConfig
from steadyvq.training.run import RunFolder

EXIT_FAILED, EXIT_INTERRUPTED = 3, 130


def say(line: str) -> None:
    """A line of progress on stderr, where results on stdout are not disturbed."""
    print(line, file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows of text on stdout, headed by their keys."""
    shown = Table(show_edge=False)
    for name in rows[0]:
        shown.add_column(name, justify="left" if name in ("run", "name", "paper", "what it is") else "right")
    for row in rows:
        shown.add_row(*(str(value) for value in row.values()))
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(shown)


def open_tokenizer(path: Path, quantizer: str | None) -> tuple[Tokenizer, RunConfig | None]:
    """The last saved tokenizer of a run, or a saved tokenizer, in evaluation mode.

    Args:
        path: A run folder, or a folder written by `save_pretrained`.
        quantizer: file.py:function of a quantizer of the user's own, if it is not where the configuration says.
    """
    if (path / "config.yaml").is_file():
        run = RunFolder.open(path)
        if not run.tokenizer.is_dir():
            raise ValueError(f"{path} has saved no tokenizer yet: let it train to its first evaluation")
        settings = run.config.quantizer
        own = quantizer or (settings.name if ":" in settings.name else None)
        built = None
        if own:
            options = {**settings.options, "channel_axis": 1}
            built = build_quantizer(own, num_codes=settings.num_codes, dim=settings.dim, **options)
        return Tokenizer.from_pretrained(run.tokenizer, quantizer=built).eval(), run.config
    if quantizer:
        raise ValueError(f"--quantizer needs a run folder that says its size, but {path} holds no config.yaml")
    return Tokenizer.from_pretrained(path).eval(), None
