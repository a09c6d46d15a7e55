# SPDX-License-Identifier: Apache-2.0
"""What a comparison of methods found: runs read back, mean and spread over seeds, tables, JSON."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

import steadyvq
from steadyvq.experiments.markdown import markdown
from steadyvq.metrics import EvaluationRecord, read_record
from steadyvq.training.run import RunFolder

Row = dict[str, Any]

MEASURED = ("psnr", "ssim", "relative_error", "utilization", "ceiling", "perplexity", "step_ms", "peak_mb")
"""What is averaged over the final runs of a method."""

DEFINITIONS = {
    "bits": "bits for every position of the token grid: indices per image times log2 of their range, over positions",
    "psnr": "mean over held-out crops of the dB of 8-bit images",
    "relative_error": "squared quantisation error over the spread of the latents, where the codes live",
    "utilization": "codes hit at least once on the held-out crops, of the rows of all tables; quantizers of quantizers have "
    "smaller tables, which are easier to fill, and their perplexity is that of all tables together",
    "ceiling": "what a uniform source of as many tokens would hit",
    "step_ms": "median over windows of training of the wall time per step, one thread, as many runs at a time as cores",
    "peak_mb": "peak memory of the run's process, evaluations included, beyond what it held once the photographs were "
    "loaded; on a GPU, of what torch has allocated there",
    "extra_parameters": "trained numbers of the whole tokenizer, less those with vq; codes that are moving averages or "
    "fixed are no parameters",
    "rate": "the learning rate with the best PSNR in the search: of the free codebook (codebook_lr), or of everything (lr)",
    "search_seconds": "time of all runs of the search for this method",
}


@dataclass(frozen=True)
class Failure:
    """Why a run of a method, or the method itself, failed.

    Attributes:
        phase: `build`, `search` or `final`.
        what: The rate in the search, the seed of a final run.
        reason: One line.
    """

    phase: str
    what: float | None
    reason: str

    def __str__(self) -> str:
        where = {"build": "", "search": f"search at {self.what:g}: " if self.what is not None else ""}
        return where.get(self.phase, f"seed {self.what}: ") + self.reason


@dataclass(frozen=True)
class Trial:
    """One run of the search: its rate, its PSNR on the photographs of the search (None: it failed), its folder."""

    rate: float
    psnr: float | None
    path: Path


@dataclass(frozen=True)
class Finding:
    """Everything about one method.

    Attributes:
        name: Registered name or file.py:function.
        label: Its name in tables and folders.
        rate_name: The rate that is searched, `codebook_lr` or `lr`; empty where the method cannot be built.
        num_codes: Range of an index.
        bits: Bits per position of the token grid.
        parameters: Trained numbers of the whole tokenizer.
        extra_parameters: The same, less those of the reference.
        trials: The search, in the order of the rates.
        rate: The chosen rate.
        runs: Folders of the final runs that finished.
        failures: What went wrong.
    """

    name: str
    label: str
    rate_name: str = ""
    num_codes: int = 0
    bits: float = 0.0
    parameters: int = 0
    extra_parameters: int = 0
    trials: list[Trial] = field(default_factory=list)
    rate: float | None = None
    runs: list[Path] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or largest tried, so that a better one may lie beyond."""
        return self.rate is not None and self.rate in (self.trials[0].rate, self.trials[-1].rate)


def final_record(run: Path) -> EvaluationRecord:
    """The last evaluation of a run."""
    return read_record(max((run / "evaluations").glob("step-*.json")))


def final_psnr(run: Path) -> float:
    """PSNR of the last evaluation of a run."""
    return float(final_record(run).metrics["psnr"])


def measured(path: Path) -> Row:
    """What a finished run found, with what it takes to make it again."""
    run, info, record = RunFolder.open(path), json.loads((path / "run.json").read_text()), final_record(path)
    peak = info.get("peak_memory")
    return {
        "path": str(path),
        "seed": run.config.seed,
        "lr": run.config.optim.lr,
        "codebook_lr": run.config.optim.codebook_lr,
        "config_hash": run.config.hash(),
        "commit": info["commit"],
        "steadyvq": info["steadyvq"],
        "split": record.split,
        "photographs": record.photographs,
        "pixels_hash": record.pixels_hash,
        "steps": record.step,
        "seconds": info["seconds"],
        "step_ms": step_milliseconds(run.log_path),
        "peak_mb": None if peak is None else peak / 2**20,
        **record.metrics,
    }


def step_milliseconds(log: Path) -> float | None:
    """The median wall time of a step over the windows of a log; those with an evaluation in them are rare enough."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    windows = [(b["seconds"] - a["seconds"], b["step"] - a["step"]) for a, b in pairwise(rows)]
    return 1000 * median(seconds / steps for seconds, steps in windows) if windows else None


def summarise(finding: Finding) -> Row:
    """Mean and standard deviation over the final runs of a method; names with `_spread` are None for a single run."""
    runs = [measured(path) for path in finding.runs]
    row: Row = {"method": finding.label, "seeds": len(runs), "rate_name": finding.rate_name, "rate": finding.rate}
    row |= {"at_edge": finding.at_edge, "search_seconds": sum(_seconds(trial.path) for trial in finding.trials)}
    row |= {name: getattr(finding, name) for name in ("num_codes", "bits", "parameters", "extra_parameters")}
    for name in MEASURED:
        values = [run[name] for run in runs if run[name] is not None]
        row[name] = mean(values) if values else None
        row[f"{name}_spread"] = stdev(values) if len(values) > 1 else None
    return row | {"runs": runs, "failed": [str(failure) for failure in finding.failures]}


def _seconds(run: Path) -> float:
    """How long a run has trained, finished or not."""
    info = run / "run.json"
    return float(json.loads(info.read_text()).get("seconds", 0.0)) if info.is_file() else 0.0


def ranked(findings: Sequence[Finding]) -> list[Row]:
    """The rows of all methods, the best PSNR first; those without a result come last."""
    return sorted(map(summarise, findings), key=lambda row: -1.0 if row["psnr"] is None else row["psnr"], reverse=True)


def orders(rows: Sequence[Row]) -> list[Row]:
    """The first three methods by the PSNR of two disjoint sets of seeds, best first; empty with fewer than two seeds."""
    seeds = sorted({run["seed"] for row in rows for run in row["runs"]})
    halves = [seeds[: (len(seeds) + 1) // 2], seeds[(len(seeds) + 1) // 2 :]]
    found = []
    for half in halves if len(seeds) > 1 else []:
        by_method = {row["method"]: [run["psnr"] for run in row["runs"] if run["seed"] in half] for row in rows}
        means = {method: mean(values) for method, values in by_method.items() if values}
        found.append({"seeds": half, "first": sorted(means, key=means.__getitem__, reverse=True)[:3]})
    return found


def _order_note(rows: Sequence[Row]) -> str:
    """Whether two disjoint sets of seeds agree on the first three methods."""
    first, second = orders(rows)
    said = [f"seeds {', '.join(map(str, o['seeds']))}: {', '.join(o['first'])}" for o in (first, second)]
    stable = "stable" if first["first"] == second["first"] else "**not stable**"
    return f"The order of the first three is {stable} over disjoint sets of seeds ({'; '.join(said)})."


def _number(name: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    """Shows a mean with its spread."""

    def show(row: Row) -> str:
        if row[name] is None:
            return "-"
        spread = row.get(f"{name}_spread")
        return f"{row[name] * scale:{form}}" + ("" if spread is None else f" ± {spread * scale:{form}}")

    return show


def _fact(name: str, form: str) -> Callable[[Row], str]:
    """Shows what does not depend on the seed; a method that cannot be built has none."""
    return lambda row: format(row[name], form) if row["rate_name"] else "-"


def _rate(row: Row) -> str:
    return "-" if row["rate"] is None else f"{row['rate']:g}{'*' if row['at_edge'] else ''} ({row['rate_name']})"


def _note(row: Row) -> str:
    said = "; ".join(row["failed"]).replace("|", "/")
    return said if row["seeds"] or not said else f"failed: {said}"


def _mean_of(name: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "-" if row[name] is None else f"{row[name] * scale:{form}}"


QUALITY: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row["method"],
    "bits": _fact("bits", ".2f"),
    "PSNR, dB": _number("psnr", ".2f"),
    "SSIM": _number("ssim", ".3f"),
    "relative error": _number("relative_error", ".3f"),
    "codes used, %": _number("utilization", ".1f", 100),
    "ceiling, %": _mean_of("ceiling", ".1f", 100),
    "perplexity": _number("perplexity", ".0f"),
}
COST: dict[str, Callable[[Row], str]] = {
    "ms per step": _number("step_ms", ".1f"),
    "peak, MB": _number("peak_mb", ".0f"),
    "extra parameters": _fact("extra_parameters", "+,"),
    "rate": _rate,
    "search, s": _fact("search_seconds", ".0f"),
    "seeds": lambda row: str(row["seeds"]),
    "note": _note,
}
SHORT = (
    "method",
    "bits",
    "PSNR, dB",
    "SSIM",
    "codes used, %",
    "ceiling, %",
    "perplexity",
    "ms per step",
    "peak, MB",
    "note",
)


def short_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """What fits a terminal."""
    columns = {**QUALITY, **COST}
    return [{name: columns[name](row) for name in SHORT} for row in rows]


def comparison_table(rows: Sequence[Row]) -> str:
    """All columns of all methods, in Markdown."""
    columns = {**QUALITY, **COST}
    cells = [[f"`{show(row)}`" if name == "method" else show(row) for name, show in columns.items()] for row in rows]
    return markdown(list(columns), cells)


def as_markdown(facts: Row, rows: Sequence[Row]) -> str:
    """The comparison as a page of Markdown."""
    lines = ["# Methods compared", "", *_protocol(facts), "", comparison_table(rows)]
    lines += [f"- {note}" for note in notes(rows)] + ["", "What the numbers are:", ""]
    lines += [f"- *{name}*: {text}" for name, text in DEFINITIONS.items()]
    return "\n".join([*lines, "", "Made with:", "", "```bash", facts["command"], "```", ""])


def _protocol(facts: Row) -> list[str]:
    have, search = facts["photographs"], facts["search"]
    return [
        f"Every method: the same autoencoder, the same crops in the same order, {facts['steps']} steps of "
        f"{facts['batch_size']} crops (budget `{facts['budget']}`).",
        f"Trained on {have['train']} photographs of `{facts['data']}`; one of {len(search['rates']['lr'])} learning rates "
        f"chosen on {have['val']} others (seed {search['seed']});",
        f"judged on {have['test']} that neither had: mean ± standard deviation over seeds.",
    ]


def notes(rows: Sequence[Row]) -> list[str]:
    """What has to be said beside the table: cost, order over seeds, edges of the search, what is not comparable."""
    searched = sum(row["search_seconds"] for row in rows)
    trained = sum(run["seconds"] for row in rows for run in row["runs"])
    said = [
        f"The search took {searched:.0f} s of training, the final runs {trained:.0f} s (runs side by side count each)."
    ]
    if orders(rows):
        said.append(_order_note(rows))
    if any(row["at_edge"] for row in rows):
        said.append("`*`: the best rate is the smallest or largest that was tried; a better one may lie beyond.")
    if len({run["pixels_hash"] for row in rows for run in row["runs"]}) > 1:
        said.append(
            "**The runs were not judged on the same images: the photographs changed in between. Do not rank them.**"
        )
    if len({f"{row['bits']:.1f}" for row in rows if row["rate_name"]}) > 1:
        said.append("The methods spend different numbers of bits (column *bits*): more of them should give more PSNR.")
    return said


def as_json(facts: Row, rows: Sequence[Row], findings: Sequence[Finding]) -> str:
    """The comparison with every run behind it."""
    searched = {
        f.label: [{**t.__dict__, "path": str(t.path), **_provenance(t.path)} for t in f.trials] for f in findings
    }
    shown = [{**row, "search": searched[row["method"]]} for row in rows]
    versions = {"steadyvq": steadyvq.__version__, "torch": torch.__version__}
    return (
        json.dumps(
            {**facts, **versions, "definitions": DEFINITIONS, "orders": orders(rows), "methods": shown}, indent=1
        )
        + "\n"
    )


def _provenance(run: Path) -> Row:
    info = run / "run.json"
    known = json.loads(info.read_text()) if info.is_file() else {}
    return {name: known.get(name) for name in ("config_hash", "commit", "status", "seconds")}
