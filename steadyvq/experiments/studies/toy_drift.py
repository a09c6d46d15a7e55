# SPDX-License-Identifier: Apache-2.0
"""Can a codebook follow a source that moves? Points in the plane that translate, rotate, shrink and expand; no network."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steadyvq.experiments.claims import Claim, Decision, Results, above, every, one_each
from steadyvq.experiments.outcome import steps_to
from steadyvq.experiments.study import Cell, Computed, Curve, Measure, Study, Values
from steadyvq.experiments.tracking import Candidate, Follower, best_codes, decibels, distortion, distortion_of, used
from steadyvq.quantizers import VectorQuantizer, build_quantizer, list_quantizers

MOTIONS = ("still", "translate", "rotate", "shrink", "expand")
MOVING = MOTIONS[1:]
LOOKS = 20
PAPER = "arXiv 2602.18896, Fig. 1"
WORST = 60.0
"""Regret in dB of codes that are nowhere near; so that one broken run does not decide a mean."""
Decide = Callable[[Results], Decision]
SHOWN = ("vq", "ema", "simvq", "nsvq_kernel", "transvq", "nsvq")
"""What the first animation shows."""


class Source:
    """A mixture of Gaussians in the plane that moves as a whole; `at(t)` for t in [0, 1].

    Args:
        motion: One of `MOTIONS`.
        seed: Of the centres and of all samples.
    """

    def __init__(self, motion: str, seed: int) -> None:
        self.motion = motion
        self.generator = torch.Generator().manual_seed(seed)
        self.centres = torch.rand(32, 2, generator=self.generator) * 2 - 1

    def at(self, t: float, count: int) -> Tensor:
        """Samples (N, 2) at a time."""
        which = torch.randint(len(self.centres), (count,), generator=self.generator)
        points = self.centres[which] + 0.06 * torch.randn(count, 2, generator=self.generator)
        if self.motion == "translate":
            return points + torch.tensor([4.0 * t, 2.0 * t])
        if self.motion == "rotate":
            angle = torch.tensor(math.pi * t)
            turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
            # About a point outside, so that the whole cloud travels.
            return (points - torch.tensor([2.0, 0.0])) @ turn.T + torch.tensor([2.0, 0.0])
        return points * self.scale(t)

    def scale(self, t: float) -> float:
        """How large the cloud is, in units of its start."""
        return {"shrink": 1 - 0.9 * t, "expand": 1 + 4 * t}.get(self.motion, 1.0)


def follow(cell: Cell) -> Values:
    """One method on every motion, each at the rate with the least regret over the first half, judged on the second."""
    found: Values = {"curves": {}}
    frames = {}
    for motion in MOTIONS:
        runs = [_run(cell, motion, rate) for rate in cell.settings["rates"]]
        best = min(runs, key=lambda run: mean(value for _, value in run["regret"][: LOOKS // 2]))
        for name in ("use", "regret"):
            found["curves"][f"{name}_{motion}"] = best[name]
            found[f"{name}_{motion}"] = round(mean(value for _, value in best[name][LOOKS // 2 :]), 4)
        found[f"rate_{motion}"] = best["rate"]
        frames[motion] = best["codes"]
    for name in ("use", "regret"):
        found[name] = round(mean(found[f"{name}_{motion}"] for motion in MOVING), 4)
    reached = [steps_to(found["curves"][f"use_{motion}"]) for motion in MOVING]
    found["steps_to_95"] = round(mean(step for step in reached if step is not None))
    np.savez_compressed(cell.folder / "codes.npz", **frames)
    return found


def _run(cell: Cell, motion: str, rate: float) -> dict[str, Any]:
    """Use and regret over time, and the codes (looks, K, 3; the last is whether a code is used)."""
    s, source = cell.settings, Source(motion, cell.seed)
    judge = Source(motion, cell.seed)
    reference = _reference(s["judged"], s["codes"], cell.seed)
    candidate = Candidate(s["quantizer"], s["options"], rate, s["init"])
    follower = Follower(candidate, s["codes"], 2, s["steps"], cell.seed)
    use, regret, seen = [], [], []
    for step in range(s["steps"]):
        follower.step(source.at(step / s["steps"], s["batch"]))
        if (step + 1) % (s["steps"] // LOOKS) == 0:
            t = (step + 1) / s["steps"]
            points = judge.at(t, s["judged"])
            made, indices = follower.quantise(points)
            best = reference * judge.scale(t) ** 2
            use.append([step + 1, round(used(indices, s["codes"]), 4)])
            regret.append([step + 1, round(min(WORST, decibels(distortion(points, made), best)), 3)])
            hit = torch.zeros(s["codes"], 1)
            hit[torch.unique(indices)] = 1
            seen.append(torch.cat([follower.codes(), hit], 1).numpy())
    return {"rate": rate, "use": use, "regret": regret, "codes": np.stack(seen).astype(np.float32)}


@cache
def _reference(count: int, codes: int, seed: int) -> float:
    """The distortion of k-means on a still source; all motions keep its shape, so it holds for all times, up to its size."""
    points = Source("still", seed).at(0.0, count)
    return distortion_of(points, best_codes(points, codes, seed))


def followers() -> dict[str, dict[str, Any]]:
    """Every registered method with a table of codes in the space of the latents."""
    found = {}
    for name in list_quantizers():
        try:
            quantizer = build_quantizer(name, num_codes=64, dim=2)
        except ValueError:
            continue
        # Methods that quantise directions, or in a space of their own, cannot represent points of the plane.
        if isinstance(quantizer, VectorQuantizer) and not quantizer.unit_sphere and name not in ("hypervq", "vqgan_fc"):
            found[name] = {"quantizer": name, "options": {}, "init": "none"}
    found["vqgan_lc"]["init"] = "kmeans"
    found["vq-kmeans"] = {"quantizer": "vq", "options": {}, "init": "kmeans"}
    found["ema-kmeans-replacement"] = {
        "quantizer": "ema",
        "options": {"maintenance": {"ema": {"decay": 0.9}, "replace": {}}},
        "init": "kmeans",
    }
    return found


def arms(settings: Mapping[str, Any]) -> dict[str, Computed]:
    """One arm per method."""
    return {name: Computed(follow, {**settings, **own}) for name, own in followers().items()}


def _more_use(arm: str, than: str) -> Decide:
    def decide(results: Results) -> Decision:
        return every(
            *(above(results.gains(arm, than, f"use_{m}"), 0, f"{m}, points of use", "+.0f", 100) for m in MOVING)
        )

    return decide


def _drops(results: Results) -> Decision:
    moving = [[a - b] for a, b in zip(results.values("vq", "use_still"), results.values("vq", "use"), strict=True)]
    return above(moving, 0.1, "use of a still source less that of moving ones, points", "+.0f", 100)


def _mean_gain(better: str, worse: str) -> Decide:
    """Whether the first has less regret over k-means, mean over the motions."""

    def decide(results: Results) -> Decision:
        gains = [[-v for v in pair] for pair in results.gains(better, worse, "regret")]
        return above(gains, 0, f"dB less regret than {worse}", "+.2f")

    return decide


def _k_means(results: Results) -> Decision:
    return above(one_each([-v for v in results.values("transvq", "regret_still")]), -0.5, "minus regret, dB", "+.2f")


CLAIMS = (
    Claim("The codes of plain VQ fall out of use when the source moves (by 10 points or more)", PAPER, _drops, "shown"),
    Claim("NS-VQ uses more codes than VQ in every motion", PAPER, _more_use("nsvq_kernel", "vq"), "shown"),
    Claim("TransVQ uses more codes than VQ in every motion", PAPER, _more_use("transvq", "vq"), "shown"),
    Claim("NS-VQ is nearer to k-means than VQ", "ours", _mean_gain("nsvq_kernel", "vq")),
    Claim("NSVQ uses more codes than VQ in every motion", "arXiv 2606.11363", _more_use("nsvq", "vq")),
    Claim("EMA with replacement is nearer to k-means than NSVQ", "ours", _mean_gain("ema-kmeans-replacement", "nsvq")),
    Claim("A start on data alone does not save VQ: NSVQ is nearer to k-means", "ours", _mean_gain("nsvq", "vq-kmeans")),
    Claim("TransVQ reaches k-means on a still source (within 0.5 dB)", "arXiv 2602.18896", _k_means, "converges"),
)  # fmt: skip

MEASURES = (
    Measure("use", "used, moving, %", ".0f", 100),
    Measure("regret", "regret, moving, dB", ".2f"),
    *(Measure(f"regret_{motion}", f"{motion}, dB", ".2f") for motion in MOTIONS),
    *(Measure(f"use_{motion}", f"{motion}, %", ".0f", 100) for motion in MOTIONS),
    Measure("steps_to_95", "steps to 95 % of final use, moving", ".0f"),
)


def draw(folder: Path, cells: Mapping[tuple[str, int], Path], _: Results) -> Sequence[Path]:
    """Animations of the codes of all methods, six in a picture, the best known first."""
    done = [name for name, seed in cells if seed == 0]
    order = [*(name for name in SHOWN if name in done), *(name for name in done if name not in SHOWN)]
    groups = [order[start : start + len(SHOWN)] for start in range(0, len(order), len(SHOWN))]
    names = ["toy-drift.gif", *(f"toy-drift-{i}.gif" for i in range(2, len(groups) + 1))]
    return [_animation(folder / name, group, cells) for name, group in zip(names, groups, strict=False)]


def _animation(path: Path, shown: Sequence[str], cells: Mapping[tuple[str, int], Path]) -> Path:
    """The codes of some methods on every moving source: grey points, used codes blue, dead codes red."""
    from PIL import Image, ImageDraw

    from steadyvq.files import write_atomically

    side, top, left = 104, 16, 60
    codes = {name: np.load(cells[name, 0] / "codes.npz") for name in shown}
    sources = {motion: Source(motion, 0) for motion in MOVING}
    looks = len(codes[shown[0]][MOVING[0]])
    points = {m: [sources[m].at((i + 1) / looks, 150).numpy() for i in range(looks)] for m in MOVING}
    frames = []
    for look in range(looks):
        image = Image.new("RGB", (left + side * len(shown), top + side * len(MOVING)), "white")
        pen = ImageDraw.Draw(image)
        for column, name in enumerate(shown):
            pen.text((left + side * column + 4, 2), name, fill="black")
            for row, motion in enumerate(MOVING):
                pen.text((2, top + side * row + side // 2), motion, fill="black")
                every_point = np.concatenate(points[motion])
                low, size = every_point.min(0), float(np.ptp(every_point, axis=0).max())
                place = np.array([left + side * column + 4, top + side * row + 4])
                for x, y in place + (points[motion][look] - low) / size * (side - 8):
                    pen.point((x, y), fill="#b0b0b0")
                table = codes[name][motion][look]
                for (x, y), hit in zip(place + (table[:, :2] - low) / size * (side - 8), table[:, 2], strict=True):
                    if place[0] - 4 <= x <= place[0] + side - 8 and place[1] - 4 <= y <= place[1] + side - 8:
                        pen.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill="#0072b2" if hit else "#d55e00")
        frames.append(image.quantize(16))
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 200, "loop": 0}
    write_atomically(path, lambda temporary: frames[0].save(temporary, **options))
    return path


STUDY = Study(
    name="toy-drift",
    title="Sources that move in the plane",
    question="Which codebooks follow a source that translates, rotates, shrinks or expands?",
    protocol=(
        "A mixture of 32 Gaussians in the plane moves over {steps} steps of {batch} points; {codes} codes. Every method "
        "with a table, at that of the rates {rates} with the least regret over the first half; use and regret over "
        "k-means, judged by {judged} fresh points at 20 times, are means over the second half. No encoder, no network."
    ),
    profiles={
        "tiny": {"steps": 120, "batch": 256, "codes": 64, "judged": 1024, "rates": [0.01, 0.1]},
        "small": {"steps": 1000, "batch": 256, "codes": 256, "judged": 4096, "rates": [0.003, 0.01, 0.03, 0.1]},
        "full": {
            "steps": 4000,
            "batch": 1024,
            "codes": 1024,
            "judged": 16384,
            "rates": [0.001, 0.003, 0.01, 0.03, 0.1],
        },
    },
    arms=arms,
    claims=CLAIMS,
    measures=MEASURES,
    curves=tuple(
        curve
        for motion in MOVING
        for curve in (
            Curve(f"use_{motion}", f"Codes used, {motion}", percent=True),
            Curve(f"regret_{motion}", f"Regret over k-means, {motion}", "dB"),
        )
    ),
    draw=draw,
)
