# SPDX-License-Identifier: Apache-2.0
"""Two processes as two threads that exchange statistics, so that a forward and an update can be split between them."""

import copy
import threading
from collections.abc import Callable

import torch
from torch import Tensor

import steadyvq


class Pair:
    """Sums and concatenations over two threads that call them in the same order."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20)
        self.slots: list[Tensor] = [torch.empty(0)] * 2

    def _exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self.slots[rank] = tensor.detach().clone()
        self.barrier.wait()
        both = list(self.slots)
        self.barrier.wait()
        return both

    def join(self, vq: steadyvq.Quantizer, rank: int) -> None:
        """Makes a quantizer that of one process."""
        for layer in vq.modules():
            if isinstance(layer, steadyvq.Quantizer):
                layer.reduce = lambda tensor: sum(self._exchange(rank, tensor))
                layer.gather = lambda rows: torch.cat(self._exchange(rank, rows))

    def run(self, work: Callable[[int], None]) -> None:
        """Does the work of both."""
        errors: list[BaseException] = []

        def guarded(rank: int) -> None:
            try:
                work(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def one_step(vq: steadyvq.Quantizer, z: Tensor, mask: Tensor, upstream: Tensor) -> tuple[list[Tensor], Tensor, object]:
    """(gradients by the latents and the parameters, number of valid latents, output) of one forward and backward."""
    z = z.clone().requires_grad_()
    out = vq(z, mask)
    # A decoder's loss is a mean over the forward's latents too.
    total = out.loss + (out.z_q * upstream * mask[:, None]).sum() / out.num_valid
    leaves = [z, *vq.parameters()]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)], out.num_valid, out


def split_step(
    vq: steadyvq.Quantizer, z: Tensor, mask: Tensor, upstream: Tensor, cut: int
) -> tuple[list[Tensor], list[steadyvq.Quantizer]]:
    """The same by two processes with the latents before and after `cut`: averaged gradients, and their quantizers."""
    pair, parts = Pair(), [copy.deepcopy(vq) for _ in range(2)]
    results: list = [None, None]

    def work(rank: int) -> None:
        pair.join(parts[rank], rank)
        rows = slice(0, cut) if rank == 0 else slice(cut, None)
        parts[rank].first_item = 0 if rank == 0 else cut
        results[rank] = one_step(parts[rank], z[rows], mask[rows], upstream[rows])
        parts[rank].update(results[rank][2])

    pair.run(work)
    total = sum(valid for _, valid, _ in results)
    shares = [[g * (valid / total) for g in grads] for grads, valid, _ in results]
    return [
        torch.cat([shares[0][0], shares[1][0]]),
        *(a + b for a, b in zip(shares[0][1:], shares[1][1:], strict=True)),
    ], parts
