# SPDX-License-Identifier: Apache-2.0
"""Training a prior over stored tokens that are drawn as tokens, as a task of the loop: the autoregressive one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor, nn

from steadyvq.generation.autoregressive import AutoregressivePrior
from steadyvq.generation.body import TokenPrior
from steadyvq.generation.sampling import SamplingConfig, sample_tokens
from steadyvq.generation.token_task import TokenTask
from steadyvq.models import Tokenizer
from steadyvq.training.prior_config import PriorConfig
from steadyvq.training.run import RunFolder
from steadyvq.training.strict import from_dict
from steadyvq.training.task import StepOutput


class PriorTask(TokenTask):
    """An autoregressive prior on stored tokens.

    Attributes:
        model: The prior; subclasses have others.
    """

    kind = "autoregressive"
    drawing = SamplingConfig
    model: ClassVar[Any] = AutoregressivePrior
    watchable = frozenset({"loss", "cross_entropy"})
    best = ("cross_entropy", "min")
    columns: ClassVar[Mapping[str, tuple[str, str]]] = {
        "cross-entropy (nats per token)": ("cross_entropy", ".4f"),
        "bits per image": ("bits_per_image", ".1f"),
        "held-out images": ("held_out_images", ".0f"),
    }
    prior: TokenPrior

    def check_tokens(self) -> None:
        """One code per place, and no more codes than the vocabulary has."""
        tokens, vocabulary = self.tokens, self._vocabulary
        if len(tokens.shape) != 2:
            raise ValueError(
                f"the tokens in {tokens.folder} have shape {tokens.shape} for an image, but this prior knows grids of one code "
                "per place: tokenise with a quantizer that gives a latent one code"
            )
        if tokens.num_codes > vocabulary:
            raise ValueError(
                f"the tokens in {tokens.folder} are of {tokens.num_codes:,} codes, but prior.vocabulary is {vocabulary:,}: "
                "raise it, or leave it out"
            )

    @property
    def _vocabulary(self) -> int:
        return self.config.prior.vocabulary or self.tokens.num_codes

    def make_prior(self) -> TokenPrior:
        """An untrained prior for these tokens."""
        grid = (self.tokens.shape[0], self.tokens.shape[1])
        made: TokenPrior = self.model(self.config.prior, self._vocabulary, grid, len(self.classes))
        return made

    def facts(self) -> dict[str, Any]:
        """Vocabulary and grid."""
        return {"vocabulary": self.prior.vocabulary, "grid": self.prior.shape}

    @classmethod
    def build(cls, facts: Mapping[str, Any]) -> TokenPrior:
        """The prior that was saved, without its weights."""
        config = from_dict(PriorConfig, facts["config"], "prior")
        height, width = facts["grid"]
        made: TokenPrior = cls.model(config, facts["vocabulary"], (height, width), facts["num_classes"])
        return made

    @staticmethod
    def draw(
        model: TokenPrior,
        labels: Int[Tensor, "B"],
        seed: int,
        numbers: Sequence[int],
        drawing: SamplingConfig,
        tokenizer: Tokenizer,
    ) -> Int[Tensor, "B ..."]:
        """As the prior draws them; codes that the tokenizer does not have become its last."""
        tokens = sample_tokens(model, labels, seed, numbers, drawing).reshape(-1, *model.shape)
        # A prior with more codes than the tokenizer may name one that does not exist.
        return tokens.clamp_max(tokenizer.quantizer.num_codes - 1)

    def batch(self, epoch: int, positions: range) -> list[Tensor]:
        """Tokens (B, n) and classes (B,)."""
        rows, views, labels = self.choose(epoch, positions)
        return [torch.from_numpy(self.tokens.read(rows, views).astype(np.int64)), labels]

    def loss(self, objective: str, model: nn.Module, batch: Any, earlier: Mapping[str, StepOutput]) -> StepOutput:
        """Mean of -log p over the tokens, in nats."""
        loss = model(*batch).mean()
        return StepOutput(loss, {"loss": loss.detach(), "loss/cross_entropy": loss.detach()})

    def surprisal(self, rows: NDArray[np.int64], tokens: Tensor, labels: Tensor) -> Tensor:
        """-log p of images (B,) in nats.

        Args:
            rows: Their numbers.
            tokens: Their tokens (B, n).
            labels: Their classes.
        """
        found: Tensor = self.prior(tokens, labels).double().sum(1)
        return found

    @torch.no_grad()
    def validate(self, step: int, run: RunFolder) -> Mapping[str, float]:
        """Cross-entropy of held-out images in their first view; some samples as a picture."""
        rows = self.held_out[: self.config.data.eval_crops]
        device = next(self.prior.parameters()).device
        total = 0.0
        for start in range(0, len(rows), self.config.batch_size):
            part = rows[start : start + self.config.batch_size]
            tokens = torch.from_numpy(self.tokens.read(part).astype(np.int64))
            total += float(self.surprisal(part, tokens.to(device), self.labels(part).to(device)).double().sum())
        self.show(step, run)
        nats = total / (len(rows) * self.prior.num_tokens)
        bits = nats * self.prior.num_tokens / math.log(2)
        return {"cross_entropy": nats, "bits_per_image": bits, "held_out_images": float(len(rows))}
