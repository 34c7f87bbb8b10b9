"""Trackers beside `metrics.jsonl`, the record: TensorBoard where it is installed, Weights & Biases where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from outgrow.errors import OutgrowError
from outgrow.training.config import RunConfig
from outgrow.training.record import Row

Tracker = Callable[[Row], None]
TRACKERS = ("tensorboard", "wandb")


def trackers(names: Iterable[str], run: RunConfig, directory: Path, begin: int) -> list[Tracker]:
    """What is told every row of a run from the clock `begin` on; what was told of later ones, before a kill, is forgotten.

    Each is opened with the first row, when the run is known to be this process's: another may be at it, and have its own open. TensorBoard
    is left out where it is not installed, since it is asked for by default.
    """
    made: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            made += [_opened_late(lambda: _tensorboard(directory, begin))] if find_spec("tensorboard") else []
        elif name == "wandb":
            if not find_spec("wandb"):
                raise OutgrowError("Weights & Biases is asked for and not installed; pip install wandb")
            made.append(_opened_late(lambda: _wandb(run, directory)))
        else:
            raise OutgrowError(f"there is no tracker '{name}'; known: {', '.join(TRACKERS)}")
    return made


def _opened_late(opened: Callable[[], Tracker]) -> Tracker:
    once = cache(opened)
    return lambda row: once()(row)


def _tensorboard(directory: Path, begin: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory / "tensorboard"), purge_step=begin)

    def told(row: Row) -> None:
        for name, value in _numbers(row).items():
            writer.add_scalar(name, value, row["tokens"])
        writer.flush()

    return told


def _wandb(run: RunConfig, directory: Path) -> Tracker:
    import wandb  # type: ignore[import-not-found]

    tracked = wandb.init(
        name=run.name, id=run.identity(), dir=directory, config=run.model_dump(mode="json"), resume="allow", reinit="create_new"
    )
    # A step of its own counter for every row: rows whose step goes back, as it does after a roll back, it would drop.
    tracked.define_metric("*", step_metric="tokens")
    return lambda row: tracked.log(_numbers(row) | {"tokens": row["tokens"]})


def _numbers(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "tokens" and isinstance(value, (int, float))}
