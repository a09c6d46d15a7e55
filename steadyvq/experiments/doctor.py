# SPDX-License-Identifier: Apache-2.0
"""Does the doctor name a planted disease, and nothing where there is none? Does the monitor warn in time?

    python -m steadyvq.experiments.doctor --runs development       # what thresholds were chosen on
    python -m steadyvq.experiments.doctor                          # writes docs/evidence/doctor.json

Eight diseases with three seeds, ten healthy runs, and three plain quantizers that die. The thresholds
(steadyvq/diagnosis/thresholds.py) were committed before the test runs were made, and seeds, codebook sizes and rates of
both sets differ. Finished runs are kept, so an interrupted experiment goes on where it was.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import steadyvq
from steadyvq.diagnosis import diagnose, thresholds
from steadyvq.diagnosis.logs import of_rows
from steadyvq.experiments.patients import Patient, Run
from steadyvq.files import write_text
from steadyvq.training.progress import ProgressReport
from steadyvq.training.run import source_commit

HEALTHY, DYING = "healthy", "dying"
REPLACE: dict[str, Any] = {"maintenance": {"replace": {}}}
AVERAGE: dict[str, Any] = {"maintenance": {"ema": {"decay": 0.99}, "replace": {}}}


def development() -> list[Patient]:
    """Runs that thresholds may be chosen on: seeds from 100 on, most with K = 512."""
    size: dict[str, Any] = {"seed": 100, "num_codes": 512}
    ill = [
        Patient("starved codebook", **size, codebook_lr=1.5e-4),
        Patient("tau out of scale", **size, method="nsvq", options={"temperature": 15.0}),
        Patient("tau out of scale", **size, method="nsvq", options={"temperature": 1e-3}),
        Patient("untrained encoder frozen", **size, method="nsvq", freeze=40),
        Patient("discriminator start", **size, method="nsvq", gan=90, gan_weight=0.2),
        Patient("duplicate codes", **size, copies=5),
        Patient("scale mismatch at init", **size, init="none"),
        Patient("scale mismatch at init", **size, scale=15.0),
        Patient("half-precision look-ups", **size, method="plain", autocast=True),
        Patient("too few tokens for K", **size, method="nsvq", batch=2, steps=120),
    ]
    well = [
        Patient(HEALTHY, **size, method="nsvq"),
        Patient(HEALTHY, **size, method="nsvq", freeze=150, gan=160, gan_weight=0.003, gan_ramp=40),
        Patient(HEALTHY, **size, method="ema", options=AVERAGE, init="kmeans"),
        Patient(HEALTHY, **size, options=REPLACE),
        Patient(HEALTHY, **size, method="vqp-ema"),
    ]
    slow = [
        Patient(HEALTHY, 113, 640, method="ema", options=AVERAGE, init="kmeans"),
        Patient(HEALTHY, 114, 640, options=REPLACE),
        Patient(DYING, 111, 640),
        Patient(DYING, 110, 320),
    ]
    return [*ill, *well, Patient(DYING, **size), *slow]


def test() -> list[Patient]:
    """The runs of the evidence: other K, other rates, seeds from 30 on."""
    ill: list[Patient] = []
    for i, num_codes in enumerate((320, 896, 576)):
        size: dict[str, Any] = {"seed": 30 + i, "num_codes": num_codes}
        ill += [
            Patient("starved codebook", **size, codebook_lr=(2e-4, 4e-5, 2.5e-4)[i]),
            Patient("tau out of scale", **size, method="nsvq", options={"temperature": (6e-4, 20.0, 50.0)[i]}),
            Patient("untrained encoder frozen", **size, method="nsvq", freeze=(40, 20, 50)[i]),
            Patient(
                "discriminator start", **size, method="nsvq", gan=(100, 70, 120)[i], gan_weight=(0.5, 0.15, 0.3)[i]
            ),
            Patient("duplicate codes", **size, copies=(6, 3, 2)[i], method=("vq", "nsvq", "vq")[i]),
            Patient("scale mismatch at init", **size, init=("data", "none", "data")[i], scale=(0.01, 1.0, 12.0)[i]),
            Patient("half-precision look-ups", **size, method="plain", autocast=True, dim=(16, 32, 8)[i]),
            Patient("too few tokens for K", **size, method="nsvq", batch=(1, 2, 1)[i], steps=160),
        ]
    well = [
        Patient(HEALTHY, 40, 320, method="nsvq"),
        Patient(HEALTHY, 41, 896, method="nsvq", lr=7e-4),
        Patient(HEALTHY, 42, 448, method="nsvq", codebook_lr=2e-2),
        Patient(HEALTHY, 43, 640, method="nsvq", freeze=155, gan=165, gan_weight=0.002, gan_ramp=30),
        Patient(HEALTHY, 44, 320, method="ema", options=AVERAGE, init="kmeans"),
        Patient(HEALTHY, 45, 896, method="ema", options=AVERAGE, init="kmeans", lr=7e-4),
        Patient(HEALTHY, 46, 448, options=REPLACE),
        Patient(HEALTHY, 47, 640, options=REPLACE, codebook_lr=2e-2),
        Patient(HEALTHY, 48, 320, method="vqp-ema"),
        Patient(HEALTHY, 49, 896, method="vqp-ema", lr=7e-4),
    ]
    return [*ill, *well, *(Patient(DYING, 50 + i, k) for i, k in enumerate((320, 640, 896)))]


RUNS = {"development": development, "test": test}


def path_of(patient: Patient, out: Path) -> Path:
    """Where the log of a patient's run goes."""
    return out / f"{patient.name}.jsonl"


def train(job: tuple[Patient, Path]) -> str:
    """Makes one run; its log appears when it is complete."""
    patient, out = job
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    Run(patient, rows.append).train()
    end = {"kind": "end", "seconds": round(time.monotonic() - started, 1), "commit": source_commit()}
    write_text(path_of(patient, out), "".join(json.dumps(row) + "\n" for row in [*rows, end]))
    return patient.name


def train_all(patients: Sequence[Patient], out: Path, jobs: int) -> None:
    """Makes the runs that are missing."""
    missing = [(patient, out) for patient in patients if not path_of(patient, out).is_file()]
    with ProgressReport("patients", len(patients), len(patients) - len(missing)) as progress:
        if jobs == 1:
            for job in missing:
                progress.advance(train(job))
            return
        with get_context("spawn").Pool(jobs) as pool:
            for name in pool.imap_unordered(train, missing):
                progress.advance(name)


def result(patient: Patient, out: Path) -> dict[str, Any]:
    """What the doctor and the monitor made of a run."""
    rows = [json.loads(line) for line in path_of(patient, out).read_text().splitlines()]
    log, end = of_rows(rows), rows[-1]
    found = diagnose(log)
    warned = next((row for row in log.warned if row["warning"] == "dying"), None)
    return {
        "planted": patient.disease,
        "found": [finding.cause for finding in found.findings],
        "evidence": [finding.evidence for finding in found.findings],
        "method": patient.method,
        "num_codes": patient.num_codes,
        "seed": patient.seed,
        "config_hash": patient.hash(),
        "commit": end["commit"],
        "seconds": end["seconds"],
        "alive": log.last["alive"],
        "lost": round(log.last["died"], 3),
        "warnings": [row["warning"] for row in log.warned],
        "lost_at_warning": None if warned is None else round(warned["died"], 3),
    }


def thresholds_hash() -> str:
    """Twelve hexadecimal digits that name the file of the thresholds."""
    return hashlib.sha256(Path(thresholds.__file__).read_bytes()).hexdigest()[:12]


def main() -> None:
    """Makes the runs and writes the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", choices=tuple(RUNS), default="test")
    parser.add_argument("--out", type=Path, default=Path("runs/doctor"))
    parser.add_argument("--evidence", type=Path, help="default: docs/evidence/doctor.json for the test runs, else none")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--steps", type=int, help="shorter runs, to try the command")
    arguments = parser.parse_args()
    patients = RUNS[arguments.runs]()
    if arguments.steps is not None:
        patients = [replace(patient, steps=arguments.steps) for patient in patients]
    train_all(patients, arguments.out, arguments.jobs)
    runs = [result(patient, arguments.out) for patient in patients]
    evidence = {
        "experiment": "doctor",
        "steadyvq": steadyvq.__version__,
        "torch": torch.__version__,
        "data": "mvtb-data, crops of the train scenes",
        "thresholds": thresholds_hash(),
        "runs": runs,
    }
    path = arguments.evidence
    if path is None and arguments.runs == "test" and arguments.steps is None:
        path = Path("docs/evidence/doctor.json")
    if path is not None:
        write_text(path, json.dumps(evidence, indent=1) + "\n")
    for run in runs:
        who = f"{run['planted']:26s} {run['method']:9s} K={run['num_codes']:<5d}"
        print(f"{who} {', '.join(run['found']) or HEALTHY}  {run['warnings']}")


if __name__ == "__main__":
    main()
