"""What a checkpoint is and what a plan does, as facts and lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from outgrow.arch import Arch, Config, flops_per_token, parameter_counts
from outgrow.checkpoint.huggingface import Checkpoint
from outgrow.checkpoint.lineage import read_lineage
from outgrow.growth.plan import GrowthPlan

CONTEXT = 2048  # tokens, where a config does not say how much it was trained with


def checkpoint_facts(checkpoint: Checkpoint, context: int = CONTEXT) -> dict[str, Any]:
    """Name -> value: family, sizes, parameters, FLOPs per token at a context, dtypes, files, lineage."""
    arch, config = checkpoint.arch, checkpoint.config
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
        facts["grown by"] = f"{lineage.plan.get('operator')} {lineage.plan.get('knobs')} ({lineage.plan.get('citation')})"
        facts["grown from"] = lineage.parents
    return facts


def plan_lines(plan: GrowthPlan, every_tensor: bool = True) -> Iterator[str]:
    """A plan as text: sizes, parameters and FLOPs before and after, claims, and which tensor comes from which."""
    arch, before, after = plan.arch, plan.source_config, plan.target_config
    knobs = ", ".join(f"{key}={value}" for key, value in plan.knobs.items())
    yield f"{plan.operator}({knobs}), {plan.citation}: {arch.family}"
    yield _change("layers", arch.layers(before), arch.layers(after))
    for name, size in arch.sizes(before).items():
        if name in plan.lifts:
            yield _change(name, size, arch.sizes(after)[name])
    yield from _costs(arch, before, after)
    yield "the function is preserved" if plan.claims.preserves else "the function changes: expect a higher loss until trained on"
    yield f"layer map: {' '.join(map(str, plan.layers))}"
    if every_tensor:
        shapes = arch.shapes(after)
        yield from (f"{a.target.name} {list(shapes[a.target.name])} <- {a.source}" for a in plan.assignments())


def _costs(arch: Arch, before: Config, after: Config) -> Iterator[str]:
    old, new = parameter_counts(arch, before), parameter_counts(arch, after)
    yield _change("parameters", old.total, new.total)
    yield _change("non-embedding parameters", old.non_embedding, new.non_embedding)
    trained = arch.get(before, "max_position_embeddings")
    context = trained if isinstance(trained, int) and trained > 0 else CONTEXT
    flops = flops_per_token(arch, before, context), flops_per_token(arch, after, context)
    yield _change(f"training FLOPs per token at context {context}", *flops)


def _change(name: str, before: int, after: int) -> str:
    return f"{name}: {before:,} -> {after:,} (x{after / before:.3g})"
