# SPDX-License-Identifier: Apache-2.0
"""The doctor: from the log of a monitor to causes, each with its evidence and the knob to turn.

It reads what was measured and never what was configured, so it is right or wrong about any trainer in the same way.
"""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from steadyvq.diagnosis import thresholds as at
from steadyvq.diagnosis.logs import MonitorLog, Row


@dataclass(frozen=True)
class Finding:
    """One cause.

    Attributes:
        cause: Its name, one of `CAUSES`, or `dying` where codes die of none of them.
        evidence: The numbers that say so, in a sentence.
        knob: What to change.
    """

    cause: str
    evidence: str
    knob: str


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor says about a log.

    Attributes:
        findings: Causes, the most certain first; none: healthy.
        unknown: Causes that could not be judged, with what the log lacks.
        summary: Use of the codebook at the end, in a sentence.
    """

    findings: tuple[Finding, ...]
    unknown: dict[str, str]
    summary: str

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"healthy": self.healthy, **asdict(self), "findings": [asdict(finding) for finding in self.findings]}

    def __str__(self) -> str:
        lines = [self.summary, "healthy" if self.healthy else ""]
        for finding in self.findings:
            lines += [f"cause:    {finding.cause}", f"evidence: {finding.evidence}", f"knob:     {finding.knob}", ""]
        lines += [f"not judged: {cause} ({why})" for cause, why in self.unknown.items()]
        return "\n".join(line for i, line in enumerate(lines) if line or i < len(lines) - 1).strip()


class NotInLog(Exception):
    """The log lacks what a rule reads."""


def diagnose(log: MonitorLog) -> Diagnosis:
    """Names what is wrong with the codebook whose training this log is of."""
    findings, unknown = [], {}
    for cause, rule in CAUSES.items():
        try:
            found = rule(log)
        except NotInLog as error:
            unknown[cause] = str(error)
            continue
        findings += [] if found is None else [Finding(cause, *found)]
    if not findings and suffers(log):
        findings = [_dying(log)]
    return Diagnosis(tuple(findings), unknown, _summary(log.last))


def _summary(row: Row) -> str:
    alive = (
        f"{row['alive']:,} of {row['num_codes']:,} codes alive after {row['tokens']:,} tokens ({row['step']:,} steps)"
    )
    used = f"the last {row['window_tokens']:,} tokens used {row['utilization']:.1%} of them"
    return f"{alive}; {used}, a uniform source would {row['ceiling']:.1%}; perplexity {row['perplexity']:.0f}"


def suffers(log: MonitorLog) -> bool:
    """Whether the codebook has lost many of its codes, or most of them never lived."""
    row = log.last
    return bool(row["died"] > at.LOST or row["alive"] < at.FEW * row["num_codes"])


Found = tuple[str, str] | None


def few_tokens(log: MonitorLog) -> Found:
    """K is more than the tokens seen so far can train."""
    row = log.last
    per_code = row["tokens"] / row["num_codes"]
    if per_code >= at.TOKENS_PER_CODE:
        return None
    return (
        f"{row['tokens']:,} tokens so far are {per_code:.1f} for each of {row['num_codes']:,} codes "
        f"({row['tokens_per_step']:,.0f} in a step); below {at.TOKENS_PER_CODE} a code cannot find its place",
        "a smaller K, a larger batch, or a longer run",
    )


def half_precision(log: MonitorLog) -> Found:
    """Distances in half precision choose wrong codes."""
    half = {"bfloat16", "float16"}
    rows = [row for row in log.rows if half & set((row.get("dtypes") or {}).values())]
    missed = log.median("missed", rows)
    if missed is None or missed <= at.MISSED_SHARE:
        return None
    kinds = sorted({str(kind) for row in rows for kind in row["dtypes"].values() if kind in half})
    return (
        f"{missed:.1%} of look-ups chose a code although another was nearer, with {' and '.join(kinds)} in the look-up",
        "compute distances in float32: `with torch.autocast(device, enabled=False)` around the quantizer, latents.float()",
    )


def duplicates(log: MonitorLog) -> Found:
    """Several codes lie in one place, and only the first of them can ever be chosen."""
    row = max(log.rows, key=lambda row: row.get("duplicates") or 0.0)
    share = row.get("duplicates")
    if share is None:
        raise NotInLog("no row has a codebook")
    if share <= at.DUPLICATES:
        return None
    now = log.last.get("duplicates") or 0.0
    return (
        f"{share:.0%} of the codes lie on another one at step {row['step']:,}, {now:.0%} at the end",
        "start codes on distinct latents (k-means or data initialisation); give replaced codes a jitter of their own",
    )


def init_scale(log: MonitorLog) -> Found:
    """Codes start far smaller or far larger than the latents."""
    first = log.first
    ratio = first.get("norm_ratio")
    if ratio is None or first["step"] > at.AT_START:
        raise NotInLog("it does not begin with the first steps of training")
    if at.NORM_LOW <= ratio <= at.NORM_HIGH or not suffers(log):
        return None
    return (
        f"at step {first['step']} codes were {ratio:.3g} times as long as latents, and {first['active']:,} were chosen; "
        f"{_alive(log)} now",
        "place the codes on first latents (data or k-means initialisation), or start them at the latents' scale",
    )


def _alive(log: MonitorLog) -> str:
    return f"{log.last['alive']:,} of {log.last['num_codes']:,} codes are alive"


def starved(log: MonitorLog) -> Found:
    """Codes are too slow for the encoder."""
    rows = [row for row in log.rows if row.get("trained") is not False]
    pairs = [r for r in rows if r.get("code_step") is not None and r.get("drift_per_hit") is not None]
    if not pairs:
        raise NotInLog("neither drift nor steps of codes: give the monitor a probe")
    ratio = log.median(lambda r: r["code_step"] / max(r["drift_per_hit"], 1e-30), pairs)
    assert ratio is not None
    if ratio >= at.STEP_PER_DRIFT or not suffers(log):
        return None
    drift, step = log.median("drift_per_hit", pairs), log.median("code_step", pairs)
    hits = log.median(lambda r: r["distance_rms"] / max(r["code_step"], 1e-30), pairs)
    return (
        f"between two hits of a code latents move {drift:.2g}, but a hit moves the code {step:.2g}, {ratio:.2g} times as far "
        f"({hits:,.0f} hits to cross the distance to its latents); {_alive(log)}",
        "raise the codebook's own learning rate (about ten times), or let codes be moving averages of their latents",
    )


def temperature(log: MonitorLog) -> Found:
    """The softmax of a dense loss knows nothing of the latents' scale."""
    rows = [row for row in log.rows if row.get("winner_mass") is not None]
    if not rows:
        return None
    mass, losers = log.median("winner_mass", rows), log.median("effective_losers", rows)
    assert mass is not None
    assert losers is not None
    others = log.last["num_codes"] - 1
    knob = "calibrate tau to 8 to 32 effective losers, or set it to about the mean squared distance to the winner"
    if mass >= at.MASS_HIGH:
        return (
            f"the winner holds {mass:.1%} of the softmax mass: tau is too small, and losers get next to nothing",
            knob,
        )
    if losers >= at.LOSERS_SHARE * others:
        share = f"{losers:,.0f} of {others:,} losing codes share {1 - mass:.1%} of the softmax mass evenly"
        return f"{share}: tau is too large, and every latent pulls all codes towards the mean", knob
    return None


def untrained_freeze(log: MonitorLog) -> Found:
    """The encoder was frozen before it had learned."""
    frozen = [i for i, row in enumerate(log.rows) if row.get("trained") is False]
    if not frozen or frozen[0] == 0:
        return None
    before = log.rows[: frozen[0]]
    if any(row.get("trained") is not True for row in before):
        return None
    moving = [r for r in before[-at.ROWS_BEFORE :] if r.get("drift_per_step") is not None and r.get("latent_spread")]
    if not moving:
        raise NotInLog("no drift before the freeze: give the monitor a probe")
    pace = log.median(lambda r: r["drift_per_step"] / r["latent_spread"], moving)
    assert pace is not None
    if pace <= at.FREEZE_PACE:
        return None
    step = before[-1]["step"]
    return (
        f"the encoder stands still from step {step:,} on; until then latents moved by {pace:.1%} of their spread a step",
        "arm the plateau rule (`min_epochs`: the first epochs, with small latents, have the smallest commitment loss), or "
        "freeze at a fixed fraction of the run",
    )


def gan_start(log: MonitorLog) -> Found:
    """Reconstruction suffers as a discriminator begins to push."""
    names = [i for i, row in enumerate(log.rows) if "adversarial" in row.get("values", {})]
    if not names:
        return None
    start = names[0]
    before = [_reconstruction(row) for row in log.rows[max(1, start - at.ROWS_BEFORE) : start]]
    after = [_reconstruction(row) for row in log.rows[start : start + at.ROWS_AFTER]]
    known, then = [x for x in before if x is not None], [x for x in after if x is not None]
    if not known or len(then) < 2:
        raise NotInLog("too few values of `reconstruction` around the start of the discriminator")
    calm = sum(known) / len(known)
    worst = max((a + b) / 2 for a, b in itertools.pairwise(then))
    if worst <= at.SHOCK * calm:
        return None
    return (
        f"the discriminator pushes from about step {log.rows[start]['step']:,} on, and the reconstruction loss rises from "
        f"{calm:.3g} to {worst:.3g} ({worst / calm - 1:+.0%})",
        "start it later (after the encoder is frozen), let it learn before it pushes, ramp its weight up, or lower that weight",
    )


def _reconstruction(row: Row) -> float | None:
    value = row.get("values", {}).get("reconstruction")
    return None if value is None else float(value)


def _dying(log: MonitorLog) -> Finding:
    return Finding(
        "dying",
        f"{_alive(log)}, {log.last['died']:.0%} fewer than at the peak, and none of the known causes shows",
        "revive dead codes (replacement), lower the encoder's learning rate, or use a method whose unselected codes learn",
    )


CAUSES: dict[str, Callable[[MonitorLog], Found]] = {
    "too few tokens for K": few_tokens,
    "half-precision look-ups": half_precision,
    "duplicate codes": duplicates,
    "tau out of scale": temperature,
    "untrained encoder frozen": untrained_freeze,
    "discriminator start": gan_start,
    "scale mismatch at init": init_scale,
    "starved codebook": starved,
}
"""Causes by name, the most certain first."""
