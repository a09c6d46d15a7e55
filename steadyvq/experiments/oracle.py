# SPDX-License-Identifier: Apache-2.0
"""An oracle: k-means refitted to the latents of the last steps, again and again. The upper bound of every rule that tracks.

It costs what no training would pay, so it is no method. Used by experiments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steadyvq.quantizers import Quantizer, compose
from steadyvq.quantizers.codebooks import Codebook, FrozenCodebook
from steadyvq.quantizers.initialise import lloyd, seed_plus_plus
from steadyvq.quantizers.maintenance import MAINTENANCE, Maintenance, UpdateBatch


class Refit(Maintenance):
    """Every few updates the codes become those of k-means on the latents of the last updates.

    Args:
        num_codes: K.
        dim: d.
        every: Updates between two fits.
        window: Latents that are kept.
        iterations: Lloyd's iterations of a fit, which starts from the present codes.
        seed: Of new places for codes without latents.
    """

    recent: Tensor
    updates: Tensor

    def __init__(
        self, num_codes: int, dim: int, *, every: int = 25, window: int = 16384, iterations: int = 3, seed: int = 0
    ) -> None:
        super().__init__()
        if every < 1 or window < num_codes or iterations < 1:
            raise ValueError(
                f"every={every}, window={window}, iterations={iterations}, but a refit needs every >= 1, iterations >= 1 and "
                f"a window of at least {num_codes} latents, one per code"
            )
        self.every, self.window, self.iterations, self.seed = every, window, iterations, seed
        self.register_buffer("recent", torch.zeros(0, dim), persistent=False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def check(self, codes: Codebook) -> None:
        """Refuses codebooks that something else moves as well."""
        if not isinstance(codes, FrozenCodebook):
            raise ValueError(
                f"a refit writes the table itself, so it needs codebook='frozen', not {type(codes).__name__}"
            )

    def forward(self, batch: UpdateBatch) -> dict[str, float]:
        """Keeps the latents of this step and fits when it is time."""
        z = torch.cat([a.z[a.counted] for a in batch.assignments])
        self.recent = torch.cat([self.recent, batch.gather(z)])[-self.window :]
        self.updates += 1
        enough = len(self.recent) >= min(self.window, 2 * len(batch.hits))
        if int(self.updates) % self.every or not enough:
            return {}
        batch.codes.set_rows_(self._fitted(batch.codes()))
        return {}

    def _fitted(self, codes: Tensor) -> Tensor:
        """Lloyd's iterations; codes that none of the latents chooses are placed anew, as k-means++ does."""
        from steadyvq.kernels import nearest

        for _ in range(self.iterations):
            indices, distance = nearest(self.recent, codes)
            counts = torch.bincount(indices, minlength=len(codes))
            empty = (counts == 0).nonzero().flatten()
            if len(empty):
                generator = torch.Generator().manual_seed(self.seed + int(self.updates))
                codes = codes.clone()
                if len(empty) == len(codes) - 1:
                    codes = seed_plus_plus(self.recent, len(codes), generator)
                else:
                    share = distance.double().clamp_min(1e-30)
                    codes[empty] = self.recent[torch.multinomial(share, len(empty), generator=generator)]
            codes = lloyd(self.recent, codes, 1)
        return codes


MAINTENANCE["refit"] = Refit


def oracle(num_codes: int, dim: int, **overrides: Any) -> Quantizer:
    """A quantizer whose codes are k-means of the latents of the last steps."""
    parts = {"codebook": "frozen", "init": "normal", "losses": {"commitment": 0.25}, "maintenance": {"refit": {}}}
    return compose(num_codes, dim, parts, overrides)
