# SPDX-License-Identifier: Apache-2.0
"""`steadyvq compare`."""

import argparse

from steadyvq.cli import FAILED, INTERRUPTED
from steadyvq.cli.common import say, table
from steadyvq.experiments.compare import Comparison, Settings
from steadyvq.experiments.verdict import short_table


def compare(arguments: argparse.Namespace) -> int:
    """Compares methods; 0 if any of them has a result, whatever became of the others."""
    methods = None if arguments.methods is None else arguments.methods.split(",")
    settings = Settings(arguments.out, methods, arguments.data, arguments.seeds, arguments.budget, arguments.set)
    comparison = Comparison(settings)
    _tell(comparison)
    try:
        comparison.run()
    except KeyboardInterrupt:
        say(f"stopped; finished runs are kept, and the others go on with: {comparison.command}")
        return INTERRUPTED
    rows = comparison.write()
    table(short_table(rows))
    failed = sum(1 for row in rows if row["failed"])
    if failed:
        say(f"{failed} of {len(rows)} methods had runs that failed: see the notes")
    say(f"table, numbers and pictures: {arguments.out}/compare.md, compare.json, report.html")
    return 0 if any(row["runs"] for row in rows) else FAILED


def _tell(comparison: Comparison) -> None:
    """What will be done, and what cannot be."""
    for finding in comparison.findings:
        for failure in finding.failures:
            say(f"{finding.label} is left out: {failure}")
    have, runs = comparison.photographs, len(comparison.search_arms())
    say(
        f"{len(comparison.findings)} methods: {runs} runs to choose learning rates on {have['val']} photographs, then "
        f"{comparison.num_final()} judged on {have['test']} others; {comparison.steps} steps each"
    )
