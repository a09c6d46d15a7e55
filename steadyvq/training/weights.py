# SPDX-License-Identifier: Apache-2.0
"""Starting from the weights of an earlier run, and from nothing else of it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from steadyvq.models.tokenizer import WEIGHTS_FILE, check_fit, read_weights
from steadyvq.quantizers import ShardedQuantizer, VectorQuantizer
from steadyvq.quantizers.maintenance import Maintenance
from steadyvq.training.checkpoint import latest_checkpoint, load_checkpoint

OF_QUANTIZER = ("quantizer.", "rectifier.")
"""Beginnings of the names of what goes with a tokenizer's quantizer."""


@torch.no_grad()
def load_weights(module: nn.Module, source: Path, parts: Literal["all", "autoencoder"] = "all") -> None:
    """Copies the averaged weights, which are those that were evaluated, into a module.

    What a quantizer's bookkeeping has counted and annealed (averages, idle codes, temperature, number of updates) starts
    as in a new run, from the loaded codes.

    Args:
        module: Of the same architecture and quantizer.
        source: A run folder, a checkpoint file, or a folder with a saved tokenizer.
        parts: `all`, or `autoencoder`: the module keeps its quantizer (and what belongs to it) as it is.

    Raises:
        ValueError: There are no weights, or they do not fit.
    """
    state, own = averaged_weights(source), set(_bookkeeping(module))
    if parts == "autoencoder":
        own = {name for name in (*module.state_dict(), *state) if name.startswith(OF_QUANTIZER)}
    state = {name: value for name, value in state.items() if name not in own}
    state |= _parts_of_tables(module, state)
    fresh = module.state_dict()
    check_fit({name: value for name, value in fresh.items() if name not in own}, state, source)
    module.load_state_dict({**{name: fresh[name].clone() for name in own & fresh.keys()}, **state})
    if parts == "autoencoder":
        return
    for quantizer in (part for part in module.modules() if isinstance(part, VectorQuantizer | ShardedQuantizer)):
        table = quantizer.codebook() if isinstance(quantizer, VectorQuantizer) else quantizer.base
        for part in quantizer.maintenance.children():
            if isinstance(part, Maintenance):
                part.rows_set(table)


def _bookkeeping(module: nn.Module) -> Iterator[str]:
    """Names of the state that belongs to a run and not to its weights."""
    for prefix, part in module.named_modules():
        if isinstance(part, VectorQuantizer | ShardedQuantizer):
            names = ["temperature", "updates", *(f"maintenance.{name}" for name in part.maintenance.state_dict())]
            yield from (f"{prefix}.{name}" if prefix else name for name in names)


def _parts_of_tables(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process takes of the tables in a state that are cut among processes in the module."""
    cut = {f"{n}.codes.base": q.codes for n, q in module.named_modules() if isinstance(q, ShardedQuantizer)}
    return {name: codes.part(state[name]) for name, codes in cut.items() if name in state}


def averaged_weights(source: Path) -> dict[str, Tensor]:
    """The weights that `load_weights` loads, by name."""
    if source.is_dir():
        if (source / WEIGHTS_FILE).is_file():
            return read_weights(source)
        newest = latest_checkpoint(source / "checkpoints")
        if newest is None:
            raise ValueError(
                f"{source} holds neither checkpoints nor {WEIGHTS_FILE}: give a run folder, a checkpoint or a saved tokenizer"
            )
        source = newest
    state = load_checkpoint(source)
    module: dict[str, Tensor] = state["module"]
    # Beside a discriminator the tokenizer is a part of what was trained.
    part = {n.removeprefix("tokenizer."): value for n, value in module.items() if n.startswith("tokenizer.")}
    weights: dict[str, Tensor] = {**(part or module), **state["average"]["shadow"]}
    return weights
