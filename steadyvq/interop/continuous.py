# SPDX-License-Identifier: Apache-2.0
"""KL autoencoders of others, to be quantised post hoc: the frozen body of CODA and TokenBridge.

Such an encoder gives the mean and the log-variance of a normal distribution, moments = quant_conv(conv_out(h)). A transplant
quantises the mean, as what encodes without noise does, so the two layers become one and the variance's rows are left out:

    mean = Q (W * h + b) + q = (Q W) * h + (Q b + q)        Q, q: the first half of quant_conv's rows
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from steadyvq.interop.checkpoints import Imported, groups_of, import_checked, load_pairs
from steadyvq.interop.formats import CONTINUOUS, recognise
from steadyvq.interop.layouts import shape_of, take_size, tensor_pairs
from steadyvq.interop.reading import Checkpoint, read_checkpoint
from steadyvq.models import Autoencoder

_IGNORED = ("loss.", "model_ema.")


@dataclass
class ImportedAutoencoder:
    """An autoencoder of others as ours.

    Attributes:
        autoencoder: Ours, in evaluation mode; its latents are the means.
        format: The format that the file has.
        what: That format in words.
        weights: Which of the file's weights these are.
        mapped: Number of tensors that were taken over.
        ignored: Number of tensors that are no part of an autoencoder, by the beginning of their names.
    """

    autoencoder: Autoencoder
    format: str
    what: str
    weights: str
    mapped: int
    ignored: dict[str, int]


def import_autoencoder(
    path: str | os.PathLike[str], format: str = "auto", *, weights: str = "auto", groups: int | None = None
) -> ImportedAutoencoder:
    """Reads a KL autoencoder that another project wrote; the arguments are those of `import_tokenizer`.

    Raises:
        ValueError: The file cannot be read, is none, or its tensors are not those of the format.
    """
    imported = import_checkpoint(path, format, weights=weights, groups=groups)
    if isinstance(imported, Imported):
        raise ValueError(
            f"{path} is a tokenizer ({imported.what}) and no continuous autoencoder: read it with import_tokenizer"
        )
    return imported


def import_checkpoint(
    path: str | os.PathLike[str], format: str = "auto", *, weights: str = "auto", groups: int | None = None
) -> Imported | ImportedAutoencoder:
    """Reads a tokenizer or a KL autoencoder, whichever the file holds; the arguments are those of `import_tokenizer`."""
    checkpoint = read_checkpoint(Path(path), weights)
    try:
        name = recognise(checkpoint.tensors) if format == "auto" else format
        return _imported(checkpoint, name, groups) if name in CONTINUOUS else import_checked(checkpoint, name, groups)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error


def _imported(checkpoint: Checkpoint, name: str, groups: int | None) -> ImportedAutoencoder:
    what, dialect = CONTINUOUS[name]
    checkpoint.ignore(_IGNORED)
    mapped = len(checkpoint.tensors)
    groups = groups_of(checkpoint, dialect, groups)
    try:
        _keep_the_mean(checkpoint)
        config = take_size(checkpoint.tensors, dialect, groups)
    except ValueError as error:
        raise ValueError(f"this is no autoencoder of the format {name} ({what}): {error}") from error
    autoencoder = Autoencoder(config)
    load_pairs(autoencoder, tensor_pairs(config, dialect, autoencoder.state_dict()), checkpoint.tensors, name)
    return ImportedAutoencoder(autoencoder.eval(), name, what, checkpoint.weights, mapped, checkpoint.ignored)


def _keep_the_mean(checkpoint: Checkpoint) -> None:
    """Puts the two layers that make the moments together, and leaves out what makes the variance."""
    state = checkpoint.tensors
    for name in ("encoder.conv_out", "decoder.conv_in"):
        shape_of(state, f"{name}.weight"), shape_of(state, f"{name}.bias")
    weight, bias = (state[f"encoder.conv_out.{kind}"].double() for kind in ("weight", "bias"))
    if "quant_conv.weight" in state:
        shape_of(state, "quant_conv.bias")
        mixing, shift = state.pop("quant_conv.weight").double(), state.pop("quant_conv.bias").double()
        if mixing.dim() != 4 or mixing.shape[1:] != (len(weight), 1, 1) or len(shift) != len(mixing):
            raise ValueError(f"quant_conv.weight is {tuple(mixing.shape)}, which does not fit {len(weight)} moments")
        weight = torch.einsum("om,mchw->ochw", mixing[..., 0, 0], weight)
        bias = mixing[..., 0, 0] @ bias + shift
    dim, width = len(weight) // 2, shape_of(state, "decoder.conv_in.weight")[1]
    if len(weight) % 2 or dim != width:
        raise ValueError(
            f"its encoder gives {len(weight)} moments and its decoder takes {width} channels, but a mean and a log-variance "
            "for each of them are needed"
        )
    state["encoder.conv_out.weight"], state["encoder.conv_out.bias"] = weight[:dim].float(), bias[:dim].float()
    if "post_quant_conv.weight" in state:
        # Projections come in pairs here; this one is used up.
        state["quant_conv.weight"], state["quant_conv.bias"] = torch.eye(dim)[..., None, None], torch.zeros(dim)
