# SPDX-License-Identifier: Apache-2.0
"""`steadyvq report`, `steadyvq doctor` and `steadyvq list`."""

import argparse
import json

from steadyvq.cli.common import check_output, say, table


def report(arguments: argparse.Namespace) -> int:
    """Writes the report of one or several runs."""
    from steadyvq.report import comparison_table, write_report
    from steadyvq.report.runs import read_runs
    from steadyvq.report.table import refusal

    out = arguments.runs[0] / "report.html" if arguments.out is None else arguments.out
    check_output(out)
    page = write_report(arguments.runs, out)
    table(comparison_table(arguments.runs))
    unlike = refusal(read_runs(arguments.runs))
    if unlike:
        say(unlike)
    say(f"report: {page}")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Prints what the log of a training says about its codebook."""
    from steadyvq.diagnosis import diagnose, read_log

    found = diagnose(read_log(arguments.log))
    print(json.dumps(found.to_dict(), indent=1) if arguments.json else found)
    return 0


def listing(arguments: argparse.Namespace) -> int:
    """Lists methods or recipes."""
    if arguments.what == "recipes":
        from steadyvq.training.config import read_recipe, recipe_names

        recipes = {name: read_recipe(name) for name in recipe_names()}
        table(
            [
                {
                    "name": name,
                    "kind": "comparison" if "arms" in recipe else "train",
                    "what it is": recipe.get("title", ""),
                }
                for name, recipe in recipes.items()
            ]
        )
        print("train: for `steadyvq train`; comparison: several arms, for `steadyvq demo` or steadyvq.experiments")
        return 0
    from steadyvq.quantizers import methods

    rows = [
        {"name": m.name, "status": m.status, "what it is": m.summary, "cost": m.cost, "paper": m.paper}
        for m in methods().values()
    ]
    table(rows)
    print(
        "status: published, as its paper or official code; reconstructed, the text leaves choices open; variant, another form"
    )
    print("cost: of a training forward on N latents and K codes of dimension d; stores: beyond the table of codes")
    print("nsvq here is non-stationary VQ (arXiv 2606.11363), not the PyPI package nsvq (noise substitution, 2022)")
    return 0
