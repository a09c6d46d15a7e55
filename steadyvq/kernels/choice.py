# SPDX-License-Identifier: Apache-2.0
"""Which kernel is used for which problem, and why: the choice behind the backend "auto"."""

from typing import NamedTuple

import torch
from torch import Tensor

from steadyvq.kernels import native, streaming, triton
from steadyvq.kernels.rounding import working_dtype


class Choice(NamedTuple):
    """The kernel for a problem.

    Attributes:
        backend: "native", "triton" or "streaming".
        reason: one sentence.
    """

    backend: str
    reason: str


def search_choice(
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
        return _on_card(
            device, dtype, dim, "bounds from bfloat16 products on the tensor cores, winners scored in float64"
        )
    if dim > native.MOST_DIMENSIONS:
        return Choice("streaming", f"the bounds of the compiled kernel hold up to {native.MOST_DIMENSIONS} dimensions")
    refused = _refused(num_latents * num_codes * dim, dtype)
    if refused:
        return Choice("streaming", refused)
    screen = "bfloat16 and again in float32" if native.library().bfloat16 else "float32"
    return Choice("native", f"compiled for this processor; codes are screened in {screen}, winners scored in float64")


def softmax_choice(
    num_latents: int, num_codes: int, dim: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Choice:
    """What reduces the softmax over codes of squared distances; the arguments are those of `search_choice`."""
    if device != "cpu":
        return _on_card(device, dtype, dim, "weights are computed twice and never written, sums have one owner each")
    refused = _refused(num_latents * num_codes * dim, dtype)
    if refused:
        return Choice("streaming", refused)
    return Choice(
        "native", "compiled for this processor; weights and their sums over codes in one pass over the logits"
    )


def _on_card(device: str, dtype: torch.dtype, dim: int, how: str) -> Choice:
    refused = "Triton's interpreter is for tests" if triton.interpreted() else triton.unusable(device, dtype, dim)
    if refused:
        return Choice("streaming", f"torch operators run on any device, and this is {device}: {refused}")
    return Choice("triton", f"compiled for this card by Triton; {how}")


def _refused(work: int, dtype: torch.dtype) -> str:
    """Why the compiled kernels do not suit; empty if they do."""
    if dtype == torch.float64:
        return "the compiled kernels are for float32 or shorter, and these are float64"
    if work < native.LEAST_WORK:
        return "so small a problem does not need a compiled kernel"
    found = native.library()
    return "" if found.functions is not None else f"there is no compiled kernel: {found.reason}"


def uses_triton(z: Tensor, table: Tensor) -> bool:
    """Whether "auto" gives these tensors to Triton."""
    if z.device.type == "cpu":
        return False
    chosen = search_choice(1, 1, z.shape[1], device=z.device.type, dtype=working_dtype(z, table))
    return chosen.backend == "triton" and not triton.failed(z.device)


def nearest(z: Tensor, table: Tensor, *, dot: bool = False) -> tuple[Tensor, Tensor]:
    """Exact nearest code of every latent by the search that suits; same contract as `reference.nearest`."""
    if uses_triton(z, table):
        return triton.nearest(z, table, dot=dot)
    dtype = working_dtype(z, table)
    backend, _ = search_choice(z.shape[0], table.shape[0], z.shape[1], device=z.device.type, dtype=dtype)
    return native.nearest(z, table, dot=dot) if backend == "native" else streaming.nearest(z, table, dot=dot)
