# SPDX-License-Identifier: Apache-2.0
"""The final numbers of runs side by side, as text for a terminal and as numbers for a page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from steadyvq.report.runs import Run, read_runs

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """One number that runs are compared by.

    Attributes:
        name: head of the column.
        show: the number of a run, as text.
        value: the number itself, or None where the run has none.
        best: picks the best of several values, or None where no value is better than another.
    """

    name: str
    show: Callable[[Run], str]
    value: Callable[[Run], float | None]
    best: Callable[[Sequence[float]], float] | None = None


def psnr(run: Run) -> str:
    """PSNR in dB with its interval."""
    mean, low, high = (run.final(key) for key in ("psnr", "psnr_low", "psnr_high"))
    interval = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return MISSING if mean is None else f"{mean:.2f}{interval}"


def codes(run: Run) -> str:
    """Codes used of all codes."""
    if run.active is None or run.num_codes is None:
        return MISSING
    return f"{run.active:,} of {run.num_codes:,}"


def percent(value: float | None) -> str:
    """A share in percent."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def duration(seconds: float | None) -> str:
    """A time in the largest units that tell it to a few percent."""
    if seconds is None:
        return MISSING
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def _metric(name: str, key: str, form: str, best: Callable[[Sequence[float]], float] | None) -> Column:
    def show(run: Run) -> str:
        value = run.final(key)
        return MISSING if value is None else format(value, form)

    return Column(name, show, lambda run: run.final(key), best)


COLUMNS = (
    Column("PSNR (dB)", psnr, lambda run: run.final("psnr"), max),
    _metric("SSIM", "ssim", ".3f", max),
    Column("codes used", codes, lambda run: run.final("utilization"), max),
    Column("utilization", lambda run: percent(run.final("utilization")), lambda run: run.final("utilization"), max),
    Column("ceiling", lambda run: percent(run.final("ceiling")), lambda run: run.final("ceiling")),
    _metric("perplexity", "perplexity", ",.0f", max),
    _metric("relative error", "relative_error", ".3f", min),
    Column("time", lambda run: duration(run.seconds), lambda run: run.seconds),
)


def comparison_table(runs: Sequence[Path]) -> list[dict[str, str]]:
    """Return one row of final numbers per run, as text by column name.

    Args:
        runs: run folders.

    Raises:
        ValueError: a folder holds no log.
    """
    return [{"run": run.label, **{column.name: column.show(run) for column in COLUMNS}} for run in read_runs(runs)]


def best_runs(column: Column, runs: Sequence[Run]) -> set[int]:
    """Return the positions of the runs with the best value of a column; none where there is nothing to tell apart."""
    known = {i: value for i, run in enumerate(runs) if (value := column.value(run)) is not None}
    if column.best is None or len(set(known.values())) < 2:
        return set()
    best = column.best(list(known.values()))
    return {i for i, value in known.items() if value == best}


SAME_IMAGES = ("data", "split", "crop", "count", "pixels_hash")


def evaluated_differently(runs: Sequence[Run]) -> list[str]:
    """Return what the newest records of the runs disagree on, of all that decides whether numbers may be compared."""
    records = [record for run in runs for record in run.final_records]
    differing = [key for key in SAME_IMAGES if len({str(record.get(key)) for record in records}) > 1]
    # Not every evaluation has every network; those that several have must be one.
    networks = dict.fromkeys(key for record in records for key in record if key.endswith("_weights"))
    named = {key: {str(record[key]) for record in records if key in record} for key in networks}
    return differing + [key for key, hashes in named.items() if len(hashes) > 1]


def refusal(runs: Sequence[Run]) -> str | None:
    """Why the final numbers of the runs may not be ranked, in one sentence; None where they may."""
    different = evaluated_differently(runs)
    if not different:
        return None
    what = "on the same images" if set(different) & set(SAME_IMAGES) else "by the same networks"
    return f"These runs were not measured {what} ({', '.join(different)} differ): do not rank them."
