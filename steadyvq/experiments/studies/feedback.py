# SPDX-License-Identifier: Apache-2.0
"""Does quantisation error drive the encoder's drift through the straight-through estimator? Meters, and interventions."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steadyvq.experiments.claims import Claim, Decision, Results, above, below, one_each
from steadyvq.experiments.runner import fresh_run, run_config
from steadyvq.experiments.study import Cell, Computed, Curve, Measure, Study, Trained, Values
from steadyvq.metrics import encoder_drift
from steadyvq.training.average import WeightAverage
from steadyvq.training.loop import Engine
from steadyvq.training.task import StepOutput
from steadyvq.training.tokenizer_task import TokenizerTask

FVQ = "arXiv 2509.10140"
NSVQ = "arXiv 2606.11363"


class MeteredTask(TokenizerTask):
    """A tokenizer's training with three meters, read every few steps on the batch of that step.

    cosine    between the gradients of the reconstruction error at z_q and at z: what the straight-through estimator gets wrong
    behind    |e_q - z|^2 of the batch after the step, over the same before it: above 1, codes run after their latents
    rows      share of the codes that the step moved

    Args:
        settings: `config` of the quickstart recipe, and `every`.
        seed: Of the run.
    """

    def __init__(self, settings: Mapping[str, Any], seed: int) -> None:
        super().__init__(run_config(Trained("quickstart", settings["config"]), seed))
        self.every, self.steps = settings["every"], 0
        self.readings: dict[str, list[tuple[int, float]]] = {}
        self._before: tuple[Tensor, Tensor] | None = None
        self._probe: Tensor | None = None

    def loss(self, objective: str, model: nn.Module, batch: Tensor, earlier: Mapping[str, StepOutput]) -> StepOutput:
        """Keeps the batch and the table as they are before the step."""
        self._before = (batch, self.quantizer.codebook()) if (self.steps + 1) % self.every == 0 else None
        return super().loss(objective, model, batch, earlier)

    def after_step(
        self, objective: str, outputs: Sequence[StepOutput], optimizer: Optimizer, average: WeightAverage
    ) -> Mapping[str, float | Tensor]:
        """Reads the meters after the step and its bookkeeping."""
        logs = super().after_step(objective, outputs, optimizer, average)
        self.steps += 1
        if self._before is not None:
            self._read(*self._before, outputs)
            self._before = None
        return logs

    def _read(self, batch: Tensor, table: Tensor, outputs: Sequence[StepOutput]) -> None:
        old = outputs[0].extra.quantized.assignment
        with torch.no_grad():
            latents = self.tokenizer.latents(batch)
            z = latents.movedim(1, -1).reshape(-1, latents.shape[1])
            now = self.quantizer.codebook()
            before = (table[old.indices] - old.z).square().sum(1).mean()
            after = (now[old.indices] - z).square().sum(1).mean()
            moved = (now - table).square().sum(1).sqrt()
            probe = self.tokenizer.latents(next(self.val_crops.batches(16))).movedim(1, -1).flatten(0, 2)
        found = {
            "cosine": self._cosine(batch, latents),
            "behind": float(after / before.clamp_min(1e-20)),
            # A decay of moving averages moves idle codes in the last digits only.
            "rows": float((moved > 1e-4 * now.square().sum(1).mean().sqrt()).float().mean()),
            "error": float(old.distance.mean() / (old.z - old.z.mean(0)).square().sum(1).mean()),
        }
        if self._probe is not None:
            found["drift"] = encoder_drift(self._probe, probe)[0]
        self._probe = probe
        for name, value in found.items():
            self.readings.setdefault(name, []).append((self.steps, round(value, 4)))

    def _cosine(self, batch: Tensor, latents: Tensor) -> float:
        """Mean over latents of the cosine between the gradients at their codes and at themselves."""
        with torch.no_grad():
            z_q = self.quantizer(latents).z_q
        first, second = (self._gradient(batch, point) for point in (z_q, latents))
        return float(nn.functional.cosine_similarity(first, second, dim=1).mean())

    def _gradient(self, batch: Tensor, point: Tensor) -> Tensor:
        point = point.detach().requires_grad_()
        tokenizer = self.tokenizer
        made = tokenizer.decoder(tokenizer.post_quant(tokenizer.rectifier(point)))
        (gradient,) = torch.autograd.grad((made - batch).square().sum(), point)
        return gradient


def metered(cell: Cell) -> Values:
    """A run with meters; means over its second half, where nothing is as at the start any more."""
    task = MeteredTask(cell.settings, cell.seed)
    Engine(task, fresh_run(cell.folder, task.config), quiet=True).fit()
    late = {name: [v for _, v in readings[len(readings) // 2 :]] for name, readings in task.readings.items()}
    found: Values = {name: round(mean(values), 4) for name, values in late.items()}
    return {**found, "curves": {name: [list(r) for r in readings] for name, readings in task.readings.items()}}


def arms(settings: Mapping[str, Any]) -> dict[str, Computed]:
    """Plain VQ, four times the codes, other estimators and codebooks, and the oracle."""
    plain: dict[str, dict[str, Any]] = {
        "vq": {"name": "vq", "init": "data"},
        "vq, K x 4": {"name": "vq", "init": "data", "num_codes": 4096},
        "rotation": {"name": "rotation", "init": "data"},
        "simvq": {"name": "simvq"},
        "fvq": {"name": "fvq"},
        "nsvq": {"name": "nsvq"},
        "oracle": {"name": "steadyvq.experiments.oracle:oracle", "init": "kmeans"},
    }
    made = {}
    for name, quantizer in plain.items():
        config = {**settings["training"], "quantizer": {"num_codes": 1024, "init_samples": 256, **quantizer}}
        made[name] = Computed(metered, {"config": config, "every": settings["every"]})
    return made


Decide = Callable[[Results], Decision]


def _more(measure: str, arm: str, than: str, sign: float = 1.0) -> Decide:
    what = f"{measure}, " + ("more" if sign > 0 else "less")

    def decide(results: Results) -> Decision:
        gains = [[sign * value for value in pair] for pair in results.gains(arm, than, measure)]
        return above(gains, 0, f"{what} than `{than}`", "+.3f")

    return decide


def _few(results: Results) -> Decision:
    return below(one_each(results.values("vq", "rows")), 0.5, "codes moved in a step, %", ".0f", 100)


def _all(arm: str) -> Decide:
    return lambda results: above(one_each(results.values(arm, "rows")), 0.95, "codes moved in a step, %", ".0f", 100)


def _behind(results: Results) -> Decision:
    return above(one_each(results.values("vq", "behind")), 1.0, "error after over before the step", ".3f")


SLOWER = {"optim": {"final": 0.1}}
"""A step at the rate 0 moves nothing and would be read as a method that moves nothing."""

STUDY = Study(
    name="feedback",
    title="The feedback loop",
    question="Does a smaller quantisation error make gradients truer, and the encoder steadier?",
    protocol=(
        "The quickstart recipe with K = 1,024 and rates that fall to a tenth, so that the last "
        "reading has a step; every {every} steps three meters are read on the batch of the step (cosine "
        "of the gradients at z_q and at z; error of the chosen codes after the step over before it; codes that moved) and "
        "the drift of held-out latents since the last reading. Means over the second half. Interventions: four times the "
        "codes, the rotation trick, whole-table codebooks, the NS loss, and k-means refitted every 25 steps."
    ),
    profiles={
        "tiny": {"training": {"epochs": 2, "eval_every": 2, **SLOWER}, "every": 20},
        "small": {"training": {"epochs": 10, "eval_every": 10, **SLOWER}, "every": 50},
        "full": {"training": {"epochs": 100, "eval_every": 100, **SLOWER}, "every": 100},
    },
    arms=arms,
    claims=(
        Claim("A step of plain VQ moves fewer than half of the codes", FVQ, _few, "sparse gradients"),
        Claim("A step of FVQ moves (nearly) all codes", FVQ, _all("fvq"), "100 %"),
        Claim("A step of NSVQ moves (nearly) all codes", NSVQ, _all("nsvq"), "dense gradient"),
        Claim(
            "Codes of plain VQ are one step behind: the step makes their error larger", FVQ, _behind, "one-step-behind"
        ),
        Claim("A smaller error makes the gradients truer: oracle against VQ", FVQ, _more("cosine", "oracle", "vq")),
        Claim("... and K x 4 against K", FVQ, _more("cosine", "vq, K x 4", "vq")),
        Claim(
            "A smaller error makes the encoder steadier: oracle against VQ", NSVQ, _more("drift", "oracle", "vq", -1)
        ),
        Claim("... and NSVQ against VQ", NSVQ, _more("drift", "nsvq", "vq", -1), "Fig. 2: 0.118 against 25 (RMS)"),
        Claim("The rotation trick makes the encoder steadier", "ours", _more("drift", "rotation", "vq", -1)),
    ),
    measures=(
        Measure("error", "relative error"),
        Measure("cosine", "cosine of gradients"),
        Measure("behind", "error after / before a step"),
        Measure("rows", "codes moved, %", ".0f", 100),
        Measure("drift", "drift between readings, spreads"),
    ),
    curves=(
        Curve("cosine", "Cosine of the gradients at z_q and z"),
        Curve("error", "Relative error"),
        Curve("drift", "Encoder drift between readings", "spreads"),
        Curve("rows", "Codes moved by a step", percent=True),
    ),
)
