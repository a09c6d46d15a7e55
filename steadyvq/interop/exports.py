# SPDX-License-Identifier: Apache-2.0
"""Our tokenizers in the files of other projects, so that their generators, trainers and tools can use them.

The codebook is written as the table that look-up and decode use, so whatever method made it, it is a plain one there. A
tokenizer that the other project would run to other tokens or images is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from steadyvq.files import write_atomically, write_text
from steadyvq.interop.formats import EMBEDDING
from steadyvq.interop.layouts import DIFFUSERS, LLAMAGEN, TAMING, Dialect, arranged_there, tensor_pairs
from steadyvq.models import AutoencoderConfig, Tokenizer
from steadyvq.quantizers import VectorQuantizer
from steadyvq.quantizers.assign import ASSIGNMENTS, evaluated
from steadyvq.quantizers.names import look_up

State = dict[str, Tensor]

_GROUPS = 32
_LLAMAGEN_CHANNELS = 128


@dataclass(frozen=True)
class Export:
    """How a project's file is written.

    Attributes:
        dialect: The names of the layers.
        check: Refuses what the project cannot express; gives what to tell the user, or an empty text.
        write: Writes the tensors.
    """

    dialect: Dialect
    check: Callable[[Tokenizer, AutoencoderConfig], str]
    write: Callable[[Path, State, Tokenizer, AutoencoderConfig], None]


def export_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str], format: str) -> str:
    """Writes a tokenizer as another project does.

    Args:
        tokenizer: Made by `Tokenizer.build` with the layout `vqgan`.
        path: The file; for diffusers the folder.
        format: `taming`, `llamagen` or `diffusers`.

    Returns:
        How to load it there.

    Raises:
        ValueError: The project cannot run this tokenizer to the same tokens and images; says why.
    """
    form: Export = look_up("format to write", format, EXPORTS)
    config = tokenizer.config
    if config is None:
        raise ValueError(
            "this tokenizer was put together by hand, so its layout is not known: make it with Tokenizer.build"
        )
    if config.layout != form.dialect.layout:
        raise ValueError(
            f"this tokenizer has the layout {config.layout!r}, but {format} has that of VQGAN: train one with "
            "model.layout=vqgan"
        )
    if config.rectifier:
        raise ValueError(
            f"this tokenizer has a rectifier behind its codes, which {format} has not: transplant without model.rectifier"
        )
    note = form.check(tokenizer, config)
    ours = {name: tensor.detach().cpu() for name, tensor in tokenizer.state_dict().items()}
    pairs = tensor_pairs(config, form.dialect, ours)
    state = {pair.theirs: arranged_there(ours[pair.ours], pair.form).contiguous().clone() for pair in pairs}
    state |= _projections(tokenizer, config) | {EMBEDDING: tokenizer.quantizer.codebook().detach().cpu().clone()}
    form.write(Path(path), state, tokenizer, config)
    return note


def _projections(tokenizer: Tokenizer, config: AutoencoderConfig) -> State:
    """1x1 convolutions that change nothing, where a tokenizer has none and the other project always has them."""
    if not isinstance(tokenizer.pre_quant, nn.Identity):
        return {}
    eye = torch.eye(config.z_channels)[..., None, None]
    names = ("quant_conv", "post_quant_conv")
    weights = {f"{name}.weight": eye.clone() for name in names}
    return weights | {f"{name}.bias": torch.zeros(config.z_channels) for name in names}


def _check_search(tokenizer: Tokenizer, project: str, *, sphere: bool) -> VectorQuantizer:
    """Refuses a quantizer whose tokens are not the nearest rows of its table."""
    quantizer = tokenizer.quantizer
    if not isinstance(quantizer, VectorQuantizer):
        raise ValueError(
            f"the quantizer is a {type(quantizer).__name__}, but {project} has one table of codes: train a method with one"
        )
    if evaluated(quantizer.assign) is not ASSIGNMENTS["l2"]:
        raise ValueError(f"this quantizer's tokens are not nearest codes, but those of {project} are")
    if quantizer.unit_sphere and not sphere:
        raise ValueError(
            f"this quantizer divides latents by their lengths, which {project} does not: write it as llamagen, which does"
        )
    return quantizer


def _check_layout(tokenizer: Tokenizer, config: AutoencoderConfig, project: str) -> None:
    if config.decoder_res_blocks not in (None, config.num_res_blocks + 1):
        raise ValueError(
            f"the decoder has {config.decoder_res_blocks} residual blocks per level, but {project} has one more than in the "
            f"encoder, {config.num_res_blocks + 1}"
        )
    groups = sorted({part.num_groups for part in tokenizer.modules() if isinstance(part, nn.GroupNorm)})
    if project != "diffusers" and groups != [_GROUPS]:
        raise ValueError(
            f"the norms have {' and '.join(map(str, groups))} groups, but {project} has {_GROUPS} everywhere: train with "
            f"model.groups={_GROUPS}"
        )
    if len(groups) > 1:
        raise ValueError(
            f"the norms have {groups} groups, but {project} has one number for all: train with model.groups set"
        )


def _check_taming(tokenizer: Tokenizer, config: AutoencoderConfig) -> str:
    _check_search(tokenizer, "taming", sphere=False)
    _check_layout(tokenizer, config, "taming")
    if not config.mid_attention:
        raise ValueError(
            "this tokenizer has no attention in the middle, but taming always has: model.mid_attention=true"
        )
    top = 256
    ddconfig = {
        "double_z": False,
        "z_channels": config.z_channels,
        "resolution": top,
        "in_channels": 3,
        "out_ch": 3,
        "ch": config.channels,
        "ch_mult": list(config.multipliers),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [top // 2**level for level in config.attention],
        "dropout": 0.0,
    }
    size = {"n_embed": tokenizer.quantizer.num_codes, "embed_dim": tokenizer.quantizer.dim}
    return f"load it in taming with {json.dumps({**size, 'ddconfig': ddconfig})}"


def _check_llamagen(tokenizer: Tokenizer, config: AutoencoderConfig) -> str:
    quantizer = _check_search(tokenizer, "llamagen", sphere=True)
    _check_layout(tokenizer, config, "llamagen")
    lowest = len(config.multipliers) - 1
    if config.attention != (lowest,) or not config.mid_attention or config.num_res_blocks != 2:
        raise ValueError(
            f"llamagen has two residual blocks per level and attention on level {lowest} and in the middle: train with "
            f"model.num_res_blocks=2, model.attention=[{lowest}] and model.mid_attention=true"
        )
    arguments = {
        "codebook_size": quantizer.num_codes,
        "codebook_embed_dim": quantizer.dim,
        "codebook_l2_norm": bool(quantizer.unit_sphere),
        "codebook_show_usage": False,
        "encoder_ch_mult": list(config.multipliers),
        "decoder_ch_mult": list(config.multipliers),
        "z_channels": config.z_channels,
    }
    note = f"load it in LlamaGen with ModelArgs of {json.dumps(arguments)}"
    if config.channels != _LLAMAGEN_CHANNELS:
        note += f"; its Encoder and Decoder take ch={config.channels}, which ModelArgs does not name"
    return note


def _check_diffusers(tokenizer: Tokenizer, config: AutoencoderConfig) -> str:
    _check_search(tokenizer, "diffusers", sphere=False)
    _check_layout(tokenizer, config, "diffusers")
    if config.multipliers[0] != 1:
        raise ValueError(
            f"the first level is {config.multipliers[0]} times as wide as the first convolution, but in diffusers they are "
            "of one width: train with 1 as the first of model.multipliers"
        )
    return "load it with diffusers.VQModel.from_pretrained"


def _write_pickled(key: str) -> Callable[[Path, State, Tokenizer, AutoencoderConfig], None]:
    def write(path: Path, state: State, tokenizer: Tokenizer, config: AutoencoderConfig) -> None:
        write_atomically(path, lambda temporary: torch.save({key: state}, temporary))

    return write


def _write_diffusers(folder: Path, state: State, tokenizer: Tokenizer, config: AutoencoderConfig) -> None:
    attends = [level in config.attention for level in range(len(config.multipliers))]
    norm = next(part for part in tokenizer.modules() if isinstance(part, nn.GroupNorm))
    settings: dict[str, Any] = {
        "_class_name": "VQModel",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["AttnDownEncoderBlock2D" if yes else "DownEncoderBlock2D" for yes in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if yes else "UpDecoderBlock2D" for yes in attends[::-1]],
        "block_out_channels": [config.channels * multiplier for multiplier in config.multipliers],
        "layers_per_block": config.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": config.z_channels,
        "num_vq_embeddings": tokenizer.quantizer.num_codes,
        "norm_num_groups": norm.num_groups,
        "vq_embed_dim": tokenizer.quantizer.dim,
        "norm_type": "group",
        "mid_block_add_attention": config.mid_attention,
    }
    weights = folder / "diffusion_pytorch_model.safetensors"
    write_atomically(weights, lambda temporary: save_file(state, temporary, metadata={"format": "pt"}))
    write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")


EXPORTS: dict[str, Export] = {
    "taming": Export(TAMING, _check_taming, _write_pickled("state_dict")),
    "llamagen": Export(LLAMAGEN, _check_llamagen, _write_pickled("model")),
    "diffusers": Export(DIFFUSERS, _check_diffusers, _write_diffusers),
}
"""What can be written, by name."""
