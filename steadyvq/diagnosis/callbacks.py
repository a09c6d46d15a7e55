# SPDX-License-Identifier: Apache-2.0
"""A monitor inside other people's trainers. Their libraries are imported when a callback is made, not before."""

from importlib import import_module
from typing import Any

from steadyvq.diagnosis.monitor import Monitor


def _class(modules: tuple[str, ...], name: str, package: str) -> Any:
    for module in modules:
        try:
            return getattr(import_module(module), name)
        except ModuleNotFoundError:
            continue
    raise ValueError(f"{package} is not installed, and the callback is made for its trainer: pip install {package}")


def lightning_callback(monitor: Monitor) -> Any:
    """A callback for `lightning.Trainer(callbacks=[...])`: one `monitor.step` per optimiser step.

    Numbers that the module logs as `reconstruction` or `adversarial` (`self.log`, of the step) go into the monitor's log; the
    monitor's state travels in Lightning's checkpoints.

    Raises:
        ValueError: Lightning is not installed.
    """
    base = _class(("lightning.pytorch", "pytorch_lightning"), "Callback", "lightning")

    class MonitorCallback(base):  # type: ignore[misc, valid-type]
        """One step of the monitor per optimiser step."""

        def __init__(self) -> None:
            self.done = 0

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any, **__: Any) -> None:
            """The global step counts optimiser steps, so accumulated batches end none."""
            if trainer.global_step > self.done:
                self.done = trainer.global_step
                monitor.step(_read(trainer.callback_metrics))

        def state_dict(self) -> dict[str, Any]:
            return {"done": self.done, "monitor": monitor.state_dict()}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.done = state_dict["done"]
            monitor.load_state_dict(state_dict["monitor"])

    return MonitorCallback()


def transformers_callback(monitor: Monitor) -> Any:
    """A callback for `transformers.Trainer(callbacks=[...])`: one `monitor.step` per optimiser step.

    Raises:
        ValueError: Transformers is not installed.
    """
    base = _class(("transformers",), "TrainerCallback", "transformers")

    class MonitorCallback(base):  # type: ignore[misc, valid-type]
        """One step of the monitor per optimiser step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """The trainer calls it once per optimiser step, accumulated or not."""
            latest = state.log_history[-1] if state.log_history else {}
            monitor.step(_read(latest))

    return MonitorCallback()


def _read(metrics: Any) -> dict[str, Any]:
    """What the doctor reads, by the names it knows."""
    return {name: metrics[name] for name in ("reconstruction", "adversarial", "loss") if name in metrics}
