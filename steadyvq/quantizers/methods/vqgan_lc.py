# SPDX-License-Identifier: Apache-2.0
"""VQGAN-LC: the codebook is a trained linear projection of frozen features.

    E = F W^T + b,   F (K, d') frozen,   q_i = argmin_j |z_i - E_j|^2,   straight-through
    L = 0.1 (mean (sg[E_q] - z)^2 + 0.33 mean (E_q - sg[z])^2)

All codes move with W and b, as in SimVQ; here F is made of data: in the paper, k-means centres of CLIP features.

Source: VQGAN-LC, arXiv 2406.11837, section 3.3, and its code: weights 1 and 0.33 under a rate of 0.1, W ~ N(0, 1/d).
Differs from the source: the features come from a safetensors file with one tensor of shape (K, d'), or, without one, from
`init_from(latents)`: then F holds k-means centres of these latents, d' = d, and the projection starts as the identity.
Before either, F is random. The official `decode_code` fails; here `decode` uses E, as forward does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steadyvq.files import read_tensors
from steadyvq.quantizers.base import Quantizer
from steadyvq.quantizers.codebooks import Codebook, LinearCodebook
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.registry import register

PARTS: dict[str, Any] = {"init": "normal", "losses": {"commitment": 0.1, "codebook": 0.033}}


class ProjectedFeatures(LinearCodebook):
    """E = F W^T + b.

    Args:
        features: F (K, d').
        dim: d.
        generator: Of the start of W ~ N(0, 1/d); b starts as torch.nn.Linear's.
        placed: Whether rows may be put into F, so that they are the codes.
    """

    def __init__(self, features: Tensor, dim: int, generator: torch.Generator, *, placed: bool) -> None:
        super().__init__(features, generator, dim=dim)
        with torch.no_grad():
            self.weight.normal_(0, dim**-0.5, generator=generator)
        if not placed:
            self.cannot_place = (
                "they are projections of given features, which stay as they are; leave out `features` to have the latents "
                "themselves as features"
            )

    def set_rows_(self, rows: Tensor) -> None:
        """Makes the rows the features and the projection the identity, unless the features were given."""
        if self.cannot_place:
            raise ValueError(f"set_rows_ cannot place codes: {self.cannot_place}")
        super().set_rows_(rows)


def read_features(path: str, num_codes: int) -> Tensor:
    """The one tensor (K, d') of a safetensors file.

    Raises:
        ValueError: No such file, several tensors, or another shape.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"features is {path!r}, but there is no such file: give a safetensors file with the features")
    tensors = read_tensors(file)
    if len(tensors) != 1:
        names = ", ".join(sorted(tensors)) or "none"
        raise ValueError(f"{path} holds {len(tensors)} tensors ({names}), but the features must be its only one")
    (features,) = tensors.values()
    shape = tuple(features.shape)
    if features.dim() != 2 or not features.is_floating_point() or shape[0] != num_codes or not shape[1]:
        raise ValueError(
            f"the features in {path} have shape {shape} and dtype {features.dtype}, but num_codes={num_codes} needs "
            f"floating-point numbers of shape ({num_codes}, d'), one row per code"
        )
    if not features.isfinite().all():
        raise ValueError(f"the features in {path} are not all finite: leave out the broken rows")
    return features.float()


@register(
    "vqgan_lc",
    paper="VQGAN-LC, arXiv 2406.11837",
    summary="one linear map moves all codes of frozen features of data",
    cost="N K d + K d d'; stores d d'",
)
def vqgan_lc(
    num_codes: int, dim: int, *, features: str | None = None, feature_dim: int | None = None, **overrides: Any
) -> Quantizer:
    """VQGAN-LC.

    Args:
        num_codes: K.
        dim: d.
        features: A safetensors file whose only tensor is F (K, d').
        feature_dim: d' of a random F, for weights that are loaded into it later; a saved layer names it in its `spec`, so
            that it is read back without the file.
        **overrides: See `build_quantizer`.
    """
    if features is not None and feature_dim is not None:
        raise ValueError(
            "features and feature_dim are both given, but the file says how long its features are: give one"
        )

    def make(rows: Tensor, generator: torch.Generator) -> Codebook:
        if features is not None:
            rows = read_features(features, num_codes)
        elif feature_dim is not None:
            rows = torch.empty(num_codes, feature_dim).normal_(generator=generator)
        return ProjectedFeatures(rows, dim, generator, placed=features is None and feature_dim is None)

    quantizer = compose(num_codes, dim, {**PARTS, "codebook": make}, overrides)
    if features is not None:
        quantizer.spec_changes = {"features": None, "feature_dim": quantizer.codes.base.shape[1]}
    return quantizer
