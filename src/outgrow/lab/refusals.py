"""What keeps runs from being trained, growth included, found from their settings before the first of them is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from outgrow.data.packed import Packed
from outgrow.errors import OutgrowError
from outgrow.growth.plan import GrowthPlan
from outgrow.lab.ancestry import growth_of, learning_of, model_of
from outgrow.training.config import RunConfig, Start, first_token, unmasking
from outgrow.training.maps import learning_problems
from outgrow.training.refusals import problems


def problems_of(run: RunConfig, ranks: int, packed: Packed | None = None) -> Iterator[str]:
    """A sentence a problem: of its growth, and as `training.refusals.problems` has them.

    Raises:
        OutgrowError: no plan can be made of its growth operator.
    """
    plan = growth_of(run)
    if plan and run.start:
        yield from _of_growth(run, run.start, plan)
    yield from _of_masks(run)
    yield from problems(run, model_of(run), first_token(run), packed, ranks)


def told_problems(runs: Iterable[RunConfig], ranks: int, packed: Packed | None = None) -> list[str]:
    """The problems of several runs, each once and with the run's name."""
    found: list[str] = []
    for run in runs:
        try:
            found += [f"'{run.name}': {problem}" for problem in problems_of(run, ranks, packed)]
        except OutgrowError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def _of_growth(run: RunConfig, start: Start, plan: GrowthPlan) -> Iterator[str]:
    if plan.is_untrained:
        if start.optimizer != "reset":
            yield "no law moves optimizer state through learned maps; let start.optimizer be 'reset'"
        if start.rewarm_tokens:
            yield (
                "no law says what of learned maps is new, to be warmed up alone; let 'rate' be 'restart' or 'keep', or leave "
                "start.rewarm_tokens out"
            )
        yield from learning_problems(learning_of(run), run.data.context)
    elif start.learn:
        yield f"start.learn has no effect with the operator '{start.operator}', which has no maps to learn; remove it"
    before = growth_of(start.run) if start.run else None
    if before and before.trains_only_fresh and start.optimizer != "reset":
        yield (
            f"start.optimizer is '{start.optimizer}', and under '{before.operator}' only new layers are trained, so the others have no "
            "state; let it be 'reset'"
        )
    if plan.fill != "masked" and start.unmask_tokens:
        yield f"start.unmask_tokens has no effect with the operator '{start.operator}', which masks nothing; remove it"


def _of_masks(run: RunConfig) -> Iterator[str]:
    """A run leaves a parent that was grown behind masks once they are open."""
    parent = run.start.run if run.start else None
    plan = growth_of(parent) if parent else None
    if parent and plan and plan.fill == "masked":
        begun = first_token(parent)
        is_open = math.ceil(begun + unmasking(parent, begun))
        if begun < first_token(run) < is_open:
            yield f"it leaves '{parent.name}' at {first_token(run):,} tokens, where masks still open; they are open at {is_open:,}"
