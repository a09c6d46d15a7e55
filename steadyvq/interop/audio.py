# SPDX-License-Identifier: Apache-2.0
"""The quantizers of audio codecs as ours: DAC, EnCodec and Mimi. Their encoders and decoders stay where they are.

    vq = from_mimi("model.safetensors")
    indices = vq.encode(latents)          # (B, T, layers) of latents (B, d, T)
    latents = vq.decode(indices)

Indices have the layers last here; there they are (B, layers, T) (DAC, Mimi) or (layers, B, T) (EnCodec).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steadyvq.interop.reading import read_checkpoint
from steadyvq.quantizers import Quantizer, VectorQuantizer, build_quantizer
from steadyvq.quantizers.methods.projected import Projected

Source = Mapping[str, Tensor] | str | os.PathLike[str]

_EMA = {"losses": {"commitment": 1.0}, "maintenance": {"ema": {"decay": 0.99}}}
_SMALLEST_USE = 1e-5
"""Below this count a code of Mimi is its sum of latents divided by this."""


class _State:
    """The tensors of a codec's quantizer, taken one by one; what is left at the end is an error."""

    def __init__(self, source: Source, codec: str) -> None:
        state = source if isinstance(source, Mapping) else read_checkpoint(Path(source)).tensors
        whole = any(name.startswith("quantizer.") for name in state)
        self.codec = codec
        self.tensors = {
            name.removeprefix("quantizer."): value.detach().float()
            for name, value in state.items()
            if name.startswith("quantizer.") or not whole
        }

    def take(self, *names: str) -> Tensor:
        """The tensor of the first of these names that is there."""
        for name in names:
            if name in self.tensors:
                return self.tensors.pop(name)
        raise ValueError(
            f"there is no {' or '.join(names)}, which a quantizer of {self.codec} has: give its state dict"
        )

    def count(self, pattern: str) -> int:
        """How many layers there are; `{i}` of the pattern is their number."""
        form = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)") + r"\..*")
        return len({match[1] for match in map(form.fullmatch, self.tensors) if match})

    def finish(self, quantizer: Quantizer) -> Quantizer:
        """The quantizer in evaluation mode; ValueError if tensors are left over."""
        if self.tensors:
            left = sorted(self.tensors)
            more = f" and {len(left) - 4} more" if len(left) > 4 else ""
            raise ValueError(f"{', '.join(left[:4])}{more} of this quantizer of {self.codec} has no counterpart here")
        return quantizer.eval()


def from_dac(source: Source) -> Quantizer:
    """The quantizer of a Descript Audio Codec: `residual` with `projected` layers that search by cosine.

    Args:
        source: The checkpoint, or the state dict of the codec or of its quantizer (weight norm in any of its forms).

    Raises:
        ValueError: Tensors are missing, left over or do not fit.
    """
    state = _State(source, "DAC")
    count = state.count("quantizers.{i}")
    tables = [state.take(f"quantizers.{i}.codebook.weight") for i in range(max(1, count))]
    maps = [[_map_of(state, f"quantizers.{i}.{side}_proj") for side in ("in", "out")] for i in range(count)]
    num_codes, inner_dim = _same_shape(tables, "DAC")
    dim = maps[0][0][0].shape[1]
    quantizer = build_quantizer(
        "residual",
        num_codes=num_codes,
        dim=dim,
        layers=count,
        inner="projected",
        inner_options={
            "inner_dim": inner_dim,
            "inner": "vq",
            "inner_options": {"assign": "cosine", "init": "unit_normal"},
        },
        channel_axis=1,
    )
    for layer, table, (into, out) in zip(_inner(quantizer), tables, maps, strict=True):
        assert isinstance(layer, Projected)
        _copy_table(layer.layers()[0], table)
        for linear, (weight, bias) in ((layer.into, into), (layer.out, out)):
            _copy(linear.weight, weight, "DAC")
            _copy(linear.bias, bias, "DAC")
    return state.finish(quantizer)


def from_encodec(source: Source) -> Quantizer:
    """The quantizer of EnCodec: `residual` with `ema` layers.

    Args:
        source: The checkpoint, or the state dict of the codec or of its quantizer, as in its own code or in transformers.

    Raises:
        ValueError: Tensors are missing, left over or do not fit, or a codebook has not been initialised.
    """
    state = _State(source, "EnCodec")
    own = state.count("vq.layers.{i}")
    count = own or state.count("layers.{i}")
    names = [f"vq.layers.{i}._codebook" if own else f"layers.{i}.codebook" for i in range(max(1, count))]
    tables, counts, sums = (
        [state.take(f"{n}.{part}") for n in names] for part in ("embed", "cluster_size", "embed_avg")
    )
    if not all(bool(state.take(f"{name}.inited").all()) for name in names):
        raise ValueError("a codebook of this EnCodec waits for its k-means start: run a batch through it first")
    num_codes, dim = _same_shape(tables, "EnCodec")
    quantizer = build_quantizer(
        "residual",
        num_codes=num_codes,
        dim=dim,
        layers=count,
        inner="ema",
        inner_options=_EMA,
        estimator="each",
        reduction="mean",
        channel_axis=1,
    )
    for layer, table, hits, total in zip(_inner(quantizer), tables, counts, sums, strict=True):
        _copy_averages(layer, table, hits, total)
    return state.finish(quantizer)


def from_mimi(source: Source) -> Quantizer:
    """The quantizer of Mimi: a projected codebook for meaning beside a projected `residual`, added.

    Args:
        source: The checkpoint, or the state dict of the codec or of its quantizer, as in its own code or in transformers.

    Raises:
        ValueError: Tensors are missing, left over or do not fit, or a codebook has not been initialised.
    """
    state = _State(source, "Mimi")
    if any(name.startswith("rvq_first.") for name in state.tensors):
        branches, layer = ("rvq_first", "rvq_rest"), "vq.layers.{i}._codebook"
        parts = ("embedding_sum", "cluster_usage", "_initialized")
    else:
        branches = ("semantic_residual_vector_quantizer", "acoustic_residual_vector_quantizer")
        layer, parts = "layers.{i}.codebook", ("embed_sum", "cluster_usage", "initialized")
    read = [_mimi_branch(state, branch, layer, parts) for branch in branches]
    num_codes, inner_dim = _same_shape([sums for branch in read for sums, _ in branch[2]], "Mimi")
    dim = read[0][0].shape[1]
    quantizer = build_quantizer(
        "summed",
        num_codes=num_codes,
        dim=dim,
        parts=[
            {
                "name": "projected",
                "inner": "residual",
                "inner_dim": inner_dim,
                "bias": False,
                "inner_options": {"layers": len(layers), "inner": "ema", "inner_options": _EMA, "estimator": "each"},
            }
            for _, _, layers in read
        ],
        channel_axis=1,
    )
    for branch, (into, out, layers) in zip(_inner(quantizer), read, strict=True):
        assert isinstance(branch, Projected)
        _copy(branch.into.weight, into, "Mimi")
        _copy(branch.out.weight, out, "Mimi")
        for one, (sums, counts) in zip(_inner(branch.layers()[0]), layers, strict=True):
            _copy_averages(one, sums / counts.clamp_min(_SMALLEST_USE)[:, None], counts, sums)
    return state.finish(quantizer)


def _mimi_branch(
    state: _State, branch: str, layer: str, parts: tuple[str, str, str]
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """The two maps of a branch, and sums and counts of its layers."""
    into, out = (state.take(f"{branch}.{side}_proj.weight").squeeze(-1) for side in ("input", "output"))
    names = [f"{branch}.{layer.format(i=i)}" for i in range(max(1, state.count(f"{branch}.{layer}")))]
    layers = [(state.take(f"{name}.{parts[0]}"), state.take(f"{name}.{parts[1]}")) for name in names]
    if not all(bool(state.take(f"{name}.{parts[2]}").all()) for name in names):
        raise ValueError("a codebook of this Mimi waits for its k-means start: run a batch through it first")
    return into, out, layers


def _map_of(state: _State, name: str) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias of a convolution of width 1, with weight norm resolved."""
    parametrized = f"{name}.parametrizations.weight.original"
    if f"{name}.weight" in state.tensors:
        weight = state.take(f"{name}.weight")
    else:
        length = state.take(f"{name}.weight_g", f"{parametrized}0")
        direction = state.take(f"{name}.weight_v", f"{parametrized}1")
        # Weight norm: every output's weights are a direction times a length.
        weight = torch.nn.functional.normalize(direction.flatten(1), dim=1, eps=0.0) * length.reshape(-1, 1)
    return weight.reshape(weight.shape[:2]), state.take(f"{name}.bias")


def _inner(quantizer: Quantizer) -> list[Quantizer]:
    layers: Any = quantizer.inner
    return list(layers)


def _same_shape(tables: list[Tensor], codec: str) -> tuple[int, int]:
    shapes = {tuple(table.shape) for table in tables}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(
            f"the codebooks of this {codec} have shapes {sorted(shapes)}, but those here are of one (K, d)"
        )
    return tables[0].shape[0], tables[0].shape[1]


@torch.no_grad()
def _copy(ours: Tensor, theirs: Tensor, codec: str) -> None:
    if ours.shape != theirs.shape:
        raise ValueError(f"a tensor of this {codec} is {tuple(theirs.shape)}, which does not fit {tuple(ours.shape)}")
    ours.copy_(theirs)


@torch.no_grad()
def _copy_table(quantizer: Quantizer, table: Tensor) -> None:
    assert isinstance(quantizer, VectorQuantizer)
    quantizer.codes.base.copy_(table)


@torch.no_grad()
def _copy_averages(quantizer: Quantizer, table: Tensor, counts: Tensor, sums: Tensor) -> None:
    """Table and moving averages of an `ema` layer."""
    _copy_table(quantizer, table)
    assert isinstance(quantizer, VectorQuantizer)
    ema: Any = quantizer.maintenance["ema"]
    ema.counts.copy_(counts)
    ema.sums.copy_(sums)
