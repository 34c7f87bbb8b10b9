"""What a terminal shows: tables, a progress bar, facts as people read them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outgrow.errors import OutgrowError


@contextmanager
def bar() -> Iterator[Any]:
    """A progress bar on a terminal, for what takes longer than a moment; yields what is told (bytes done, bytes in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_table(rows: list[list[str]]) -> None:
    """Rows of text, a heading first, as wide as the terminal; as wide as they are where there is none."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0])
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)


def plain(value: Any) -> str:
    """A fact as people read it: thousands separated, lists joined."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def without_nan(value: Any) -> Any:
    """Plain data in which what is not known is null, as JSON has it."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and value != value else value


def short_names(names: list[str]) -> list[str]:
    """Paths without the parts that all of them have in front or behind, so that what tells them apart stays."""
    paths = [Path(name) if Path(name).name else Path(name).resolve() for name in names]  # '.' has no parts
    parts = [path.parts for path in paths]
    if len(parts) < 2:
        return [path.name for path in paths]
    shortest = min(map(len, parts))
    front = next((i for i in range(shortest) if len({one[i] for one in parts}) > 1), shortest - 1)
    back = next((i for i in range(shortest - front) if len({one[-1 - i] for one in parts}) > 1), shortest - front - 1)
    return ["/".join(one[front : len(one) - back]) for one in parts]


def told(line: str) -> None:
    """A line for people, beside the output."""
    print(line, file=sys.stderr, flush=True)


def refuse_picture(path: Path | None) -> None:
    """Refuses a file whose ending names no kind of picture."""
    if path and path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise OutgrowError(f"--figure takes a file that ends in .png, .svg or .pdf, not '{path}'")
