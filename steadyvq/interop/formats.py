# SPDX-License-Identifier: Apache-2.0
"""The formats of other people's tokenizers: how each is recognised, and which quantizer of ours its codebook is.

A format is a dialect of layer names and a codebook. Losses and weights of the quantizers are those of the project's training
code, so that a run that starts from imported weights goes on as they were trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steadyvq.interop.layouts import DIFFUSERS, LLAMAGEN, MAGVIT, TAMING, Dialect, Pair, shape_of
from steadyvq.quantizers.names import unknown

State = Mapping[str, Tensor]
EMBEDDING = "quantize.embedding.weight"
BRIDGE = "quantize.qbridge."
TABLE = "quantizer.codes.base"
LEGACY = {"commitment": 1.0, "codebook": 0.25}
"""VQGAN's released code has 0.25 on the codebook's term, not on the commitment."""
_SMALL = 32
"""Codes of at most this many features are taken for those of a unit sphere, which LlamaGen trains with 8."""


@dataclass
class Codebook:
    """A quantizer of ours for a checkpoint's codebook.

    Attributes:
        name: The method.
        num_codes: K.
        dim: d.
        options: Of `build_quantizer`.
        pairs: Its tensors here and there.
    """

    name: str
    num_codes: int
    dim: int
    options: dict[str, Any] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)


@dataclass(frozen=True)
class Format:
    """How one project writes its tokenizers.

    Attributes:
        what: The project, and what its codebook is.
        dialect: The names of the layers.
        codebook: Reads the codebook's size and method.
        ignored: Beginnings of names that are no part of a tokenizer.
    """

    what: str
    dialect: Dialect
    codebook: Callable[[State], Codebook]
    ignored: tuple[str, ...] = ("loss.", "model_ema.")


def _table(state: State) -> tuple[int, int]:
    shape = shape_of(state, EMBEDDING)
    if len(shape) != 2:
        raise ValueError(f"{EMBEDDING} has shape {shape}, but a codebook has two axes")
    return shape[0], shape[1]


def _plain(name: str, **options: Any) -> Callable[[State], Codebook]:
    def read(state: State) -> Codebook:
        return Codebook(name, *_table(state), dict(options), [Pair(TABLE, EMBEDDING)])

    return read


def _simvq(state: State) -> Codebook:
    weight = "quantize.embedding_proj.weight"
    shape_of(state, weight)
    names = {TABLE: EMBEDDING, "quantizer.codes.weight": weight}
    bias = "quantize.embedding_proj.bias" in state
    if bias:
        names["quantizer.codes.bias"] = "quantize.embedding_proj.bias"
    return Codebook("simvq", *_table(state), {} if bias else {"bias": False}, [Pair(*item) for item in names.items()])


def _lfq(state: State) -> Codebook:
    bits = shape_of(state, "encoder.conv_out.weight")[0]
    return Codebook("lfq", 2**bits, bits)


def _fvq(state: State) -> Codebook:
    if not any(name.startswith(BRIDGE) for name in state):
        return Codebook("vq", *_table(state), {}, [Pair(TABLE, EMBEDDING)])
    num_codes, dim = _table(state)
    if f"{BRIDGE}x_embedder.proj.weight" not in state or any(".adaLN" in name for name in state):
        raise ValueError(
            "its bridge is another one than the transformer of the paper (VQBridge): write its codes into the checkpoint "
            "with the project's convert_fullvq2vq.py, and import that"
        )
    hidden, _, patch, _ = shape_of(state, f"{BRIDGE}x_embedder.proj.weight")
    blocks = {name.split(".")[3] for name in state if name.startswith(f"{BRIDGE}blocks.")}
    side = math.isqrt(num_codes)
    if side * side != num_codes or side % patch:
        raise ValueError(
            f"it has {num_codes} codes, but a bridge with patches of {patch}x{patch} needs a square of them"
        )
    options = {"patch": patch, "hidden": hidden, "depth": len(blocks), "square": True}
    return Codebook("fvq", num_codes, dim, options, [Pair(TABLE, EMBEDDING), *_bridge(len(blocks))])


def _bridge(depth: int) -> list[Pair]:
    """The layers of the bridge here and there."""
    layers = [Pair("compress", "x_embedder.proj", "patches"), Pair("recover", "final_layer.linear")]
    parts = {"qkv": "attn.qkv", "out": "attn.proj", "wide": "mlp.fc1", "narrow": "mlp.fc2"}
    layers += [
        Pair(f"blocks.{i}.{ours}", f"blocks.{i}.{theirs}") for i in range(depth) for ours, theirs in parts.items()
    ]
    return [
        Pair(f"quantizer.codes.{pair.ours}.{kind}", f"{BRIDGE}{pair.theirs}.{kind}", pair.form)
        for pair in layers
        for kind in ("weight", "bias")
    ]


_USED = ("quantize.codebook_used",)

FORMATS: dict[str, Format] = {
    "taming": Format("taming-transformers and latent diffusion: nearest code", TAMING, _plain("vq", losses=LEGACY)),
    "llamagen": Format(
        "LlamaGen: nearest code on the unit sphere", LLAMAGEN, _plain("vqgan_fc"), ("loss.", "model_ema.", *_USED)
    ),
    "simvq": Format("SimVQ: frozen codes behind a linear map", MAGVIT, _simvq),
    "ibq": Format("SEED-Voken's IBQ: largest inner product", TAMING, _plain("ibq")),
    "lfq": Format("SEED-Voken's Open-MAGVIT2: a bit per feature", MAGVIT, _lfq),
    "fvq": Format("FVQ: codes from a bridge, or baked", LLAMAGEN, _fvq, ("loss.", "model_ema.", *_USED)),
    "diffusers": Format("diffusers' VQModel: nearest code", DIFFUSERS, _plain("vq", losses=LEGACY)),
}
"""What can be imported, by name."""


CONTINUOUS: dict[str, tuple[str, Dialect]] = {
    "kl": ("latent diffusion and FLUX: KL autoencoder", TAMING),
    "diffusers_kl": ("diffusers' AutoencoderKL", DIFFUSERS),
}
"""Autoencoders without a quantizer that can be imported: what they are, and the names of their layers."""


def format_named(name: str) -> Format:
    """A format of tokenizers; ValueError with the known names if there is none of that name."""
    if name in CONTINUOUS:
        raise ValueError(
            f"the format is {name} ({CONTINUOUS[name][0]}), which has no quantizer and so is no tokenizer: read it with "
            "import_autoencoder or `steadyvq import`, and put a quantizer inside with `steadyvq transplant`"
        )
    if name not in FORMATS:
        raise unknown("format", name, [*FORMATS, *CONTINUOUS])
    return FORMATS[name]


def recognise(state: State) -> str:
    """The format of a checkpoint, from the names of its tensors.

    Raises:
        ValueError: It is none of the known ones, or fits several that differ in what their tokens are.
    """
    words = {name: form.what for name, form in FORMATS.items()} | {name: what for name, (what, _) in CONTINUOUS.items()}
    known = "the known ones are " + "; ".join(f"{name} ({what})" for name, what in words.items())
    if "quantize.proj.weight" in state:
        raise ValueError(f"the format is that of a Gumbel VQGAN, whose tokens are no nearest codes: {known}")
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in state:
        if any(".norm_layer." in name for name in state):
            raise ValueError(
                "the format is that of diffusers with spatial norms (MoVQ), which have no counterpart here"
            )
        return "diffusers_kl" if _is_continuous(state) else "diffusers"
    if "encoder.conv_blocks.0.res.0.conv1.weight" in state:
        return _llamagen_or_fvq(state)
    if "encoder.down.0.block.0.conv1.weight" in state:
        if "encoder.mid.block_1.conv1.weight" in state:
            return "kl" if _is_continuous(state) else _taming_or_ibq(state)
        return "simvq" if "quantize.embedding_proj.weight" in state else "lfq"
    if any(re.search(r"quantizers\.0\.in_proj|\.embed_avg$|rvq_first|semantic_residual", name) for name in state):
        raise ValueError(
            "the format is that of an audio codec, which is no image tokenizer: steadyvq.interop has from_dac, from_encodec "
            "and from_mimi for its quantizer"
        )
    begins = ", ".join(sorted({name.partition(".")[0] for name in state})[:6])
    raise ValueError(f"the format is unknown (its names begin with {begins}): {known}")


def _is_continuous(state: State) -> bool:
    """Whether the encoder gives a mean and a log-variance for each channel of the decoder, and there are no codes."""
    last, first = state.get("encoder.conv_out.weight"), state.get("decoder.conv_in.weight")
    if last is None or first is None or any(name.startswith("quantize") for name in state):
        return False
    return bool(last.shape[0] == 2 * first.shape[1])


def _llamagen_or_fvq(state: State) -> str:
    if any(name.startswith(BRIDGE) for name in state):
        return "fvq"
    if EMBEDDING in state and _table(state)[1] > _SMALL:
        raise ValueError(
            f"its names fit llamagen and a baked fvq, which differ in the search, and codes of {_table(state)[1]} features "
            "do not tell which: say --format llamagen (unit sphere) or --format fvq (plain distance)"
        )
    return "llamagen"


def _taming_or_ibq(state: State) -> str:
    if "encoder.down.0.block.2.conv1.weight" in state:
        raise ValueError(
            "its names fit taming and ibq, which differ in the search: say --format taming (nearest code) or --format ibq "
            "(largest inner product; its released models have four residual blocks per level, as this one may have)"
        )
    return "taming"
