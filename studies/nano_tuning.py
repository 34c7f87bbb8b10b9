"""How the settings of the nano recipe were found: one factor at a time around the chosen point, both arms by the same rule.

    python studies/nano_tuning.py [--runs runs] [--only TEXT]

Every row is the annealed held-out loss of one arm at the largest budget, seed 0. Finished runs are found, so the file can be
stopped and started; its result, src/outgrow/lab/recipes/nano_tuning.json, is what the report shows as "What was tried".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from outgrow.config import parse
from outgrow.errors import OutgrowError
from outgrow.files import write_json
from outgrow.lab.ancestry import in_order
from outgrow.lab.comparison import Arm, Comparison
from outgrow.lab.demo import BUILT_IN, open_comparison
from outgrow.lab.runs import read_result
from outgrow.lab.watch import execute_all

# (question, arm, path of the setting in the recipe, values)
QUESTIONS: list[tuple[str, Arm, str, list[Any]]] = [
    ("scratch: learning rate", "scratch", "learning_rates.scratch", [0.006, 0.012, 0.024]),
    ("scratch: share of the budget that decays", "scratch", "decay_share", [0.2, 0.4, 0.6]),
    ("scratch: batch, tokens", "scratch", "batch_tokens", [1024, 2048, 4096]),
    ("scratch: initial deviation", "scratch", "model.initializer_range", [0.06, 0.14]),
    ("scratch: weight decay", "scratch", "weight_decay", [0.0, 0.1, 0.3]),
    ("scratch: beta2", "scratch", "beta2", [0.95, 0.99]),
    ("grown: learning rate of the base", "grown", "learning_rates.base", [0.006, 0.012, 0.024]),
    ("grown: learning rate of the target", "grown", "learning_rates.target", [0.006, 0.012, 0.024]),
    ("grown: tokens of the base, d", "grown", "growth_tokens", [400_000, 600_000, 800_000]),
    ("grown: share of the budget that decays", "grown", "decay_share", [0.2, 0.4, 0.6]),
    ("grown: initial deviation", "grown", "model.initializer_range", [0.06, 0.14]),
]
RULE = (
    "One factor at a time around the chosen setting, seed 0, annealed held-out loss at the largest budget of {budget:,} tokens; "
    "the learning rate of every arm by the same sweep (python studies/nano_tuning.py). An earlier setting, 0.40M parameters at 4M tokens, "
    "was left: there an abrupt drop, early or late by luck, outweighed growth, and a baseline with plain initialisation flattered "
    "it (LOG.md). Muon was not tried here; it is worth +24.7% over this baseline (outgrow report baseline --scale nano)."
)


def edited(recipe: Comparison, path: str, value: Any) -> Comparison:
    """The recipe at its largest budget alone, with one setting changed."""
    content = recipe.model_dump() | {"budgets": [max(recipe.budgets)]}
    *outer, last = path.split(".")
    place = content
    for key in outer:
        place = place[key]
    place[last] = value
    return parse(Comparison, content, where=path)


def main() -> None:
    """Runs what is missing and writes the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--runs", type=Path, default=Path("runs"))
    arguments.add_argument("--only", default="", help="run the questions that contain this text, and write no table")
    options = arguments.parse_args()
    root = options.runs
    recipe, _ = open_comparison(BUILT_IN)
    budget = max(recipe.budgets)
    rows = []
    for question, arm, path, values in QUESTIONS:
        if options.only not in question:
            continue
        chosen: Any = recipe.model_dump()
        for key in path.split("."):
            chosen = chosen[key]
        for value in values:
            run = edited(recipe, path, value).branch(arm, 0, budget)
            try:
                execute_all(in_order([run]), root)
                result = read_result(run, root)
                found = {"loss": result.final_loss, "flops": result.flops}
            except OutgrowError as error:  # it diverged, and that is a result
                found = {"loss": None, "flops": None}
                print(error)
            rows.append({"question": question, "setting": f"{value:,}", **found, "chosen": value == chosen, "run": run.identity()})
            if not options.only:
                write_json(BUILT_IN.with_name("nano_tuning.json"), {"rule": RULE.format(budget=budget), "rows": rows})


if __name__ == "__main__":
    main()
