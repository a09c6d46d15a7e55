# SPDX-License-Identifier: Apache-2.0
"""The tables of README and docs, made from the code and from checked-in evidence, so that they cannot drift apart.

    python -m steadyvq.experiments.tables            check; exit code 1 where a table differs
    python -m steadyvq.experiments.tables --write    bring them up to date

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import re
import runpy
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from steadyvq.experiments import performance
from steadyvq.experiments.doctor_tables import confusion_table, cost_table, warnings_table
from steadyvq.experiments.markdown import markdown
from steadyvq.experiments.pages import claims_and_arms, duration, plots
from steadyvq.experiments.recipes import recipe_table, size_table
from steadyvq.experiments.runner import Experiment, read_results
from steadyvq.experiments.studies.steady import leads
from steadyvq.experiments.study import Study, studies, study_of
from steadyvq.experiments.verdict import comparison_table, notes
from steadyvq.quantizers import methods

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
BLOCK = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def method_table() -> str:
    """Every registered method: name, what it is, paper, status."""
    rows = [[f"`{m.name}`", m.summary, m.paper, m.status] for m in methods().values()]
    return markdown(["name", "what it is", "paper", "status"], rows)


def exemption_table() -> str:
    """What every check of the conformance suite has found exempt: check, reason, methods."""
    exempt = runpy.run_path(str(ROOT / "tests" / "exemptions.py"))["EXEMPT"]
    by_reason: dict[tuple[str, str], list[str]] = {}
    for (method, check), reason in exempt.items():
        by_reason.setdefault((check.removeprefix("test_").replace("_", " "), reason), []).append(f"`{method}`")
    rows = [[check, ", ".join(sorted(names)), reason] for (check, reason), names in sorted(by_reason.items())]
    return markdown(["check", "methods", "why"], rows)


def evidence(name: str) -> dict[str, Any]:
    """A checked-in record of an experiment."""
    record: dict[str, Any] = json.loads((ROOT / "docs" / "evidence" / f"{name}.json").read_text())
    return record


def _spread(row: dict[str, Any], name: str, form: str, scale: float = 1.0) -> str:
    spread = row[f"{name}_spread"]
    shown = format(row[name] * scale, form)
    return shown if spread is None else f"{shown} ± {format(spread * scale, form)}"


def arms_table(name: str) -> str:
    """Arms of a comparison: mean and standard deviation over seeds."""
    rows = [
        [
            f"`{row['arm']}`",
            _spread(row, "of_ceiling", ".1f", 100),
            _spread(row, "perplexity", ".0f"),
            _spread(row, "psnr", ".2f"),
            _spread(row, "relative_error", ".3f"),
        ]
        for row in evidence(name)["summary"]
    ]
    return markdown(["arm", "codes used, % of ceiling", "perplexity", "PSNR, dB", "relative error"], rows)


def compare_table() -> str:
    """What `steadyvq compare` found, and what has to be said of it."""
    rows = evidence("compare")["methods"]
    return comparison_table(rows) + "\n" + "".join(f"- {note}\n" for note in notes(rows))


def recorded_experiments() -> list[str]:
    """Experiments with a checked-in record."""
    return sorted(path.stem for path in (ROOT / "docs" / "evidence" / "experiments").glob("*.json"))


SHOWN = {
    "annealing": ("psnr",),
    "causes": ("utilization",),
    "codebook-scale": ("utilization",),
    "components": ("utilization",),
    "drift-stress": ("utilization",),
    "dynamics": ("relative-error",),
    "feedback": ("rows",),
    "freeze-controls": ("psnr",),
    "freeze-time": ("psnr",),
    "kmeans-init": ("utilization",),
    "oracle": ("regret",),
    "phases": ("psnr",),
    "replay": ("regret",),
    "sensitivity": ("utilization",),
    "stationary": ("regret",),
    "steady": ("lead-psnr", "lead-lpips"),
    "table1": ("psnr",),
    "training-length": ("psnr",),
}
"""Plots of experiments that the docs show."""


def experiment_plots(name: str) -> dict[Path, str]:
    """The plots of an experiment that the docs show, by file."""
    record = evidence(f"experiments/{name}")
    made = plots(study_of(name), record)
    if name == "steady":
        made |= {f"lead-{measure}": svg for measure, svg in leads(read_results(record)).items()}
    return {IMAGES / "experiments" / f"{name}-{plot}.svg": made[plot] for plot in SHOWN.get(name, ())}


def experiment_table(name: str) -> str:
    """What an experiment found: claims with verdicts, arms with numbers, plots."""
    drawn = (path.relative_to(ROOT / "docs").as_posix() for path in experiment_plots(name))
    pictures = "".join(f"\n![{Path(path).stem.replace('-', ' ')}]({path})\n" for path in drawn)
    return claims_and_arms(study_of(name), evidence(f"experiments/{name}")) + pictures


def _not_run(study: Study) -> list[str]:
    """The cells of an experiment without a record, with the time that it would take."""
    plan = Experiment(study, "tiny", 1, Path("runs") / "nowhere")
    expected = plan.expected_seconds()
    time = "-" if expected is None else f"expected: {duration(expected * study.seeds)}"
    return ["not run yet", f"{len(plan.plans)} arms, {study.seeds} seeds", time]


def experiments_table() -> str:
    """Every experiment: what it asks, and what its record says and took."""
    rows, spent = [], dict[str, float]()
    for name, study in studies().items():
        cells = _not_run(study)
        if name in recorded_experiments():
            record = evidence(f"experiments/{name}")
            for cell in record["cells"]:
                # A cell that experiments share was trained once; who came later has the time of its measurement alone.
                spent[cell["key"]] = max(cell["seconds"], spent.get(cell["key"], 0.0))
            verdicts = Counter(claim["verdict"] for claim in record["claims"])
            runs = f"{len({c['arm'] for c in record['cells']})} arms, {record['seeds']} seeds"
            cells = [", ".join(f"{n} {verdict}" for verdict, n in verdicts.items()), runs, duration(record["seconds"])]
        rows.append([f"`{name}`", study.question, *cells])
    rows.append(["all recorded", "", "", "", duration(sum(spent.values()))])
    return markdown(["experiment", "question", "claims", "profile `tiny`", "one core"], rows)


def transplant_table() -> str:
    """PSNR and use of a source, its rival from scratch and the transplant, seed by seed."""
    record = evidence("transplant")
    runs = {(run["arm"], run["seed"]): run for run in record["runs"]}
    arms = ("source", "scratch", *record["gap_db"])
    rows = []
    for seed in sorted({seed for _, seed in runs}):
        own = [runs[arm, seed] for arm in arms]
        shown = [f"{run['psnr']:.2f} dB, {run['utilization']:.0%} used" for run in own]
        gaps = [f"{run['psnr'] - own[1]['psnr']:+.2f}" for run in own[2:]]
        rows.append([str(seed), *shown, *gaps])
    heads = [f"{run['arm']}, K = {run['num_codes']:,}, {run['steps']} steps" for run in own]
    return markdown(["seed", *heads, *(f"{arm} less scratch, dB" for arm in arms[2:])], rows)


def generate_table(name: str) -> str:
    """How near the pictures of a `steadyvq demo generate` and of its rivals came to photographs."""
    record = evidence(name)
    rows = []
    for pictures in ("prior", "marginals", "shuffled", "real tokens"):
        found = record[pictures]
        ahead = [found[key] for key in ("ahead", "ahead_low", "ahead_high") if key in found]
        shown = "{:.3f} [{:.3f}, {:.3f}]".format(*ahead) if ahead else "-"
        rows.append([pictures, f"{found['kid_lite0']:.3f}", f"{found['fd_lite0']:.0f}", shown])
    table = markdown(["pictures", "KID-Lite0", "FD-Lite0", "prior ahead in KID-Lite0 by [95 %]"], rows)
    return table + f"\n{record['count']:,} pictures each; commit {record['commit'][:7]}.\n"


DEMO_ARMS = {
    "vq": "vq-uniform-lr3e-2",
    "nsvq": "nsvq-lr3e-2",
    "simvq": "simvq",
    "ema": "ema-kmeans-replacement",
    "steady": "steady",
}


def demo_table() -> str:
    """What `steadyvq demo` prints: its arms are the collapse experiment's with seed 0."""
    runs = {run["arm"]: run for run in evidence("collapse")["runs"] if run["seed"] == 0}
    rows = []
    for arm, name in DEMO_ARMS.items():
        run = runs[name]
        used = f"{run['recheck']['active_rows']:,} of {run['num_codes']:,}"
        rows.append([f"`{arm}`", used, f"{run['perplexity']:.0f}", f"{run['psnr']:.2f}", f"{run['ssim']:.3f}"])
    return markdown(["arm", "codes used", "perplexity", "PSNR, dB", "SSIM"], rows)


def performance_table(group: str) -> str:
    """A group of benchmarks, with what it was measured on."""
    record = evidence("performance")[group]
    made = record["machine"]
    threads = f"{made['threads']} thread" + ("s" if made["threads"] > 1 else "")
    kernels = "bfloat16 screen" if made["bfloat16"] else "float32 screen"
    where = (
        f"{made['cpu']}, {made['vectors']}, {kernels}, {threads}, torch {made['torch']}, commit {record['commit'][:7]}"
    )
    make = {
        "search": performance.search_table,
        "memory": performance.memory_table,
        "dense": performance.dense_table,
        "step": performance.step_table,
        "scaling": performance.scaling_table,
    }[group]
    return f"Measured on {where}.\n\n{make(record['rows'])}"


TABLES: dict[str, Callable[[], str]] = {
    "methods": method_table,
    "compare": compare_table,
    "recipes": recipe_table,
    "recipe-sizes": size_table,
    "exemptions": exemption_table,
    "demo": demo_table,
    "collapse": partial(arms_table, "collapse"),
    "tuning": partial(arms_table, "tuning"),
    "transplant": transplant_table,
    "generate": partial(generate_table, "generate"),
    "generate-diffusion": partial(generate_table, "generate_diffusion"),
    "doctor": lambda: confusion_table(evidence("doctor")["runs"]),
    "monitor-warnings": lambda: warnings_table(evidence("doctor")["runs"]),
    "monitor-cost": lambda: cost_table(evidence("monitor_cost")),
    "experiments": experiments_table,
    **{f"experiment-{name}": partial(experiment_table, name) for name in recorded_experiments()},
    **{
        f"performance-{group}": partial(performance_table, group)
        for group in ("search", "memory", "dense", "step", "scaling")
    },
}

PLOT = IMAGES / "performance-scaling.svg"


def documents() -> list[Path]:
    """Files that may hold tables."""
    return [ROOT / "README.md", ROOT / "LOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def updated(text: str) -> str:
    """A document with its tables made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", text)


def main() -> int:
    """Checks or writes the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    stale = []
    fresh_of = {path: updated(path.read_text()) for path in documents()}
    fresh_of[PLOT] = performance.scaling_plot(evidence("performance")["scaling"]["rows"])
    for name in recorded_experiments():
        fresh_of |= experiment_plots(name)
    for path, fresh in fresh_of.items():
        text = path.read_text() if path.exists() else ""
        if fresh != text:
            stale.append(path.name)
            if write:
                path.parent.mkdir(exist_ok=True)
                path.write_text(fresh)
    if stale:
        print(f"{'updated' if write else 'out of date'}: {', '.join(stale)}")
    return 1 if stale and not write else 0


if __name__ == "__main__":
    raise SystemExit(main())
