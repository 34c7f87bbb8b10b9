"""What a run begins with: random weights, a checkpoint on disk, or another run that is grown in depth where it lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from outgrow.arch import Config
from outgrow.checkpoint.dcp import is_dcp
from outgrow.checkpoint.grow import refuse_other_ties
from outgrow.checkpoint.huggingface import open_checkpoint
from outgrow.checkpoint.lineage import Lineage, read_lineage
from outgrow.checkpoint.optimizer_state import MOMENTS
from outgrow.errors import OutgrowError
from outgrow.growth.apply import Grown, rows_of
from outgrow.growth.plan import GrowthPlan
from outgrow.models.build import initial
from outgrow.training.distributed import from_files, like_parameter, local
from outgrow.training.optim import Optimizer
from outgrow.training.state import Clock, restore_optimizer


@dataclass(frozen=True)
class Origin:
    """A beginning.

    Attributes:
        config: of the model.
        read: gives the rows of a tensor that a rank asks for.
        lineage: what led here.
        restore: loads the optimizer's state; returns its step count.
        directory: where it lies on disk, if it does.
    """

    config: Config
    read: Callable[[str, slice], Tensor]
    lineage: Lineage
    restore: Callable[[Optimizer], int]
    directory: Path | None = None

    @property
    def has_weights(self) -> bool:
        return self.read is not _unread

    def receipt(self) -> Origin:
        """The same for a run that has a checkpoint of its own since: what led here, and no weights."""
        return replace(self, read=_unread, restore=_unread)


def from_seed(config: Config, seed: int) -> Origin:
    """Random weights."""
    draw = initial(config, seed)
    return Origin(config, lambda name, rows: draw(name)[rows], Lineage(), lambda optimizer: 0)


def from_directory(directory: Path) -> Origin:
    """A checkpoint, ours or any that can be opened."""
    if is_dcp(directory):
        raise OutgrowError(
            f"'{directory}' is a distributed checkpoint, and training begins with a Hugging Face directory; grow it into one, or take its "
            "layers as they are: outgrow grow --layers 0-LAST --trust-pickle"
        )
    found = open_checkpoint(directory)
    refuse_other_ties(found)
    lineage = read_lineage(directory)
    fresh = GrowthPlan.from_json(lineage.plan).new_tensors if lineage.plan else []
    return Origin(
        found.config, from_files(found.tensors), lineage, lambda optimizer: restore_optimizer(directory, optimizer, fresh), directory
    )


def already_grown(plan: GrowthPlan, source: Lineage) -> Origin:
    """What a run was grown from, for one that has a checkpoint of its own since."""
    return Origin(plan.target_config, _unread, _grown(plan, source), _unread)


def _unread(*arguments: Any) -> Any:
    raise AssertionError("a run that has a checkpoint goes on from that")


def _grown(plan: GrowthPlan, source: Lineage) -> Lineage:
    """The receipt of growth in memory."""
    trains = plan.new_tensors if plan.trains_only_fresh else None
    return replace(source, plan=plan.as_json(), trains=trains, copies=plan.copies or None)


def can_grow_in_place(plan: GrowthPlan, policy: str) -> bool:
    """Is every tensor of the target made of the same part of one tensor of the source, so that each rank can grow its own shards?"""
    plain = all(not (stage.lifts or stage.depth_maps or stage.rewrites or stage.fill == "masked") for stage in plan.stages)
    # A moment that nothing stands behind begins at the mean of a whole tensor, of which a rank holds a part.
    begins = policy == "carry" and any(0 in stage.ends for stage in plan.stages)
    grown = Grown(plan, lambda name, rows: None)
    return plain and not begins and policy != "fresh-new" and all(grown.has_source(name) for name in grown.tensors)


def grown_in_place(
    parameters: dict[str, Tensor], optimizer: Optimizer, clock: Clock, run: str, plan: GrowthPlan
) -> Origin:  # fmt: skip
    """A run in memory, grown in depth: each rank copies shards that it holds, and nothing is sent.

    Args:
        parameters, optimizer, clock, run: of the run that is grown.
        plan: one that `can_grow_in_place`.
    """
    weights = Grown(plan, rows_of({name: local(value.detach()) for name, value in parameters.items()}))
    lineage = _grown(plan, Lineage(clock.tokens, clock.flops, run=run, skipped=clock.skipped or None))

    def restore(target: Optimizer) -> int:
        saved: dict[str, dict[str, Any]] = {}
        for moment, values in optimizer.moments().items():
            grown = Grown(plan, rows_of({name: local(value) for name, value in values.items()}))
            names = [name for name in target.parameters if grown.reference(name) in values]
            saved[moment] = {name: like_parameter(target.parameters[name], grown.state(name, MOMENTS[moment], "carry")) for name in names}
        target.restore(saved, clock.steps)
        return clock.steps

    return Origin(plan.target_config, lambda name, rows: weights.weight(name), lineage, restore)
