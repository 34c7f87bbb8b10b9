"""What no lift says: pure functions on a grown tensor, named in a plan with their arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outgrow.arch import Tensor, size_of
from outgrow.growth.fresh import entries, normal_rows
from outgrow.growth.plan import GrowthPlan
from outgrow.growth.rows import folded, pieces
from outgrow.spaces import Lift, Rows, at, empty_like, like

_PROJECTED = 1 << 18  # numbers that are projected at once
Moved = Callable[[Tensor], Any]  # another tensor of the target, moved along its spaces


@dataclass(frozen=True)
class Rewrite:
    """A rewrite.

    Attributes:
        touches: the tensors that it changes.
        apply: (plan, tensor, array, moved, rows, **knobs) -> what it makes of those rows of one, which `array` holds.
    """

    touches: Callable[[GrowthPlan, Tensor], bool]
    apply: Callable[..., Any]


def noise(plan: GrowthPlan, tensor: Tensor, array: Any, moved: Moved, rows: Rows, share: float) -> Any:
    """W <- (1 - share) W + share eps, eps at the scale of fresh weights (arXiv 2405.15319). The function changes."""
    noisy = empty_like(array, tuple(array.shape))
    deviation = plan.grown_arch.deviation(tensor.spec, plan.target_config)
    for some, values in normal_rows(plan.seed, f"noise {tensor.name}", _shape(plan, tensor), rows):
        values *= share * deviation
        noisy[some] = array[some]
        noisy[some] *= 1 - share
        noisy[some] += like(array, values)
    return noisy


def projected_noise(plan: GrowthPlan, tensor: Tensor, array: Any, moved: Moved, rows: Rows, share: float) -> Any:
    """W <- W + share (N - N D R): noise that whatever reads a grown space cannot see, since (N - N D R) D = 0 (derived).

    Copies part ways and the function stays. N is at the scale of fresh weights. All copies of an expert are read together, so that what
    their last maps get adds up to nothing.
    """
    if plan.ends_copied_expert(tensor):
        array = array + like(array, share * _unseen_among_copies(plan, tensor, rows))  # the source's own where no axis grows
    if not _reads_grown(plan, tensor):
        return array
    place, lift = next(_grown_reads(plan, tensor))
    drawn, kept = rows, slice(None)
    if place == 0:  # rows are projected together with those that read the same: all copies of an old index
        wanted = np.arange(lift.new)[rows]
        held = np.intersect1d(lift.source[wanted], np.arange(lift.size))
        drawn = np.union1d(wanted, np.flatnonzero(np.isin(lift.source, held)))
        kept = np.searchsorted(drawn, wanted)
        _, lift = lift.part(drawn, "read")
    n = _epsilon(plan, tensor, drawn)
    # Projected in float64, some at a time along another axis, since all of it would be the largest thing in memory.
    across = 0 if place else 1
    step = max(1, _PROJECTED * n.shape[across] // n.size)
    for first in range(0, n.shape[across], step):
        some = at(across, slice(first, first + step))
        unseen = n[some] - lift.along(lift.onto_old(n[some], place), place, "read")
        unseen = unseen if place else unseen[kept]
        unseen *= share
        array[some] += like(array, unseen)  # it is ours: a lift has just made it
    return array


def above(plan: GrowthPlan, tensor: Tensor, array: Any, moved: Moved, rows: Rows) -> Any:
    """New outputs come from the same module one layer up: AKI of bert2BERT (arXiv 2110.07143)."""
    assert tensor.layer is not None
    upper = min(plan.layers[tensor.layer] + 1, plan.arch.layers(plan.source_config) - 1)
    where = plan.layers.index(upper) if upper in plan.layers else tensor.layer
    other = moved(replace(tensor, layer=where, name=plan.arch.name(tensor.key, where, tensor.expert)))
    new = entries(tensor.spec, plan.lifts, plan.arch.sizes(plan.source_config), "repeated")[0].astype(np.float64)
    new = new[rows] if len(new) > 1 else new
    array *= like(array, 1.0 - new)  # both are ours: a lift has just made them
    other *= like(array, new)
    array += other
    return array


def diagonal(plan: GrowthPlan, tensor: Tensor, array: Any, moved: Moved, rows: Rows) -> Any:
    """W' = [[W, 0], [0, W]] in place of [[W, W], [W, W]] / 2: each copy reads its own kind (arXiv 2203.06211)."""
    copy = [_copy_number(plan, axis.blocks) for axis in tensor.spec.axes]
    copy[0] = copy[0][rows]
    for some in pieces(tuple(array.shape)):
        same = copy[0][some, None] == copy[1][None, :]
        array[some] *= like(array, same * np.float32(copy[1].max() + 1))  # ours: a lift has just made it
    return array


def _unseen_among_copies(plan: GrowthPlan, tensor: Tensor, rows: Rows) -> NDArray[np.float64]:
    """N - N D R over the copies of an expert: its own noise without its share of all that they write."""
    lift, expert = plan.lifts["expert"], tensor.expert
    assert isinstance(lift, Lift)
    assert expert is not None
    unseen = _epsilon(plan, tensor, rows).astype(np.float64)
    for copy in np.flatnonzero(lift.source == lift.source[expert]):
        name = plan.grown_arch.name(tensor.key, tensor.layer, int(copy))
        unseen -= lift.read[expert] * lift.write[copy] * _epsilon(plan, replace(tensor, name=name), rows)
    return unseen


def _touches_blocks(plan: GrowthPlan, tensor: Tensor) -> bool:
    return tensor.layer is not None and tensor.spec.decays


def _reads_grown(plan: GrowthPlan, tensor: Tensor) -> bool:
    return tensor.spec.decays and any(_grown_reads(plan, tensor))


def _gets_unseen(plan: GrowthPlan, tensor: Tensor) -> bool:
    return _reads_grown(plan, tensor) or plan.ends_copied_expert(tensor)


def _writes_grown(plan: GrowthPlan, tensor: Tensor) -> bool:
    copies = tensor.layer is not None and plan.source_of(tensor) is not None
    return copies and any(axis.role != "read" and axis.spaces & plan.lifts.keys() for axis in tensor.spec.axes)


def _grown_on_both_sides(plan: GrowthPlan, tensor: Tensor) -> bool:
    return len(tensor.spec.axes) == 2 and all(axis.spaces & plan.lifts.keys() for axis in tensor.spec.axes)


REWRITES: dict[str, Rewrite] = {
    "noise": Rewrite(_touches_blocks, noise),
    "projected noise": Rewrite(_gets_unseen, projected_noise),
    "above": Rewrite(_writes_grown, above),
    "diagonal": Rewrite(_grown_on_both_sides, diagonal),
}


def _grown_reads(plan: GrowthPlan, tensor: Tensor) -> Iterator[tuple[int, Lift]]:
    """Every axis that reads a grown space, and its lift."""
    for place, axis in enumerate(tensor.spec.axes):
        if axis.role == "read" and axis.spaces & plan.lifts.keys():
            lift = folded(axis, plan.lifts, plan.arch.sizes(plan.source_config))
            if isinstance(lift, Lift):
                yield place, lift


def _copy_number(plan: GrowthPlan, blocks: tuple[tuple[str, ...], ...]) -> NDArray[np.int64]:
    """[new size of the axis] which copy an index is: 0 for the first."""
    numbers: list[NDArray[np.int64]] = []
    sizes = plan.arch.sizes(plan.source_config)
    for block in blocks:
        number = np.zeros(1, np.int64)
        for space in block:
            lift = plan.lifts.get(space)
            one = np.arange(lift.new) // lift.size if lift else np.zeros(size_of(space, sizes), np.int64)
            number = np.ravel(number[:, None] + one[None, :])
        numbers.append(number)
    return np.concatenate(numbers)


def _epsilon(plan: GrowthPlan, tensor: Tensor, rows: Rows) -> NDArray[np.float32]:
    shape = _shape(plan, tensor)
    drawn = np.concatenate([values for _, values in normal_rows(plan.seed, f"noise {tensor.name}", shape, rows)])
    drawn *= plan.grown_arch.deviation(tensor.spec, plan.target_config)
    return drawn


def _shape(plan: GrowthPlan, tensor: Tensor) -> tuple[int, ...]:
    return plan.grown_arch.shape(tensor.spec, plan.grown_arch.sizes(plan.target_config))
