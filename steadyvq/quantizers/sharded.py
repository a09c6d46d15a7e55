# SPDX-License-Identifier: Apache-2.0
"""A table that no process holds as a whole: `vq` and `nsvq` with the codes cut among processes.

    shards = process_shards()                       # after torch.distributed.init_process_group
    vq = ShardedQuantizer("nsvq", 1_048_576, 128, shards)
    optimizer = torch.optim.Adam(vq.parameters())   # moments of this process's codes alone

Each process trains on latents of its own and holds K / R codes with their gradient and optimiser state. A forward gathers the
latents of all processes (small beside the table), searches its own codes for all of them, and agrees with the others on

    d_i = min_r d_ir in float64, the lowest index on equality           (two minima over processes)
    log Z_i = log sum_r exp(log Z_ir),   w_ij = w_ij^r exp(log Z_ir - log Z_i)           (a maximum and a sum; `ns` only)

so that losses, gradients and replacement are those of one process with the whole table and the whole batch. The gradient of a
process's codes is that of the mean over the latents of all processes already: leave them out of a wrapper that averages
gradients. All processes call `forward`, `encode`, `decode` and `update` together, in evaluation as well.

`whole_state` is the state of the replicated quantizer of the same name, whatever the number of processes; `load_whole_state`
cuts it anew, and `replicated` is that quantizer. A training run uses all of it by `quantizer.sharded: true`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steadyvq import kernels
from steadyvq.kernels.passes import nearest_and_normaliser, sums_by_code
from steadyvq.kernels.reference import squared_distance
from steadyvq.quantizers.assign import ASSIGNMENTS
from steadyvq.quantizers.base import (
    Assignment,
    HostNumber,
    Quantized,
    Quantizer,
    WeightAverage,
    added,
    check_mask,
    from_rows,
    to_rows,
)
from steadyvq.quantizers.codebooks import Codebook, FreeCodebook
from steadyvq.quantizers.compose import compose
from steadyvq.quantizers.estimators import ESTIMATORS
from steadyvq.quantizers.initialise import place
from steadyvq.quantizers.losses import NonStationary
from steadyvq.quantizers.maintenance import UpdateBatch
from steadyvq.quantizers.methods import nsvq, vq
from steadyvq.quantizers.names import look_up
from steadyvq.quantizers.noise import Noise
from steadyvq.quantizers.registry import build_quantizer
from steadyvq.quantizers.shards import Shards
from steadyvq.quantizers.vector import VectorQuantizer

PRESETS: dict[str, dict[str, Any]] = {"vq": vq.PARTS, "nsvq": nsvq.PARTS}


class _Seen:
    """The latents of all processes in one forward, and what was agreed on about them.

    Attributes:
        z: (M, d) latents of all processes, no gradient.
        weight: (M,) 1 for valid ones.
        own: Where this process's lie.
        indices: (M,) int64 codes in the whole table.
        distance: (M,) squared distances.
        selected: (M, d) codes.
        normaliser: (M,) log sum_j exp(-D_ij / tau) over all codes, or None.
        ratio: (M,) share of this process's codes in it, or None.
    """

    def __init__(self, z: Tensor, weight: Tensor, own: slice) -> None:
        self.z, self.weight, self.own = z, weight, own
        self.indices = self.distance = self.selected = weight
        self.normaliser: Tensor | None = None
        self.ratio: Tensor | None = None


class _Rows(Codebook):
    """This process's codes of a table of which nobody holds all.

    Args:
        rows: They.
        low: The first of them in the whole table.
        num_codes: K of the whole table.
    """

    trainable = True

    def __init__(self, rows: Tensor, low: int, num_codes: int) -> None:
        super().__init__()
        self.base = nn.Parameter(rows)
        self.low, self.num_codes = low, num_codes

    def part(self, table: Tensor) -> Tensor:
        """This process's rows of a whole table (K, ...); anything else as it is."""
        whole = table.dim() > 0 and len(table) == self.num_codes
        return table[self.low : self.low + len(self.base)] if whole else table

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Takes its part of a whole table."""
        key = f"{prefix}base"
        mine = {**state_dict, key: self.part(state_dict[key])} if key in state_dict else state_dict
        super()._load_from_state_dict(mine, prefix, *rest)

    def forward(self) -> Tensor:
        """This process's codes."""
        return self.base

    def set_rows_(self, rows: Tensor) -> None:
        """Refused.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "set_rows_ cannot place the codes of a table that is cut among processes: load a whole state into the quantizer"
        )


class ShardedQuantizer(Quantizer):
    """`vq` or `nsvq` whose table is cut among processes.

    Args:
        name: `vq` or `nsvq`.
        num_codes: K of the whole table.
        dim: d.
        shards: The processes (None: one).
        **overrides: As `build_quantizer` takes them for that name: `losses`, `maintenance` (`replace` alone), `temperature`,
            `init`, `channel_axis`, `seed`.

    Attributes:
        weighed: The loop multiplies the loss of every process by its share of the latents (n_r R / sum n), as loops do whose
            wrapper takes the mean of gradients over processes. The gradient of the codes, which is that of all latents
            already, is then divided by that share.

    Raises:
        ValueError: Parts that need the whole table in one place, or more processes than codes.
    """

    temperature: Tensor
    updates: Tensor

    def __init__(self, name: str, num_codes: int, dim: int, shards: Shards | None = None, **overrides: Any) -> None:
        parts = look_up("sharded quantizer", name, PRESETS)
        whole = compose(num_codes, dim, parts, overrides)
        check_shardable(whole)
        super().__init__(num_codes, dim, channel_axis=whole.channel_axis)
        self.name, self.shards, self.seed, self.overrides = name, shards or Shards(), whole.seed, dict(overrides)
        if self.shards.count > num_codes:
            raise ValueError(
                f"num_codes is {num_codes}, but {self.shards.count} processes share the table: give every process at least "
                "one code"
            )
        self.low, self.high = self.shards.bounds(num_codes)
        self.codes = _Rows(whole.codes.base.detach()[self.low : self.high].clone(), self.low, num_codes)
        self.weighed = False
        self.losses, self.maintenance = whole.losses, whole.maintenance
        self.register_buffer("temperature", whole.temperature.clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.needs_update = bool(self.maintenance)
        self._weights: dict[str, float] = {}
        self._paused: frozenset[str] = frozenset()
        self._count = HostNumber()
        self.reduce = self.shards.sum
        self.gather = lambda rows: torch.cat(self.shards.gather(rows))

    @property
    def base(self) -> nn.Parameter:
        """This process's codes (n, d)."""
        base = self.codes.base
        assert isinstance(base, nn.Parameter)
        return base

    @property
    def batch_coupled(self) -> tuple[str, ...]:
        """See `Quantizer.batch_coupled`."""
        active = {name: loss for name, loss in self.losses.items() if self.weight(name) != 0}
        return tuple(name for name, loss in active.items() if getattr(loss, "batch_coupled", False))

    def weight(self, name: str) -> float:
        """The present weight of a loss."""
        return self._weights.get(name, self.losses[name].weight)

    def configure(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        paused: Sequence[str] = (),
        estimator: str | None = None,
        frozen: bool = False,
    ) -> None:
        """See `Quantizer.configure`; the estimator is always straight-through."""
        if estimator not in (None, "straight_through"):
            raise ValueError(f"estimator is {estimator!r}, but a sharded table has 'straight_through' alone")
        for name, value in (weights or {}).items():
            if value != 0:
                look_up("loss of this quantizer", name, self.losses)
        self._weights = dict(weights or {})
        self._paused = frozenset(self.maintenance if frozen else paused)

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self, latents: Tensor, mask: Tensor | None = None) -> Quantized:
        """See `Quantizer.forward`; all processes call it together."""
        self._remind()
        with torch.autocast(latents.device.type, enabled=False):
            z, weight = self._rows(latents, mask)
            names = [name for name in self.losses if self.weight(name) != 0]
            seen = self._search(z, weight, normalise="ns" in names)
            selected = seen.selected[seen.own]
            indices = seen.indices[seen.own]
            indices = indices if mask is None else torch.where(mask.reshape(-1), indices, -1)
            record = Assignment(
                z=z,
                table=self.base,
                indices=indices,
                distance=seen.distance[seen.own],
                selected=selected,
                num_valid=weight.sum(),
                temperature=self.temperature,
                row_weight=None if mask is None else weight,
                reduce=self.shards.sum,
            )
            losses = {name: self._loss(name, record, seen) for name in names}
            total = torch.zeros((), dtype=z.dtype, device=z.device)
            for name, value in losses.items():
                total = total + self.weight(name) * value
            shape = _grid(latents, self.channel_axis)
            z_q = from_rows(selected + (z - z.detach()), shape, self.channel_axis).to(latents.dtype)
            if mask is not None:
                z_q = torch.where(mask.unsqueeze(self.channel_axis), z_q, latents)
        return Quantized(z_q, indices.reshape(shape), total, losses, record.detach())

    def _rows(self, latents: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latents (N, d) with zeros where masked, and their weights (N,)."""
        z = to_rows(latents, self.dim, self.channel_axis, self.base.dtype)
        if mask is None:
            return z, torch.ones_like(z[:, 0].detach())
        check_mask(mask, latents, self.channel_axis)
        return torch.where(mask.reshape(-1, 1), z, 0.0), mask.reshape(-1).to(z.dtype)

    @torch.no_grad()
    def _search(self, z: Tensor, weight: Tensor, *, normalise: bool) -> _Seen:
        """The nearest codes of the latents of all processes, agreed on by all of them."""
        parts = self.shards.gather(torch.cat([z.detach(), weight[:, None]], 1))
        together = torch.cat(parts)
        start = sum(len(part) for part in parts[: self.shards.rank])
        seen = _Seen(together[:, :-1].contiguous(), together[:, -1].contiguous(), slice(start, start + len(z)))
        table, local = self.base.detach(), None
        if normalise:
            near, _, local = nearest_and_normaliser(seen.z, table, temperature=self.temperature)
        else:
            near, _ = kernels.nearest(seen.z, table)
        # The search rounds its score; what decides between processes is the float64 number of the contract.
        broken = ~seen.z.isfinite().all(1)
        score = squared_distance(seen.z, table[near]).masked_fill(broken, torch.inf)
        least = self.shards.minimum(score)
        mine = torch.where(score == least, near + self.low, self.num_codes)
        seen.indices = self.shards.minimum(mine).masked_fill(broken, 0)
        seen.selected = self.shards.sum(self._contribution(seen.indices))
        seen.distance = least.masked_fill(broken, torch.nan).to(z.dtype)
        if local is not None:
            largest = -self.shards.minimum(-local)
            seen.normaliser = self.shards.sum((local - largest).exp()).log() + largest
            seen.ratio = (local - seen.normaliser).exp()
        return seen

    def _contribution(self, indices: Tensor) -> Tensor:
        """Codes (n, d) of `indices` (n,) that lie here, zeros elsewhere."""
        here = (indices >= self.low) & (indices < self.high)
        rows = self.base.detach()[(indices - self.low).clamp(0, self.high - self.low - 1)]
        return torch.where(here[:, None], rows, 0.0)

    def _loss(self, name: str, record: Assignment, seen: _Seen) -> Tensor:
        """A loss (0-d) with its gradient: to the latents of this process, and to its codes from those of all."""
        if name == "commitment":
            return self.losses[name](record)
        if name == "ns":
            return self._non_stationary(record, seen)
        here = (seen.indices >= self.low) & (seen.indices < self.high)
        places = torch.where(here, seen.indices - self.low, -1)
        counted = sums_by_code(places, seen.z, len(self.base), row_weight=seen.weight)
        scale = 2 / (seen.weight.sum().clamp_min(1) * self.dim)
        grad = (counted.mass[:, None] * self.base.detach() - counted.sums) * scale
        return self._attach(self.losses[name](record).detach(), grad, seen)

    def _attach(self, value: Tensor, grad: Tensor, seen: _Seen) -> Tensor:
        """A loss whose gradient by this process's codes is known."""
        if self.weighed:
            own, everyone = seen.weight[seen.own].sum().clamp_min(1), seen.weight.sum()
            grad = grad * (everyone / (self.shards.count * own))
        return kernels.attach_gradient(value, self.base, grad)

    def _non_stationary(self, record: Assignment, seen: _Seen) -> Tensor:
        """The non-stationary loss of the latents of all processes; see `kernels.non_stationary`."""
        loss = self.losses["ns"]
        assert isinstance(loss, NonStationary)
        assert seen.ratio is not None
        assert seen.normaliser is not None
        share = torch.where(seen.weight > 0, seen.weight * seen.ratio, 0.0)
        here = (seen.indices >= self.low) & (seen.indices < self.high)
        mass, pulled, cost = (torch.zeros_like(self.base[:, 0].detach()) for _ in range(3))
        sums = torch.zeros_like(self.base.detach())
        loser, spent = torch.zeros_like(share), torch.zeros_like(share)
        # The winner is left out where it lies here; elsewhere there is none to leave out.
        for rows, rule in ((here, "losers"), (~here, "all")):
            which = rows.nonzero()[:, 0]
            winner = (seen.indices[which] - self.low).clamp(0, len(self.base) - 1)
            part = kernels.soft_statistics(
                seen.z[which],
                self.base,
                winner,
                temperature=self.temperature,
                row_weight=share[which],
                rule=rule,  # type: ignore[arg-type]
            )
            mass, pulled, cost = mass + part.column_mass, pulled + part.gradient_mass, cost + part.column_cost
            sums = sums + part.column_sum
            kept = part.loser_mass if rule == "losers" else part.loser_mass + part.winner_mass
            loser[which], spent[which] = kept * seen.ratio[which], part.row_cost * seen.ratio[which]
        factor = 1 / (mass + loss.prior) if loss.per_code else torch.ones_like(mass)
        scale = 1 / (seen.weight.sum().clamp_min(1) * self.dim)
        value = self.shards.sum((factor * cost).sum()) * scale
        grad = (pulled[:, None] * self.base.detach() - sums) * (2 * scale * factor)[:, None]
        self._note(record, seen, self.shards.sum(torch.stack([loser, spent])))
        least, largest = grad.aminmax()
        record.stats["ns_grad_max"] = -self.shards.minimum(torch.minimum(least, -largest))
        return self._attach(value, grad, seen)

    def _note(self, record: Assignment, seen: _Seen, sums: Tensor) -> None:
        """Winner mass and effective losers of this process's latents, from sums (2, M) over all codes."""
        loser, spent = sums[:, seen.own]
        assert seen.normaliser is not None
        losers = kernels.effective_losers(seen.normaliser[seen.own], loser, spent, self.temperature)
        record.stats["winner_mass"] = record.mean((1 - loser).clamp_min(0))
        record.stats["effective_losers"] = record.mean(losers.clamp_min(1).log()).exp()

    @torch.no_grad()
    def encode(self, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Quantizer.encode`; all processes call it together."""
        z, weight = self._rows(latents, mask)
        seen = self._search(z, weight, normalise=False)
        indices = seen.indices[seen.own]
        indices = indices if mask is None else torch.where(mask.reshape(-1), indices, -1)
        return indices.reshape(_grid(latents, self.channel_axis))

    @torch.no_grad()
    def decode(self, indices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """See `Quantizer.decode`; all processes call it together."""
        parts = self.shards.gather(indices.reshape(-1))
        start = sum(len(part) for part in parts[: self.shards.rank])
        rows = self.shards.sum(self._contribution(torch.cat(parts)))[start : start + indices.numel()]
        return from_rows(rows, indices.shape, self.channel_axis).to(dtype or rows.dtype)

    # --- the whole table ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def codebook(self) -> Tensor:
        """The whole table (K, d), in every process."""
        return torch.cat(self.shards.gather(self.base.detach()))

    def bake(self) -> Quantizer:
        """See `Quantizer.bake`: a plain quantizer with the whole table."""
        whole = compose(self.num_codes, self.dim, PRESETS["vq"], {"channel_axis": self.channel_axis})
        whole.codes.set_rows_(self.codebook().to(whole.codes.base))
        return whole.bake().train(self.training)

    @torch.no_grad()
    def init_from(
        self, latents: Tensor, mask: Tensor | None = None, *, method: str = "kmeans", seed: int | None = None
    ) -> None:
        """See `Quantizer.init_from`; the whole table is placed in every process, once."""
        z, weight = self._rows(latents.detach(), mask)
        rows = self.gather(z[weight > 0])
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        table = place(rows, self.num_codes, method, generator)
        self.base.copy_(self.codes.part(table))
        for part in self.maintenance.values():
            part.rows_set(table)  # type: ignore[operator]

    def whole_state(self) -> dict[str, Tensor]:
        """The state of the replicated quantizer of this name, in every process: it loads there, and in any number of shards."""
        return {**self.state_dict(), "codes.base": self.codebook()}

    def replicated(self, state: Mapping[str, Tensor]) -> Quantizer:
        """The ordinary quantizer of this name with a whole state, in the present stage, for one process alone."""
        whole = build_quantizer(self.name, num_codes=self.num_codes, dim=self.dim, **self.overrides)
        whole.to(self.base).load_state_dict(state)
        whole.configure(weights=self._weights, paused=sorted(self._paused))
        return whole.train(self.training)

    @torch.no_grad()
    def load_whole_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes its part of a state that `whole_state` or the replicated quantizer gave.

        Raises:
            ValueError: The table has another size.
        """
        table = state["codes.base"]
        if tuple(table.shape) != (self.num_codes, self.dim):
            raise ValueError(
                f"the state holds {table.shape[0]} codes of dimension {table.shape[1]}, but this quantizer has "
                f"{self.num_codes} of dimension {self.dim}"
            )
        self.load_state_dict(state)

    @torch.no_grad()
    def whole_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """What an optimiser remembers of the table, for all codes; numbers that are not per code as they are."""
        state = optimizer.state.get(self.base, {})
        return {
            name: torch.cat(self.shards.gather(value)) if value.shape == self.base.shape else value.clone()
            for name, value in state.items()
            if isinstance(value, Tensor)
        }

    @torch.no_grad()
    def load_whole_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
        """Takes its part of what `whole_optimizer_state` gave, in any number of shards."""
        for name, value in state.items():
            per_code = tuple(value.shape) == (self.num_codes, self.dim)
            optimizer.state[self.base][name] = (self.codes.part(value) if per_code else value).clone()

    # --- update -------------------------------------------------------------------------------------------------------

    def _update(
        self, batch: list[Assignment], optimizer: torch.optim.Optimizer | None, ema: WeightAverage | None
    ) -> dict[str, float]:
        count = self._count.advance(self.updates)
        active = [part for name, part in self.maintenance.items() if name not in self._paused]
        if not batch or not active:
            return {}
        sums = [sums_by_code(a.indices, a.distance[:, None], self.num_codes, row_weight=a.counted) for a in batch]
        hits = self.shards.sum(added([part.mass for part in sums]))
        step = UpdateBatch(
            assignments=batch,
            codes=self.codes,
            temperature=self.temperature,
            hits=hits,
            distortion=self.shards.sum(added([part.sums for part in sums])[:, 0]),
            tokens=hits.sum(),
            reduce=self.shards.sum,
            gather=lambda rows: torch.cat(self.shards.gather(rows)),
            noise=Noise.at(self.seed, self.updates, torch.arange(self.num_codes, device=hits.device)),
            generator=torch.Generator().manual_seed(self.seed * 1_000_003 + count),
            rewrite=lambda dst, src, noise: self._rewrite(dst, src, noise, optimizer, ema),
        )
        events: dict[str, float] = {}
        for part in active:
            events |= part(step)
        return events

    def _rewrite(
        self,
        dst: Tensor,
        src: Tensor,
        noise: Tensor,
        optimizer: torch.optim.Optimizer | None,
        ema: WeightAverage | None,
    ) -> None:
        """Makes codes copies of others, wherever both lie."""
        rows = self.shards.sum(self._contribution(src)) + noise.to(self.base)
        here = ((dst >= self.low) & (dst < self.high)).nonzero()[:, 0]
        places = dst[here] - self.low
        self.base[places] = rows[here]
        self.codes.forget_rows(places, optimizer, ema)
        for part in self.maintenance.values():
            part.rows_copied(dst, src, self.base)  # type: ignore[operator]


def check_shardable(whole: Quantizer) -> None:
    """Raises ValueError for parts of a quantizer that need its whole table in one place."""
    if not isinstance(whole, VectorQuantizer) or type(whole.codes) is not FreeCodebook or whole.unit_sphere:
        raise ValueError(
            "a sharded table is a free codebook without unit_sphere: leave `codebook` and `unit_sphere` out"
        )
    if whole.assign is not ASSIGNMENTS["l2"] or whole.estimator is not ESTIMATORS["straight_through"]:
        raise ValueError(
            "a sharded table assigns by l2 and its estimator is straight_through: leave `assign` and `estimator` out"
        )
    for kind, names, known in (
        ("losses", whole.losses, ("commitment", "codebook", "ns")),
        ("maintenance", whole.maintenance, ("replace", "temperature", "anneal")),
    ):
        for name in names:
            if name not in known:
                raise ValueError(f"{kind} holds {name!r}, but a sharded table knows {', '.join(known)} alone")
    ns: Any = whole.losses.get("ns")
    if isinstance(ns, NonStationary) and not (ns.squared and ns.detach_latents):
        raise ValueError(
            "ns of a sharded table is that of squared distances and detached latents: leave both settings out"
        )


def _grid(latents: Tensor, channel_axis: int) -> tuple[int, ...]:
    axis = channel_axis % latents.dim()
    return (*latents.shape[:axis], *latents.shape[axis + 1 :])
