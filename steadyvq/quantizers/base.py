# SPDX-License-Identifier: Apache-2.0
"""What every quantizer is: the record of one assignment, what a forward returns, and the contract of a layer.

    out = quantizer(latents, mask=None)      # pure: no statistic changes, no parameter is touched
    z_q, indices, loss = out                 # `out.losses` holds the unweighted losses by name
    optimizer.step()
    quantizer.update(out, optimizer=optimizer)   # the bookkeeping: EMA, dead-code replacement, temperature

`forward` does nothing but compute; `update` does all the bookkeeping. So activation checkpointing (which runs a forward
twice) and gradient accumulation (several forwards, one `update([...])`) stay right.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree

from steadyvq.quantizers.names import coupling
from steadyvq.quantizers.noise import Noise

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes of a run; the identity in one process. Quantizers know no engine."""

Gather = Callable[[Tensor], Tensor]
"""Concatenates rows (n, ...) of all processes, which may differ in number, in the order of their ranks."""

UPDATE_REMINDER_AFTER = 10
SHORTEST = 1e-8
"""Length from which on a row has a direction; below, the gradient of its direction would be worth nothing."""


def added(parts: list[Tensor]) -> Tensor:
    """The sum of the parts of a step's micro-batches, in their order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def alone(tensor: Tensor) -> Tensor:
    """Sum and concatenation in one process: the tensor itself."""
    return tensor


class WeightAverage(Protocol):
    """A moving average of weights that `Quantizer.update` keeps in step when it rewrites rows of a codebook."""

    def copy_rows(self, tensor: Tensor, rows: Tensor) -> None:
        """Sets the average of `tensor[rows]` to the present values."""


@dataclass
class Assignment:
    """One assignment of N latents to K codes: what estimators, losses and maintenance read.

    Attributes:
        z: Latents (N, d) in float32 (or float64); carries the gradient to the encoder. Masked rows are zero.
        table: The effective codebook (K, d) of this forward; carries the gradient to the codebook.
        indices: The selected code of each latent (N,), int64; -1 where masked.
        distance: Squared distance to the selected code (N,), no gradient.
        selected: The selected codes (N, d); carries the gradient to the codebook.
        num_valid: Number of latents of this forward that are not masked, the denominator of its means (0-d).
        temperature: tau of soft assignments, in units of the squared distance (0-d).
        row_weight: 1 for a valid latent, 0 for a masked one (N,); None if nothing is masked.
        noise: Random numbers by the position of a latent; None where a record was made without.
        reduce: Sums a tensor over the processes of a run.
        stats: Detached numbers about this assignment, by name, filled by the losses that know them.
    """

    z: Tensor
    table: Tensor
    indices: Tensor
    distance: Tensor
    selected: Tensor
    num_valid: Tensor
    temperature: Tensor
    row_weight: Tensor | None = None
    noise: Noise | None = None
    reduce: Reduce = alone
    stats: dict[str, Tensor] = field(default_factory=dict)

    @property
    def counted(self) -> Tensor:
        """Rows that statistics count (N,), bool: not masked, and finite, so that one broken latent spoils no code."""
        return (self.indices >= 0) & self.distance.isfinite()

    def mean(self, per_latent: Tensor) -> Tensor:
        """The mean of a value per latent (N,) over the valid latents of this forward; 0 if there are none.

        Where an optimiser step has several forwards (micro-batches, processes) with unequal numbers of valid latents,
        its mean is the mean of these weighted by `Quantized.num_valid`; training/loop.py does so.
        """
        total = per_latent if self.row_weight is None else per_latent * self.row_weight
        return total.sum() / self.num_valid.clamp_min(1)

    def detach(self) -> Assignment:
        """The same record without gradients, sharing memory."""
        names = ("z", "table", "distance", "selected", "num_valid", "temperature")
        changed: dict[str, Tensor] = {name: getattr(self, name).detach() for name in names}
        return replace(self, **changed)  # type: ignore[arg-type]


@dataclass
class Quantized:
    """What a quantizer's forward returns; unpacks as `z_q, indices, loss`.

    Attributes:
        z_q: Quantized latents, shape and dtype of the latents. Its value is exactly the selected code, in training unless
            `Quantizer.exact_in_training` is False.
        indices: Selected codes, int64, shape of the latents without the feature axis; -1 where masked.
        loss: Weighted sum of the losses (0-d).
        losses: The unweighted losses by name (0-d each); a loss of weight 0 is not evaluated and is not here.
        assignment: The detached record that `update` reads.
        inner: What the layers of a quantizer of quantizers returned, in their order; each is updated with its own. The
            `assignment` then describes the whole: one code per latent, the row of `table` that the layers make together.
    """

    z_q: Tensor
    indices: Tensor
    loss: Tensor
    losses: dict[str, Tensor]
    assignment: Assignment
    inner: tuple[Quantized, ...] = ()

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.z_q, self.indices, self.loss))

    @property
    def num_valid(self) -> Tensor:
        """How many latents the losses are means over (0-d): those that are not masked."""
        return self.assignment.num_valid

    @property
    def stats(self) -> dict[str, Tensor]:
        """Detached numbers about the assignment, by name (for example `winner_mass`)."""
        return self.assignment.stats


def _register_pytree(cls: type) -> None:
    """Lets compilers and data-parallel wrappers see the tensors inside a dataclass."""
    names = [f.name for f in fields(cls) if f.name != "reduce"]
    _pytree.register_pytree_node(
        cls,
        lambda record: ([getattr(record, name) for name in names], getattr(record, "reduce", None)),
        lambda values, reduce: cls(**dict(zip(names, values, strict=True)), **({"reduce": reduce} if reduce else {})),
        serialized_type_name=f"steadyvq.{cls.__name__}",
    )


_register_pytree(Noise)
_register_pytree(Assignment)
_register_pytree(Quantized)


class Quantizer(nn.Module, ABC):
    """A layer that replaces latents by codes.

    Args:
        num_codes: K, the number of codes.
        dim: d, the size of the latents along `channel_axis`.
        channel_axis: The axis of the latents that holds the features: -1 for (..., d), 1 for (B, d, H, W),
            (B, d, T) and (B, d, T, H, W).

    Attributes:
        spec: The arguments of `build_quantizer` that make a layer for this one's state (JSON-able), or None.
        spec_changes: Arguments of `spec` that differ from those given, where one named a file that need not last.
        reduce: Sums a tensor over the processes of a run; see `across_processes`.
        gather: Concatenates rows over the processes of a run.
        needs_update: Whether `update` must be called after every optimiser step.
        places_codes: Whether `init_from` can place the codes on data; a fixed grid has none to place.
        first_item: Position of the next forward's first sample in the global batch, which says where its noise begins.
    """

    spec: dict[str, Any] | None = None
    spec_changes: Mapping[str, Any] = MappingProxyType({})
    needs_update: bool = False
    places_codes: bool = True
    _first_item: Tensor

    def __init__(self, num_codes: int, dim: int, *, channel_axis: int = -1) -> None:
        super().__init__()
        for name, value in (("num_codes", num_codes), ("dim", dim)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, but a quantizer needs a positive integer")
        self.num_codes = num_codes
        self.dim = dim
        self.channel_axis = channel_axis
        self.reduce: Reduce = alone
        self.gather: Gather = alone
        self._forwards_without_update: int | None = 0
        # A tensor, so that a compiled forward need not be compiled anew for every position.
        self.register_buffer("_first_item", torch.zeros((), dtype=torch.int64), persistent=False)
        self._warned_of_partial_statistics = False

    @abstractmethod
    def forward(self, latents: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantizes latents.

        Args:
            latents: Floating-point tensor of any rank >= 1 with size d along `channel_axis`.
            mask: Bool, shape of the latents without the feature axis; False marks positions that are not there. They
                change no loss, gradient, statistic or index; their latents are returned unchanged with index -1.

        Raises:
            ValueError: The latents or the mask have the wrong shape or dtype.
        """

    @abstractmethod
    def encode(self, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """The indices that `forward` would give, without losses or gradients."""

    @abstractmethod
    def decode(self, indices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """The codes of `indices` (any shape, integers), with the feature axis at `channel_axis`; -1 gives zeros.

        `decode(out.indices, dtype=latents.dtype)` is `torch.equal` to `out.z_q` in evaluation, and in training too unless
        `exact_in_training` is False.
        """

    @abstractmethod
    def codebook(self) -> Tensor:
        """The effective table (K, d), the one that look-up and decode both use, without gradient."""

    @abstractmethod
    def init_from(
        self, latents: Tensor, mask: Tensor | None = None, *, method: str = "kmeans", seed: int | None = None
    ) -> None:
        """Places the codes on data: `data` (a random subset of the latents) or `kmeans` (k-means++ and Lloyd).

        Call it before training: it knows no optimiser whose moments it could reset. After `across_processes` it places
        the codes on the latents of all processes.
        """

    def index_shape(self, grid: Sequence[int]) -> tuple[int, ...]:
        """The shape of the indices of latents whose shape without the feature axis is `grid`; here the same."""
        return tuple(grid)

    @property
    def num_entries(self) -> int:
        """Rows of all tables together, what usage is measured against; K unless there are several tables."""
        return self.num_codes

    def entries(self, indices: Tensor) -> Tensor:
        """Indices as positions in all tables, in [0, num_entries), of the same shape; -1 stays."""
        return indices

    def index_map(self, indices: Tensor) -> Tensor:
        """Indices of images as one grid (B, h, w), for a picture; the layers of several are not all in it."""
        return indices

    @property
    def first_item(self) -> int:
        """Where the next forward's first sample stands among the samples of all micro-batches and processes.

        Set it before each forward of a cut batch, and noise is that of the whole one. A wrapper that broadcasts buffers
        would give all processes the value of the first.
        """
        return int(self._first_item)

    @first_item.setter
    def first_item(self, position: int) -> None:
        self._first_item.fill_(position)

    @property
    def exact_in_training(self) -> bool:
        """Whether z_q is the selected code to the last bit in training too, as it always is in evaluation."""
        return True

    @property
    def batch_coupled(self) -> tuple[str, ...]:
        """Active losses (and `assignment`) that are no means over latents: micro-batches do not add up to the batch."""
        return ()

    @abstractmethod
    def bake(self) -> Quantizer:
        """A plain, frozen quantizer with the same tokens and the same vectors, free of this method's code."""

    def update(
        self,
        out: Quantized | Sequence[Quantized],
        optimizer: torch.optim.Optimizer | None = None,
        ema: WeightAverage | None = None,
    ) -> dict[str, float]:
        """Does the bookkeeping of one optimiser step; call it after `optimizer.step()`.

        Args:
            out: What `forward` returned in this step, or the list of all micro-batches of this step.
            optimizer: The optimiser of the codebook; the moments of replaced rows are reset in it.
            ema: A moving average of the weights; the rows of replaced codes are set in it too.

        Returns:
            What happened, by name (for example `replaced`: number of codes).
        """
        batch = [out] if isinstance(out, Quantized) else list(out)
        if not all(isinstance(item, Quantized) for item in batch):
            raise ValueError(
                "update was not given what forward returned: pass `out`, or the list of the step's outputs"
            )
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"optimizer is a {type(optimizer).__name__}, but update takes the codebook's torch optimizer"
            )
        self._forwards_without_update = None
        if not self.training:
            return {}
        self._warn_of_partial_statistics(len(batch))
        with torch.no_grad():
            return self._update_all(batch, optimizer, ema)

    def _warn_of_partial_statistics(self, micro_batches: int) -> None:
        """Warns once where the codebook would be the function of a part of the batch."""
        if self._warned_of_partial_statistics:
            return
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self.needs_update and several and self.reduce is alone:
            self._warned_of_partial_statistics = True
            warnings.warn(
                f"{dist.get_world_size()} processes train, but this quantizer counts the latents of its own process only, "
                "and codebooks will differ: call steadyvq.across_processes(model) before training",
                UserWarning,
                stacklevel=4,
            )
        if micro_batches > 1 and self.batch_coupled:
            self._warned_of_partial_statistics = True
            warnings.warn(
                f"{coupling(self.batch_coupled[0])} couples all latents of a batch, so {micro_batches} accumulated "
                "micro-batches are not the same as one large batch",
                UserWarning,
                stacklevel=4,
            )

    def _update_all(
        self, batch: list[Quantized], optimizer: torch.optim.Optimizer | None, ema: WeightAverage | None
    ) -> dict[str, float]:
        return self._update([item.assignment for item in batch], optimizer, ema)

    def _update(
        self, batch: list[Assignment], optimizer: torch.optim.Optimizer | None, ema: WeightAverage | None
    ) -> dict[str, float]:
        return {}

    def configure(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        paused: Sequence[str] = (),
        estimator: str | None = None,
        frozen: bool = False,
    ) -> None:
        """Applies the settings of a training stage; what is not named goes back to how the layer was built.

        Args:
            weights: Loss weights by name that differ in this stage.
            paused: Names of maintenance that rests in this stage (names that the layer lacks are ignored).
            estimator: Name of the gradient estimator of this stage.
            frozen: All maintenance rests: nothing moves the codes.
        """
        if any(value != 0 for value in (weights or {}).values()):
            raise ValueError(f"{type(self).__name__} has no losses to weight: leave out `weights` in this stage")

    def _remind(self) -> None:
        """Warns once when a layer that needs `update` has been trained without it."""
        # In this order: a compiled forward that read the counter would be compiled anew whenever it changed.
        if torch.compiler.is_compiling() or self._forwards_without_update is None:
            return
        if not (self.training and self.needs_update and torch.is_grad_enabled()):
            return
        self._forwards_without_update += 1
        if self._forwards_without_update == UPDATE_REMINDER_AFTER:
            warnings.warn(
                f"{UPDATE_REMINDER_AFTER} training forwards without `update`: call `quantizer.update(out, optimizer)` "
                "after every optimizer.step(), or its moving averages and dead codes are never attended to",
                UserWarning,
                stacklevel=4,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Moves the state, but never below float32: half-precision codes lose their neighbours and their updates."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.is_floating_point() and moved.element_size() < 4:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """The size and layout, for `print(model)`."""
        return f"num_codes={self.num_codes}, dim={self.dim}, channel_axis={self.channel_axis}"


class HostNumber:
    """Reads a 0-d buffer of a device once, and knows its value from then on as long as nobody else writes it.

    A value that the device is asked for makes the host wait for all work before it; a counter that the host itself moves need
    not be asked for.
    """

    def __init__(self) -> None:
        self._known: tuple[Tensor, int, float] | None = None

    def of(self, buffer: Tensor) -> float:
        """The value of the buffer."""
        if self._known is None or self._known[0] is not buffer or self._known[1] != buffer._version:
            self._known = (buffer, buffer._version, buffer.item())
        return self._known[2]

    def assign(self, buffer: Tensor, value: int) -> None:
        """Writes an integer."""
        buffer.fill_(value)
        self._known = (buffer, buffer._version, value)

    def advance(self, buffer: Tensor) -> int:
        """Adds 1 to an integer buffer; returns its value."""
        self.assign(buffer, int(self.of(buffer)) + 1)
        return int(self.of(buffer))

    def __deepcopy__(self, memo: object) -> HostNumber:
        return HostNumber()

    def __reduce__(self) -> tuple[type[HostNumber], tuple[()]]:
        return HostNumber, ()


def to_rows(latents: Tensor, dim: int, channel_axis: int, dtype: torch.dtype) -> Tensor:
    """Latents of any layout as rows (N, d) in `dtype`.

    Raises:
        ValueError: Not floating point, or the wrong size along the feature axis.
    """
    if not latents.is_floating_point():
        raise ValueError(f"latents have dtype {latents.dtype}, but a quantizer needs floating-point latents")
    if not -latents.dim() <= channel_axis < latents.dim():
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}, but this quantizer has channel_axis={channel_axis}: "
            "build it with the axis that holds the features"
        )
    if latents.shape[channel_axis] != dim:
        which = "last dimension" if channel_axis == -1 else f"size {latents.shape[channel_axis]} at axis {channel_axis}"
        given = f"{which} {latents.shape[-1]}" if channel_axis == -1 else which
        raise ValueError(
            f"latents (shape {tuple(latents.shape)}) have {given}, but this quantizer has dim={dim}: project before "
            "quantizing (Tokenizer does this with pre_quant) or set channel_axis to the axis of the features"
        )
    return latents.movedim(channel_axis, -1).reshape(-1, dim).to(dtype)


def from_rows(rows: Tensor, shape: Sequence[int], channel_axis: int) -> Tensor:
    """Rows (N, d) back to the layout whose shape without the feature axis is `shape`."""
    out = rows.reshape(*shape, rows.shape[-1])
    return out.movedim(-1, channel_axis)


def unit(rows: Tensor) -> Tensor:
    """Rows (..., d) divided by their lengths; a row of no length has no direction and stays as it is."""
    length = rows.contiguous().norm(dim=-1, keepdim=True)
    return rows / torch.where(length > SHORTEST, length, 1.0)


def check_mask(mask: Tensor, latents: Tensor, channel_axis: int) -> None:
    """Raises ValueError unless the mask is bool with the latents' shape less the feature axis."""
    axis = channel_axis % latents.dim()
    shape = (*latents.shape[:axis], *latents.shape[axis + 1 :])
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise ValueError(
            f"mask has dtype {mask.dtype} and shape {tuple(mask.shape)}, but these latents need "
            f"torch.bool of shape {shape}"
        )
