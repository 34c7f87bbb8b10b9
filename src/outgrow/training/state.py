"""Checkpoints of a run: a Hugging Face directory with the optimizer's state beside the weights, under the same names."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, distributed

from outgrow.checkpoint.huggingface import SINGLE
from outgrow.checkpoint.lineage import LINEAGE, Lineage
from outgrow.checkpoint.optimizer_state import BEHIND_MASKS, CLOCK, moment_file, stored_moments
from outgrow.checkpoint.ranks import PATIENCE, agreed, leads, telling, world
from outgrow.data.tokenizer import open_encoder
from outgrow.errors import OutgrowError
from outgrow.files import new_directory, read_json, write_json
from outgrow.training.distributed import Part, fill, from_files, like_parameter, snapshot, wait, write_tensors
from outgrow.training.optim import KEPT, Optimizer


@dataclass(frozen=True)
class Clock:
    """How far a run is.

    Attributes:
        tokens: tokens seen, those of its ancestors included.
        flops: training FLOPs spent, those of its ancestors included.
        steps: optimizer steps since the optimizer's state was fresh.
        skipped: tokens of data that were left out, by rolling back before a loss spike.
    """

    tokens: int
    flops: float
    steps: int
    skipped: int = 0


@dataclass(frozen=True)
class State:
    """What a checkpoint holds, apart from the run, so that training can go on while it is written.

    Attributes:
        weights: name -> this rank's part of each parameter, as any tool would have to run it.
        behind: name -> what is trained where `weights` are still masked.
        moments: moment -> name -> this rank's part.
        config: the model's, for its config.json.
        clock: of the run.
        lineage: its receipt.
    """

    weights: Mapping[str, Part]
    behind: Mapping[str, Part]
    moments: Mapping[str, Mapping[str, Part]]
    config: Any
    clock: Clock
    lineage: Lineage


def state_of(
    config: Any, parameters: Mapping[str, Tensor], optimizer: Optimizer, clock: Clock, run: str,
    behind: Mapping[str, Tensor], copies: dict[str, list[int]] | None = None,
) -> State:  # fmt: skip
    """A copy of all that a checkpoint holds.

    Args:
        config: of the transformers model.
        parameters: its parameters by name, sharded ones as this rank holds them.
        optimizer: the run's.
        clock: the run's.
        run: its identity.
        behind: what is trained where the parameters are still masked.
        copies: what copied what at the last growth.
    """
    trained = [name for name, value in parameters.items() if value.requires_grad]
    trains = trained if len(trained) < len(parameters) else None
    receipt = Lineage(tokens=clock.tokens, flops=clock.flops, run=run, trains=trains, skipped=clock.skipped or None, copies=copies)
    moments = {moment: snapshot(values) for moment, values in optimizer.moments().items()}
    return State(snapshot(parameters), snapshot(behind), moments, config, clock, receipt)


class Writer:
    """Writes checkpoints one after another behind the back of training; every rank has one."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._group = _writers() if world() > 1 else None
        self._last: Future[None] | None = None

    def write(self, directory: Path, state: State, tokenizer: list[Path]) -> None:
        """Begins a checkpoint, which will appear whole or not at all; the one before it is finished first."""
        self.finish()
        self._last = self._pool.submit(_write, directory, state, tokenizer, self._group)

    def failed(self) -> bool:
        """Did the last checkpoint fail already? `finish` says why."""
        return bool(self._last and self._last.done() and self._last.exception())

    def finish(self) -> None:
        """Waits until the last checkpoint is there for every rank, and says what went wrong with it."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


@cache
def _writers() -> Any:
    """The process group that all writers of this process share, apart from training's, since they work at the same time."""
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


def _write(directory: Path, state: State, tokenizer: list[Path], group: Any) -> None:
    if leads():
        with telling(group) as tell, new_directory(directory) as temporary:
            tell(temporary)
            _write_tensors(temporary, state, group)
            for path in tokenizer:
                shutil.copy(path, temporary)
            _with_ends(state.config, open_encoder(temporary).end).save_pretrained(temporary)
            write_json(temporary / CLOCK, asdict(state.clock))
            write_json(temporary / LINEAGE, state.lineage.as_json())
    elif place := agreed(None, group):
        _write_tensors(place, state, group)
    wait(group)  # until it has its name: ranks that looked for the newest checkpoint before that would load different ones


def _with_ends(config: Any, end: int) -> Any:
    """The config of a model with the token that stands before and behind a text, where it does not say one."""
    whole = copy(config)
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(whole, name, None) is None:
            setattr(whole, name, end)
    return whole


def _write_tensors(directory: Path, state: State, group: Any) -> None:
    write_tensors(directory / SINGLE, state.weights, group)
    if state.behind:
        write_tensors(directory / BEHIND_MASKS, state.behind, group)
    for moment, values in state.moments.items():
        write_tensors(moment_file(directory, moment), values, group)


def read_clock(directory: Path) -> Clock:
    """The clock of a checkpoint that a run wrote."""
    return Clock(**read_json(directory / CLOCK))


def restore_optimizer(directory: Path, optimizer: Optimizer, fresh: Collection[str] = ()) -> int:
    """Loads the optimizer's state of a checkpoint, each rank its part; returns its step count. `fresh`: see `Optimizer.restore`."""
    if not (directory / CLOCK).exists():
        raise OutgrowError(f"'{directory}' carries no optimizer state; set start.optimizer to 'reset'")
    steps = read_clock(directory).steps
    saved: dict[str, dict[str, Tensor]] = {}
    for moment, stored in stored_moments(directory).items():
        wanted = {name: value for name, value in optimizer.parameters.items() if moment in KEPT[optimizer.kinds[name]]}
        saved[moment] = {name: like_parameter(value) for name, value in wanted.items() if name in stored}
        fill(saved[moment], from_files(stored))
    optimizer.restore(saved, steps, fresh)
    return steps
