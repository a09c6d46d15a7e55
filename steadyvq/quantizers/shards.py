# SPDX-License-Identifier: Apache-2.0
"""What processes that share one table exchange, and what each of them has to hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from steadyvq.quantizers.base import alone


@dataclass(frozen=True)
class Shards:
    """The processes that share a table, and what they exchange. Quantizers know no engine; see `process_shards`.

    Attributes:
        rank: Of this process.
        count: Number of processes, R.
        sum: Sums a tensor over processes.
        minimum: The least of a tensor over processes, entry by entry.
        gather: The rows (n, ...) of every process, in the order of their ranks; n may differ.
        to_first: The same in the first process, and nothing in the others.
    """

    rank: int = 0
    count: int = 1
    sum: Callable[[Tensor], Tensor] = alone
    minimum: Callable[[Tensor], Tensor] = alone
    gather: Callable[[Tensor], list[Tensor]] = lambda rows: [rows]
    to_first: Callable[[Tensor], list[Tensor]] = lambda rows: [rows]

    def bounds(self, num_codes: int) -> tuple[int, int]:
        """The codes [low, high) of this process."""
        return num_codes * self.rank // self.count, num_codes * (self.rank + 1) // self.count


def bytes_per_process(
    num_codes: int, dim: int, processes: int, latents: int, element: int = 4, *, averaged: bool = False
) -> dict[str, int]:
    """What a process holds of a table of K codes between steps and in a step, in bytes.

    Args:
        num_codes: K.
        dim: d.
        processes: R.
        latents: N of all processes together.
        element: Bytes of a number.
        averaged: A moving average of the codes is kept.

    Returns:
        `table`, `gradient`, `moments` (Adam's two), `average` if there is one, `replacement` (three numbers per code of the
        whole table, the same in every process), `latents` (gathered, and their codes).
    """
    rows = -(-num_codes // processes)
    part = rows * dim * element
    return {
        "table": part,
        "gradient": part,
        "moments": 2 * part,
        **({"average": part} if averaged else {}),
        "replacement": num_codes * (8 + 2 * 4),
        "latents": 2 * latents * dim * element,
    }
