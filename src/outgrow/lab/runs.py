"""Runs on disk: where each lies, whether it is finished, what it found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from outgrow.checkpoint.lineage import read_lineage
from outgrow.errors import OutgrowError
from outgrow.files import read_json
from outgrow.lab.ancestry import flops_before, own_flops
from outgrow.lab.speedup import Curve
from outgrow.training.config import RunConfig, first_token
from outgrow.training.record import EVALUATED, FINISHED, Row, checkpoint_at, latest_checkpoint, read_rows

SETTINGS, GROWN, ENVIRONMENT = "run.json", "start", "environment.json"


@dataclass(frozen=True)
class Result:
    """A finished run, read from its files."""

    config: RunConfig
    directory: Path
    rows: list[Row]

    @property
    def validation(self) -> list[Row]:
        return [row for row in self.rows if "validation_loss" in row]

    @property
    def curve(self) -> Curve:
        """(FLOPs, held-out loss) at each validation, once anything was spent."""
        return [(row["flops"], row["validation_loss"]) for row in self.validation if row["flops"]]

    @property
    def evaluations(self) -> list[Row]:
        return [row for row in self.rows if any(name.startswith(EVALUATED) for name in row)]

    @property
    def steps(self) -> list[Row]:
        return [row for row in self.rows if "loss" in row]

    @property
    def final_loss(self) -> float:
        return self.validation[-1]["validation_loss"]

    @property
    def flops(self) -> float:
        return self.rows[-1]["flops"]


def place(run: RunConfig, root: Path) -> Path:
    """The directory of a run: its name for people, its identity for the rest."""
    named = sorted(root.glob(f"*-{run.identity()}"))
    return named[0] if named else root / f"{run.name}-{run.identity()}"


def finished(run: RunConfig, root: Path) -> bool:
    """Did this run reach its end, here or earlier?"""
    return (place(run, root) / FINISHED).exists()


def clock_of(run: RunConfig, root: Path) -> int:
    """The clock from which a run will go on: of its newest checkpoint, or its first token."""
    latest = latest_checkpoint(place(run, root))
    return int(latest.name) if latest else first_token(run)


def flops_done(run: RunConfig, root: Path) -> float:
    """Training FLOPs of a run that need not be spent again: all of a finished one's, those of its newest checkpoint otherwise."""
    if finished(run, root):
        return own_flops(run)
    latest = latest_checkpoint(place(run, root))
    return read_lineage(latest).flops - flops_before(run) if latest else 0.0


def read_result(run: RunConfig, root: Path) -> Result:
    """The result of a finished run, from files only."""
    directory = place(run, root)
    if not finished(run, root):
        raise OutgrowError(f"the run '{run.name}' ({run.identity()}) is not finished in '{root}'; train it first")
    return Result(run, directory, read_rows(directory))


def final_checkpoint(run: RunConfig, root: Path) -> Path:
    """The checkpoint directory at the end of a finished run."""
    return checkpoint_at(place(run, root), run.tokens)


def require_text(directories: Iterable[Path], corpus_hash: str) -> None:
    """Refuses to go on from, or to compare, runs that read another text: 'python' is another corpus on another machine."""
    for directory in directories:
        if (directory / ENVIRONMENT).exists() and read_json(directory / ENVIRONMENT)["corpus_hash"] != corpus_hash:
            raise OutgrowError(f"the corpus is not the one that '{directory}' was trained on; give that text back, or use another --runs")
