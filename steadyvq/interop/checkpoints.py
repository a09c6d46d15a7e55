# SPDX-License-Identifier: Apache-2.0
"""Other people's tokenizers as ours, and ours as theirs.

    imported = import_tokenizer("vqgan_imagenet_f16_16384.ckpt")
    imported.tokenizer.save_pretrained("tokenizer")
    export_tokenizer(tokenizer, "ours.ckpt", "taming")

Every tensor of a file is mapped, ignored by name, or the import is refused; every parameter here comes from the file.
docs/checkpoints.md says what each format is here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from steadyvq.interop.formats import format_named, recognise
from steadyvq.interop.layouts import DIFFUSERS, Dialect, Pair, arranged_here, take_size, tensor_pairs
from steadyvq.interop.reading import Checkpoint, read_checkpoint
from steadyvq.models import Tokenizer
from steadyvq.quantizers import build_quantizer

_NAMES_IN_AN_ERROR = 6
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""What diffusers called the layers of attention until its version 0.15."""


@dataclass
class Imported:
    """A tokenizer of others as ours.

    Attributes:
        tokenizer: Ours, in evaluation mode.
        format: The format that the file has.
        what: That format in words.
        weights: Which of the file's weights these are.
        mapped: Number of tensors that were taken over.
        ignored: Number of tensors that are no part of a tokenizer, by the beginning of their names.
    """

    tokenizer: Tokenizer
    format: str
    what: str
    weights: str
    mapped: int
    ignored: dict[str, int]


def import_tokenizer(
    path: str | os.PathLike[str], format: str = "auto", *, weights: str = "auto", groups: int | None = None
) -> Imported:
    """Reads a tokenizer that another project wrote.

    Args:
        path: The checkpoint; of diffusers also the folder.
        format: A name of `steadyvq.interop.FORMATS`, or `auto` to recognise it by the names of the tensors.
        weights: `ema` for averaged weights, `model` for the last ones, `auto` for averaged ones where there are any.
        groups: Groups of every GroupNorm, which no tensor tells (None: 32 as in all released models; of a diffusers folder
            what its config.json says).

    Raises:
        ValueError: The file cannot be read, its format is unknown, or its tensors are not those of the format.
    """
    checkpoint = read_checkpoint(Path(path), weights)
    try:
        name = recognise(checkpoint.tensors) if format == "auto" else format
        return import_checked(checkpoint, name, groups)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error


def import_checked(checkpoint: Checkpoint, name: str, groups: int | None) -> Imported:
    """The tokenizer in a checkpoint of a format; ValueError unless every tensor fits."""
    form = format_named(name)
    checkpoint.ignore(form.ignored)
    groups = groups_of(checkpoint, form.dialect, groups)
    try:
        config = take_size(checkpoint.tensors, form.dialect, groups)
        book = form.codebook(checkpoint.tensors)
    except ValueError as error:
        raise ValueError(f"this is no tokenizer of the format {name} ({form.what}): {error}") from error
    quantizer = build_quantizer(book.name, num_codes=book.num_codes, dim=book.dim, channel_axis=1, **book.options)
    tokenizer = Tokenizer.build(config, quantizer)
    pairs = [*tensor_pairs(config, form.dialect, tokenizer.state_dict()), *book.pairs]
    load_pairs(tokenizer, pairs, checkpoint.tensors, name)
    return Imported(tokenizer.eval(), name, form.what, checkpoint.weights, len(pairs), checkpoint.ignored)


def load_pairs(module: nn.Module, pairs: Sequence[Pair], found: Mapping[str, Tensor], name: str) -> None:
    """Copies every tensor of a file; ValueError unless names and shapes are those that the module needs."""
    state = module.state_dict()
    unmapped = {n for n, _ in module.named_parameters()} - {pair.ours for pair in pairs}
    assert not unmapped, f"no name in {name} for {sorted(unmapped)}"
    theirs = {pair.theirs for pair in pairs}
    problems = [f"{n} is missing" for n in sorted(theirs - set(found))]
    problems += [f"{n} is left over" for n in sorted(set(found) - theirs)]
    values = {p.ours: arranged_here(found[p.theirs], p.form) for p in pairs if p.theirs in found}
    for pair in pairs:
        if pair.ours in values and values[pair.ours].shape != state[pair.ours].shape:
            there = tuple(found[pair.theirs].shape)
            problems.append(f"{pair.theirs} is {there}, which does not fit {tuple(state[pair.ours].shape)}")
    if problems:
        shown = "; ".join(problems[:_NAMES_IN_AN_ERROR])
        more = len(problems) - _NAMES_IN_AN_ERROR
        tail = f"; and {more} more" if more > 0 else ""
        raise ValueError(f"its tensors are not those of the format {name}: {shown}{tail}")
    module.load_state_dict({**state, **values})


def groups_of(checkpoint: Checkpoint, dialect: Dialect, groups: int | None) -> int:
    """Groups of every norm: those given, or what diffusers says, or 32. Attention of diffusers gets its present names."""
    if dialect is not DIFFUSERS:
        return 32 if groups is None else groups
    _prepare_diffusers(checkpoint)
    return _groups_of_diffusers(checkpoint.path) if groups is None else groups


def _prepare_diffusers(checkpoint: Checkpoint) -> None:
    """Gives the layers of attention the names that they have today."""
    for old, new in _OLD_ATTENTION.items():
        for name in [name for name in checkpoint.tensors if ".attentions." in name and old in name]:
            checkpoint.tensors[name.replace(old, new)] = checkpoint.tensors.pop(name)


def _groups_of_diffusers(path: Path) -> int:
    file = path.with_name("config.json")
    if not file.is_file():
        return 32
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from error
    groups = config.get("norm_num_groups", 32) if isinstance(config, dict) else None
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise ValueError(f"{file} has no whole number norm_num_groups")
    return groups
