# SPDX-License-Identifier: Apache-2.0
"""Is a codebook transplanted into a trained tokenizer as good, in a quarter of the steps, as one trained with everything?

    python -m steadyvq.experiments.transplant                    # three seeds, writes docs/evidence/transplant.json

For every seed three runs on the same photographs and the architecture of the quickstart: `source` with 1,024 codes; `scratch`
with 4,096 codes for as many steps; `transplant`, 4,096 fresh codes in the source's encoder and decoder, for a quarter of the
steps.
Finished runs are kept, so an interrupted experiment goes on where it was.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import steadyvq
from steadyvq.experiments.arms import Arm, is_done, train_arms
from steadyvq.experiments.verdict import final_record
from steadyvq.files import write_text
from steadyvq.training.config import read_recipe, resolve
from steadyvq.training.run import RunFolder
from steadyvq.training.transplant import plan

CODES = 4096
REPORTED = ("psnr", "ssim", "utilization", "perplexity", "relative_error")
COMMAND = "steadyvq.experiments.transplant"


def first_arms(out: Path, seed: int, epochs: int) -> list[Arm]:
    """The source and its rival from scratch, which differ in the number of codes alone."""
    arms = []
    for name, codes in (("source", 1024), ("scratch", CODES)):
        own = [f"title={name}", f"seed={seed}", f"epochs={epochs}", f"eval_every={epochs}", "data.eval_split=test"]
        config = resolve(read_recipe("quickstart"), [*own, f"quantizer.num_codes={codes}"])
        arms.append(Arm(config, out / f"{name}-{seed}", f"{COMMAND} --seeds {seed} --epochs {epochs}"))
    return arms


def transplant_arm(source: Arm, name: str, sets: list[str]) -> Arm:
    """The transplant into a trained source: as many epochs, each of a quarter of the crops."""
    config = source.config
    own = [f"title={name}", f"seed={config.seed}", f"epochs={config.epochs}", f"eval_every={config.epochs}"]
    own += [f"data.epoch_samples={config.epoch_samples // 4}", f"batch_size={config.batch_size}"]
    planned, _ = plan(source.path, num_codes=CODES, sets=[*own, *sets])
    return Arm(planned, source.path.parent / f"{name}-{config.seed}", source.command)


def result(arm: Arm) -> dict[str, Any]:
    """The final evaluation of a run."""
    run = RunFolder.open(arm.path)
    metrics = final_record(arm.path).metrics
    info = json.loads((arm.path / "run.json").read_text())
    return {
        "arm": run.config.title,
        "seed": run.config.seed,
        "steps": run.config.epochs * run.config.steps_per_epoch,
        "config_hash": run.config.hash(),
        "commit": info["commit"],
        "num_codes": metrics["num_codes"],
        "seconds": info["seconds"],
        **{name: round(metrics[name], 5) for name in REPORTED},
    }


def gaps(results: list[dict[str, Any]], name: str) -> list[float]:
    """PSNR of the transplant less that of training from scratch (dB), seed by seed."""
    found = {(item["arm"], item["seed"]): item["psnr"] for item in results}
    return [round(psnr - found["scratch", seed], 4) for (arm, seed), psnr in sorted(found.items()) if arm == name]


def main() -> None:
    """Runs the experiment and writes its evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/transplanted"))
    parser.add_argument("--evidence", type=Path, default=Path("docs/evidence/transplant.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10, help="of the long runs, 100 steps each")
    parser.add_argument("--name", default="transplant", help="a name for other --set; earlier ones stay in the table")
    parser.add_argument("--set", action="append", default=[], help="a setting of the transplants")
    arguments = parser.parse_args()
    long = [arm for seed in arguments.seeds for arm in first_arms(arguments.out, seed, arguments.epochs)]
    train_arms([arm for arm in long if not is_done(arm.path)])
    sources = [arm for arm in long if arm.config.title == "source"]
    short = [transplant_arm(arm, arguments.name, arguments.set) for arm in sources]
    train_arms([arm for arm in short if not is_done(arm.path)])
    old = json.loads(arguments.evidence.read_text())["runs"] if arguments.evidence.is_file() else []
    done = {item["arm"] for item in map(result, [*long, *short])}
    runs = [item for item in old if item["arm"] not in done] + [result(arm) for arm in [*long, *short]]
    names = [name for name in dict.fromkeys(item["arm"] for item in runs) if name not in ("source", "scratch")]
    evidence = {
        "experiment": "transplant",
        "steadyvq": steadyvq.__version__,
        "torch": torch.__version__,
        "data": "mvtb-data, trained on the train scenes, judged on test",
        "gap_db": {name: gaps(runs, name) for name in names},
        "runs": runs,
    }
    write_text(arguments.evidence, json.dumps(evidence, indent=1) + "\n")
    for name in ("source", "scratch", *names):
        own = [item for item in runs if item["arm"] == name]
        psnr, used = [item["psnr"] for item in own], mean(item["utilization"] for item in own)
        spread = stdev(psnr) if len(psnr) > 1 else 0.0
        print(f"{name:24s} {own[0]['steps']:5d} steps  {mean(psnr):6.2f} +- {spread:.2f} dB  {used:6.1%} of codes used")


if __name__ == "__main__":
    main()
