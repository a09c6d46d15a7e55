# SPDX-License-Identifier: Apache-2.0
"""One optimiser step of one objective: its gradient is that of the global batch, however the batch is cut.

    grad = sum_rm w_rm grad L_rm / sum_rm w_rm        (r: processes, m: micro-batches, w_rm: items of that micro-batch)

L_rm is the mean over the items of one micro-batch, so this is the gradient of the mean over all items of the step, never
of a mean of means.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from steadyvq.data import Request
from steadyvq.quantizers.processes import noise_from
from steadyvq.training.processes import Processes, wrapped
from steadyvq.training.sharding import Cut
from steadyvq.training.task import StepOutput, Task

Weight = float | Tensor


@dataclass
class Gradient:
    """What the forwards and backwards of one objective left.

    Attributes:
        outputs: One per micro-batch of this process.
        loss: Mean over the items of the step (0-d).
        logs: The means of the step, by name (0-d).
        norm: Norm of the gradient before clipping (0-d).
        finite: Whether loss, gradient and what the task checks are finite in all processes.
        added: Sums over processes of the signals that each of them put in.
    """

    outputs: list[StepOutput]
    loss: Tensor
    logs: dict[str, Tensor]
    norm: Tensor
    finite: bool
    added: list[float]


class GlobalStep:
    """Cuts the global batch among processes and micro-batches and puts its gradient together again.

    Args:
        task: What is trained.
        processes: Those that share the batch.
        batch_size: Samples of the global batch.
        micro_batch_size: Most samples that one process handles at once (None: its whole share).
        clip: Largest norm of the gradient (None: no clipping).

    Attributes:
        cut: What is cut up among processes, if anything is.
    """

    cut: Cut | None = None

    def __init__(
        self, task: Task, processes: Processes, batch_size: int, micro_batch_size: int | None, clip: float | None
    ) -> None:
        self.task, self.processes, self.batch_size, self.clip = task, processes, batch_size, clip
        self.shares = processes.shares(batch_size, micro_batch_size)
        # Weights are relative to an even cut, so that a whole batch in one process has the weight 1 exactly.
        self._nominal = batch_size / (processes.count * len(self.shares))

    def batches(self, epoch: int, index: int) -> list[Any]:
        """The micro-batches of this process in global batch number `index` of an epoch."""
        device = self.processes.fabric.device
        batches = [self.task.batch(epoch, own) for own in self._positions(index)]
        # To a device, the copy waits for nothing; pageable memory is read before the call returns.
        return [
            _pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)
            for batch in batches
        ]

    def _positions(self, index: int) -> list[range]:
        start = index * self.batch_size
        return [range(start + share.start, start + share.stop) for share in self.shares]

    def requests(self, first: int, last: int, per_epoch: int) -> Iterator[Request]:
        """What this process will ask its task for in these steps of the run, in order."""
        for step in range(first, last):
            epoch, index = divmod(step, per_epoch)
            yield from (Request(epoch, own) for own in self._positions(index))

    def wrap(self, modules: Mapping[str, nn.Module], batch: Any) -> dict[str, Any]:
        """The wrappers of the modules that the objectives train in this stage.

        Args:
            modules: By objective.
            batch: A micro-batch. In several processes it is gone through once for nothing, to see whether every
                parameter gets a gradient.
        """
        if self.processes.count == 1 or self.processes.cuts:
            return {name: self.processes.wrap(module) for name, module in modules.items()}
        buffers = {buffer: buffer.clone() for buffer in self.task.module.buffers()}
        earlier: dict[str, StepOutput] = {}
        models = {}
        for name, module in modules.items():
            wanted = [p for p in module.parameters() if p.requires_grad]
            with _only_trained({id(p) for p in wanted}, self.task), self.processes.fabric.autocast():
                earlier[name] = self.task.loss(name, module, batch, earlier)
                self.processes.fabric.backward(earlier[name].loss)
            missing = torch.tensor([float(sum(p.grad is None for p in wanted))], device=self.processes.fabric.device)
            used = self.task.always_used and not bool(self.processes.sum(missing))
            models[name] = self.processes.wrap(module, all_used=used)
        for parameter in self.task.module.parameters():
            parameter.grad = None
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        return models

    def gradient(
        self,
        objective: str,
        model: nn.Module,
        optimizer: Any,
        batches: Sequence[Any],
        earlier: Sequence[Mapping[str, StepOutput]],
        signals: Sequence[float],
    ) -> Gradient:
        """Leaves the clipped gradient of the global batch in the parameters of an optimiser.

        Args:
            objective: Which of the task's losses.
            model: The wrapper of the trained module.
            optimizer: Fabric's wrapper of the objective's optimiser.
            batches: What `batches` gave.
            earlier: For each micro-batch the outputs of the objectives before this one.
            signals: Numbers to be added up over the processes on the same occasion.
        """
        optimizer.zero_grad(set_to_none=True)
        outputs: list[StepOutput] = []
        weights: list[Weight] = []
        with _only_trained({id(p) for p in self.task.trained(objective).parameters()}, self.task):
            for i, batch in enumerate(batches if len(batches) > 1 else ()):
                noise_from(self.task.module, self.shares[i].start)
                self.task.survey(objective, batch)
            for i, batch in enumerate(batches):
                with self._synchronised(model, last=i == len(batches) - 1):
                    noise_from(self.task.module, self.shares[i].start)
                    output = self.task.loss(objective, model, batch, earlier[i])
                    if not output.loss.requires_grad:
                        raise ValueError(
                            f"the loss of {objective!r} reaches no parameter in this stage: leave something unfrozen that it "
                            "trains, or give a loss weight other than 0"
                        )
                    weight = (len(self.shares[i]) if output.count is None else output.count) / self._nominal
                    self.processes.fabric.backward(output.loss if _is_one(weight) else output.loss * weight)
                output.loss = output.loss.detach()
                outputs.append(output)
                weights.append(weight)
        if self.cut is not None:
            self.cut.collect(optimizer.optimizer)
        means, total, broken, added = self._means(outputs, weights, signals)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # The wrapper has taken the mean over processes.
        factor = self.processes.count / total
        if parameters and not _is_one(factor):
            torch._foreach_mul_([p.grad for p in parameters], factor)
        largest = float("inf") if self.clip is None else self.clip
        if self.cut is not None:
            norm = self.cut.clip(optimizer.optimizer, largest)
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
        loss = means.pop("")
        # The one question to the device in a step: whether to go on decides what the host does next.
        whole = (torch.isfinite(norm + loss) & ~broken).to(added)
        finite, *numbers = torch.cat([whole.reshape(1), added]).tolist()
        return Gradient(
            outputs, loss, means, norm, bool(finite), numbers if self.processes.count > 1 else list(signals)
        )

    @contextmanager
    def _synchronised(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """The wrapper adds gradients up over processes once, in the backward of the last micro-batch.

        Networks that are cut do so in every backward: each process keeps its part of the sum alone.
        """
        if self.processes.count == 1 or last or self.processes.cuts or not wrapped(model):
            yield
            return
        with self.processes.fabric.no_backward_sync(model):  # type: ignore[arg-type]
            yield

    def _means(
        self, outputs: Sequence[StepOutput], weights: Sequence[Weight], signals: Sequence[float]
    ) -> tuple[dict[str, Tensor], Weight, Tensor, Tensor]:
        """Means over all items of the step ("": the loss), the sum of weights, whether anything broke, summed signals.

        One vector is summed over processes.
        """
        names = list(outputs[0].logs)
        here = torch.stack([_row(o, names, w) for o, w in zip(outputs, weights, strict=True)]).sum(0)
        # In one process they need not travel.
        sent = torch.tensor(signals if self.processes.count > 1 else [], dtype=here.dtype)
        here = torch.cat([here, sent.to(here.device, non_blocking=True)])
        parts = [len(names) + 1, 1, 1, len(sent)]
        shares, weight, broken, added = torch.split(self.processes.sum(here), parts)
        means = dict(zip(["", *names], shares / weight, strict=True))
        total: Weight = weight[0].clamp_min(1e-12)
        if self.processes.count == 1 and not any(isinstance(w, Tensor) for w in weights):
            # Plain numbers, so that a batch in one piece is not even multiplied by 1.
            total = float(sum(weights))
        return means, total, broken[0] > 0, added


def _row(output: StepOutput, names: Sequence[str], weight: Weight) -> Tensor:
    """Loss and logs of a micro-batch times its weight, the weight, and 1 if something broke, in float64."""
    values = [output.loss, *(output.logs[name] for name in names)]
    row = torch.stack([value.detach().to(output.loss.device, torch.float64) for value in values])
    # Filling waits for nothing, where a number copied to the device would.
    size = weight.to(row) if isinstance(weight, Tensor) else torch.full((), weight, device=row.device, dtype=row.dtype)
    broken = torch.zeros_like(size) if output.finite is None else (~output.finite).to(row)
    # A micro-batch without a single item has no mean.
    return torch.cat([torch.where(size > 0, row * size, 0.0), torch.stack([size, broken])])


def _is_one(number: Weight) -> bool:
    return not isinstance(number, Tensor) and number == 1.0


@contextmanager
def _only_trained(own: set[int], task: Task) -> Iterator[None]:
    """Parameters of other objectives get no gradient: it would be thrown away, and their wrapper does not expect it."""
    several = len(task.objectives) > 1
    others = [p for p in task.module.parameters() if several and p.requires_grad and id(p) not in own]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
