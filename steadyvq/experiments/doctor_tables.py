# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/diagnosis.md, from docs/evidence/doctor.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from steadyvq.diagnosis.doctor import CAUSES
from steadyvq.experiments.markdown import markdown

NOTHING = "healthy"
OTHER = "dying"
ORDER = (*CAUSES, OTHER, NOTHING)


def confusion_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Planted against named: in each cell the runs in which that was named, of which a run may have several."""
    rows = []
    for planted in ORDER:
        own = [run for run in runs if run["planted"] == planted]
        named = [run["found"] or [NOTHING] for run in own]
        cells = [sum(column in names for names in named) for column in ORDER]
        rows.append([planted, str(len(own)), *(str(count) if count else "." for count in cells)])
    head = ["planted", "runs", *(f"{i + 1}" for i in range(len(ORDER)))]
    numbered = ", ".join(f"{i + 1} {name}" for i, name in enumerate(ORDER))
    return f"Named: {numbered}.\n\n{markdown(head, rows)}"


def warnings_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Healthy and dying runs: what was lost of the peak when the monitor spoke, and in the end."""
    rows = []
    for run in runs:
        if run["planted"] in (NOTHING, OTHER):
            spoke = "said nothing" if run["lost_at_warning"] is None else f"{run['lost_at_warning']:.0%}"
            used = f"{run['alive']:,} of {run['num_codes']:,}"
            rows.append([run["planted"], f"`{run['method']}`", str(run["seed"]), used, f"{run['lost']:.0%}", spoke])
    return markdown(["run", "method", "seed", "alive at the end", "lost of the peak", "lost when it warned"], rows)


def cost_table(record: Mapping[str, Any]) -> str:
    """What a monitor adds to a training step."""
    rows = []
    for row in record["rows"]:
        low, high = (f"{100 * (row[name] - 1):+.1f}" for name in ("low", "high"))
        size = f"`{row['method']}`, {row['tokens']:,} tokens, K = {row['num_codes']:,}, d = {row['dim']}"
        step = f"{row['ours_ms'] / record['steps']:.1f}"
        added = f"{100 * (row['ratio'] - 1):+.1f} % [{low}, {high}]"
        rows.append([size, step, f"{100 * row['inside']:.1f} %", added, str(row["pairs"])])
    head = ["step", "ms without", "time inside the monitor", "difference of blocks (95 %)", "pairs of 100 steps"]
    return markdown(head, rows)
