# SPDX-License-Identifier: Apache-2.0
"""A monitor for any VQ module: it watches the codebook while others train it, and warns before it is too late.

monitor = steadyvq.Monitor(vq, "monitor.jsonl", probe=(model, images))
for batch in batches:
    ...                                        # forward, backward, optimizer.step(), in any trainer
    monitor.step({"reconstruction": loss})     # once per optimiser step
"""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from steadyvq.diagnosis.adapters import Adapter, Record, adapt, compared
from steadyvq.diagnosis.early import early_warnings
from steadyvq.diagnosis.look import latents_of, look, table_of
from steadyvq.diagnosis.meters import CodeAges, Reduce, spaced
from steadyvq.metrics.drift import Probe

KIND = "monitor"
PROBE_ROWS = 1024
FORGOTTEN = 100
logger = logging.getLogger("steadyvq")
Sink = Callable[[dict[str, Any]], object]


def alone(tensor: Tensor) -> Tensor:
    """The sum over one process."""
    return tensor


class Monitor:
    """Measures how a codebook is used, how fast latents and codes move, and says so before half of it is dead.

    Args:
        module: The VQ module, ours or not; its forwards in training mode are counted.
        log: A file that gets a JSON line per row, a function that takes each row, or None.
        probe: The model that holds the module, and fixed inputs: it is called in evaluation mode at every row. Or a function
            without arguments that sends the same inputs through the module each time. Without either drift is unknown.
        adapter: Reads a call of the module; see `steadyvq.diagnosis.adapt`.
        every: Optimiser steps between rows.
        watch_every: Optimiser steps between looks at the ages of the codes, from which warnings come.
        reduce: Sums a tensor over all processes of a run, all of which take the same steps.
        attach: Hook the module. False: `observe` is called with each record instead.
        warn: Say warnings by `warnings.warn` and the logger `steadyvq`. False: they are only rows of the log.

    Attributes:
        row: The last row; empty before the first.
        warned: What was said so far, by kind (`dying`, `stillborn`).
    """

    def __init__(
        self,
        module: nn.Module,
        log: str | Path | Sink | None = None,
        *,
        probe: tuple[nn.Module, Any] | Callable[[], object] | None = None,
        adapter: Adapter = adapt,
        every: int = 100,
        watch_every: int = 5,
        reduce: Reduce = alone,
        attach: bool = True,
        warn: bool = True,
    ) -> None:
        if every < 1 or watch_every < 1:
            raise ValueError(f"every={every} and watch_every={watch_every}, but a monitor needs at least 1 of each")
        self.module, self.probe, self.adapter, self.reduce = module, probe, adapter, reduce
        self.every, self.watch_every, self.warn = every, watch_every, warn
        self.log = _appending(Path(log)) if isinstance(log, str | Path) else log
        self.steps = self.forwards = 0
        self.row: dict[str, Any] = {}
        self.warned: dict[str, str] = {}
        self.ages: CodeAges | None = None
        self._loaded: dict[str, Any] = {}
        self._drift, self._probed_at = Probe(), 0
        self._probing: list[Record] | None = None
        self._sample: list[Record] = []
        self._before: Tensor | None = None
        self._last: Record | None = None
        self._table: Callable[[], Tensor] | None = None
        self._values: dict[str, tuple[float | Tensor, int]] = {}
        self._trained: bool | None = None
        self._hook = module.register_forward_hook(self._called, with_kwargs=True) if attach else None

    def close(self) -> None:
        """Takes the hook off the module."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        inputs = (*args, *kwargs.values())
        if self._probing is not None:
            self._probing.append(self.adapter(module, inputs, outputs))
        elif module.training:
            self.observe(self.adapter(module, inputs, outputs))

    @property
    def _due(self) -> bool:
        """Whether the present step ends with a row: the first does, and every `every`-th."""
        return self.steps == 0 or (self.steps + 1) % self.every == 0

    def observe(self, record: Record) -> None:
        """Counts one training forward; the hook calls it."""
        if self.ages is None:
            self._start(record)
        assert self.ages is not None
        self.ages.count(record.indices)
        self.forwards += 1
        if record.trained is not None:
            self._trained = bool(self._trained) or record.trained
        if self._due:
            self._sample.append(record)
        self._last = record
        if self.forwards == FORGOTTEN and self.steps == 0:
            self._say(
                "no_step", f"a monitor saw {FORGOTTEN} forwards and no step: call monitor.step() after optimizer.step()"
            )

    def _start(self, record: Record) -> None:
        """Checks the first record and makes the state."""
        table, flat = table_of(record), record.indices.detach().reshape(-1)
        if table.dim() != 2:
            raise ValueError(f"the codebook has shape {tuple(table.shape)}, but a monitor needs one table (K, d)")
        low, high = (int(bound) for bound in torch.aminmax(flat)) if flat.numel() else (0, 0)
        if low < -1 or high >= len(table):
            raise ValueError(
                f"indices reach from {low} to {high}, but the codebook has {len(table)} rows: pass an adapter whose indices "
                "name rows, or -1 for masked positions"
            )
        self.ages, self._table = CodeAges(len(table), flat.device), record.codebook
        if self._loaded:
            self.ages.load_state_dict(self._loaded)

    def step(self, values: Mapping[str, float | Tensor] | None = None) -> dict[str, Any] | None:
        """Ends an optimiser step; call it after `optimizer.step()` and, for it to see gradients, before these are cleared.

        Args:
            values: Numbers of this step for the log; tensors are not read before the next row. The doctor reads
                `reconstruction` (a loss) and `adversarial` (that of the generator; left out before it begins).

        Returns:
            The row, if one was due.

        Raises:
            ValueError: A value is no number.
        """
        for name, value in (values or {}).items():
            self._add(name, value)
        due, row = self._due, None
        self.steps += 1
        if self.ages is not None:
            self.ages.end_step(self.reduce)
            if due:
                row = self._report(self.ages)
            elif self.steps % self.watch_every == 0:
                self._check(self._lives(self.ages))
            if self._due and self._last is not None:
                # What the next step starts from; a module may change it within its forward.
                self._before = table_of(self._last)
        self._last = None
        return row

    def _lives(self, ages: CodeAges) -> dict[str, Any]:
        """The ages of the codes now."""
        if self._last is not None:
            self._table = self._last.codebook
        assert self._table is not None
        with torch.no_grad():
            return ages.alive(self._table)

    def _add(self, name: str, value: float | Tensor) -> None:
        number = value.detach() if isinstance(value, Tensor) else value
        if not isinstance(number, Tensor | float | int) or (isinstance(number, Tensor) and number.numel() != 1):
            raise ValueError(f"{name} is a {type(value).__name__} that is no single number: give its mean")
        total, count = self._values.get(name, (0.0, 0))
        self._values[name] = (total + number, count + 1)

    def _report(self, ages: CodeAges) -> dict[str, Any]:
        """Measures and logs a row."""
        lives = self._lives(ages)
        row: dict[str, Any] = {
            "kind": KIND,
            "step": self.steps,
            "num_codes": ages.num_codes,
            **lives,
            **ages.usage(),
            **look(self._sample, self._before, self.reduce, ages.last.device),
            "trained": self._trained,
        }
        row["tokens_per_step"] = row["window_tokens"] / (self.steps - self.row.get("step", 0))
        if self.probe is not None:
            row |= self._moved(row)
        row["values"] = {name: float(total) / count for name, (total, count) in self._values.items()}
        self._values, self._trained, self._sample, self._before = {}, None, [], None
        self.row = _plain(row)
        if self.log is not None:
            self.log(self.row)
        self._check(lives)
        return self.row

    def _moved(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        """How far the probe's latents moved since the last row, per step, and between two hits of a code that is alive."""
        record = self._run_probe()
        rows, flat = latents_of(record), record.indices.detach().reshape(-1).to(torch.int64)
        rows, flat = (x[spaced(len(flat), PROBE_ROWS, flat.device)] for x in (rows, flat))
        z, table = compared(rows.float(), record.metric), compared(table_of(record).float(), record.metric)
        seen = self._drift(z, table[flat.clamp_min(0)], flat)
        names = ("drift", "drift_rms", "churn")
        found = [(seen[name] or 0.0, float(seen[name] is not None)) for name in names]
        sums = self.reduce(torch.tensor(found, dtype=torch.float64, device=flat.device))
        mean = {
            n: float(total / count) if count else None for n, (total, count) in zip(names, sums.tolist(), strict=True)
        }
        steps, self._probed_at = self.steps - self._probed_at, self.steps
        per_step = None if mean["drift_rms"] is None else mean["drift_rms"] / steps
        updates = max(1.0, row["alive"] / max(1.0, row["tokens_per_step"]))
        return {
            **mean,
            "drift_steps": steps,
            "drift_per_step": per_step,
            "drift_per_hit": None if per_step is None else per_step * updates,
        }

    def _run_probe(self) -> Record:
        self._probing = []
        try:
            with torch.no_grad():
                if isinstance(self.probe, tuple):
                    model, inputs = self.probe
                    with _evaluating(model):
                        found = model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
                else:
                    assert self.probe is not None
                    with _evaluating(self.module):
                        found = self.probe()
            seen = [found] if isinstance(found, Record) else self._probing
        finally:
            self._probing = None
        if not seen:
            raise ValueError(
                "the probe did not call the monitored module: pass (model, inputs) of the model that holds it"
            )
        return seen[-1]

    def _check(self, lives: Mapping[str, Any]) -> None:
        assert self.ages is not None
        for kind, sentence in early_warnings(self.steps, self.ages.num_codes, lives).items():
            self._say(kind, sentence, {name: lives[name] for name in ("alive", "peak_alive", "died")})

    def _say(self, kind: str, sentence: str, numbers: Mapping[str, Any] = MappingProxyType({})) -> None:
        if kind in self.warned:
            return
        self.warned[kind] = sentence
        if self.warn:
            logger.warning(sentence)
            warnings.warn(sentence, UserWarning, stacklevel=4)
        if self.log is not None:
            self.log({"kind": "warning", "step": self.steps, "warning": kind, "text": sentence, **numbers})

    def state_dict(self) -> dict[str, Any]:
        """Everything that later rows depend on; tensors and plain data."""
        return {
            "steps": self.steps,
            "row": {name: self.row[name] for name in ("step",) if name in self.row},
            "warned": dict(self.warned),
            "ages": self._loaded if self.ages is None else self.ages.state_dict(),
            "drift": self._drift.state_dict(),
            "probed_at": self._probed_at,
            "before": {} if self._before is None else {"table": self._before.clone()},
            "values": {name: [float(total), count] for name, (total, count) in self._values.items()},
            "trained": self._trained,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict()`."""
        self.steps = int(state["steps"])
        self.row, self.warned = dict(state["row"]), dict(state["warned"])
        self._loaded = dict(state["ages"])
        if self.ages is not None and self._loaded:
            self.ages.load_state_dict(self._loaded)
        self._drift.load_state_dict(state["drift"])
        self._probed_at, self._before = int(state["probed_at"]), state["before"].get("table")
        self._values = {name: (total, int(count)) for name, (total, count) in state["values"].items()}
        self._trained = state["trained"]


def _appending(path: Path) -> Sink:
    path.parent.mkdir(parents=True, exist_ok=True)

    def append(row: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    return append


def _plain(value: Any) -> Any:
    """Without numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; then each part as it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
