# SPDX-License-Identifier: Apache-2.0
"""The codebook in a report: how often codes are hit on held-out images, and since when not in training."""

from collections.abc import Sequence
from dataclasses import dataclass

from steadyvq.report.markup import Markup, tag
from steadyvq.report.runs import Run
from steadyvq.report.usage import hit_bins, hits_figure, idle_bins, idle_figure, ranks_figure, share_limit

_HITS = "Codes by hits on the held-out images. Lines: where chance would put them if all codes were used alike."
_RANKS = "Hits of each code on the held-out images, the most used code first; a dead code was never hit."
_IDLE = "Codes by hits missed in training since their last one. Lines: by chance, if all codes were used alike."
_PATIENCE = " Beyond the patience a code is replaced."


@dataclass(frozen=True)
class _Group:
    """Figures of one kind, one per run that has the numbers."""

    title: str
    caption: str
    figures: list[Markup]


def codebook_section(runs: Sequence[Run]) -> list[Markup]:
    """Return the histograms of the codes: those of one run side by side, those of several kind by kind."""
    groups = [group for group in (_hits(runs), _ranks(runs), _idle(runs)) if group.figures]
    if not groups:
        return []
    heading = tag("h2", "Codebook")
    if len(runs) == 1:
        return [heading, tag("div", *(group.figures[0] for group in groups), class_="grid-of-figures")]
    parts = [heading]
    for group in groups:
        parts += [tag("h3", group.title), tag("div", *group.figures, class_="grid-of-figures")]
        parts.append(tag("p", group.caption, class_="small"))
    return parts


def _told(run: Run, runs: Sequence[Run], title: str, caption: str) -> tuple[str, str]:
    """Return name and caption of a figure: several are named by their runs and share a caption."""
    return (title, caption) if len(runs) == 1 else (run.label, "")


def _hits(runs: Sequence[Run]) -> _Group:
    title, known = "Hits per code", [(i, run, run.counts) for i, run in enumerate(runs) if run.counts]
    highest = max((max(counts) for _, _, counts in known), default=0)
    binned = [(i, run, hit_bins(counts, highest)) for i, run, counts in known]
    limit = share_limit([bins for _, _, bins in binned])
    figures = [hits_figure(*_told(run, runs, title, _HITS), bins, i, limit) for i, run, bins in binned]
    return _Group(title, _HITS, figures)


def _ranks(runs: Sequence[Run]) -> _Group:
    title, known = "Codes by rank", [(i, run, run.counts) for i, run in enumerate(runs) if run.counts]
    highest = max((max(counts) for _, _, counts in known), default=0)
    figures = [ranks_figure(*_told(run, runs, title, _RANKS), counts, i, highest) for i, run, counts in known]
    return _Group(title, _RANKS, figures)


def _idle(runs: Sequence[Run]) -> _Group:
    title, known = "Idle codes", [(i, run, run.idle) for i, run in enumerate(runs) if run.idle]
    highest = max((max(*idle, run.patience or 0.0) for _, run, idle in known), default=0.0)
    binned = [(i, run, idle, idle_bins(idle, highest)) for i, run, idle in known]
    limit = share_limit([bins for *_, bins in binned])
    caption = _IDLE + (_PATIENCE if any(run.patience is not None for _, run, _ in known) else "")
    figures = [
        idle_figure(*_told(run, runs, title, caption), idle, bins, i, limit, run.patience)
        for i, run, idle, bins in binned
    ]
    return _Group(title, caption, figures)
