# SPDX-License-Identifier: Apache-2.0
"""Batches from worker processes: read, decoded and cut ahead of the training that asks for them."""

import os
import signal
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from steadyvq.data.decode import to_float
from steadyvq.data.stream import Faults, Piece, StreamedCrops

AHEAD = 4
"""Batches that each worker holds ready."""

SIGNALLED_WITHIN = 5.0
"""Seconds in which the system tells a process that a child of it has died."""


class Request(NamedTuple):
    """A batch that training will ask for: consecutive positions of an epoch."""

    epoch: int
    positions: range


@dataclass
class FeedReport:
    """What a feed has done since its last report.

    Attributes:
        images: Photographs handed over.
        waited: Seconds that training waited for them.
        worked: Seconds that it did something else.
        busy: Seconds of reading, decoding and cutting, summed over workers.
        workers: Worker processes; 0: the work was done while training waited.
        faults: What could not be read.
    """

    images: int
    waited: float
    worked: float
    busy: float
    workers: int
    faults: Faults


class CropFeed:
    """Hands out the batches of a ``StreamedCrops``, prepared by worker processes once it is known which are to come.

    A batch is the same with any number of workers, and also if it was never announced.

    Args:
        crops: What the batches consist of.
        workers: Number of worker processes; 0: batches are prepared when they are asked for.

    Attributes:
        numbers: Which photographs the last batch is of.
        labels: Their classes.
        unannounced: Batches that were asked for out of turn while workers ran, and so prepared on the spot.
        total: What could not be read so far, in all processes that report (see ``learn``).
    """

    def __init__(self, crops: StreamedCrops, workers: int = 0) -> None:
        if workers < 0:
            raise ValueError(f"workers is {workers}, but a number of processes is at least 0")
        self.crops, self.workers = crops, workers
        self.labels: Int[Tensor, B] = torch.empty(0, dtype=torch.int64)
        self.unannounced = 0
        self.total = Faults()
        self._pieces: Iterator[Piece | str] | None = None
        self._ready: Piece | None = None
        self._left: float | None = None
        self._begin()

    def _begin(self) -> None:
        self._report = FeedReport(0, 0.0, 0.0, 0.0, self.workers, Faults())

    def announce(self, requests: Iterable[Request]) -> None:
        """Starts the workers on the batches that will be asked for, in this order."""
        self.close()
        if not self.workers:
            return
        with warnings.catch_warnings():
            # torch warns where workers are more than cores; whoever asks for them may know why.
            warnings.filterwarnings("ignore", "This DataLoader will create")
            loader = DataLoader(
                _Pieces(self.crops),
                batch_sampler=_Keys(self.crops, requests),
                num_workers=self.workers,
                collate_fn=_as_it_is,
                prefetch_factor=AHEAD,
                worker_init_fn=_begin_worker,
                # Else it would draw from the global generator.
                generator=torch.Generator(),
            )
            self._pieces = iter(loader)
        self._left = None

    def batch(self, epoch: int, positions: range) -> Float[Tensor, "B 3 S S"]:
        """Crops at these positions of an epoch as float32 in [-1, 1].

        Raises:
            ValueError: A photograph cannot be read, nor any of those that would stand in for it.
            OSError: A worker process has died.
        """
        asked = time.perf_counter()
        if self._left is not None:
            self._report.worked += asked - self._left
        piece = self._take(epoch, positions)
        images = to_float(piece.images)
        self.numbers, self.labels = piece.numbers, self.crops.labels(piece.numbers)
        self._report.faults.add(piece.faults)
        self._report.images += len(images)
        self._report.busy += piece.seconds
        self._left = time.perf_counter()
        self._report.waited += self._left - asked
        return images

    def _take(self, epoch: int, positions: range) -> Piece:
        wanted = (epoch, (positions.start, positions.stop))
        if self._ready is None and self._pieces is not None:
            self._ready = self._next(self._pieces)
        ready = self._ready
        if ready is not None and (ready.epoch, ready.positions) == wanted:
            self._ready = None
            return ready
        self.unannounced += self._pieces is not None
        return self.crops.piece(self.crops.keys(epoch, positions))

    def _next(self, pieces: Iterator[Piece | str]) -> Piece | None:
        with self._naming_the_dead():
            try:
                piece = next(pieces, None)
            except (ConnectionError, EOFError):
                # A worker died in the middle of sending. The signal of its death is still to come: waited for here, since
                # it would otherwise strike wherever this error has got to by then.
                time.sleep(SIGNALLED_WITHIN)
                raise
        if isinstance(piece, str):
            raise ValueError(piece)
        return piece

    @contextmanager
    def running(self, requests: Iterable[Request]) -> Iterator[None]:
        """Inside this context workers prepare the batches that will be asked for, in this order."""
        self.announce(requests)
        try:
            with self._naming_the_dead():
                yield
        finally:
            self.close()

    @contextmanager
    def _naming_the_dead(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # In this way torch tells the death of a worker, between any two lines of the main thread.
            if "DataLoader worker" not in str(error):
                raise
            raise OSError(
                f"a worker process that prepares batches has ended ({' '.join(str(error).split())}): the machine may be short "
                f"of memory or of shared memory (/dev/shm); set data.workers to less than {self.workers}"
            ) from error

    def close(self) -> None:
        """Ends the workers."""
        self._pieces = self._ready = None

    def report(self) -> FeedReport:
        """What happened since the last report; what training does until the next batch is not counted."""
        if self._left is not None:
            self._report.worked += time.perf_counter() - self._left
            self._left = None
        report = self._report
        self._begin()
        return report

    def learn(self, reports: Iterable[FeedReport]) -> dict[str, Any]:
        """Takes the reports of all processes together; returns a row for the log, empty if there is nothing to say.

        ``images_per_second`` is what training got, ``loader_images_per_second`` what the workers can prepare,
        ``model_images_per_second`` what training would take without ever waiting, and ``wait`` the share of the time it
        waited.
        """
        reports = list(reports)
        images = sum(report.images for report in reports)
        row: dict[str, Any] = {}
        if images:
            slowest = max(report.waited + report.worked for report in reports)
            waited = sum(report.waited for report in reports) / len(reports)
            worked = sum(report.worked for report in reports) / len(reports)
            able = sum(r.images / max(r.busy, 1e-9) * max(1, r.workers) for r in reports)
            row = {
                "images_per_second": round(images / max(slowest, 1e-9), 1),
                "loader_images_per_second": round(able, 1),
                "model_images_per_second": round(images / max(worked, 1e-9), 1),
                "wait": round(waited / max(waited + worked, 1e-9), 4),
                "workers": sum(report.workers for report in reports),
            }
        found = Faults()
        for report in reports:
            found.add(report.faults)
        new = {name: reason for name, reason in found.reasons.items() if name not in self.total.reasons}
        self.total.add(found)
        if row or found.replaced:
            row |= {"replaced": self.total.replaced, "unreadable": len(self.total.reasons)}
        return row | ({"new_unreadable": sorted(new.items())} if new else {})

    def state_dict(self) -> dict[str, Any]:
        """What could not be read so far."""
        return {"replaced": self.total.replaced, "reasons": [list(pair) for pair in sorted(self.total.reasons.items())]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores ``state_dict()``."""
        self.total = Faults(state["replaced"], dict(state["reasons"]))


def usable_workers(processes: int = 1) -> int:
    """Worker processes for one of several training processes on this machine: its cores less one, and 8 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // max(1, processes) - 1))


class _Pieces(Dataset[Piece]):
    """What a worker does: a list of keys becomes a piece, or the sentence that says why it cannot."""

    def __init__(self, crops: StreamedCrops) -> None:
        self.crops = crops

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> Piece | str:
        try:
            return self.crops.piece(keys)
        except ValueError as error:
            # Raised in a worker it would arrive with a traceback in its message.
            return str(error)


class _Keys:
    """The requests as lists of keys; the order of the photographs is computed here, once, and not in every worker."""

    def __init__(self, crops: StreamedCrops, requests: Iterable[Request]) -> None:
        self.crops, self.requests = crops, requests

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for epoch, positions in self.requests:
            yield self.crops.keys(epoch, positions)


def _as_it_is(piece: Any) -> Any:
    return piece


def _begin_worker(worker: int) -> None:
    """Ctrl-C and a cluster's SIGTERM reach workers too, but it is their parent that saves, stops and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
