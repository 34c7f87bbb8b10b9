"""The laws that an operator's claims are tested by: preserves, trains, and gradients that follow the dual lift.

They are measures on arrays, not assertions; tests and receipts say what is small enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outgrow.growth.apply import transport
from outgrow.growth.plan import GrowthPlan


def logit_difference(source: Any, target: Any) -> float:
    """max |delta logit| between two models' logits on the same tokens: below 1e-10 in float64 where a plan preserves."""
    return float(abs(source - target).max())


def untrained(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The tensors that no step has changed: blocks that growth left dead. Three steps of any optimizer suffice."""
    return [name for name in before if bool((before[name] == after[name]).all())]


def gradients_follow(plan: GrowthPlan, source: Mapping[str, Any], target: Mapping[str, Any]) -> float:
    """max |dual lift of the source's gradients - the target's own gradients|, over all parameters.

    Holds for preserving plans of lifts alone; a depth copy changes the function, and so its gradients.
    """
    sizes = plan.arch.sizes(plan.source_config)
    duals = {space: lift.dual() for space, lift in plan.lifts.items()}
    errors = (abs(transport(a.target.spec, source[a.source], duals, sizes) - target[a.target.name]).max() for a in plan.assignments())
    return max(float(error) for error in errors)
