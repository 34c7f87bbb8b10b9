"""Studies reported: one page that opens offline, pictures for papers, and a table in the terminal."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from outgrow.lab.figures import as_plotly, save_figures
from outgrow.lab.fitting import outside
from outgrow.lab.page import write_page
from outgrow.lab.studies import Studied, budget_table, main_table, recovery_table, sentences, sweep_table
from outgrow.lab.study_figures import best_instants, fitted_laws, pictures
from outgrow.scaling.laws import LAWS

COLUMNS = {"rate": "rate", "loss": "annealed loss", "annealed": "speed-up, annealed", "un-annealed": "un-annealed", "paper": "paper"}


def write_studies(studies: Sequence[Studied], page: Path, pictures_to: Path | None) -> None:
    """Writes the page, and for each figure of each study a PNG and an SVG file if a directory is given."""
    figures = {one.file: pictures(one) for one in studies}
    flat = [as_plotly(figure) for of_one in figures.values() for figure in of_one]
    counts = {file: len(of_one) for file, of_one in figures.items()}
    write_page(
        "studies.html.j2", page, flat, studies=studies, counts=counts, fits={one.file: list(fit_rows(one)) for one in studies},
        main_table=main_table, budget_table=budget_table, sweep_table=sweep_table, sentences=sentences, recovery_table=recovery_table,
    )  # fmt: skip
    for file, of_one in figures.items() if pictures_to else ():
        for figure in of_one:
            what = re.sub(r"\W+", "-", figure.title.partition(": ")[2].split(",")[0]).strip("-")
            for ending in ("png", "svg"):
                save_figures([figure], (pictures_to or Path()) / f"{file}-{what}.{ending}")


def fit_rows(one: Studied) -> Iterator[tuple[str, str, str, str, str]]:
    """(what was fitted, law, name of a figure, value, 95% interval) of every fit of a study."""
    for kind, fits in fitted_laws(one).items():
        for law, made in fits.items():
            if isinstance(made, str):
                yield kind, LAWS[law].equation, "", f"not fitted: {made}", ""
                continue
            for name, value in {**made.coefficients, **made.derived}.items():
                between = made.intervals.get(name)
                yield kind, made.law.equation, name, f"{value:.4g}", f"{between[0]:.4g} to {between[1]:.4g}" if between else ""
    for flops, made in best_instants(one).items():
        best = made.derived["best growth_tokens"]
        text = f"{best:,.0f} tokens{outside(made, 'best growth_tokens', best)}" if math.isfinite(best) else "no minimum"
        yield f"{flops:.3g} FLOPs", made.law.equation, "best d", text, ""


def show_studies(studies: Sequence[Studied]) -> None:
    """Prints each study's table and what was found."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for one in studies:
        table = Table("arm", title=escape(f"{one.study.name}, {one.scale_name}"), title_justify="left")
        for name in COLUMNS.values():
            table.add_column(name, justify="right")
        for row in main_table(one):
            table.add_row(escape(row["arm"]), *(row[key] for key in COLUMNS))
        console.print(table)
        for text in sentences(one):
            console.print(text, soft_wrap=True, highlight=False, markup=False)
