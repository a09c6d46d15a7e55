# SPDX-License-Identifier: Apache-2.0
"""How much of a codebook is used, always beside what a uniform source of as many tokens would use."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UsageReport:
    """Code usage of one named set of tokens.

    Attributes:
        num_codes: K, the size of the codebook.
        tokens: Tokens counted (masked ones are not).
        active: Codes hit at least once.
        utilization: active / K, in [0, 1].
        ceiling: 1 - (1 - 1/K)**tokens, the utilization to expect from as many tokens drawn uniformly, in [0, 1].
        of_ceiling: utilization / ceiling; it may exceed 1. 0 without tokens.
        perplexity: exp(entropy of the code frequencies), between 1 and K; 0 without tokens.
        entropy_bits: The entropy in bits per token.
    """

    num_codes: int
    tokens: int
    active: int
    utilization: float
    ceiling: float
    of_ceiling: float
    perplexity: float
    entropy_bits: float

    def __str__(self) -> str:
        return (
            f"{self.active}/{self.num_codes} codes ({100 * self.utilization:.1f} %; a uniform source of "
            f"{self.tokens:,} tokens would reach {100 * self.ceiling:.1f} %), perplexity {self.perplexity:.0f}"
        )


class UsageMeter:
    """Counts how often each code is hit; counts add up exactly over batches and processes.

    Args:
        num_codes: K, the size of the codebook.
        device: Where the counts live; put it where the indices are.

    Attributes:
        counts: Hits per code, (K,) int64. Summing it over processes gives the meter of their union.
    """

    def __init__(self, num_codes: int, device: torch.device | str = "cpu") -> None:
        if num_codes < 1:
            raise ValueError(f"num_codes is {num_codes}, but a codebook has at least 1 code: pass num_codes >= 1")
        self.num_codes = num_codes
        self.counts = torch.zeros(num_codes, dtype=torch.int64, device=device)

    def update(self, indices: Tensor) -> None:
        """Count a batch of indices of any shape.

        Args:
            indices: Integers in [0, K), any shape; -1 marks masked positions, which are not counted.

        Raises:
            ValueError: An index is outside [-1, K).
        """
        flat = indices.detach().reshape(-1).to(device=self.counts.device, dtype=torch.int64)
        if flat.numel() == 0:
            return
        low, high = (int(bound) for bound in torch.aminmax(flat))
        if low < -1 or high >= self.num_codes:
            raise ValueError(
                f"indices reach from {low} to {high}, but this meter has num_codes={self.num_codes}: "
                f"pass indices in [0, {self.num_codes}), or -1 for masked positions"
            )
        self.counts += torch.bincount(flat + 1, minlength=self.num_codes + 1)[1:]

    def merge(self, other: "UsageMeter") -> None:
        """Add the counts of another meter of the same codebook size."""
        if other.num_codes != self.num_codes:
            raise ValueError(
                f"cannot merge a meter of {other.num_codes} codes into one of {self.num_codes}: "
                "merge meters of one codebook size"
            )
        self.counts += other.counts.to(self.counts.device)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the counts for a checkpoint."""
        return {"counts": self.counts.clone()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        if state["counts"].shape != self.counts.shape:
            raise ValueError(
                f"the saved counts are of {state['counts'].numel()} codes, but this meter has "
                f"num_codes={self.num_codes}: load them into a meter of the saved size"
            )
        self.counts.copy_(state["counts"])

    def reset(self) -> None:
        """Forget everything counted."""
        self.counts.zero_()

    def report(self) -> UsageReport:
        """Summarise the counts so far."""
        tokens = int(self.counts.sum())
        hits = self.counts[self.counts > 0].to(device="cpu", dtype=torch.float64)
        utilization = hits.numel() / self.num_codes
        ceiling = uniform_utilization(self.num_codes, tokens)
        shares = hits / max(tokens, 1)
        # The entropy of a single used code comes out as -0.0.
        entropy = abs(float(-(shares * shares.log()).sum()))
        return UsageReport(
            num_codes=self.num_codes,
            tokens=tokens,
            active=hits.numel(),
            utilization=utilization,
            ceiling=ceiling,
            of_ceiling=utilization / ceiling if tokens else 0.0,
            perplexity=math.exp(entropy) if tokens else 0.0,
            entropy_bits=entropy / math.log(2),
        )


def uniform_utilization(num_codes: int, tokens: int) -> float:
    """Return 1 - (1 - 1/K)**n, the expected fraction of K codes that n uniform draws hit at least once.

    Args:
        num_codes: K >= 1.
        tokens: n >= 0.
    """
    if num_codes == 1:
        return float(tokens > 0)
    # The plain power loses all digits where K is large and n small.
    return -math.expm1(tokens * math.log1p(-1.0 / num_codes))
