# SPDX-License-Identifier: Apache-2.0
"""Training a masked-token prior over stored tokens, as a task of the loop."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steadyvq.data.crops import uniforms
from steadyvq.generation.masked import MaskedDrawing, MaskedPrior, hidden_count
from steadyvq.generation.prior_task import PriorTask
from steadyvq.training.task import StepOutput

_HIDDEN, _JUDGED = 8, 9
"""What numbers are drawn for: the tokens hidden in training, and in an evaluation."""
PARTS = 4
"""How often an evaluation hides tokens of an image."""


class MaskedTask(PriorTask):
    """A masked-token prior on stored tokens."""

    kind = "masked"
    drawing = MaskedDrawing
    model = MaskedPrior
    prior: MaskedPrior

    def batch(self, epoch: int, positions: range) -> list[Tensor]:
        """Tokens (B, n), which of them are hidden (B, n), and classes (B,)."""
        tokens, labels = super().batch(epoch, positions)
        total = self.prior.num_tokens
        hidden = []
        for position in positions:
            drawn = uniforms(total + 1, self.config.seed, epoch, position, _HIDDEN)
            hidden.append(_lowest(drawn[1:], hidden_count(drawn[0], total)))
        return [tokens, torch.from_numpy(np.stack(hidden)), labels]

    def loss(
        self, objective: str, model: nn.Module, batch: list[Tensor], earlier: Mapping[str, StepOutput]
    ) -> StepOutput:
        """Mean of -log p over the hidden tokens of the global batch, in nats."""
        count = batch[1].sum()
        loss = model(*batch).sum() / count
        return StepOutput(loss, {"loss": loss.detach(), "loss/cross_entropy": loss.detach()}, count=count)

    def surprisal(self, rows: NDArray[np.int64], tokens: Tensor, labels: Tensor) -> Tensor:
        """-log p of images (B,) in nats where their tokens are drawn one by one in a random order, estimated.

        With m of n tokens hidden and m uniform in 1..n, n times the mean of -log p over the hidden ones has the mean over all
        orders of -log p(image) as its expectation (arXiv 2110.02037, equation 3): a bound on that of the best order, and
        what makes priors of both kinds comparable. Here m is stratified, and both are functions of the image's number.
        """
        total, found = self.prior.num_tokens, torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        for part in range(PARTS):
            hidden = []
            for row in rows.tolist():
                drawn = uniforms(total + 1, self.config.seed, row, part, _JUDGED)
                count = 1 + min(total - 1, math.floor((part + drawn[0]) / PARTS * total))
                hidden.append(_lowest(drawn[1:], count))
            which = torch.from_numpy(np.stack(hidden)).to(tokens.device)
            found += self.prior(tokens, which, labels).double().sum(1) / which.sum(1) * total / PARTS
        return found


def _lowest(values: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """True at the places of so many of the smallest values."""
    chosen = np.zeros(len(values), np.bool_)
    chosen[np.argsort(values, kind="stable")[:count]] = True
    return chosen
