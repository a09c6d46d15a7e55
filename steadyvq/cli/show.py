# SPDX-License-Identifier: Apache-2.0
"""`steadyvq report` and `steadyvq list`."""

import argparse

from steadyvq.cli.common import say, table


def report(arguments: argparse.Namespace) -> int:
    """Writes the report of one or several runs."""
    from steadyvq.report import comparison_table, write_report

    page = write_report(arguments.runs, arguments.out or arguments.runs[0] / "report.html")
    table(comparison_table(arguments.runs))
    say(f"report: {page}")
    return 0


def listing(arguments: argparse.Namespace) -> int:
    """Lists methods or recipes."""
    if arguments.what == "recipes":
        from steadyvq.training.config import read_recipe, recipe_names

        table([{"name": name, "what it is": read_recipe(name).get("title", "")} for name in recipe_names()])
        return 0
    from steadyvq.quantizers import methods

    table([{"name": m.name, "paper": m.paper, "what it is": m.summary} for m in methods().values()])
    print("nsvq here is non-stationary VQ (arXiv 2606.11363), not the PyPI package nsvq (noise substitution, 2022)")
    return 0
