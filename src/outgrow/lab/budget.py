"""What runs will need, said before anything is allocated: parameters, FLOPs, memory a rank, disk, tokens per second."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from outgrow.arch import arch_for, parameter_counts
from outgrow.errors import OutgrowError
from outgrow.lab.ancestry import model_of, own_flops
from outgrow.lab.refusals import told_problems
from outgrow.models.build import empty
from outgrow.training.config import RunConfig, first_token

STATE_BYTES = {"adamw": 16, "muon": 12}  # a parameter in fp32, its gradient, and its moments
SAVED_BYTES = {"adamw": 12, "muon": 8}


@dataclass(frozen=True)
class Need:
    """What one run needs.

    Attributes:
        parameters: of its model; `non_embedding` without embedding and head.
        flops_per_token: of training, the optimizer's among them.
        flops: of the whole run, its ancestors' not counted.
        state_bytes: weights, gradients and optimizer, on each of `ranks`.
        activation_bytes: what a forward pass keeps on each rank, at most about so much.
        checkpoint_bytes: of one checkpoint.
        tokens: trained in this run.
    """

    parameters: int
    non_embedding: int
    flops_per_token: float
    flops: float
    state_bytes: int
    activation_bytes: int
    checkpoint_bytes: int
    tokens: int


def need_of(run: RunConfig, ranks: int = 1) -> Need:
    """What a run needs over so many ranks. The model is built on the meta device, which holds shapes and no numbers."""
    config = model_of(run)
    arch = arch_for(config)
    counts = parameter_counts(arch, config)
    built = sum(value.numel() for value in empty(config).parameters())
    if built != counts.total:
        raise OutgrowError(
            f"transformers builds {built:,} parameters, and the table of {arch.family} says {counts.total:,}; please report this"
        )
    matrices = counts.non_embedding if run.optimizer.kind == "muon" else 0
    state, saved = (kind["muon"] * matrices + kind["adamw"] * (counts.total - matrices) for kind in (STATE_BYTES, SAVED_BYTES))
    sequence_tokens = (run.micro_batch_tokens or run.batch_tokens) // ranks
    return Need(
        counts.total,
        counts.non_embedding,
        own_flops(run) / (run.tokens - first_token(run)),
        own_flops(run),
        -(-state // ranks),
        _activations(run, config, sequence_tokens, ranks),
        saved,
        run.tokens - first_token(run),
    )


def _activations(run: RunConfig, config: Any, tokens: int, ranks: int) -> int:
    """Bytes kept for the backward pass of so many tokens, in the precision of products; attention in fused kernels."""
    arch = arch_for(config)
    sizes = arch.sizes(config)
    width = 2 if run.precision == "bf16" else 4
    heads = sizes["kv"] * sizes.get("group", 1) * sizes["head"]
    inside = width * (4 * sizes["hidden"] + 3 * heads + 4 * sizes["ffn"])
    residual = 4 * sizes["hidden"]
    layers = arch.layers(config)
    capped = 3 * 4 * sizes["vocab"] if config.get("final_logit_softcapping") else 0  # logits that must be whole, and their gradient
    # On one rank matrices are cast, and those of one input joined, for their products; the copies are kept for the backward pass.
    copies = width * parameter_counts(arch, config).non_embedding // (layers if run.recompute or ranks > 1 else 1)
    return copies + tokens * (residual * layers + inside * (1 if run.recompute else layers) + capped)


def need_lines(runs: list[RunConfig], ranks: int, days: float) -> Iterator[str]:
    """What runs need, as text."""
    if wrong := told_problems(runs, ranks):
        raise OutgrowError("; ".join(wrong))
    whole = sum(own_flops(run) for run in runs)
    for run in runs:
        need = need_of(run, ranks)
        yield f"{run.name}: {need.tokens:,} tokens, ends at {run.tokens:,}"
        yield f"  parameters {need.parameters:,} ({need.non_embedding:,} without embedding and head)"
        yield f"  training FLOPs {need.flops:.3e} ({need.flops_per_token:.3e} a token)"
        yield (
            f"  memory on each of {ranks} ranks: {_gb(need.state_bytes)} of weights, gradients and optimizer, about "
            f"{_gb(need.activation_bytes)} of activations"
        )
        passes = run.batch_tokens // (run.micro_batch_tokens or run.batch_tokens)
        on_a_rank = run.batch_tokens // passes // ranks
        yield f"  a step: {run.batch_tokens:,} tokens in {passes} passes of {on_a_rank:,} on each rank (micro_batch_tokens)"
        yield f"  one checkpoint: {_gb(need.checkpoint_bytes)}"
        seconds = days * 86400 * need.flops / whole
        yield f"  to end in its share of {days:g} days: {need.tokens / seconds:,.1f} tokens/s, {need.flops / seconds:.3e} FLOPs/s in all"
    yield f"in all {whole:.3e} FLOPs"


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
