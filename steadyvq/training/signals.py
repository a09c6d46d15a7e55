# SPDX-License-Identifier: Apache-2.0
"""Signals: the first asks for a stop after the present step, a later one stops at once."""

import signal
import time
from types import FrameType
from typing import Any

# A launcher hands on the Ctrl-C that the terminal has sent us already; a person needs longer for a second one.
SAME_REQUEST_SECONDS = 0.5

ASKING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Notes SIGINT and SIGTERM inside its `with` block.

    Attributes:
        asked: For each of `ASKING` 1.0 if it came, else 0.0; numbers, so that processes can add theirs up.
    """

    def __init__(self) -> None:
        self.asked = [0.0] * len(ASKING)
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in ASKING:
            try:
                self._previous[number] = signal.signal(number, self._ask)
            except ValueError:
                break  # not in the main thread: a caller's own loop handles its signals
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not any(self.asked):
            self._first = now
        elif now - self._first > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
        self.asked[ASKING.index(signal.Signals(number))] = 1.0


def requested(asked: list[float]) -> int | None:
    """Which signal asked, by the numbers of one process or their sums over all; Ctrl-C where both came."""
    return next((number for number, count in zip(ASKING, asked, strict=True) if count), None)
