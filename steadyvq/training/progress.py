# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar with the time left on a terminal, plain lines with it in a log."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressReport:
    """Shows how far a piece of work is.

    Args:
        label: What is being done.
        total: Steps in all.
        done: Steps done before (a resumed run).
        every: Seconds between plain lines when the output is no terminal.
        quiet: Show nothing.
    """

    def __init__(self, label: str, total: int, done: int = 0, every: float = 10.0, quiet: bool = False) -> None:
        self.label, self.total, self.done, self.every, self.quiet = label, total, done, every, quiet
        self._start_done = done
        self._start = self._last = time.monotonic()
        self._console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> "ProgressReport":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, note: str = "") -> None:
        """One step is done; `note` stands beside the bar."""
        self.advance_by(1, note)

    def advance_by(self, steps: int, note: str = "") -> None:
        """Some steps are done."""
        self.done += steps
        if self._bar:
            self._bar.update(self._task, completed=self.done, note=note)
            return
        now = time.monotonic()
        if now - self._last >= self.every or self.done == self.total:
            self._last = now
            left = (now - self._start) / max(1, self.done - self._start_done) * (self.total - self.done)
            self.say(
                f"{self.label} {self.done}/{self.total}, {now - self._start:.0f} s, {left:.0f} s left  {note}".rstrip()
            )

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self._bar:
            self._bar.console.print(line, highlight=False)
        elif not self.quiet:
            print(line, file=sys.stderr, flush=True)
