"""What a run leaves on disk: a row of metrics for every step, and checkpoints by their clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outgrow.files import write_text

METRICS, CHECKPOINTS, FINISHED = "metrics.jsonl", "checkpoints", "finished.json"
EVALUATED = "eval/"  # how the fields of an evaluation begin: eval/TASK/METRIC and eval/AVERAGE, each with its _stderr
Row = dict[str, Any]


def read_rows(directory: Path) -> list[Row]:
    """The metrics of a run, in order."""
    return [json.loads(line) for line in (directory / METRICS).read_text(encoding="utf-8").splitlines()]


def forget_rows_after(path: Path, tokens: int) -> None:
    """Cuts the record back to a clock, so that a resumed run writes what an uninterrupted one would have."""
    _keep_rows(path, lambda row: row["tokens"] <= tokens)


def forget_rollbacks_from(path: Path, tokens: int) -> None:
    """Forgets that the run went back to its clock: resumed there, it meets the same loss and goes back again."""
    _keep_rows(path, lambda row: "rolled_back" not in row or row["tokens"] < tokens)


def _keep_rows(path: Path, wanted: Callable[[Row], bool]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    whole = (line for line in lines if line.endswith("}"))  # a killed writer leaves half a line
    kept = [line + "\n" for line in whole if wanted(json.loads(line))]
    write_text(path, "".join(kept))


def checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in (directory / CHECKPOINTS).glob("*") if path.name.isdigit())


def checkpoint_at(directory: Path, tokens: int) -> Path:
    """Where a run keeps its checkpoint at a clock."""
    return directory / CHECKPOINTS / f"{tokens:015d}"


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    found = checkpoints(directory)
    return found[-1] if found else None
