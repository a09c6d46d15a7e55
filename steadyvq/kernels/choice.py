# SPDX-License-Identifier: Apache-2.0
"""Which search is used for which problem, and why: the choice behind the backend "auto"."""

from typing import NamedTuple

import torch
from torch import Tensor

from steadyvq.kernels import native, streaming
from steadyvq.kernels.rounding import working_dtype


class Choice(NamedTuple):
    """The search for a problem.

    Attributes:
        backend: "native" or "streaming".
        reason: one sentence.
    """

    backend: str
    reason: str


def choose(
    num_latents: int, num_codes: int, dim: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Choice:
    """The search that "auto" uses for N latents and K codes of d dimensions.

    Args:
        num_latents: N.
        num_codes: K.
        dim: d.
        device: type of the device.
        dtype: float64, or anything shorter.
    """
    if device != "cpu":
        return Choice("streaming", f"tiles of torch products run on any device, and this is {device}")
    if dtype == torch.float64:
        return Choice("streaming", "the compiled kernel screens in float32 or less, and these are float64")
    if dim > native.MOST_DIMENSIONS:
        return Choice("streaming", f"the bounds of the compiled kernel hold up to {native.MOST_DIMENSIONS} dimensions")
    if num_latents * num_codes * dim < native.LEAST_WORK:
        return Choice("streaming", "so small a problem does not need a compiled kernel")
    found = native.library()
    if found.functions is None:
        return Choice("streaming", f"there is no compiled kernel: {found.reason}")
    screen = "bfloat16 and looked at again in float32" if found.bfloat16 else "float32"
    return Choice(
        "native", f"compiled for this processor; bundles of codes are screened in {screen}, winners scored in float64"
    )


def nearest(z: Tensor, table: Tensor, *, dot: bool = False) -> tuple[Tensor, Tensor]:
    """Exact nearest code of every latent by the search that suits; same contract as `reference.nearest`."""
    dtype = working_dtype(z, table)
    backend, _ = choose(z.shape[0], table.shape[0], z.shape[1], device=z.device.type, dtype=dtype)
    return native.nearest(z, table, dot=dot) if backend == "native" else streaming.nearest(z, table, dot=dot)
