# SPDX-License-Identifier: Apache-2.0
"""A close look at one optimiser step: its latents against the table they were looked up in, and what the step did to it."""

import math
from typing import Any

import torch
from torch import Tensor

from steadyvq.diagnosis.adapters import Record
from steadyvq.diagnosis.meters import Reduce, closeness, code_step, sample_of, spaced, table_numbers

SUMS = ("error", "latent_square", "latent_spread", "missed", "winner_mass", "log_losers")
SOFT = ("winner_mass", "effective_losers")


@torch.no_grad()
def table_of(record: Record) -> Tensor:
    """A copy of the codebook as it is now."""
    return record.codebook().detach().clone()


def latents_of(record: Record) -> Tensor:
    """The latents of a call as rows (N, d)."""
    latents = record.latents if isinstance(record.latents, Tensor) else record.latents()
    return latents.detach().reshape(-1, latents.shape[-1])


def look(records: list[Record], before: Tensor | None, reduce: Reduce, device: torch.device) -> dict[str, Any]:
    """Numbers about one step.

    Args:
        records: The training forwards of this step in this process.
        before: The table (K, d) before the step; None where nobody looked.
        reduce: Sums over processes; called once.
        device: Where sums over processes are made.

    Returns:
        The numbers by name; those that cannot be known are None.
    """
    sums = torch.zeros(len(SUMS), 2, dtype=torch.float64)
    own: dict[str, Any] = {}
    if records:
        table = table_of(records[-1]) if before is None else before
        sums = _closeness(records[-1], table)
        own = _own(records, table, before)
    sums = reduce(sums.to(device)).cpu()
    if not float(sums[0, 1]):
        return own
    mean = {name: float(total / count) for name, (total, count) in zip(SUMS, sums, strict=True)}
    spread, dim = mean["latent_spread"], own.get("dim")
    size = math.sqrt(mean["latent_square"] / dim) if dim else None
    return {
        **own,
        "distance_rms": math.sqrt(mean["error"]),
        "relative_error": mean["error"] / spread if spread else None,
        "latent_rms": size,
        "latent_spread": math.sqrt(spread),
        "norm_ratio": own["code_rms"] / size if size and "code_rms" in own else None,
        "missed": None if before is None else mean["missed"],
        "natural_winner_mass": mean["winner_mass"],
        "natural_losers": math.exp(mean["log_losers"]),
    }


def _closeness(record: Record, table: Tensor) -> Tensor:
    flat = record.indices.detach().reshape(-1).to(torch.int64)
    valid = (flat >= 0).nonzero().reshape(-1)
    if not len(valid):
        return torch.zeros(len(SUMS), 2, dtype=torch.float64)
    valid = valid[spaced(len(valid), sample_of(len(table)), valid.device)]
    with torch.no_grad():
        rows = latents_of(record)[valid]
    seen = closeness(rows, flat[valid], table.to(rows.device), record.metric)
    return torch.tensor([seen[name] for name in SUMS], dtype=torch.float64)


def _own(records: list[Record], table: Tensor, before: Tensor | None) -> dict[str, Any]:
    """What this process knows by itself: the table is the same in all of them."""
    record = records[-1]
    picked = spaced(len(table), device=table.device)
    numbers: dict[str, Any] = {
        "dim": table.shape[1],
        **table_numbers(table, record.metric),
        **{name: float(record.stats[name]) for name in SOFT if name in record.stats},
        "dtypes": _dtypes(record, table),
        "code_step": None,
        "moved_codes": None,
    }
    if before is not None:
        hits = torch.zeros(len(table) + 1, dtype=torch.bool, device=table.device)
        for item in records:
            hits[item.indices.detach().reshape(-1).to(table.device, torch.int64) + 1] = True
        numbers |= code_step(before[picked], table_of(record)[picked], hits[1:][picked])
    gradient = None if record.parameter is None else record.parameter.grad
    if gradient is not None:
        numbers["gradient_codes"] = float((gradient[picked] != 0).any(1).double().mean())
    return numbers


def _dtypes(record: Record, table: Tensor) -> dict[str, str | None]:
    """What the look-up was given; `autocast` is what products are computed in, if that is on."""
    kind = table.device.type
    cast = torch.get_autocast_dtype(kind) if record.autocast else None
    names = {"latents": latents_of(record).dtype, "codebook": table.dtype, "autocast": cast}
    return {name: None if value is None else str(value).removeprefix("torch.") for name, value in names.items()}
