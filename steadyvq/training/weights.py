# SPDX-License-Identifier: Apache-2.0
"""Starting from the weights of an earlier run, and from nothing else of it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from steadyvq.models.tokenizer import WEIGHTS_FILE, check_fit, read_weights
from steadyvq.training.checkpoint import latest_checkpoint, load_checkpoint


@torch.no_grad()
def load_weights(module: nn.Module, source: Path) -> None:
    """Copies the averaged weights, which are those that were evaluated, into a module.

    Args:
        module: Of the same architecture and quantizer.
        source: A run folder, a checkpoint file, or a folder with a saved tokenizer.

    Raises:
        ValueError: There are no weights, or they do not fit.
    """
    state = averaged_weights(source)
    check_fit(module.state_dict(), state, source)
    module.load_state_dict(state)


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
    weights: dict[str, Tensor] = {**state["module"], **state["average"]["shadow"]}
    return weights
