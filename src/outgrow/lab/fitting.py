"""Laws fitted to tables and to runs: coefficients with intervals, outliers, residual plots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outgrow.config import suggestion
from outgrow.errors import OutgrowError
from outgrow.lab.figures import Figure, Series, as_plotly, save_figures
from outgrow.lab.page import write_page
from outgrow.lab.table import is_records
from outgrow.lab.table import rows as rows_of_runs
from outgrow.scaling import LAWS, Fit, compute_optimal, fit, points_of, read_table
from outgrow.scaling.laws import Law, hoffmann_grid
from outgrow.scaling.points import DERIVED, matching


@dataclass(frozen=True)
class Fitted:
    """A fit, the group of rows it is of (empty if all), where its points came from, and how many more lack what the law reads."""

    group: str
    fit: Fit
    labels: tuple[str, ...]
    left_out: int = 0


def fit_files(
    paths: Sequence[Path],
    law: str = "chinchilla",
    named: Mapping[str, str] | None = None,
    only: Mapping[str, str] | None = None,
    by: str | None = None,
    resamples: int = 1000,
    from_grid: bool = False,
) -> list[Fitted]:
    """Fits a law to tables (CSV, JSON lines) and directories of runs; with `by` once for each value of that column.

    Args:
        paths: files and directories.
        law: a name of `LAWS`.
        named: our name -> their name of a column.
        only: column -> the value, or pattern, of the rows that count.
        by: a column whose values are fitted apart, such as `flops` for parabolas at equal FLOPs, or `operator`.
        resamples: of the bootstrap.
        from_grid: L-BFGS from Hoffmann's 4,500 starts in place of variable projection; chinchilla alone.
    """
    if law not in LAWS:
        raise OutgrowError(f"unknown law '{law}'{suggestion(law, LAWS)}")
    if from_grid and law != "chinchilla":
        raise OutgrowError(f"the grid of starts is that of 'chinchilla'; '{law}' is linear in its coefficients and needs none")
    wanted = LAWS[law]
    for name in named or {}:
        if name not in (*wanted.columns, *(part for column in wanted.columns if column in DERIVED for part in DERIVED[column][0])):
            raise OutgrowError(f"the law '{law}' reads no column '{name}'{suggestion(name, wanted.columns)}")
    of_runs = [path for path in paths if path.is_dir() or is_records(path)]
    runs = [row for path in of_runs for row in _runs(path, wanted)]
    tables = [row for path in paths if path not in of_runs for row in read_table(path)]
    lacking = {id(row) for _, row in runs if not _is_known(row, wanted)}
    table = [*runs, *tables]
    groups: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for label, row in matching(table, only or {}):
        if by is not None and by not in row:
            raise OutgrowError(f"{label}: there is no column '{by}' for --by{suggestion(by, row)}")
        groups.setdefault("" if by is None else str(row[by]), []).append((label, row))
    found = list[Fitted]()
    for group, chosen in groups.items():
        known = [(label, row) for label, row in chosen if id(row) not in lacking]
        points = points_of(known, wanted.columns, named)
        trunks = [str(row.get("trunk", label)) for label, row in known]
        try:
            made = fit(wanted, points.columns, resamples, starts=hoffmann_grid if from_grid else None, trunks=trunks)
        except OutgrowError as error:
            raise OutgrowError(f"{by} {group}: {error}" if by else str(error)) from None
        found.append(Fitted(group, made, points.labels, len(chosen) - len(known)))
    if not found:
        raise OutgrowError("there is no row to fit" + (f": none of {len(table)} matches --only" if only and table else ""))
    return found


def fit_lines(fitted: Fitted, by: str | None, flops: float | None) -> Iterator[str]:
    """A fit, as text."""
    made, law = fitted.fit, fitted.fit.law
    where = f", {by} {fitted.group}" if by else ""
    left_out = f", {fitted.left_out} more left out, whose {' or '.join(law.columns)} is not known" if fitted.left_out else ""
    yield f"{law.name}{where}: {law.equation} ({law.citation}), {len(fitted.labels)} points{left_out}"
    for name, value, between in _figures(made, flops):
        yield f"  {name:<22} {_number(value):<11}" + (f" 95% {_between(between)}" if between else "") + outside(made, name, value)
    relative = " of log loss" if law.predicts == "loss" and np.isfinite(law.delta) else ""
    yield f"  residuals: {np.sqrt((made.residuals**2).mean()):.3g} root mean square{relative}, largest {np.abs(made.residuals).max():.3g}"
    for index in made.outliers:
        yield f"  outlier: {fitted.labels[index]}, residual {made.residuals[index]:+.3g}"


def as_json(fitted: Fitted, by: str | None, flops: float | None) -> dict[str, Any]:
    """A fit, for machines."""
    made = fitted.fit
    figures = {
        name: {"value": value if math.isfinite(value) else None, "interval": between} for name, value, between in _figures(made, flops)
    }
    outliers = [{"point": fitted.labels[index], "residual": float(made.residuals[index])} for index in made.outliers]
    where = {by: fitted.group} if by else {}
    return {
        **where, "law": made.law.name, "equation": made.law.equation, "points": len(fitted.labels), "left_out": fitted.left_out,
        "figures": figures, "objective": made.objective, "resamples": len(made.draws), "outliers": outliers,
    }  # fmt: skip


def write_fits(fits: Sequence[Fitted], by: str | None, flops: float | None, page: Path | None, picture: Path | None) -> None:
    """Writes a page that opens offline, and a picture (PNG, SVG, PDF)."""
    figures = [figure for fitted in fits for figure in residual_figures(fitted, by)]
    if page:
        tables = [{"title": _title(one, by),
                   "rows": [(n, _number(v), _between(b) + outside(one.fit, n, v)) for n, v, b in _figures(one.fit, flops)],
                   "outliers": [(one.labels[i], f"{one.fit.residuals[i]:+.3g}") for i in one.fit.outliers]} for one in fits]  # fmt: skip
        write_page("fit.html.j2", page, [as_plotly(figure) for figure in figures], tables=tables)
    if picture:
        save_figures(figures, picture)


def residual_figures(fitted: Fitted, by: str | None) -> list[Figure]:
    """What a fit looks like: observed against the law, and the residuals along every input."""
    made, law = fitted.fit, fitted.fit.law
    title = _title(fitted, by)
    figures = [_curve(fitted, title)] if len(law.inputs) == 1 else [_agreement(fitted, title)]
    for name in law.inputs:
        points = Series("residual", made.columns[name].tolist(), made.residuals.tolist(), "markers", labels=fitted.labels)
        figures.append(Figure(f"Residuals along {name}", name, "observed - law", [points], log_x=True, level=0.0))
    return figures


def _agreement(fitted: Fitted, title: str) -> Figure:
    made, law = fitted.fit, fitted.fit.law
    back = law.unlog
    observed, predicted = back(law.observed(made.columns)), back(made.predicted)
    ends = [float(min(observed.min(), predicted.min())), float(max(observed.max(), predicted.max()))]
    points = Series("points", predicted.tolist(), observed.tolist(), "markers", labels=fitted.labels)
    equal = Series("equal", ends, ends, "lines", "#9ca3af")
    return Figure(title, f"{law.predicts} by the law", f"{law.predicts} observed", [points, equal])


def _curve(fitted: Fitted, title: str) -> Figure:
    made, law, name = fitted.fit, fitted.fit.law, fitted.fit.law.inputs[0]
    x = made.columns[name]
    along = np.geomspace(x.min(), x.max(), 100)
    back = law.unlog
    line = Series("law", along.tolist(), back(law.prediction(made.theta, {name: along})[0]).tolist(), "lines")
    points = Series("points", x.tolist(), back(law.observed(made.columns)).tolist(), "markers", "#6b7280", labels=fitted.labels)
    return Figure(title, name, law.predicts, [line, points], log_x=True)


def _figures(made: Fit, flops: float | None) -> Iterator[tuple[str, float, tuple[float, float] | None]]:
    """(name, value, interval) of coefficients and of what follows from them."""
    intervals = made.intervals
    for name, value in {**made.coefficients, **made.derived}.items():
        yield name, value, intervals.get(name)
    if flops is None:
        return
    if made.law.name != "chinchilla":
        raise OutgrowError(f"--flops asks for the compute-optimal size, which 'chinchilla' gives and '{made.law.name}' does not")

    def optimal(values: Any) -> dict[str, float]:
        coefficients = dict(zip(made.law.coefficients, map(float, values), strict=True))
        if min(coefficients.values()) <= 0:
            return {"params": float("nan"), "tokens": float("nan")}
        return dict(zip(("params", "tokens"), compute_optimal(coefficients, flops), strict=True))

    between = made.interval(optimal)
    for name, value in zip(("params", "tokens"), compute_optimal(made.coefficients, flops), strict=True):
        yield f"optimal {name}", value, between.get(name)


def _title(fitted: Fitted, by: str | None) -> str:
    return f"{fitted.fit.law.equation}" + (f" ({by} {fitted.group})" if by else "")


def _number(value: float) -> str:
    return f"{value:.5g}" if math.isfinite(value) else "not settled by these points"


def outside(made: Fit, name: str, value: float) -> str:
    """That a best value lies where no point is."""
    column = made.columns.get(name.removeprefix("best "))
    inside = column is None or not name.startswith("best ") or not math.isfinite(value) or column.min() <= value <= column.max()
    return "" if inside else ", outside of the points"


def _between(between: tuple[float, float] | None) -> str:
    return f"{between[0]:.5g} to {between[1]:.5g}" if between else ""


def _runs(root: Path, law: Law) -> list[tuple[str, dict[str, Any]]]:
    """The finished runs that a law speaks of: not of scratch where it reads when growth was."""
    return [(name, row) for name, row in rows_of_runs(root) if all(column in row for column in law.columns)]


def _is_known(row: Mapping[str, Any], law: Law) -> bool:
    """Has a run what a law reads? Growth at the first token has no log, and a run that never met scratch no speed-up."""
    return all(math.isfinite(row[column]) and (row[column] > 0 or column == "speed_up") for column in law.columns)
