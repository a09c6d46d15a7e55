# SPDX-License-Identifier: Apache-2.0
"""Which curves a report shows: all numbers of one run, or one chart per number for several runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from steadyvq.report.charts import Chart, Mark, Series
from steadyvq.report.runs import Run


@dataclass(frozen=True)
class Topic:
    """Numbers that belong in one chart.

    Attributes:
        title: of the chart.
        curves: kind of row, key and label of each curve; several runs are compared by the first that they have.
        unit: of the vertical axis.
        limits: range that the vertical axis shows at least.
        percent: whether the values are shares.
        caption: one sentence on what the numbers mean.
        detail: another on what is drawn for a single run only.
    """

    title: str
    curves: tuple[tuple[str, str, str], ...]
    unit: str = ""
    limits: tuple[float, float] | None = None
    percent: bool = False
    caption: str = ""
    detail: str = ""


_SHARE = (0.0, 1.0)
QUALITY = (
    Topic(
        "Codes used",
        (("eval", "utilization", "held out"), ("train", "usage/train", "training"), ("eval", "ceiling", "ceiling")),
        "share of all codes",
        _SHARE,
        percent=True,
        caption="Codes hit at least once.",
        detail="The ceiling is what as many tokens, drawn uniformly, would reach.",
    ),
    Topic(
        "PSNR",
        (("eval", "psnr", "held out"),),
        "dB",
        caption="Reconstruction of held-out images, higher is better.",
        detail="Shaded: 95 % interval over photographs.",
    ),
    Topic(
        "SSIM",
        (("eval", "ssim", "held out"),),
        "SSIM",
        caption="Structural similarity of held-out images; 1 is identical.",
    ),
    Topic(
        "Perplexity",
        (("eval", "perplexity", "held out"),),
        "codes",
        caption="How many equally frequent codes would carry as much information.",
    ),
    Topic(
        "Cross-entropy",
        (("eval", "cross_entropy", "held out"),),
        "nats per token",
        caption="How well a prior predicts the tokens of held-out images, lower is better.",
    ),
    Topic(
        "Prediction error",
        (("eval", "prediction_error", "held out"),),
        "squared, of normalised latents",
        caption="How well a diffusion prior tells noise from the latents of held-out images, over all noise levels.",
    ),
    Topic(
        "Relative error",
        (("eval", "relative_error", "held out"), ("probe", "relative_error", "probe")),
        "ratio",
        caption="Quantization error over the spread of the latents; 1 is no better than their mean.",
    ),
)
STABILITY = (
    Topic(
        "Encoder drift",
        (("probe", "drift", "probe"),),
        "spreads per epoch",
        caption="How far the latents of the same images moved since the epoch before, in units of their spread.",
    ),
    Topic(
        "Encoder drift, absolute",
        (("probe", "drift_rms", "probe"),),
        "distance per epoch",
        caption="The same movement in the latents' own units.",
    ),
    Topic(
        "Churn",
        (("probe", "churn", "probe"),),
        "tokens changed per epoch",
        _SHARE,
        percent=True,
        caption="Tokens of the same images that changed since the epoch before.",
    ),
    Topic(
        "Commitment",
        (("probe", "commitment", "mean of the epoch"),),
        "squared distance",
        caption="Commitment loss, mean of each epoch: what the plateau rule of a stage usually watches.",
    ),
    Topic(
        "Temperature",
        (("train", "vq/temperature", "temperature"),),
        "squared distance",
        caption="tau of the soft assignment, in units of the squared distance.",
    ),
    Topic(
        "Winner mass",
        (("train", "vq/winner_mass", "winner mass"),),
        "share",
        _SHARE,
        percent=True,
        caption="Share of the soft assignment that the nearest code takes.",
    ),
    Topic(
        "Effective losers",
        (("train", "vq/effective_losers", "effective losers"),),
        "codes",
        caption="How many codes besides the nearest one share the rest.",
    ),
    Topic(
        "NS gradient over eps",
        (("train", "vq/ns_grad_over_eps", "largest entry"),),
        "ratio",
        caption="Largest gradient entry over the optimizer's eps; far below 1 it has no effect.",
    ),
)
ADVERSARIAL = (
    Topic(
        "Logits of the discriminator",
        (
            ("train", "adversarial/logits_real", "photographs"),
            ("train", "adversarial/logits_fake", "reconstructions"),
        ),
        "mean logit",
        caption="Above 0 it takes them for photographs; where the two part for good, it has won.",
    ),
    Topic(
        "Adversarial weight",
        (("train", "adversarial/weight", "weight"),),
        "factor",
        caption="What the discriminator's verdict weighs in the tokenizer's loss, ramps and balance included.",
    ),
    Topic(
        "Adaptive weight",
        (("train", "adversarial/adaptive_weight", "adaptive weight"),),
        "ratio of gradients",
        caption="Reconstruction gradient over adversarial gradient at the decoder's last layer, before weight and ramps.",
    ),
)
_NAMED = {(kind, key) for topic in (*QUALITY, *STABILITY, *ADVERSARIAL) for kind, key, _ in topic.curves} | {
    ("eval", key) for key in ("psnr_low", "psnr_high", "active", "tokens", "num_codes")
}


def charts(runs: Sequence[Run], topics: Sequence[Topic]) -> list[Chart]:
    """Return the charts of these topics that have anything to show."""
    marks, last_step = stage_marks(runs), max(run.last_step for run in runs)
    shown = []
    for topic in topics:
        series = _compared(runs, topic) if len(runs) > 1 else _single(runs[0], topic)
        caption = topic.caption if len(runs) > 1 else f"{topic.caption} {topic.detail}".strip()
        if series:
            axis = (topic.unit, topic.limits, topic.percent)
            shown.append(Chart(topic.title, series, last_step, marks, *axis, caption, legend=len(runs) > 1))
    return shown


def losses(runs: Sequence[Run]) -> list[Topic]:
    """Return the losses by name: in one chart for one run, in one chart each for several."""
    names = dict.fromkeys(key for run in runs for key in run.keys("train") if key.startswith("loss/"))
    parts = tuple(("train", key, key.removeprefix("loss/")) for key in names)
    total = ("train", "loss", "total")
    if len(runs) == 1:
        return [
            Topic("Losses", (total, *parts), "loss", caption="Means since the row before; the parts are unweighted.")
        ]
    return [Topic("Total loss", (total,), "loss"), *(Topic(f"Loss: {part[2]}", (part,), "loss") for part in parts)]


def remaining(runs: Sequence[Run]) -> list[Topic]:
    """Return every other number that was logged, such as the statistics of a quantizer of the user's own."""
    logged = dict.fromkeys((kind, key) for run in runs for kind in ("train", "probe", "eval") for key in run.keys(kind))
    left = [(kind, key) for kind, key in logged if (kind, key) not in _NAMED and not key.startswith("loss")]
    return [Topic(f"{key} ({kind})", ((kind, key, key),), "value") for kind, key in left]


def stage_marks(runs: Sequence[Run]) -> list[Mark]:
    """Return where stages begin after the start; a line that all runs share has no colour of its own."""
    begun = [{(float(row["step"]), str(row.get("stage", ""))) for row in run.stages()} for run in runs]
    marks = []
    for step, name in sorted(set().union(*begun)):
        if step <= 0:
            continue
        where = [i for i, stages in enumerate(begun) if (step, name) in stages]
        marks.append(Mark(step, name, None if len(where) == len(runs) else where[0]))
    return marks


def _single(run: Run, topic: Topic) -> list[Series]:
    present = [curve for curve in topic.curves if run.has(curve[0], curve[1])]
    colours = iter(range(len(present)))
    return [
        Series(label, run.points(kind, key), None, dashed=True)
        if key == "ceiling"
        else Series(label, run.points(kind, key), next(colours), band=_band(run, key))
        for kind, key, label in present
    ]


def _compared(runs: Sequence[Run], topic: Topic) -> list[Series]:
    series = []
    for i, run in enumerate(runs):
        first = next(((kind, key) for kind, key, _ in topic.curves if key != "ceiling" and run.has(kind, key)), None)
        if first:
            series.append(Series(run.label, run.points(*first), i))
    return series


def _band(run: Run, key: str) -> list[tuple[float, float, float]]:
    if key != "psnr":
        return []
    lows, highs = run.points("eval", "psnr_low"), run.points("eval", "psnr_high")
    pairs = zip(lows, highs, strict=True)
    return [(step, low, high) for (step, low), (_, high) in pairs if low is not None and high is not None]
