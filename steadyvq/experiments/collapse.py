# SPDX-License-Identifier: Apache-2.0
"""Does the non-stationary loss keep a codebook alive? Several arms, several seeds, one budget, one code path.

    python -m steadyvq.experiments.collapse                                    # writes docs/evidence/collapse.json
    python -m steadyvq.experiments.collapse --recipe tuning --seeds 10         # how the settings were chosen

The arms are in `recipes/collapse.yaml`. Settings were chosen on the `val` scenes of mvtb-data; this judges on the `test`
scenes. Finished runs are kept, so an interrupted experiment goes on where it was. Every run exports what a stranger needs
to recompute its numbers with numpy alone (`recheck.py`), and the evidence holds both.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

import steadyvq
from steadyvq.experiments.arms import Arm, arm_configs, is_done, train_arms
from steadyvq.experiments.verdict import final_record
from steadyvq.files import write_atomically, write_text
from steadyvq.metrics import to_uint8
from steadyvq.models import Tokenizer
from steadyvq.training.run import RunFolder
from steadyvq.training.tokenizer_task import evaluation_crops, load_photographs, quantizer_of

REPORTED = ("psnr", "ssim", "utilization", "of_ceiling", "perplexity", "relative_error")


def jobs(recipe: str, out: Path, seeds: list[int], arms: list[str] | None, sets: list[str]) -> list[Arm]:
    """All runs of the experiment, seed by seed."""
    return [
        Arm(config, out / f"{config.title}-{seed}", f"steadyvq.experiments.collapse --recipe {recipe} --seeds {seed}")
        for seed in seeds
        for config in arm_configs(recipe, arms, {"seed": seed}, sets)
    ]


@torch.no_grad()
def export(run: RunFolder) -> Path:
    """Writes latents, tokens, codes, images and reconstructions of the run's held-out crops as plain arrays."""
    config = run.config
    crops = evaluation_crops(config, load_photographs(config))
    tokenizer = Tokenizer.from_pretrained(run.tokenizer, quantizer=quantizer_of(config)).eval()
    latents, tokens, images = [], [], []
    for batch in crops.batches(32):
        latents.append(tokenizer.latents(batch).movedim(1, -1))
        tokens.append(tokenizer.encode(batch))
        images.append(to_uint8(tokenizer.decode(tokens[-1])))
    arrays = {
        "latents": torch.cat(latents).numpy(),
        "tokens": torch.cat(tokens).numpy(),
        "codes": tokenizer.quantizer.codebook().numpy(),
        "originals": crops.images.numpy(),
        "reconstructions": torch.cat(images).numpy(),
    }
    path = run.path / "export.npz"

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    write_atomically(path, write)
    return path


def recheck(path: Path) -> dict[str, float]:
    """The numbers of a run recomputed in a fresh process that imports numpy and nothing of ours."""
    script = Path(__file__).with_name("recheck.py")
    done = subprocess.run([sys.executable, "-I", str(script), str(path)], capture_output=True, text=True, check=True)
    numbers: dict[str, float] = json.loads(done.stdout)
    return numbers


def result(arm: Arm) -> dict[str, Any]:
    """The final evaluation of a run, with its recheck."""
    run = RunFolder.open(arm.path)
    metrics = final_record(arm.path).metrics
    metrics = {**metrics, "of_ceiling": metrics["utilization"] / metrics["ceiling"]}
    info = json.loads((arm.path / "run.json").read_text())
    return {
        "arm": run.config.title,
        "seed": run.config.seed,
        "config_hash": run.config.hash(),
        "commit": info["commit"],
        "tokens": metrics["tokens"],
        "num_codes": metrics["num_codes"],
        "seconds": info["seconds"],
        **{name: round(metrics[name], 5) for name in REPORTED},
        "recheck": recheck(exported if (exported := arm.path / "export.npz").is_file() else export(run)),
    }


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds of every arm, in the order of the recipe."""
    rows = []
    for arm in dict.fromkeys(item["arm"] for item in results):
        own = [item for item in results if item["arm"] == arm]
        row: dict[str, Any] = {"arm": arm, "seeds": len(own)}
        for name in (*REPORTED, "seconds"):
            values = [item[name] for item in own]
            row[name] = round(mean(values), 4)
            row[f"{name}_spread"] = round(stdev(values), 4) if len(values) > 1 else None
        rows.append(row)
    return rows


def main() -> None:
    """Runs the experiment and writes its evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="collapse", help="a recipe with arms")
    parser.add_argument("--out", type=Path, help="default: runs/RECIPE")
    parser.add_argument("--evidence", type=Path, help="default: docs/evidence/RECIPE.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    out = arguments.out or Path("runs") / arguments.recipe
    wanted = jobs(arguments.recipe, out, arguments.seeds, arguments.arms, arguments.set)
    train_arms([arm for arm in wanted if not is_done(arm.path)])
    results = [result(arm) for arm in wanted]
    evidence = {
        "experiment": arguments.recipe,
        "steadyvq": steadyvq.__version__,
        "torch": torch.__version__,
        "data": f"mvtb-data, trained on the train scenes, judged on {wanted[0].config.data.eval_split}",
        "summary": summarise(results),
        "runs": results,
    }
    path = arguments.evidence or Path("docs/evidence") / f"{arguments.recipe}.json"
    write_text(path, json.dumps(evidence, indent=1) + "\n")
    for row in evidence["summary"]:
        print(
            f"{row['arm']:24s} {row['psnr']:6.2f} dB  {row['of_ceiling']:6.1%} of the ceiling  {row['perplexity']:7.1f}"
        )


if __name__ == "__main__":
    main()
