# SPDX-License-Identifier: Apache-2.0
"""What the layers of our autoencoders are called in the code of others, and the sizes that names and shapes tell.

A `Dialect` is one project's way of naming the layers of the same architecture; `layer_pairs` gives, for a size, every
layer's name here and there. Import reads them one way and export the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from steadyvq.models import AutoencoderConfig

State = Mapping[str, Tensor]
Form = Literal["same", "linear", "shuffled", "patches"]


class Pair(NamedTuple):
    """One tensor here and there; `form` says how its values are arranged there."""

    ours: str
    theirs: str
    form: Form = "same"


def arranged_here(value: Tensor, form: Form) -> Tensor:
    """A tensor of another project in our arrangement."""
    if form == "linear" and value.dim() == 2:
        return value[..., None, None]
    if form == "shuffled":
        # Depth-to-space there reads channels as (2, 2, width), PixelShuffle as (width, 2, 2).
        return value.reshape(4, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
    if form == "patches" and value.dim() == 4:
        return value.permute(0, 2, 3, 1).flatten(1)
    return value


def arranged_there(value: Tensor, form: Form) -> Tensor:
    """The inverse of `arranged_here`, for the forms that are written."""
    if form == "linear" and value.dim() == 4:
        return value[..., 0, 0]
    return value


@dataclass(frozen=True)
class Dialect:
    """Names of one project. `{i}` in `down` and `up` is the level.

    Attributes:
        layout: Of our autoencoder (`AutoencoderConfig.layout`).
        down: A level of the encoder.
        up: A level of the decoder.
        up_from_lowest: Whether `{i}` of `up` counts from the lowest resolution, as our levels do.
        res: The list of residual blocks in a level.
        attention: The list of attention blocks in a level.
        skip: The convolution of a residual block whose width changes.
        mid_res: The residual blocks at the lowest resolution; one name with `{j}`, or two.
        mid_attention: The attention there.
        parts: The layers of an attention block: norm, q, k, v, proj.
        linear: Whether these are linear layers instead of 1x1 convolutions.
        shrink: The layer that halves the resolution.
        grow: The layer that doubles it.
        norm_out: The last norm.
    """

    layout: Literal["simvq", "vqgan"]
    down: str
    up: str
    up_from_lowest: bool = False
    res: str = "block"
    attention: str = "attn"
    skip: str = "nin_shortcut"
    mid_res: tuple[str, ...] = ("mid.block_1", "mid.block_2")
    mid_attention: str = "mid.attn_1"
    parts: tuple[str, str, str, str, str] = ("norm", "q", "k", "v", "proj_out")
    linear: bool = False
    shrink: str = "downsample.conv"
    grow: str = "upsample.conv"
    norm_out: str = "norm_out"


TAMING = Dialect("vqgan", "encoder.down.{i}", "decoder.up.{i}")
LLAMAGEN = Dialect(
    "vqgan",
    "encoder.conv_blocks.{i}",
    "decoder.conv_blocks.{i}",
    up_from_lowest=True,
    res="res",
    mid_res=("mid.0", "mid.2"),
    mid_attention="mid.1",
)
DIFFUSERS = Dialect(
    "vqgan",
    "encoder.down_blocks.{i}",
    "decoder.up_blocks.{i}",
    up_from_lowest=True,
    res="resnets",
    attention="attentions",
    skip="conv_shortcut",
    mid_res=("mid_block.resnets.0", "mid_block.resnets.1"),
    mid_attention="mid_block.attentions.0",
    parts=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    linear=True,
    shrink="downsamplers.0.conv",
    grow="upsamplers.0.conv",
    norm_out="conv_norm_out",
)
MAGVIT = Dialect(
    "simvq",
    "encoder.down.{i}",
    "decoder.up.{i}",
    mid_res=("mid_block.{j}",),
    shrink="downsample",
    grow="upsample.conv1",
)

_ATTENTION_PARTS = ("norm", "q", "k", "v", "proj")


def layer_pairs(config: AutoencoderConfig, dialect: Dialect) -> Iterator[Pair]:
    """Every layer (not tensor) of encoder and decoder of a size, here and there."""
    for side in ("encoder", "decoder"):
        for name, theirs in (("conv_in", "conv_in"), ("norm_out", dialect.norm_out), ("conv_out", "conv_out")):
            yield Pair(f"{side}.{name}", f"{side}.{theirs}")
        yield from _levels(config, dialect, side)
        yield from _middle(config, dialect, side)


def _levels(config: AutoencoderConfig, dialect: Dialect, side: str) -> Iterator[Pair]:
    lowest = len(config.multipliers) - 1
    encoder = side == "encoder"
    count = config.num_res_blocks
    if not encoder and config.layout == "vqgan":
        count = count + 1 if config.decoder_res_blocks is None else config.decoder_res_blocks
    for level in range(lowest + 1):
        resolution = level if encoder else lowest - level
        number = resolution if encoder or not dialect.up_from_lowest else level
        ours = f"{side}.levels.{level}"
        theirs = (dialect.down if encoder else dialect.up).format(i=number)
        stride = 2 if resolution in config.attention else 1
        for j in range(count):
            yield from _res_block(f"{ours}.{stride * j}", f"{theirs}.{dialect.res}.{j}", dialect)
            if stride == 2:
                yield from _attention(f"{ours}.{stride * j + 1}", f"{theirs}.{dialect.attention}.{j}", dialect)
        if config.adaptive and not encoder:
            for part in ("gamma", "beta"):
                yield Pair(f"decoder.adaptive.{level}.{part}", f"decoder.adaptive.{resolution}.{part}")
        if level < lowest:
            end = f"{ours}.{stride * count}"
            yield _resample(end, theirs, dialect, encoder)


def _resample(ours: str, theirs: str, dialect: Dialect, encoder: bool) -> Pair:
    if dialect.layout == "vqgan":
        return Pair(f"{ours}.conv", f"{theirs}.{dialect.shrink if encoder else dialect.grow}")
    return (
        Pair(ours, f"{theirs}.{dialect.shrink}")
        if encoder
        else Pair(f"{ours}.0", f"{theirs}.{dialect.grow}", "shuffled")
    )


def _middle(config: AutoencoderConfig, dialect: Dialect, side: str) -> Iterator[Pair]:
    if config.layout == "simvq":
        for j in range(config.num_mid_blocks):
            yield from _res_block(f"{side}.mid.{j}", f"{side}.{dialect.mid_res[0].format(j=j)}", dialect)
        return
    first, last = dialect.mid_res
    yield from _res_block(f"{side}.mid.0", f"{side}.{first}", dialect)
    if config.mid_attention:
        yield from _attention(f"{side}.mid.1", f"{side}.{dialect.mid_attention}", dialect)
    yield from _res_block(f"{side}.mid.{2 if config.mid_attention else 1}", f"{side}.{last}", dialect)


def _res_block(ours: str, theirs: str, dialect: Dialect) -> Iterator[Pair]:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield Pair(f"{ours}.{name}", f"{theirs}.{name}")
    yield Pair(f"{ours}.skip", f"{theirs}.{dialect.skip}")


def _attention(ours: str, theirs: str, dialect: Dialect) -> Iterator[Pair]:
    for name, part in zip(_ATTENTION_PARTS, dialect.parts, strict=True):
        yield Pair(f"{ours}.{name}", f"{theirs}.{part}", "linear" if dialect.linear and name != "norm" else "same")


def tensor_pairs(config: AutoencoderConfig, dialect: Dialect, ours: State) -> list[Pair]:
    """Every tensor of encoder, decoder and the projections between them and the quantizer, here and there.

    Args:
        config: The size.
        dialect: The names there.
        ours: The state of a tokenizer of that size.
    """
    layers = [*layer_pairs(config, dialect), Pair("pre_quant", "quant_conv"), Pair("post_quant", "post_quant_conv")]
    return [
        Pair(f"{pair.ours}.{kind}", f"{pair.theirs}.{kind}", pair.form)
        for pair in layers
        for kind in ("weight", "bias")
        if f"{pair.ours}.{kind}" in ours
    ]


def take_size(state: State, dialect: Dialect, groups: int | None = 32) -> AutoencoderConfig:
    """The size of the autoencoder whose tensors these are.

    Args:
        state: Tensors by their names there.
        dialect: The names.
        groups: Of every GroupNorm, which no tensor tells.

    Raises:
        ValueError: A layer that tells the size is missing, or the widths are no multiples of the first.
    """
    channels = shape_of(state, "encoder.conv_in.weight")[0]
    levels = _count(state, dialect.down, f"{dialect.res}.0.conv1.weight")
    down = [dialect.down.format(i=i) for i in range(levels)]
    blocks = _count(state, f"{down[0] if down else dialect.down.format(i=0)}.{dialect.res}.{{i}}", "conv1.weight")
    ups = _count(state, f"{dialect.up.format(i=0)}.{dialect.res}.{{i}}", "conv1.weight")
    if not levels or not blocks or not ups:
        raise ValueError(f"there is no {dialect.down.format(i=0)}.{dialect.res}.0.conv1.weight and so no size to tell")
    widths = [shape_of(state, f"{name}.{dialect.res}.0.conv2.weight")[0] for name in down]
    if any(width % channels for width in widths):
        raise ValueError(f"the levels have {widths} channels, but here they are multiples of the first one, {channels}")
    more: dict[str, object] = {"layout": dialect.layout}
    if dialect.layout == "vqgan":
        norm = dialect.parts[0]
        attending = [i for i, name in enumerate(down) if f"{name}.{dialect.attention}.0.{norm}.weight" in state]
        more["attention"] = tuple(attending)
        more["mid_attention"] = f"encoder.{dialect.mid_attention}.{norm}.weight" in state
        more["decoder_res_blocks"] = None if ups == blocks + 1 else ups
    else:
        more["num_mid_blocks"] = _count(state, f"encoder.{dialect.mid_res[0].format(j='{i}')}", "conv1.weight")
        more["adaptive"] = "decoder.adaptive.0.gamma.weight" in state
    return AutoencoderConfig(
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        num_res_blocks=blocks,
        z_channels=shape_of(state, "encoder.conv_out.weight")[0],
        groups=groups,
        projection=True if "quant_conv.weight" in state else None,
        **more,  # type: ignore[arg-type]
    )


def shape_of(state: State, name: str) -> tuple[int, ...]:
    """The shape of a tensor; ValueError if it is not there."""
    if name not in state:
        raise ValueError(f"{name} is missing")
    return tuple(state[name].shape)


def _count(state: State, pattern: str, ending: str) -> int:
    """How many numbers follow each other from 0 at `{i}` of a pattern."""
    before, _, after = pattern.partition("{i}")
    form = re.compile(re.escape(before) + r"(\d+)" + re.escape(f"{after}.{ending}"))
    found = {int(match[1]) for match in map(form.fullmatch, state) if match}
    return next(i for i in range(len(found) + 1) if i not in found)
