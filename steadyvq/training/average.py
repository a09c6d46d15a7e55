# SPDX-License-Identifier: Apache-2.0
"""The moving average of the weights, which is what gets evaluated and saved."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from steadyvq.training.sharding import local


class WeightAverage:
    """Exponential moving average of a module's parameters and of the buffers that training changes.

    w~ <- d w~ + (1 - d) w with d = min(decay, (1 + t) / (10 + t)), so that the first steps are not remembered forever.
    A module names buffers that belong into the average in `averaged_buffers`.

    Args:
        module: The module to average; its tensors are read at every `update`.
        decay: d in [0, 1); 0 follows the weights exactly.

    Attributes:
        tensors: What is averaged, by name.
        shadow: The averages.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}, but a moving average needs a decay in [0, 1)")
        self.decay = decay
        self.steps = 0
        self.tensors = dict(_averaged(module))
        # Of networks that are cut up among processes, the part of this one.
        self._live = {name: local(tensor) for name, tensor in self.tensors.items()}
        self.shadow = {name: tensor.clone() for name, tensor in self._live.items()}
        self._names = {id(tensor): name for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights of one optimiser step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(list(self.shadow.values()), list(self._live.values()), 1 - decay)

    @torch.no_grad()
    def copy_rows(self, tensor: Tensor, rows: Tensor) -> None:
        """Sets the average of rows that were rewritten to their present values."""
        name = self._names.get(id(tensor))
        if name is not None:
            self.shadow[name][rows] = tensor.detach()[rows]

    @torch.no_grad()
    def align(self, module: nn.Module) -> None:
        """Sets the average of a module, buffers that training changes included, to its present values.

        For the start of training, and for a part that is frozen from now on.
        """
        for _, tensor in _averaged(module):
            name = self._names.get(id(tensor))
            if name is not None:
                self.shadow[name].copy_(self._live[name])

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside this context the module holds the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self._live.items():
            live = tensor.clone()
            tensor.copy_(self.shadow[name])
            self.shadow[name].copy_(live)

    def state_dict(self) -> dict[str, object]:
        """The averages and the number of updates; of what is cut, the part of this process."""
        return {"steps": self.steps, "shadow": dict(self.shadow)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restores `state_dict()`; of what is cut, it takes the part of this process."""
        steps, shadow = state["steps"], state["shadow"]
        assert isinstance(steps, int)
        assert isinstance(shadow, dict)
        self.steps = steps
        for name, tensor in self.shadow.items():
            tensor.copy_(shadow[name])


def _averaged(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    for prefix, part in module.named_modules():
        for name in getattr(part, "averaged_buffers", ()):
            yield (f"{prefix}.{name}" if prefix else name), getattr(part, name)
