"""The laws that an operator's claims are tested by: preserves, trains, gradients that follow the dual lift; and whether copies part.

They are measures on arrays, not assertions; tests and receipts say what is small enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outgrow.arch import Tensor
from outgrow.growth.apply import Grown, rows_of
from outgrow.growth.fresh import entries, mask_of
from outgrow.growth.plan import GrowthPlan

EXACT = 1e-10  # what counts as equal in float64


def logit_difference(source: Any, target: Any) -> float:
    """max |delta logit| between two models' logits on the same tokens: below `EXACT` in float64 where a plan preserves."""
    return float(abs(source - target).max())


def untrained(plan: GrowthPlan, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What no step has changed of the target: tensors, and new indices of tensors. Three steps of any optimizer suffice.

    A bias is trained where its matrix's rows are, so only the rows are looked at: softmax does not see a bias of the keys that is the
    same at every position, and rounding alone moves it.

    Args:
        before, after: name -> numpy array of the target, before and after the steps.
    """
    tensors = [tensor for tensor in plan.grown_arch.tensors(plan.target_config) if not tensor.spec.is_bias]
    return [dead for tensor in tensors for dead in _dead(plan, tensor, before, after)]


def gradient_difference(plan: GrowthPlan, source: Mapping[str, Any], target: Mapping[str, Any]) -> float:
    """max |dual lift of the source's gradients - the target's own gradients|, over every entry that growth did not make up.

    Holds for preserving plans; a depth copy changes the function, and so its gradients.
    """
    grown = Grown(plan, rows_of(source))
    worst = 0.0
    for name, tensor in grown.tensors.items():
        old = 1.0 - mask_of(plan, tensor, "empty")
        worst = max(worst, float(abs((grown.state(name, "gradient", "carry") - target[name]) * old).max()))
    return worst


def alike(plan: GrowthPlan, weights: Mapping[str, Any]) -> list[str]:
    """Spaces whose equal indices trade places without changing any weight of the target, each alone or all at once.

    Such indices get the same gradient, so that training keeps them alike: after steps as before them (derived; Net2Net, 1511.05641,
    adds noise against it).

    Args:
        weights: name -> numpy array of the target.
    """
    turns = {space: _turned(numbers) for space, numbers in plan.twins().items()}
    alone = [space for space, turn in turns.items() if _is_kept(plan, weights, {space: turn})]
    return list(turns) if _is_kept(plan, weights, turns) else alone


def _turned(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """[new] the next index of the same number, the first after the last; an index itself where it is the only one."""
    turn = np.arange(len(numbers))
    for number in np.unique(numbers):
        same = np.flatnonzero(numbers == number)
        turn[same] = np.roll(same, -1)
    return turn


def _is_kept(plan: GrowthPlan, weights: Mapping[str, Any], turns: Mapping[str, NDArray[np.int64]]) -> bool:
    sizes = plan.grown_arch.sizes(plan.target_config)
    for tensor in plan.grown_arch.tensors(plan.target_config):
        expert = int(turns["expert"][tensor.expert]) if tensor.expert is not None and "expert" in turns else tensor.expert
        turned = weights[plan.grown_arch.name(tensor.key, tensor.layer, expert)]
        for place, axis in enumerate(tensor.spec.axes):
            if axis.spaces & turns.keys():
                turned = turned.take(axis.indices(turns, sizes), place)
        if np.abs(turned - weights[tensor.name]).max() > EXACT:
            return False
    return True


def _dead(plan: GrowthPlan, tensor: Tensor, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    moved = np.asarray(after[tensor.name] != before[tensor.name])
    if not moved.any():
        yield tensor.name
        return
    if plan.source_of(tensor) is None or not plan.lifts:
        return
    sizes = plan.arch.sizes(plan.source_config)
    for is_new in entries(tensor.spec, plan.lifts, sizes, "repeated"):
        for axis, size in enumerate(is_new.shape):
            others = tuple(a for a in range(moved.ndim) if a != axis)
            new = np.atleast_1d(is_new.any(axis=others)) if size > 1 else np.zeros(1, np.bool_)
            # A mask of one axis stands alone on it; where both axes write (a kv and a group), each new index is looked at.
            still = new & ~np.atleast_1d(moved.any(axis=others)) if len(new) == moved.shape[axis] else np.zeros(1, np.bool_)
            if still.any():
                yield f"{tensor.name}, index {int(np.flatnonzero(still)[0])} of axis {axis}"
