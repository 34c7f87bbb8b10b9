"""Speed-up at equal loss: how many FLOPs growth saves, every FLOP of its ancestors counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

Curve = Sequence[tuple[float, float]]  # (FLOPs, held-out loss), in order of FLOPs


@dataclass(frozen=True)
class SpeedUp:
    """Where two curves meet the same loss.

    Attributes:
        loss: the lowest loss that both reach.
        scratch_flops, grown_flops: what each pays for it, interpolated.
    """

    loss: float
    scratch_flops: float
    grown_flops: float

    @property
    def speed_up(self) -> float:
        """sp = FLOPs_scratch / FLOPs_grown - 1 (arXiv 2405.15319)."""
        return self.scratch_flops / self.grown_flops - 1

    @property
    def saving(self) -> float:
        """The share of scratch's FLOPs that is not spent: sp / (1 + sp)."""
        return 1 - self.grown_flops / self.scratch_flops


def equal_loss(scratch: Curve, grown: Curve) -> SpeedUp | None:
    """The speed-up at the lowest loss that both curves reach; None when they share no loss.

    Reading both at one arm's last point means that nothing is extrapolated, whichever arm is ahead.
    """
    loss = max(min(value for _, value in scratch), min(value for _, value in grown))
    costs = flops_at(scratch, loss), flops_at(grown, loss)
    if costs[0] is None or costs[1] is None:
        return None
    return SpeedUp(loss, costs[0], costs[1])


def bound(scratch: Curve, grown: Curve) -> tuple[float, Literal[">", "<"]] | None:
    """What is known of the speed-up where one curve begins below the lowest loss that both reach, so what it paid is not seen.

    `>`: growth had that loss at its first point or before, so the speed-up is above this figure. `<`: scratch had, so it is below.
    None where both are seen to come down to that loss.
    """
    loss = max(min(value for _, value in scratch), min(value for _, value in grown))
    of_scratch, of_grown = flops_at(scratch, loss), flops_at(grown, loss)
    if of_scratch and not of_grown:
        return of_scratch / grown[0][0] - 1, ">"
    if of_grown and not of_scratch:
        return scratch[0][0] / of_grown - 1, "<"
    return None


def equal_accuracy(scratch: Curve, grown: Curve) -> SpeedUp | None:
    """The speed-up at the highest accuracy that both curves reach, each counted where it first reaches it; `loss` is that accuracy.

    None where an arm has it from its first point on, as with an accuracy that does not rise above chance: what that cost is not known then.
    An accuracy has noise and need not rise: read it with its standard errors, and over seeds.
    """
    found = equal_loss(_negative(scratch), _negative(grown))
    if found is None or any(curve[0][1] >= -found.loss for curve in (scratch, grown)):
        return None
    return replace(found, loss=-found.loss)


def _negative(curve: Curve) -> Curve:
    return [(flops, -value) for flops, value in curve]


def flops_at(curve: Curve, loss: float) -> float | None:
    """FLOPs at which a curve first reaches a loss, linear in log FLOPs; None outside what the curve covers."""
    before: tuple[float, float] | None = None
    for flops, value in curve:
        if value <= loss:
            if before is None:
                return flops if math.isclose(value, loss, rel_tol=1e-12) else None
            share = (before[1] - loss) / (before[1] - value)
            return math.exp(math.log(before[0]) + share * (math.log(flops) - math.log(before[0])))
        before = (flops, value)
    return None


def loss_at(curve: Curve, flops: float) -> float | None:
    """A curve's loss at a cost, linear in log FLOPs; None outside what the curve covers."""
    for (cheap, first), (dear, second) in pairwise(curve):
        if cheap <= flops <= dear:
            share = math.log(flops / cheap) / math.log(dear / cheap)
            return first + share * (second - first)
    return None


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's t interval of the mean over seeds; None below three seeds, where it would say nothing."""
    if len(values) < 3:
        return None
    from scipy import stats  # an extra of reports: training needs none of it

    mean, error = float(np.mean(values)), float(stats.sem(values))
    width = error * float(stats.t.ppf(0.975, len(values) - 1))
    return mean - width, mean + width


def bootstrap(values: Sequence[float], resamples: int = 10_000, seed: int = 0) -> tuple[float, float] | None:
    """The 95% percentile interval of the mean over resamples of the seeds; None below three."""
    if len(values) < 3:
        return None
    drawn = np.random.default_rng(seed).choice(np.asarray(values), (resamples, len(values))).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class OverSeeds:
    """A speed-up over seeds.

    Attributes:
        values: each seed's.
        loss: at which it is read, the mean over seeds; NaN where they share none.
        student, bootstrap: 95% intervals of their mean; None below three seeds and where curves share no loss.
        beyond: `>` or `<` where a seed's value is only what the speed-up is above or below, see `bound`.
    """

    values: tuple[float, ...]
    loss: float
    student: tuple[float, float] | None = None
    bootstrap: tuple[float, float] | None = None
    beyond: Literal["", ">", "<"] = ""

    @property
    def speed_up(self) -> float:
        return float(np.mean(self.values))

    @property
    def saving(self) -> float:
        """The saving that the mean speed-up stands for."""
        return self.speed_up / (1 + self.speed_up)


def over_seeds(met: Sequence[SpeedUp | None]) -> OverSeeds | None:
    """Joins seeds; None when there are none, or any seed's curves share no loss."""
    found = [one for one in met if one is not None]
    if len(found) < len(met) or not found:
        return None
    values = tuple(one.speed_up for one in found)
    return OverSeeds(values, float(np.mean([one.loss for one in found])), interval(values), bootstrap(values))
