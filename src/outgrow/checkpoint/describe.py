"""What a checkpoint is and what a plan does, as facts and lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from outgrow.arch import Arch, Config, flops_per_token, parameter_counts, positions
from outgrow.checkpoint.huggingface import Checkpoint
from outgrow.checkpoint.lineage import read_lineage
from outgrow.checkpoint.optimizer_state import BEHIND_MASKS
from outgrow.growth.plan import GrowthPlan, connection_rate
from outgrow.spaces import FRESH

CONTEXT = 2048  # tokens, where a config does not say how much it was trained with


def checkpoint_facts(checkpoint: Checkpoint, context: int | None = None) -> dict[str, Any]:
    """Name -> value: family, sizes, parameters, FLOPs per token at a context (what the config says if none), dtypes, files, lineage."""
    arch, config = checkpoint.arch, checkpoint.config
    context = context or positions(config) or CONTEXT
    counts = parameter_counts(arch, config)
    lineage = read_lineage(checkpoint.directory)
    dtypes = Counter(stored.entry.dtype for stored in checkpoint.tensors.values())
    facts: dict[str, Any] = {
        "family": arch.family,
        "layers": arch.layers(config),
        "sizes": arch.sizes(config),
        "parameters": counts.total,
        "non-embedding parameters": counts.non_embedding,
        "training FLOPs per token": {f"at context {context}": flops_per_token(arch, config, context), "as 6N": 6 * counts.total},
        "tensors": len(checkpoint.tensors),
        "dtypes": dict(dtypes),
        "weight bytes": sum(stored.entry.bytes for stored in checkpoint.tensors.values()),
        "files": [path.name for path in checkpoint.weight_files],
        "trained tokens": lineage.tokens,
        "trained FLOPs": lineage.flops,
    }
    if lineage.run:
        facts["written by run"] = lineage.run
    if lineage.plan:
        facts["grown by"] = "; ".join(f"{one.get('operator')} {one.get('knobs')} ({one.get('citation')})" for one in _stages(lineage.plan))
        facts["grown from"] = lineage.source
        facts["files grown from"] = lineage.parents
        if (checkpoint.directory / BEHIND_MASKS).exists():
            facts["masks"] = f"half open: what is behind them lies in {BEHIND_MASKS}; their run goes on from here, and nothing else does"
        elif not lineage.run and lineage.plan.get("fill") == "masked":
            facts["masks"] = "closed: training from here opens them"
    return facts


def _stages(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The plans in a receipt that were applied one after another."""
    before = plan.get("after")
    return [*(_stages(before) if isinstance(before, dict) else []), plan]


def plan_lines(plan: GrowthPlan, every_tensor: bool = True) -> Iterator[str]:
    """A plan as text: sizes, parameters and FLOPs before and after, claims, and which tensor comes from which."""
    first = plan.stages[0]
    for stage in plan.stages:
        knobs = ", ".join(f"{key}={value}" for key, value in stage.knobs.items())
        yield f"{stage.operator}({knobs}), {stage.citation}: {stage.arch.family}"
        yield _change("layers", stage.arch.layers(stage.source_config), len(stage.layers))
        old, new = stage.arch.sizes(stage.source_config), stage.target_sizes
        yield from (_change(name, old[name], new[name]) for name in stage.lifts)
        if stage.layers != tuple(range(stage.arch.layers(stage.source_config))):
            yield f"layer map: {' '.join('new' if layer == FRESH else str(layer) for layer in stage.layers)}"
            yield f"connection rate: {connection_rate(stage.layers):.2f} of the neighbouring layers were neighbours before"
        if stage.fill == "masked":
            yield "what is new is zero here; training opens it, random, over start.unmask_tokens"
        if stage.trains_only_fresh:
            yield "training changes the new layers only"
    yield from _costs(first.arch, first.source_config, plan.grown_arch, plan.target_config)
    yield "the function is preserved" if plan.claims.preserves else "the function changes: expect a higher loss until trained on"
    if plan.alike:
        copies = f"copies in {', '.join(plan.alike)}"
        yield f"{copies} get equal gradients: training never parts them; noise does (direct-width, hypercloning and more-experts have some)"
    if every_tensor:
        shapes = plan.grown_arch.shapes(plan.target_config)
        for tensor in plan.grown_arch.tensors(plan.target_config):
            yield f"{tensor.name} {list(shapes[tensor.name])} <- {plan.first_source(tensor) or 'new'}"


def receipt_lines(directory: Path) -> Iterator[str]:
    """What the receipt of a grown directory says was measured."""
    measured = read_lineage(directory).measured or {}
    if "logit_difference" in measured:
        change, deviation = measured["logit_difference"], measured["logit_deviation"]
        yield f"measured: logits differ by at most {change:.2g} from the source's, whose deviation is {deviation:.2g} (float64)"
    elif measured:
        yield f"not measured: {measured['not measured']}"


def _costs(arch: Arch, before: Config, grown: Arch, after: Config) -> Iterator[str]:
    old, new = parameter_counts(arch, before), parameter_counts(grown, after)
    yield _change("parameters", old.total, new.total)
    yield _change("non-embedding parameters", old.non_embedding, new.non_embedding)
    context = positions(before) or CONTEXT
    flops = flops_per_token(arch, before, context), flops_per_token(grown, after, context)
    yield _change(f"training FLOPs per token at context {context}", *flops)


def _change(name: str, before: int, after: int) -> str:
    return f"{name}: {before:,} -> {after:,}" + (f" (x{after / before:.3g})" if before else "")
