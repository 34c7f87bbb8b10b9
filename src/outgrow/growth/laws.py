"""The laws that an operator's claims are tested by: preserves, trains, and gradients that follow the dual lift.

They are measures on arrays, not assertions; tests and receipts say what is small enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from outgrow.arch import Tensor
from outgrow.growth.apply import Grown
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
    grown = Grown(plan, lambda name: source[name])
    worst = 0.0
    for name, tensor in grown.tensors.items():
        old = 1.0 - mask_of(plan, tensor, "empty")
        worst = max(worst, float(abs((grown.state(name, "gradient", "carry") - target[name]) * old).max()))
    return worst


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
