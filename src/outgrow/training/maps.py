"""G_learn: trains the maps of a plan with the base frozen, and freezes them into the plan (LiGO, arXiv 2303.00980)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outgrow.arch import flops_per_token
from outgrow.data.packed import Batches, Packed
from outgrow.errors import DivergedError, OutgrowError
from outgrow.growth.apply import Grown, rows_of
from outgrow.growth.plan import GrowthPlan
from outgrow.models.build import initialised, loaded
from outgrow.models.forward import forward_of
from outgrow.spaces import Dense
from outgrow.training.config import LearnConfig
from outgrow.training.distributed import device


def learn_maps(
    plan: GrowthPlan, source: Path, packed: Packed, settings: LearnConfig, context: int, seed: int, begin: int = 0
) -> GrowthPlan:
    """The plan with its maps trained for `settings.steps` steps of next-token loss through them, and with what that has cost.

    Args:
        plan: a plan with learned lifts or depth maps, the only stage that has any.
        source: the base's directory; it is read and never changed.
        packed, context, seed: the data, read on from the clock `begin`, as the run that follows will.

    Raises:
        OutgrowError: a loss that is not a number, or a batch that is no multiple of the context.
    """
    if wrong := list(learning_problems(settings, context)):
        raise OutgrowError("; ".join(wrong))
    base = {name: value.detach().to(device()) for name, value in loaded(source).named_parameters()}
    # The target's own module gives the forward pass its shape; its weights are never used.
    forward = forward_of(initialised(plan.target_config, seed=0).to(device()), torch.float32)
    stages = plan.stages
    place = next(i for i, stage in enumerate(stages) if _maps(stage))
    maps = {
        name: torch.tensor(start, dtype=torch.float32, device=device(), requires_grad=True) for name, start in _maps(stages[place]).items()
    }
    optimizer = torch.optim.AdamW(maps.values(), lr=settings.learning_rate, weight_decay=0.0)
    batches = Batches(packed.training, context, seed)
    for step in range(settings.steps):
        rows = torch.from_numpy(batches.at(begin + step * settings.batch_tokens, settings.batch_tokens // context)).to(device())
        grown = Grown(_with_maps(stages, place, maps), rows_of(base))
        seen = forward.over({name: grown.weight(name) for name in grown.tensors})
        loss = seen.loss(rows[:, :-1], rows[:, 1:])
        if not math.isfinite(loss.item()):
            raise DivergedError(f"the loss through the maps is {loss.item()} at step {step}; lower learn.learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    arrays = {name: value.detach().double().cpu().numpy() for name, value in maps.items()}
    return _with_maps(stages, place, arrays, flops=learning_flops(plan, settings, context))


def learning_problems(settings: LearnConfig, context: int) -> Iterator[str]:
    """What keeps maps from being learned: a step that is not whole sequences."""
    if settings.batch_tokens % context:
        yield f"learn.batch_tokens ({settings.batch_tokens}) is not a multiple of the context ({context})"


def learning_flops(plan: GrowthPlan, settings: LearnConfig, context: int) -> float:
    """What training a plan's maps costs: the target's training FLOPs on the tokens read, and those of making its weights each step.

    Making a weight multiplies each of its entries by every entry of the maps that it comes from, forward and twice backward.
    """
    arch, config = plan.grown_arch, plan.target_config
    tokens = settings.steps * settings.batch_tokens
    making = 0
    for stage in plan.stages:
        widths = [lift.size for lift in stage.lifts.values() if isinstance(lift, Dense)]
        factor = sum(widths) + (stage.arch.layers(stage.source_config) if stage.depth_maps else 0)
        making += 6 * factor * sum(math.prod(shape) for shape in arch.shapes(config).values())
    return float(tokens * flops_per_token(arch, config, context) + settings.steps * making)


def _maps(plan: GrowthPlan) -> dict[str, Any]:
    """The learned maps of one stage, lifts and depth maps under one name each."""
    lifts = {f"lift {name}": lift.matrix for name, lift in plan.lifts.items() if isinstance(lift, Dense)}
    return {**lifts, **{f"depth {module}": matrix for module, matrix in plan.depth_maps.items()}}


def _with_maps(stages: list[GrowthPlan], place: int, maps: dict[str, Tensor] | dict[str, Any], flops: float = 0.0) -> GrowthPlan:
    """The whole plan again, with other maps in one of its stages."""
    stage = stages[place]
    lifts = {name: Dense(maps[f"lift {name}"]) if isinstance(lift, Dense) else lift for name, lift in stage.lifts.items()}
    depth_maps = {module: maps[f"depth {module}"] for module in stage.depth_maps}
    plan: GrowthPlan | None = None
    for index, one in enumerate(stages):
        new = replace(one, lifts=lifts, depth_maps=depth_maps, flops=flops) if index == place else one
        plan = replace(new, after=plan)
    assert plan is not None
    return plan
