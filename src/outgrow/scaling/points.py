"""Tables of runs as people have them, CSV or JSON lines, read into columns."""

from __future__ import annotations

import csv
import fnmatch
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outgrow.config import suggestion
from outgrow.errors import OutgrowError
from outgrow.scaling.laws import Columns

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Points:
    """Points of runs.

    Attributes:
        columns: name -> one number a point.
        labels: where each point came from, such as `runs.csv:3`.
    """

    columns: Columns
    labels: tuple[str, ...]


def read_table(path: Path) -> list[tuple[str, Row]]:
    """(file and line, row) of a table: CSV with a header, JSON lines, or a JSON list of objects; one run a row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise OutgrowError(f"there is no file '{path}'") from None
    except UnicodeDecodeError:
        raise OutgrowError(f"'{path}' is not text; a table is CSV with a header, or JSON lines") from None
    found: list[tuple[int, Any]]
    if path.suffix.lower() == ".csv":
        try:
            found = list(enumerate(csv.DictReader(text.splitlines()), 2))
        except csv.Error as error:
            raise OutgrowError(f"'{path}' is no CSV that can be read: {error}") from None
    else:
        try:
            lines = ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())
            found = list(enumerate(json.loads(text), 1)) if text.lstrip().startswith("[") else [(n, json.loads(line)) for n, line in lines]
        except json.JSONDecodeError as error:
            raise OutgrowError(f"'{path}' is neither CSV (give it that ending) nor JSON lines: {error}") from None
    for line, row in found:
        if not isinstance(row, dict):
            raise OutgrowError(f"{path}:{line}: a row must be an object with named values, not {row!r}")
        if None in row:
            raise OutgrowError(f"{path}:{line}: the row has more values than the header has names; give numbers without commas in them")
    return [(f"{path}:{line}", row) for line, row in found]


def matching(rows: Sequence[tuple[str, Row]], only: Mapping[str, str]) -> list[tuple[str, Row]]:
    """The rows that have what `only` asks for: a column -> the value, or a pattern such as `annealed*`."""
    return [(label, row) for label, row in rows if _matches(label, row, only)]


def points_of(rows: Sequence[tuple[str, Row]], needed: Sequence[str], named: Mapping[str, str] | None = None) -> Points:
    """The columns that a law needs; what follows from other columns is worked out (`DERIVED`).

    Args:
        rows: (where it came from, row).
        needed: columns of the law, such as `params`, `tokens`, `loss`.
        named: our name -> the rows' own name of a column.
    """
    if not rows:
        raise OutgrowError("there is no row to fit")
    columns = {name: np.array([_value(label, row, name, named or {}) for label, row in rows]) for name in needed}
    return Points(columns, tuple(label for label, _ in rows))


# What follows from other columns where a table does not hold it: 6 N D, D / N, d / D.
DERIVED: Mapping[str, tuple[tuple[str, str], Callable[[float, float], float]]] = {
    "flops": (("params", "tokens"), lambda params, tokens: 6 * params * tokens),
    "tokens_per_param": (("tokens", "params"), lambda tokens, params: tokens / params),
    "growth_share": (("growth_tokens", "tokens"), lambda growth, tokens: growth / tokens),
}


def _value(label: str, row: Row, name: str, named: Mapping[str, str]) -> float:
    theirs = named.get(name, name)
    if theirs in row and row[theirs] not in (None, ""):
        try:
            return float(row[theirs])
        except (TypeError, ValueError, OverflowError):
            raise OutgrowError(f"{label}: '{theirs}' is {str(row[theirs])[:40]!r}, which is no number") from None
    if name in DERIVED and name not in named:
        parts, make = DERIVED[name]
        values = [_value(label, row, part, named) for part in parts]
        return make(*values) if min(values) > 0 else float("nan")
    if theirs in row:
        raise OutgrowError(f"{label}: '{theirs}' is empty; give it a number, or leave the row out")
    hint = suggestion(theirs, row) if row else ""
    raise OutgrowError(f"{label}: there is no column '{theirs}'{hint}; --column {name}=THEIRS says which one holds it")


def _matches(label: str, row: Row, only: Mapping[str, str]) -> bool:
    for name, pattern in only.items():
        if name not in row:
            raise OutgrowError(f"{label}: there is no column '{name}' for --only{suggestion(name, row)}")
        value: Any = row[name]
        if not fnmatch.fnmatchcase(str(value).lower() if isinstance(value, bool) else str(value), pattern):
            return False
    return True
