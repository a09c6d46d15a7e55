# SPDX-License-Identifier: Apache-2.0
"""What a monitor measures: ages of codes at every step, and a close look at one step in a hundred.

The state is O(K): hits and ages of the codes. The close look takes at most `SAMPLE` latents and `SAMPLE` codes.
Sums go through `reduce`, so that several processes count as one: the hits of each step, and the close look.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from steadyvq.diagnosis.adapters import Metric, compared
from steadyvq.diagnosis.thresholds import DYING, IDLE_HITS, JUMP, JUMP_OF_SPREAD
from steadyvq.metrics.usage import UsageMeter

SAMPLE, FEWEST = 256, 64
"""Most and fewest latents, and codes, of a close look."""
PRODUCTS = 1 << 20
"""With large tables fewer are taken, so that there are about this many distances."""
AGES = (1, 5, IDLE_HITS, 100)
"""Bounds of the ages of codes, in tokens per code."""
MEMORY = 3
"""Looks at the ages of codes in which somebody must have revived one, or nobody does."""
BLOCK = 1 << 22
"""Most distances held at once."""
TWIN = 0.01
"""A duplicate lies within this share of a code's own length."""
MISSED = 1e-5
"""A look-up missed where a code is nearer than the selected one by more than this share of the squared distance."""

Reduce = Callable[[Tensor], Tensor]


class CodeAges:
    """When each code was last hit, in tokens of all processes.

    Args:
        num_codes: K.
        device: Where the indices are.

    Attributes:
        pending: Hits of this process in the present step (K + 1,); the first entry takes masked positions.
        last: Tokens seen at the end of the step that last hit each code (K,), -1 for never.
        tokens: Tokens seen (0-d).
        window: Hits since the last row of the log.
        peak: The most codes that were alive at once.
        marks: The codes along one fixed direction (K,), at the last look; a number for each is enough to see one jump. None
            while no codes are dying.
        revived: Dead codes that were moved by other means than learning, in each of the last `MEMORY` looks.
    """

    def __init__(self, num_codes: int, device: torch.device | str = "cpu") -> None:
        self.num_codes = num_codes
        self.pending = torch.zeros(num_codes + 1, dtype=torch.int64, device=device)
        self.last = torch.full((num_codes,), -1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.window = UsageMeter(num_codes, device)
        self.peak = 0
        self.marks: Tensor | None = None
        self.revived: list[int] = []

    def count(self, indices: Tensor) -> None:
        """Counts one forward; no number leaves the device."""
        flat = indices.detach().reshape(-1).to(device=self.last.device, dtype=torch.int64) + 1
        self.pending.index_add_(0, flat, torch.ones_like(flat))

    def end_step(self, reduce: Reduce) -> None:
        """Adds up the step over processes, so that all of them know the same; no number leaves the device."""
        hits = reduce(self.pending[1:])
        self.window.counts += hits
        self.tokens += hits.sum()
        self.last = torch.where(hits > 0, self.tokens, self.last)
        self.pending.zero_()

    def alive(self, table: Callable[[], Tensor]) -> dict[str, Any]:
        """Codes alive now (hit within the last 20 K tokens), at the peak, and lost since; shares of codes by age.

        Args:
            table: Returns the codebook (K, d) as it is now; it may cost something, and is only asked once codes are dying.
        """
        seen = self.last >= 0
        age = self.tokens - self.last
        young = torch.stack([seen & (age < bound * self.num_codes) for bound in AGES])
        *counts, tokens = torch.cat([young.sum(1), seen.sum()[None], self.tokens[None]]).tolist()
        alive = counts[AGES.index(IDLE_HITS)]
        self.peak = max(self.peak, alive)
        died = 0.0 if self.peak == 0 else 1 - alive / self.peak
        if died > DYING / 3:
            self._see_jumps(table(), young[AGES.index(IDLE_HITS)])
        else:
            self.marks = None
            self.revived = []
        shares = [count / self.num_codes for count in counts]
        between = [b - a for a, b in itertools.pairwise([0.0, *shares])]
        return {
            "tokens": tokens,
            "alive": alive,
            "peak_alive": self.peak,
            "died": died,
            "revived": sum(self.revived) if self.revived else None,
            "never_hit": 1 - shares[-1],
            "ages": dict(zip([*(f"under_{bound}" for bound in AGES), "older"], between, strict=True)),
        }

    def _see_jumps(self, table: Tensor, alive: Tensor) -> None:
        """Counts dead codes that went farther since the last look than those that learn, and not by a trifle."""
        direction = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        marks = (table.detach() @ direction.to(table)).double().to(self.last.device)
        before, self.marks = self.marks, marks
        if before is None:
            return
        moved = (marks - before).abs()
        usual = moved[alive].median() if bool(alive.any()) else moved.new_zeros(())
        jumped = ~alive & (moved > JUMP * usual) & (moved > JUMP_OF_SPREAD * marks.std())
        self.revived = [*self.revived, int(jumped.sum())][-MEMORY:]

    def usage(self) -> dict[str, Any]:
        """Use of the codes since the last row, beside its ceiling; begins a new window."""
        report = self.window.report()
        self.window.reset()
        names = ("tokens", "active", "utilization", "ceiling", "of_ceiling", "perplexity")
        return {f"window_{name}" if name == "tokens" else name: getattr(report, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {
            "last": self.last.clone(),
            "tokens": self.tokens.clone(),
            "window": self.window.counts.clone(),
            "peak": self.peak,
            "marks": None if self.marks is None else self.marks.clone(),
            "revived": list(self.revived),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`."""
        self.last.copy_(state["last"])
        self.tokens.copy_(state["tokens"])
        self.window.load_state({"counts": state["window"]})
        self.marks = None if state["marks"] is None else state["marks"].to(self.last.device, copy=True)
        self.peak, self.revived = int(state["peak"]), [int(count) for count in state["revived"]]


def sample_of(num_codes: int) -> int:
    """How many latents, or codes, are compared with the whole table."""
    return min(SAMPLE, max(FEWEST, PRODUCTS // num_codes))


def spaced(count: int, most: int = SAMPLE, device: torch.device | str = "cpu") -> Tensor:
    """At most `most` positions spread evenly over `count`."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().to(torch.int64).to(device)


@torch.no_grad()
def closeness(latents: Tensor, indices: Tensor, table: Tensor, metric: Metric) -> dict[str, tuple[float, float]]:
    """A close look at some latents (n, d) with their indices (n,) and the whole table (K, d).

    Returns:
        By name a sum over latents and what to divide it by: `error` (squared distance to the selected code), `latent_square`
        and `latent_spread` (squared length, from 0 and from the mean), `missed` (a code was nearer than the selected one), and
        `winner_mass` and `log_losers` of the softmax whose tau is the mean squared distance to the selected codes.
    """
    with torch.autocast(latents.device.type, enabled=False):
        z, codes = (compared(x.detach().double(), metric) for x in (latents, table))
        selected = (codes[indices] - z).square().sum(1)
        tau = selected.mean().clamp_min(1e-30)
        missed = mass = losers = z.new_zeros(())
        for rows, distance in _distances(z, codes):
            least, first = distance.min(1, keepdim=True)
            nearest = (codes[first[:, 0]] - z[rows]).square().sum(1)
            missed = missed + (selected[rows] - nearest > MISSED * selected[rows]).sum()
            # With the winner's weight 1: its mass is 1 / (1 + s), and the losers' entropy log s - sum w log w / s.
            log_weight = (least - distance).div_(tau.float())
            weight = log_weight.exp()
            s = weight.sum(1) - 1
            mass = mass + (1 / (1 + s)).double().sum()
            entropy = s.clamp_min(1e-37).log() - (weight * log_weight).sum(1) / s.clamp_min(1e-37)
            losers = losers + entropy[s > 1e-30].double().sum()
        square, spread = z.square().sum(), (z - z.mean(0)).square().sum()
        sums = torch.stack([selected.sum(), square, spread, missed, mass, losers]).tolist()
    names = ("error", "latent_square", "latent_spread", "missed", "winner_mass", "log_losers")
    return {name: (value, float(len(z))) for name, value in zip(names, sums, strict=True)}


def _distances(z: Tensor, codes: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances (rows, K) in float32, a block of rows at a time; good for candidates, not for close calls."""
    centre = codes.mean(0)
    near, table = (z - centre).float(), (codes - centre).float()
    squared = table.square().sum(1)
    block = max(1, BLOCK // len(table))
    for start in range(0, len(z), block):
        rows = slice(start, start + block)
        part = near[rows]
        yield rows, (part.square().sum(1)[:, None] - 2 * part @ table.T + squared).clamp_min_(0)


@torch.no_grad()
def table_numbers(table: Tensor, metric: Metric) -> dict[str, float]:
    """RMS of the codes' elements, and the share of `duplicates`: codes with another one at a hundredth of their own length.

    The length is measured from the median code, so that neither an offset of all codes nor a handful of far ones matters.
    """
    codes = compared(table.detach().double(), metric)
    picked = spaced(len(codes), sample_of(len(codes)), codes.device)
    median = codes[spaced(len(codes), 4096, codes.device)].median(0).values
    length = (codes[picked] - median).norm(dim=1)
    twins = 0
    with torch.autocast(codes.device.type, enabled=False):
        for rows, distance in _distances(codes[picked], codes):
            own = picked[rows]
            other = distance.scatter_(1, own[:, None], torch.inf).argmin(1)
            twins += int(((codes[own] - codes[other]).norm(dim=1) <= TWIN * length[rows]).sum())
    return {
        "code_rms": float(codes.square().mean().sqrt()),
        "duplicates": twins / len(picked) if len(codes) > 1 else 0.0,
    }


@torch.no_grad()
def code_step(before: Tensor, after: Tensor, hit: Tensor) -> dict[str, float | None]:
    """How far codes went in one update: RMS over sampled codes (n, d) that were hit in it, and the share that moved."""
    moved = (after.double() - before.double()).square().sum(1)
    step = float(moved[hit].mean().sqrt()) if bool(hit.any()) else None
    return {"code_step": step, "moved_codes": float((moved > 0).double().mean())}
