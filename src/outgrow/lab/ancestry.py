"""What runs are by their settings: ancestors, models, FLOPs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from outgrow.arch import Config, arch_for, step_flops
from outgrow.checkpoint.lineage import read_lineage
from outgrow.config import Settings, told
from outgrow.errors import OutgrowError
from outgrow.extensions import own_code
from outgrow.files import read_json
from outgrow.growth.operators import make_plan
from outgrow.growth.plan import GrowthPlan
from outgrow.models.build import resolved
from outgrow.training.config import LearnConfig, RunConfig, ScheduleConfig, Start, first_token
from outgrow.training.maps import learning_flops


def lineage(run: RunConfig) -> Iterator[RunConfig]:
    """A run's ancestors, oldest first, then the run."""
    if run.start and run.start.run:
        yield from lineage(run.start.run)
    yield run


def in_order(runs: Iterable[RunConfig]) -> list[RunConfig]:
    """The distinct runs that `runs` need, parents before children, each told which checkpoints its children start from."""
    found: dict[str, RunConfig] = {}
    clocks: dict[str, set[int]] = {}
    for run in (ancestor for wanted in runs for ancestor in lineage(wanted)):
        found.setdefault(run.identity(), run)
        clocks.setdefault(run.identity(), set()).update(run.keep)
        if run.start and run.start.run:
            clocks[run.start.run.identity()].add(first_token(run))
    return [run.model_copy(update={"keep": tuple(sorted(clocks[key]))}) for key, run in found.items()]


def run_of(settings: Settings, **own: Any) -> RunConfig:
    """A run with all that a recipe, comparison or scale says under the same names, but for its model, and `own` settings besides."""
    shared = (RunConfig.model_fields.keys() & type(settings).model_fields.keys()) - own.keys() - {"model", "start"}
    with told(RunConfig, f"the run '{own['name']}'"):
        return RunConfig(**{field: getattr(settings, field) for field in shared}, **own)


def branch_of(trunk: RunConfig, name: str, at: int, end: int) -> RunConfig:
    """The annealed branch that leaves a trunk at a clock with the optimizer's state, and whose rate falls linearly to nothing at `end`."""
    start = Start(run=trunk, tokens=at, optimizer="carry")
    schedule = ScheduleConfig(decay_tokens=end - at)  # type: ignore[call-arg]
    return RunConfig(**{**dict(trunk), "name": name, "model": None, "start": start, "schedule": schedule, "tokens": end, "keep": ()})


def whole_steps(tokens: float, batch_tokens: int) -> int:
    """Tokens in whole steps, at least one."""
    return max(1, round(tokens / batch_tokens)) * batch_tokens


def same_budget(tokens: float, other: float) -> bool:
    """Are two budgets one, but for the whole steps of different batches?"""
    return math.isclose(tokens, other, rel_tol=0.005)


def parent_of(run: RunConfig) -> str | None:
    """The identity of the run that a run starts from; None for random weights and for foreign checkpoints."""
    if run.start is None:
        return None
    return run.start.run.identity() if run.start.run else read_lineage(run.start.directory).run


def model_of(run: RunConfig) -> Config:
    """The config of the model that a run trains, growth applied; as the loop has it, with what the recipe leaves to its family."""
    if run.start is None:
        return _whole(json.dumps(run.model))
    plan = growth_of(run)
    return plan.target_config if plan else _source_of(run.start)


@cache
def _whole(model: str) -> Config:
    """The config.json that the JSON of a recipe's `model` stands for; it is asked for again and again."""
    return resolved(json.loads(model))


def _source_of(start: Start) -> Config:
    """The config of the model that a run starts from, before growth."""
    return model_of(start.run) if start.run else read_json(start.directory / "config.json")


def growth_of(run: RunConfig) -> GrowthPlan | None:
    """The plan by which a run's first weights are grown, if they are; learned maps are yet to be trained in it."""
    if not (run.start and run.start.operator):
        return None
    source = _source_of(run.start)
    try:
        return plan_of(run.start, source)
    except OutgrowError as error:
        raise OutgrowError(f"'{run.name}': {error}") from None


def plan_of(start: Start, source: Config) -> GrowthPlan:
    """The plan of the operator that a start names, for the model that it grows."""
    plan = make_plan(start.operator or "", arch_for(source), source, start.knobs)
    if start.code != own_code(start.operator or ""):
        raise OutgrowError(
            f"the Python of '{start.operator}' has changed since; give the file as it was with --operator-file, or train anew"
        )
    return plan


def learning_of(run: RunConfig) -> LearnConfig:
    """How the maps of a run's growth are trained."""
    return (run.start.learn if run.start else None) or LearnConfig()  # type: ignore[call-arg]


def own_flops(run: RunConfig) -> float:
    """Training FLOPs of a run alone, its ancestors' not counted."""
    config = model_of(run)
    steps = (run.tokens - first_token(run)) / run.batch_tokens
    return steps * step_flops(arch_for(config), config, run.data.context, run.batch_tokens, run.optimizer.kind)


def flops_before(run: RunConfig) -> float:
    """Training FLOPs that a run's ancestors spent until it left them."""
    if run.start is None:
        return 0.0
    growing = _growth_flops(run)
    if run.start.run is None:
        return read_lineage(run.start.directory).flops + growing
    parent = run.start.run
    return flops_before(parent) + own_flops(parent.model_copy(update={"tokens": first_token(run)})) + growing


def _growth_flops(run: RunConfig) -> float:
    """What learning the maps of a run's growth operator costs; other operators cost nothing."""
    plan = growth_of(run)
    return learning_flops(plan, learning_of(run), run.data.context) if plan and plan.is_untrained else 0.0
