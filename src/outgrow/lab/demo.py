"""The demo: one comparison from an empty machine to a measured speed-up."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.table import Table

from outgrow.config import load
from outgrow.lab.ancestry import in_order
from outgrow.lab.comparison import Comparison
from outgrow.lab.outcome import Outcome, cost, read_outcome
from outgrow.lab.report import sentence, write_report
from outgrow.lab.runs import finished
from outgrow.lab.speedup import over_seeds
from outgrow.lab.watch import execute_all

BUILT_IN = Path(str(resources.files("outgrow.lab"))) / "recipes" / "nano.yaml"


def open_comparison(path: Path | None) -> tuple[Comparison, Path | None]:
    """A comparison, the built-in one for None, and the file beside it that it names as `tuning`: what was tried to find its settings."""
    path = path or BUILT_IN
    comparison = load(Comparison, path)
    return comparison, path.parent / Path(comparison.tuning).name if comparison.tuning else None


def run_demo(path: Path | None, seeds: tuple[int, ...], root: Path, report: Path) -> None:
    """Trains what is missing, then prints and writes what was found."""
    comparison, tried = open_comparison(path)
    runs = in_order(comparison.runs(seeds))
    if not all(finished(run, root) for run in runs):
        execute_all(runs, root)
    show(read_outcome(comparison, seeds, root), report, tried)


def show(outcome: Outcome, report: Path, tried: Path | None) -> None:
    """Prints the table and the finding, and writes the report."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table("run")
    for name in ("layers", "tokens", "tokens/param", "FLOPs", "held-out loss", "tokens/s", "seconds"):
        table.add_column(name, justify="right")
    for result in outcome.runs():
        row = cost(result)
        table.add_row(
            result.config.name,
            str(row.layers),
            f"{result.config.tokens:,}",
            f"{row.tokens_per_parameter:.1f}",
            f"{result.flops:.3e}",
            f"{result.final_loss:.4f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.seconds:.0f}",
        )
    console.print(table)
    report.parent.mkdir(parents=True, exist_ok=True)
    write_report(outcome, report, tried)
    console.print(sentence(over_seeds(outcome.speed_ups("annealed")), len(outcome.seeds)), soft_wrap=True, highlight=False)
    console.print(f"report: {report}", soft_wrap=True)
