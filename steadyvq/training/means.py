# SPDX-License-Identifier: Apache-2.0
"""Running means of what is logged."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Means:
    """Running means of named numbers, kept on their device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._events: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Takes in one value per name."""
        for name, value in values.items():
            number = value.detach().double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            self._sums[name] = self._sums[name] + number if name in self._sums else number
            self._counts[name] = self._counts.get(name, 0) + 1

    def count(self, name: str, number: int = 1) -> None:
        """Counts events; `read` gives the number of events of that name, not a mean."""
        if number:
            self._events[name] = self._events.get(name, 0) + number

    def read(self) -> dict[str, float | int]:
        """The means so far, and the counts of events."""
        return {**{name: float(total) / self._counts[name] for name, total in self._sums.items()}, **self._events}

    def reset(self) -> None:
        """Starts anew."""
        self._sums, self._counts, self._events = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts."""
        return {"sums": dict(self._sums), "counts": dict(self._counts), "events": dict(self._events)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict()`."""
        self._sums, self._counts, self._events = (dict(state[name]) for name in ("sums", "counts", "events"))
