"""When to grow: the paper's law of growth timing with its bounds, the mixing time of a pilot, the stages of gradual growth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from outgrow.errors import OutgrowError

FITTED_PARAMS, FITTED_FLOPS = (0.4e9, 3e9), (8e19, 1.2e21)  # where the law of growth timing was fitted, at g = 4
LARGEST_SHARE = 0.25  # of the run: a base of a quarter of the layers then costs about a sixteenth of scratch's FLOPs
FACTOR = 4
WHY_NO_FACTOR_LAW = (
    "the paper's appendix fits a law for g too; it is not used, since it says g = 221 for a 70B model, which no depth divides, "
    "while in the paper's own runs g = 2 and 4 were best and 1-layer bases lost to scratch; its advice of g = 4 is used here"
)


@dataclass(frozen=True)
class GrowthTiming:
    """When to grow.

    Attributes:
        tokens: of the base, d; never more than a quarter of the run.
        by_law: what the law alone says, in tokens.
        warnings: where the law was not fitted and what was done about it; empty inside its domain.
    """

    tokens: float
    by_law: float
    warnings: tuple[str, ...]


def growth_timing(params: float, tokens: float) -> GrowthTiming:
    """Tokens of the base before growth: log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74, C = 6 N D (arXiv 2405.15319, section 4.1).

    Args:
        params: of the target, N.
        tokens: that the whole run may read, D.
    """
    for name, value in (("params", params), ("tokens", tokens)):
        if not (math.isfinite(value) and value > 0):
            raise OutgrowError(f"{name} must be a number above zero, not {value:g}")
    flops = 6 * params * tokens
    if flops < 10:
        raise OutgrowError(f"a run of {params:g} parameters and {tokens:g} tokens is none that can be planned")
    exponent = 0.88 * math.log10(params) + 163.27 / math.log10(flops) - 5.74
    by_law = 10.0 ** min(exponent, 300.0)
    warnings = [
        f"the law of growth timing was fitted for {what} from {low:.3g} to {high:.3g}, at g = 4; {value:.3g} lies outside"
        for what, value, (low, high) in (("N", params, FITTED_PARAMS), ("C = 6ND", flops, FITTED_FLOPS))
        if not low <= value <= high
    ]
    bound = LARGEST_SHARE * tokens
    if by_law > bound:
        law = f"{by_law:.3g} tokens, {by_law / tokens:.3g} times the run" if by_law > tokens else f"{by_law / tokens:.0%} of the run"
        warnings.append(f"the law says {law}; bounded to a quarter of the run, {bound:.3g} tokens")
    return GrowthTiming(min(by_law, bound), by_law, tuple(warnings))


@dataclass(frozen=True)
class Mixing:
    """What a pilot shows of the mixing time: expansions, those that met the fixed-size loss, and their mean tokens until then."""

    tried: int
    met: int
    tokens: float


def mixing_tokens(fixed: Sequence[tuple[float, float]], grown: Sequence[tuple[float, float]], tolerance: float = 0.005) -> float | None:
    """Tokens after growth until the grown model's loss meets that of the fixed-size one, read at equal tokens (arXiv 2511.04981).

    Args:
        fixed: (tokens, held-out loss) of the model that had its size from the beginning.
        grown: (tokens, held-out loss) of the grown model from growth on; its first point is at growth.
        tolerance: the loss gap that counts as met, as a share of the fixed-size loss.

    Returns:
        The tokens from which the gap stays within the tolerance; None where it is not met in what both have seen.
    """
    if not grown or len(fixed) < 2:
        raise OutgrowError("the mixing time needs held-out losses of both runs; validate more often")
    first, met = grown[0][0], None
    clocks, losses = zip(*fixed, strict=True)
    for tokens, loss in grown:
        other = np.interp(tokens, clocks, losses, left=np.nan, right=np.nan)
        if np.isnan(other):
            continue
        if loss > other * (1 + tolerance):
            met = None
        elif met is None:
            met = tokens - first
    return met


def stage_tokens(tokens: int, stages: int, alpha: float = 1.0, batch_tokens: int = 1) -> list[int]:
    """Tokens of each stage of gradual growth, T_i = T i^alpha / sum_j j^alpha, in whole batches (Prop-alpha, arXiv 2409.19044)."""
    if stages < 1 or not math.isfinite(alpha):
        raise OutgrowError(f"{stages} stages with alpha {alpha:g} are no schedule of gradual growth")
    batches = tokens // batch_tokens
    if batches < stages:
        raise OutgrowError(f"{tokens:,} tokens are {batches:,} batches, and {stages} stages need one each")
    weights = [float(number) ** alpha for number in range(1, stages + 1)]
    ends = [round(batches * sum(weights[: number + 1]) / sum(weights)) for number in range(stages)]
    for number in range(stages):  # every stage has a batch, and leaves one for each after it
        ends[number] = min(max(ends[number], number + 1), batches - (stages - 1 - number))
    return [(end - begin) * batch_tokens for begin, end in zip([0, *ends], ends, strict=False)]
