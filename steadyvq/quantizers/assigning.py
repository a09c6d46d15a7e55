# SPDX-License-Identifier: Apache-2.0
"""What quantizers with one assignment per forward share: losses with weights, the estimator, settings of stages.

A subclass says how latents are assigned (`_assign`); everything that is read off the record is here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steadyvq.quantizers.base import Assignment, Quantized, Quantizer, check_mask, from_rows, to_rows
from steadyvq.quantizers.estimators import ESTIMATORS
from steadyvq.quantizers.losses import Loss
from steadyvq.quantizers.names import look_up


class AssigningQuantizer(Quantizer):
    """A quantizer whose forward is one `Assignment`, read by an estimator and losses.

    Args:
        num_codes: K.
        dim: d.
        losses: Losses by name.
        estimator: The gradient estimator or its name.
        channel_axis: The axis of the latents that holds the features.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        losses: Mapping[str, Loss] | None = None,
        estimator: str | Callable[..., Any] = "straight_through",
        channel_axis: int = -1,
    ) -> None:
        super().__init__(num_codes, dim, channel_axis=channel_axis)
        self.losses = dict(losses or {})
        # A loss may be a module with parameters of its own; then they are trained and saved with the layer.
        self.loss_modules = nn.ModuleDict({n: loss for n, loss in self.losses.items() if isinstance(loss, nn.Module)})
        self._built_estimator = estimator
        self._set_estimator(estimator)
        self._weights: dict[str, float] = {}

    def _set_estimator(self, estimator: str | Callable[..., Any]) -> None:
        self.estimator = look_up("estimator", estimator, ESTIMATORS) if isinstance(estimator, str) else estimator

    def weight(self, name: str) -> float:
        """The present weight of a loss: the stage's if it names it, else the one it was built with."""
        return self._weights.get(name, self.losses[name].weight)

    def configure(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        paused: Sequence[str] = (),
        estimator: str | None = None,
        frozen: bool = False,
    ) -> None:
        """See `Quantizer.configure`. A weight of 0 for a loss that this method lacks is fine, any other is refused."""
        for name, value in (weights or {}).items():
            if value != 0:
                look_up("loss of this quantizer", name, self.losses)
        self._weights = dict(weights or {})
        self._set_estimator(estimator or self._built_estimator)

    @property
    def batch_coupled(self) -> tuple[str, ...]:
        """See `Quantizer.batch_coupled`."""
        active = {name: loss for name, loss in self.losses.items() if self.weight(name) != 0}
        return tuple(name for name, loss in active.items() if getattr(loss, "batch_coupled", False))

    @property
    def exact_in_training(self) -> bool:
        """See `Quantizer.exact_in_training`."""
        return not getattr(self.estimator, "own_value", False)

    @abstractmethod
    def _assign(self, latents: Tensor, mask: Tensor | None) -> Assignment:
        """The record of these latents; checks their shape and that of the mask."""

    def _carrier(self, assignment: Assignment) -> Tensor:
        """What carries the gradient of z_q (N, d)."""
        carrier: Tensor = self.estimator(assignment)
        return carrier

    def forward(self, latents: Tensor, mask: Tensor | None = None) -> Quantized:
        """See `Quantizer.forward`."""
        self._remind()
        with torch.autocast(latents.device.type, enabled=False):
            a = self._assign(latents, mask)
            losses = {name: loss(a) for name, loss in self.losses.items() if self.weight(name) != 0}
            total = torch.zeros((), dtype=a.z.dtype, device=latents.device)
            for name, value in losses.items():
                total = total + self.weight(name) * value
            rows = carrier = self._carrier(a)
            if not self.training or self.exact_in_training:
                rows = a.selected.detach() + (carrier - carrier.detach())
            shape = self._grid(latents)
            z_q = from_rows(rows, shape, self.channel_axis).to(latents.dtype)
            if mask is not None:
                z_q = torch.where(mask.unsqueeze(self.channel_axis), z_q, latents)
        return Quantized(z_q, a.indices.reshape(shape), total, losses, a.detach())

    @torch.no_grad()
    def encode(self, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Quantizer.encode`."""
        with torch.autocast(latents.device.type, enabled=False):
            return self._assign(latents, mask).indices.reshape(self._grid(latents))

    def _grid(self, latents: Tensor) -> tuple[int, ...]:
        axis = self.channel_axis % latents.dim()
        return (*latents.shape[:axis], *latents.shape[axis + 1 :])

    def _rows(self, latents: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
        """Latents (N, d) with zeros in masked rows, the weight of each row (None: all 1) and the number of valid ones."""
        z = to_rows(latents, self.dim, self.channel_axis, dtype)
        if mask is None:
            return z, None, torch.full((), float(z.shape[0]), dtype=dtype, device=z.device)
        check_mask(mask, latents, self.channel_axis)
        # Garbage in masked rows must not reach a product: 0 * NaN is NaN.
        weight = mask.reshape(-1).to(dtype)
        return torch.where(mask.reshape(-1, 1), z, 0.0), weight, weight.sum()

    def extra_repr(self) -> str:
        """The parts, for `print(model)`."""
        losses = ", ".join(f"{name}={self.weight(name):g}" for name in self.losses)
        return f"{super().extra_repr()}, losses({losses})"


def check_indices(indices: Tensor, num_codes: int) -> None:
    """Raises ValueError unless the indices are integers in [-1, num_codes)."""
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"indices have dtype {indices.dtype}, but codes are named by integers")
    # On an accelerator the look at the values would wait for the device, and the device checks by itself.
    looked_at = indices.device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel() > 0
    if looked_at and (int(indices.max()) >= num_codes or int(indices.min()) < -1):
        raise ValueError(
            f"indices run from {int(indices.min())} to {int(indices.max())}, but this quantizer has {num_codes} "
            "codes: decode with the quantizer that encoded them"
        )
