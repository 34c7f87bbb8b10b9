"""What a study lacks: first every arm's sweep of the learning rate, then all seeds at the best rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import mean

from outgrow.lab.ancestry import lineage
from outgrow.lab.records import Records
from outgrow.lab.study import Scale, Study, Trial, scale_of, trial
from outgrow.training.config import RunConfig

MOST_RATES = 6  # of a sweep whose best keeps lying at its edge


@dataclass(frozen=True)
class Sweep:
    """The learning rates tried for an arm at the largest budget: rate -> annealed loss, infinite where it diverged.

    Attributes:
        losses: at seed 0, what is known.
        lacking: (rate, seed) that are still to be tried.
        best: the rate of the lowest loss, once all are tried and it lies inside; None before, and where every rate diverged.
        at_edge: the best rate is the last of `MOST_RATES`, so a better one may lie beyond.
        means: over all seeds, of the rates that seed 0 does not tell from its best; empty where it tells.
    """

    losses: dict[float, float]
    lacking: tuple[tuple[float, int], ...]
    best: float | None
    at_edge: bool = False
    means: dict[float, float] = field(default_factory=dict[float, float])


def sweep(study: Study, scale: Scale, arm: str, seeds: int, records: Records) -> Sweep:
    """One rule for every arm: the scale's rates at seed 0, and a factor of two further where the best lies at the edge.

    Rates within the scale's `close` of the best are tried at all seeds, and their mean decides, also where the sweep goes further after
    that: seed 0 would choose what it is lucky with.
    """
    rates, means = list(scale_of(study.arms[arm], scale).rates), dict[float, float]()
    while True:
        losses = {rate: loss for rate in rates if (loss := _annealed(study, scale, arm, 0, rate, records)) is not None}
        lacking = tuple((rate, 0) for rate in rates if rate not in losses)
        if lacking:
            return Sweep(losses, lacking, None)
        best = min(rates, key=lambda rate: losses[rate])
        if math.isinf(losses[best]):
            return Sweep(losses, (), None)
        may_extend = len(rates) < MOST_RATES
        close = [rate for rate in rates if rate == best or losses[rate] < losses[best] + scale.close or rate in means]
        if len(close) > 1 and seeds > 1 and not (may_extend and best in (rates[0], rates[-1])):
            tried = {(rate, seed): _annealed(study, scale, arm, seed, rate, records) for rate in close for seed in range(seeds)}
            known = {key: loss for key, loss in tried.items() if loss is not None}
            if len(known) < len(tried):
                return Sweep(losses, tuple(key for key in tried if key not in known), None)
            means = {rate: mean(known[rate, seed] for seed in range(seeds)) for rate in close}
            best = min(means, key=lambda rate: means[rate])
        if best not in (rates[0], rates[-1]) or not may_extend:
            return Sweep(losses, (), best, best in (rates[0], rates[-1]), means)
        rates = [rates[0] / 2, *rates] if best == rates[0] else [*rates, rates[-1] * 2]


def chosen_trials(study: Study, scale: Scale, arm: str, seeds: int, best: float | None) -> list[Trial]:
    """An arm's trials at the best rate of its sweep, one a seed; none before the sweep has settled it."""
    return [] if best is None else [trial(study, scale, arm, seed, best) for seed in range(seeds)]


def wanted(study: Study, scale: Scale, seeds: int, records: Records) -> list[RunConfig]:
    """The runs that are to be trained next, with their ancestors, parents first; empty when the study is complete."""
    found: dict[str, RunConfig] = {}
    for arm in study.arms:
        tried = sweep(study, scale, arm, seeds, records)
        for rate, seed in tried.lacking:
            one = trial(study, scale, arm, seed, rate)
            _want(found, one, [one.branches[max(one.branches)]], records)
        for one in chosen_trials(study, scale, arm, seeds, tried.best):
            _want(found, one, one.runs(), records)
    return list(found.values())


def _annealed(study: Study, scale: Scale, arm: str, seed: int, rate: float, records: Records) -> float | None:
    """The annealed loss at the largest budget; infinite where that run or an ancestor diverged, None where it is not known."""
    one = trial(study, scale, arm, seed, rate)
    branch = one.branches[max(one.branches)]
    known = records.of(lineage(branch))
    if any(record.diverged for record in known):
        return math.inf
    return records[branch.identity()].final_loss if branch.identity() in records else None


def _want(found: dict[str, RunConfig], one: Trial, ends: list[RunConfig], records: Records) -> None:
    """Adds the runs that `ends` lack, told to keep every checkpoint that any run of the trial starts from."""
    whole = {run.identity(): run for run in one.runs()}
    for end in ends:
        line = list(lineage(end))
        if end.identity() in records or any(record.diverged for record in records.of(line)):
            continue
        for run in line:
            found.setdefault(run.identity(), whole[run.identity()])
