"""What a study lacks: first every arm's sweep of the learning rate, then all seeds at the best rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from outgrow.lab.ancestry import lineage
from outgrow.lab.records import Records
from outgrow.lab.study import Scale, Study, Trial, scale_of, trial
from outgrow.training.config import RunConfig

MOST_RATES = 6  # of a sweep whose best keeps lying at its edge


@dataclass(frozen=True)
class Sweep:
    """The learning rates tried for an arm, at seed 0 and the largest budget: rate -> annealed loss, infinite where it diverged.

    Attributes:
        losses: what is known.
        lacking: rates that are still to be tried.
        best: the rate of the lowest loss, once all are tried and it lies inside; None before, and where every rate diverged.
        at_edge: the best rate is the last of `MOST_RATES`, so a better one may lie beyond.
    """

    losses: dict[float, float]
    lacking: tuple[float, ...]
    best: float | None
    at_edge: bool = False


def sweep(study: Study, scale: Scale, arm: str, records: Records) -> Sweep:
    """One rule for every arm: the scale's rates, and a factor of two further where the best lies at the edge."""
    rates = list(scale_of(study.arms[arm], scale).rates)
    while True:
        losses = {rate: loss for rate in rates if (loss := _annealed(study, scale, arm, rate, records)) is not None}
        lacking = tuple(rate for rate in rates if rate not in losses)
        if lacking:
            return Sweep(losses, lacking, None)
        best = min(rates, key=lambda rate: losses[rate])
        if math.isinf(losses[best]):
            return Sweep(losses, (), None)
        if best not in (rates[0], rates[-1]) or len(rates) >= MOST_RATES:
            return Sweep(losses, (), best, best in (rates[0], rates[-1]))
        rates = [rates[0] / 2, *rates] if best == rates[0] else [*rates, rates[-1] * 2]


def chosen_trials(study: Study, scale: Scale, arm: str, seeds: int, records: Records) -> list[Trial]:
    """An arm's trials at its best rate, one a seed; none before the sweep has settled it."""
    best = sweep(study, scale, arm, records).best
    return [] if best is None else [trial(study, scale, arm, seed, best) for seed in range(seeds)]


def wanted(study: Study, scale: Scale, seeds: int, records: Records) -> list[RunConfig]:
    """The runs that are to be trained next, with their ancestors, parents first; empty when the study is complete."""
    found: dict[str, RunConfig] = {}
    for arm in study.arms:
        tried = sweep(study, scale, arm, records)
        for rate in tried.lacking:
            one = trial(study, scale, arm, 0, rate)
            _want(found, one, [one.branches[max(one.branches)]], records)
        for one in chosen_trials(study, scale, arm, seeds, records):
            _want(found, one, one.runs(), records)
    return list(found.values())


def complete(study: Study, scale: Scale, seeds: int, records: Records) -> bool:
    """Is every run recorded?"""
    return not wanted(study, scale, seeds, records)


def _annealed(study: Study, scale: Scale, arm: str, rate: float, records: Records) -> float | None:
    """The annealed loss at seed 0 and the largest budget; infinite where that run or an ancestor diverged, None where it is not known."""
    one = trial(study, scale, arm, 0, rate)
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
