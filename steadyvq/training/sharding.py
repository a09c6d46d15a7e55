# SPDX-License-Identifier: Apache-2.0
"""Networks cut up among processes (FSDP2): each keeps a part of every weight, its gradient, moments and average.

What is cut are whole children of a task's modules (encoder, decoder, discriminator), the `Blocks` inside them one at a time.
Everything else, the quantizer above all, is whole in every process, and its gradients are added up here. Optimisers and
averages see plain tensors, the local parts. For measuring and saving the first process gets whole networks again, so files do
not know how a run was cut.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from steadyvq.models.blocks import Blocks

Home = tuple[nn.Module, str]
"""A module, and the name of a child of it that is to be cut."""


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has, sharing its memory; of one that is not cut, all of it."""
    cut: Any = tensor
    part: Tensor = cut.to_local() if _is_cut(tensor) else tensor
    return part.detach()


def whole(like: Tensor, part: Tensor) -> Tensor:
    """Puts a tensor together that is cut as `like` is; every process calls it with its own part."""
    if not _is_cut(like):
        return part
    from torch.distributed.tensor import DTensor

    place: Any = like
    options: dict[str, Any] = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    cut = DTensor.from_local(part, place.device_mesh, place.placements, **options)
    return cut.full_tensor()


def _is_cut(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")


class Cut(ABC):
    """What is cut up among the processes of a run, seen from one of them: gradients, states, and all of it in one piece.

    Attributes:
        is_first: Whether this process gets whole tensors.
        held: How much of it this process has, in words.
        elsewhere: Numbers that `parameters()` does not count here, since others hold them.
    """

    is_first: bool
    held: str
    elsewhere: int = 0

    def adopt(self, optimizer: Optimizer) -> None:  # noqa: B027
        """Is shown every fresh optimiser."""

    def collect(self, optimizer: Optimizer) -> None:  # noqa: B027
        """After the backwards of a step: gradients are the means over processes, where the optimiser looks for them."""

    @abstractmethod
    def parts(self, optimizer: Optimizer) -> list[tuple[int, Tensor, Tensor]]:
        """Of an optimiser: the number of a parameter that is cut, the part that is stepped here, what it is a part of."""

    @abstractmethod
    def gathered(self, like: Tensor, part: Tensor) -> Tensor:
        """The whole of a tensor that is cut as `like` is, in the first process; the others get nothing. All call it."""

    @abstractmethod
    def part(self, like: Tensor, all_of_it: Tensor) -> Tensor:
        """The part that this process has of a whole tensor that is to be cut as `like` is."""

    @abstractmethod
    def put_together(self) -> AbstractContextManager[None]:
        """Inside, the first process has plain whole modules in the places of the cut ones; all enter and leave.

        They have the weights of that moment, and nothing that is done to them lasts.
        """

    def clip(self, optimizer: Optimizer, largest: float) -> Tensor:
        """Clips the gradient of all processes together; returns its norm before."""
        mine = [own for _, own, _ in self.parts(optimizer)]
        known, cut = {id(own) for own in mine}, [own for own in mine if own.grad is not None]
        everyone = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        rest = [p for p in everyone if id(p) not in known]
        squares = [
            torch.nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]).square() for own in (cut, rest)
        ]
        like = next(p for p in [*cut, *rest])
        total = squares[0].to(like.device, torch.float64)
        dist.all_reduce(total)
        norm = (total + squares[1].to(total)).sqrt().to(like.dtype)
        torch.nn.utils.clip_grads_with_norm_([*cut, *rest], largest, norm)
        return norm

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state as it would be uncut, in the first process; all call it."""
        state = optimizer.state_dict()
        for index, mine, like in self.parts(optimizer):
            own = state["state"].get(index, {})
            moments = {k: self.gathered(like, v) for k, v in own.items() if v.shape == mine.shape and v.dim()}
            state["state"] = {**state["state"], **({index: {**own, **moments}} if own else {})}
        return state

    def load_state_dict(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave, or an optimiser that never was cut."""
        entries = dict(state["state"])
        for index, _, like in self.parts(optimizer):
            own = entries.get(index, {})
            if own:
                entries[index] = {k: self.part(like, v) if v.dim() else v for k, v in own.items()}
        optimizer.load_state_dict({**state, "state": entries})


class Shards(Cut):
    """The cut networks of a run, in one of its processes.

    Args:
        homes: What is cut.
        uncut: Parameters inside that stay whole.
        device: This process's.

    Attributes:
        share: How much this process holds of what is cut.

    Raises:
        ValueError: There is nothing to cut, or this version of torch cannot.
    """

    def __init__(self, homes: Sequence[Home], uncut: Iterable[nn.Parameter], device: torch.device) -> None:
        if not homes:
            raise ValueError("strategy is 'fsdp', but this task names no networks to cut: leave it with strategy=ddp")
        try:
            from torch.distributed.fsdp import fully_shard
        except ImportError:
            fully_shard = None  # type: ignore[assignment]
        if fully_shard is None or "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise ValueError(
                f"strategy is 'fsdp', but torch {torch.__version__} cannot leave parameters out of it: install a newer "
                "version of torch, or leave it with strategy=ddp"
            )
        self.count, self.is_first = dist.get_world_size(), dist.get_rank() == 0
        self._homes = [(parent, name, getattr(parent, name)) for parent, name in homes]
        self._plain = [_skeleton(network) for _, _, network in self._homes]
        self._stand_ins: dict[int, list[tuple[Tensor, nn.Parameter]]] = {}
        mesh = init_device_mesh(device.type, (self.count,))
        options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": set(uncut)}
        for _, _, network in self._homes:
            for row in [part for part in network.modules() if isinstance(part, Blocks) and len(part)]:
                fully_shard(row, **options)
            fully_shard(network, **options)
        cut = [p for _, _, network in self._homes for p in network.parameters() if _is_cut(p)]
        self.share = sum(local(p).numel() for p in cut) / sum(p.numel() for p in cut)
        self.held = f"about {self.share:.0%} of the weights"

    def adopt(self, optimizer: Optimizer) -> None:
        """Lets a fresh optimiser train the local parts: they are stepped, and have moments, as plain tensors."""
        pairs = []
        for group in optimizer.param_groups:
            own = [nn.Parameter(local(p), requires_grad=False) if _is_cut(p) else p for p in group["params"]]
            pairs += [(p, mine) for p, mine in zip(group["params"], own, strict=True) if mine is not p]
            group["params"] = own
        self._stand_ins[id(optimizer)] = pairs

    def collect(self, optimizer: Optimizer) -> None:
        """See `Cut.collect`."""
        for parameter, mine in self._stand_ins[id(optimizer)]:
            mine.grad = None if parameter.grad is None else local(parameter.grad)
            parameter.grad = None
        cut = {id(mine) for _, mine in self._stand_ins[id(optimizer)]}
        rest = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in cut and p.requires_grad]
        self._average([p for p in rest if p.numel()])

    def _average(self, parameters: Sequence[Tensor]) -> None:
        """Gradients of whole parameters: one sum over processes for each type of number."""
        for dtype in sorted({p.dtype for p in parameters}, key=str):
            own = [p for p in parameters if p.dtype == dtype]
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
            there = torch.stack([g.new_tensor(float(p.grad is not None)) for p, g in zip(own, gradients, strict=True)])
            flat = torch.cat([g.flatten() for g in gradients] + [there])
            dist.all_reduce(flat)
            *means, there = torch.split(flat / self.count, [p.numel() for p in own] + [len(own)])
            for p, mean, known in zip(own, means, there.tolist(), strict=True):
                p.grad = mean.view_as(p) if known else None

    def gathered(self, like: Tensor, part: Tensor) -> Tensor:
        """See `Cut.gathered`; in memory of the CPU if it was cut."""
        if not _is_cut(like):
            return part
        found = whole(like, part)
        return found.cpu() if self.is_first else found.new_empty(0)

    def part(self, like: Tensor, all_of_it: Tensor) -> Tensor:
        """See `Cut.part`; needs no other process."""
        if not _is_cut(like) or all_of_it.shape != like.shape:
            return all_of_it
        place: Any = like
        pieces = all_of_it.chunk(place.device_mesh.size())
        rank = place.device_mesh.get_local_rank()
        # There may be more processes than rows.
        return pieces[rank] if rank < len(pieces) else all_of_it[:0]

    def parts(self, optimizer: Optimizer) -> list[tuple[int, Tensor, Tensor]]:
        """See `Cut.parts`."""
        cut = {id(mine): parameter for parameter, mine in self._stand_ins[id(optimizer)]}
        mine = [p for group in optimizer.param_groups for p in group["params"]]
        return [(i, p, cut[id(p)]) for i, p in enumerate(mine) if id(p) in cut]

    @contextmanager
    def put_together(self) -> Iterator[None]:
        """See `Cut.put_together`."""
        empty = []
        for (parent, name, network), plain in zip(self._homes, self._plain, strict=True):
            weights = {key: whole(p, local(p)) for key, p in network.named_parameters()}
            if self.is_first:
                empty.append(dict(plain.named_parameters()))
                plain.load_state_dict(weights, strict=False, assign=True)
                setattr(parent, name, plain)
        try:
            yield
        finally:
            if self.is_first:
                for (parent, name, network), plain, nothing in zip(self._homes, self._plain, empty, strict=True):
                    plain.load_state_dict(nothing, strict=False, assign=True)
                    setattr(parent, name, network)


def _skeleton(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode without weights and hooks, which shares the buffers."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in network.parameters()
    }
    memo |= {id(buffer): buffer for buffer in network.buffers()}
    for part in network.modules():
        # Hooks belong to those who train, and would take them along into the copy.
        memo |= {id(hooks): OrderedDict() for hooks in (part._forward_hooks, part._forward_pre_hooks)}
    return copy.deepcopy(network, memo).eval()
