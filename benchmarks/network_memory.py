# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of a training step of a recipe: as written, with activations computed twice, and compiled.

    OMP_NUM_THREADS=1 python benchmarks/network_memory.py                        # nsvq_imagenet128 at full width, 4 images
    OMP_NUM_THREADS=1 python benchmarks/network_memory.py --recipe nsvq_tiny --batch 32 --json out.json

Every form runs in a fresh process, on crops of the built-in photographs. A step is both objectives and both optimisers, in
float32. The peak is resident memory in three steps less what the process held before the first, when the optimisers had
their moments, so gradients are part of it. Seconds are those of this process on its CPU, of the fastest step after the first.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from fresh import in_fresh_process

FORMS = {
    "as written": [],
    "activation_checkpointing": ["activation_checkpointing=true"],
    "compile": ["compile=true"],
    "both": ["activation_checkpointing=true", "compile=true"],
}


def step(form: str, recipe: str, batch: int, sets: list[str], steps: int = 3) -> dict[str, float]:
    """A few steps of a form."""
    from steadyvq.experiments.memory import PeakMemory
    from steadyvq.training.config import read_recipe, resolve
    from steadyvq.training.loop import Engine
    from steadyvq.training.run import RunFolder
    from steadyvq.training.signals import StopRequest
    from steadyvq.training.tokenizer_task import TokenizerTask

    small = ["data.source=mvtb", "data.streaming=false", "data.max_scale=4", "data.min_scale=1", "data.eval_crops=8"]
    length = [f"batch_size={batch}", f"data.epoch_samples={10 * batch}", "precision=32-true"]
    config = resolve(read_recipe(recipe), [*small, *length, *FORMS[form], *sets])
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(TokenizerTask(config), RunFolder.create(Path(folder) / "run", config, "benchmark"), quiet=True)
        for optimizer in engine.optimizers.values():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = parameter.new_zeros(parameter.shape)
            optimizer.step()
            optimizer.zero_grad()
        memory, seconds = PeakMemory(), []
        with StopRequest() as stop:
            for _ in range(steps):
                start = time.process_time()
                engine._train_step(stop)
                seconds.append(time.process_time() - start)
    return {"peak_bytes": memory.read() or 0, "seconds": min(seconds[1:]), "first_seconds": seconds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="nsvq_imagenet128")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--json", help="also write the numbers here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(step(arguments.child, arguments.recipe, arguments.batch, arguments.set)))
        return
    words = ["--recipe", arguments.recipe, "--batch", str(arguments.batch)]
    words += [word for pair in arguments.set for word in ("--set", pair)]
    results = {}
    print(f"{arguments.recipe}, {arguments.batch} images")
    for form in arguments.forms:
        found = in_fresh_process(__file__, form, *words)
        if found is None:
            print(f"{form:26s} did not finish (out of memory?)")
            continue
        results[form] = found
        first = next(iter(results.values()))
        share, pace = found["peak_bytes"] / first["peak_bytes"], found["seconds"] / first["seconds"]
        print(
            f"{form:26s} {found['peak_bytes'] / 1e6:8.0f} MB ({share:.2f} x)  {found['seconds']:7.2f} s ({pace:.2f} x), "
            f"first step {found['first_seconds']:.1f} s"
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"recipe": arguments.recipe, "batch": arguments.batch, "forms": results}, file, indent=1)


if __name__ == "__main__":
    main()
