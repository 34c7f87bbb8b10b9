"""The one kernel: moves a tensor along its axes by the lifts of its spaces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from outgrow.arch import Spec
from outgrow.errors import OutgrowError
from outgrow.growth.plan import GrowthPlan
from outgrow.spaces import Lift


def transport(spec: Spec, array: Any, lifts: Mapping[str, Lift], sizes: Mapping[str, int], power: int = 1) -> Any:
    """A parameter over the grown spaces: W' = D_out W R_in, a gain by its own factor.

    Args:
        spec: what the parameter writes and reads.
        array: numpy array or torch tensor, in its stored shape.
        lifts: space -> lift; the duals of the plan's lifts move gradients.
        sizes: old sizes of all spaces.
        power: 2 moves squares, such as Adam's second moment.
    """
    if not is_lifted(spec, lifts):
        return array
    folded = array.reshape([sizes[space] for axis in spec.axes for space in axis.spaces])
    place = 0
    shape: list[int] = []
    for axis in spec.axes:
        entries = 1
        for space in axis.spaces:
            if space in lifts:
                folded = lifts[space].along(folded, place, axis.role, power)
            entries *= folded.shape[place]
            place += 1
        shape.append(entries)
    return folded.reshape(shape)


def is_lifted(spec: Spec, lifts: Mapping[str, Lift]) -> bool:
    """Does a parameter write, read or gain a space that grows? If not, growth copies it as it is."""
    return any(space in lifts for axis in spec.axes for space in axis.spaces)


def grow(plan: GrowthPlan, tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (name, array) of the grown checkpoint, one at a time, from the arrays of the source.

    A copy is the source's own array, not a clone. Raises OutgrowError when the source lacks a tensor.
    """
    sizes = plan.arch.sizes(plan.source_config)
    for assignment in plan.assignments():
        if assignment.source not in tensors:
            raise OutgrowError(f"the source has no tensor '{assignment.source}', from which '{assignment.target.name}' is made")
        yield assignment.target.name, transport(assignment.target.spec, tensors[assignment.source], plan.lifts, sizes)
