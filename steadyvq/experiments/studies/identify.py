# SPDX-License-Identifier: Apache-2.0
"""Which reading of the non-stationary loss fits the paper's Fig. 4? Squared distance or not, divided by d or not."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from steadyvq.experiments.claims import Claim, Decision, Results, above, one_each
from steadyvq.experiments.latents import SIZES, source
from steadyvq.experiments.studies.replay import replay
from steadyvq.experiments.study import Cell, Computed, Measure, Study, Values

ALPHAS = {0.001: 14.2, 0.01: 13.7, 0.05: 13.7, 0.1: 13.4, 0.5: 15.9}
TAUS = {0.1: 14.5, 0.3: 13.5, 0.35: 13.4, 0.5: 13.5, 1.0: 14.1}
"""rFID on CelebA 128 x 128, read off the paper's Fig. 4; both at the other's best."""
ALPHA, TAU = 0.1, 0.35
PAPER = "arXiv 2606.11363, Fig. 4"


def sweep(cell: Cell) -> Values:
    """One reading of the loss over the paper's weights and temperatures; how its regret goes with the paper's rFID."""
    s = cell.settings
    found: Values = {}
    for alpha, tau in _grid():
        # The loss is divided by d; a reading without that is d times the weight.
        weight = alpha if s["per_dim"] else alpha * s["dim"]
        losses = {"ns": {"weight": weight, "squared": s["squared"]}}
        options = {"losses": losses, "temperature": tau * s["unit"]}
        candidate = {"quantizer": "nsvq", "rate": s["rate"], "options": options}
        made = replay(Cell({"candidate": candidate, "codes": s["codes"]}, cell.seed, cell.folder, cell.inputs))
        found[_name(alpha, tau)] = made["regret"]
    ours = [found[_name(alpha, tau)] for alpha, tau in _grid()]
    theirs = [ALPHAS[alpha] if tau == TAU else TAUS[tau] for alpha, tau in _grid()]
    found["fit"] = round(_rank_correlation(ours, theirs), 4)
    found["spread"] = round(max(ours) - min(ours), 3)
    return found


def _grid() -> list[tuple[float, float]]:
    return [(alpha, TAU) for alpha in ALPHAS] + [(ALPHA, tau) for tau in TAUS if tau != TAU]


def _name(alpha: float, tau: float) -> str:
    return f"alpha {alpha:g}, tau {tau:g}"


def _rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's; ranks of equal values are shared. 0 where one of them does not vary."""

    def ranks(values: list[float]) -> np.ndarray:
        array = np.asarray(values)
        return np.array([(array < value).sum() + ((array == value).sum() - 1) / 2 for value in array])

    first, second = ranks(a), ranks(b)
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def arms(settings: Mapping[str, Any]) -> dict[str, Computed]:
    """The readings, and tau in the units of the paper or in those of our latents."""
    made = {"source": source(settings["source"])}
    for squared in (True, False):
        for per_dim in (True, False):
            for unit in settings["units"]:
                own = {"squared": squared, "per_dim": per_dim, "unit": unit, "rate": settings["rate"], "dim": 32}
                own["codes"] = settings["source"]["codes"]
                name = f"{'squared' if squared else 'plain'}, {'1/(N d)' if per_dim else '1/N'}"
                name += "" if unit == 1 else f", tau x {unit:g}"
                made[name] = Computed(sweep, own, needs=["source"], steps=30)
    return made


def fits(arm: str) -> Callable[[Results], Decision]:
    """Whether regret rises and falls with the paper's rFID."""
    return lambda results: above(one_each(results.values(arm, "fit")), 0.5, "rank correlation")


def _worse(results: Results) -> Decision:
    gains = [
        [a - b]
        for a, b in zip(
            results.values(FAITHFUL, _name(0.5, TAU)), results.values(FAITHFUL, _name(ALPHA, TAU)), strict=True
        )
    ]
    return above(gains, 0, "dB more regret than at 0.1", "+.2f")


FAITHFUL = "squared, 1/(N d)"
STUDY = Study(
    name="identify",
    title="Which reading of the NS loss",
    question="Which of the readings that the NSVQ paper leaves open has the shape of its Fig. 4?",
    protocol=(
        "NSVQ with every reading of its loss at the paper's nine pairs of weight and temperature, on replayed latents (as "
        "in `replay`), codes by Adam at {rate}. Fit: Spearman's correlation of our regret with the paper's rFID. Whether "
        "z is detached and what beta is cannot be seen without an encoder that reacts."
    ),
    profiles={
        name: {"source": SIZES[name], "rate": 0.03, "units": units}
        for name, units in {"tiny": [1.0], "small": [1.0, 0.1, 10.0], "full": [1.0, 0.1, 10.0]}.items()
    },
    arms=arms,
    claims=(
        Claim("Squared, divided by N d, has the shape of Fig. 4 (rank correlation above 0.5)", PAPER, fits(FAITHFUL)),
        Claim("Squared, divided by N, has", PAPER, fits("squared, 1/N")),
        Claim("Not squared, divided by N d, has", PAPER, fits("plain, 1/(N d)")),
        Claim("Not squared, divided by N, has", PAPER, fits("plain, 1/N")),
        Claim("alpha = 0.5 is worse than 0.1 (our reading)", PAPER, _worse, "15.9 against 13.4 rFID"),
    ),
    measures=(
        Measure("fit", "rank correlation with rFID", ".2f"),
        Measure("spread", "spread of regret, dB", ".2f"),
        *(Measure(_name(alpha, tau), f"{_name(alpha, tau)}, dB", ".2f") for alpha, tau in _grid()),
    ),
    curves=(),
)  # fmt: skip
