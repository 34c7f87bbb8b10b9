"""What a study found, worked out from its records alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

from outgrow.lab.campaign import Sweep, chosen_trials, sweep, wanted
from outgrow.lab.records import Record, Records
from outgrow.lab.runs import lineage, own_flops
from outgrow.lab.speedup import Curve, SpeedUp, equal_loss, interval
from outgrow.lab.study import Arm, Scale, Study, Trial, budgets_of, trial
from outgrow.training.config import RunConfig

PROTOCOLS = ("annealed", "un-annealed")


@dataclass(frozen=True)
class Figure:
    """A speed-up over seeds: each seed's, Student's 95% interval of their mean, and the bootstrap's over seeds."""

    values: tuple[float, ...]
    student: tuple[float, float] | None
    bootstrap: tuple[float, float] | None
    loss: float

    @property
    def speed_up(self) -> float:
        return mean(self.values)

    @property
    def saving(self) -> float:
        return self.speed_up / (1 + self.speed_up)


@dataclass(frozen=True)
class Finding:
    """What is known of one arm.

    Attributes:
        name, arm, sweep: it, and the learning rates tried.
        trials: its runs at the best rate, a seed each; those whose records are all there.
        annealed, constant: protocol's curves, a seed each: (FLOPs, held-out loss) at the ends of branches; along the constant-rate trunks.
        losses: annealed loss at the largest budget, a seed each.
        flops: to that end.
        speed_ups: protocol -> against the arm it is compared with; None where curves share no loss.
        diverged: names and reasons of runs that did, the sweep's among them.
        record: of its last branch, for sizes and machine.
    """

    name: str
    arm: Arm
    sweep: Sweep
    trials: tuple[Trial, ...]
    annealed: tuple[Curve, ...]
    constant: tuple[Curve, ...]
    losses: tuple[float, ...]
    flops: float
    speed_ups: dict[str, Figure | None]
    diverged: tuple[tuple[str, str], ...]
    record: Record | None


def findings(study: Study, scale: Scale, seeds: int, records: Records) -> list[Finding]:
    """What the records say of every arm."""
    found = {name: _curves(study, scale, name, seeds, records) for name in study.arms}
    return [_finding(study, scale, name, records, found) for name in study.arms]


def state_lines(study: Study, scale: Scale, seeds: int, records: Records) -> Iterator[str]:
    """What is done and what is left, an arm a line; what it will cost."""
    yield f"{study.name}: {study.asks}"
    done = 0.0
    for name in study.arms:
        tried = sweep(study, scale, name, records)
        ends = [branch for one in chosen_trials(study, scale, name, seeds, records) for branch in one.branches.values()]
        known = records.of(ends)
        done += sum(
            own_flops(run) for one in chosen_trials(study, scale, name, seeds, records) for run in one.runs() if run.identity() in records
        )
        rates = ", ".join(f"{rate:g}: {'diverged' if math.isinf(loss) else f'{loss:.4f}'}" for rate, loss in sorted(tried.losses.items()))
        best = f"best {tried.best:g}" if tried.best else f"{len(tried.lacking)} rates to try" if tried.lacking else "diverges at every rate"
        yield f"  {name:<16} rates {rates or '-'}; {best}; {len(known)} of {len(budgets_of(study.arms[name], scale)) * seeds} annealed ends"
    # Arms that are still swept will be run at their best rate too, whichever that is.
    unknown = [name for name in study.arms if sweep(study, scale, name, records).lacking]
    left = wanted(study, scale, seeds, records)
    later = [run for name in unknown for seed in range(seeds) for run in trial(study, scale, name, seed, scale.rates[0]).runs()]
    cost = sum(own_flops(run) for run in {run.identity(): run for run in [*left, *later]}.values())
    yield (
        f"left: {len(left)} runs now"
        + (f", {len(later)} once rates are chosen" if later else "")
        + f", {cost:.3g} FLOPs; done: {done:.3g} FLOPs"
    )


def bootstrap(values: Sequence[float], resamples: int = 10_000, seed: int = 0) -> tuple[float, float] | None:
    """The 95% percentile interval of the mean over resamples of the seeds; None below three."""
    if len(values) < 3:
        return None
    drawn = np.random.default_rng(seed).choice(np.asarray(values), (resamples, len(values))).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def rank_correlation(rows: Sequence[Finding], protocol: str) -> tuple[float, int] | None:
    """Spearman's correlation of our speed-ups with the paper's over the arms that have both, and how many; None below four."""
    from scipy import stats

    pairs = [(row.arm.paper, _standing(row, protocol)) for row in rows if row.arm.paper is not None and row.losses]
    pairs = [(paper, ours) for paper, ours in pairs if ours is not None]
    if len(pairs) < 4:
        return None
    paper, ours = zip(*pairs, strict=True)
    return float(stats.spearmanr(paper, ours)[0]), len(pairs)  # type: ignore[arg-type]


def spread(values: Sequence[float]) -> float:
    """The standard deviation over seeds; NaN of one."""
    return stdev(values) if len(values) > 1 else math.nan


def _standing(row: Finding, protocol: str) -> float | None:
    """A number to rank by: the speed-up; 0 for what others are compared with."""
    figure = row.speed_ups[protocol]
    return figure.speed_up if figure else 0.0 if row.name == "scratch" else None


def _curves(study: Study, scale: Scale, name: str, seeds: int, records: Records) -> tuple[list[Trial], list[Curve], list[Curve]]:
    """(trials, annealed curves, constant-rate curves) of the seeds whose runs are all recorded."""
    whole = [one for one in chosen_trials(study, scale, name, seeds, records) if _recorded(one, records)]
    ends = [[records[run.identity()] for run in one.branches.values()] for one in whole]
    annealed: list[Curve] = [[(end.flops, end.final_loss) for end in one] for one in ends]
    return whole, annealed, [_constant(one, records) for one in whole]


def _recorded(one: Trial, records: Records) -> bool:
    return all(run.identity() in records and not records[run.identity()].diverged for run in one.runs())


def _constant(one: Trial, records: Records) -> Curve:
    """The constant-rate curve of the target: a trunk's validations, or, where every budget has a trunk of its own, their ends."""
    trunks = {run.identity(): run for run in one.trunks.values()}
    if len(trunks) > 1:
        return sorted((records[key].flops, records[key].final_loss) for key in trunks)
    return records[next(iter(trunks))].curve


def _finding(
    study: Study, scale: Scale, name: str, records: Records, found: dict[str, tuple[list[Trial], list[Curve], list[Curve]]]
) -> Finding:
    whole, annealed, constant = found[name]
    other, others = study.against(name), found[study.against(name)]
    seeds = {one.seed: number for number, one in enumerate(others[0])}
    figures: dict[str, Figure | None] = dict.fromkeys(PROTOCOLS)
    if other != name:
        for protocol, mine, theirs in (("annealed", annealed, others[1]), ("un-annealed", constant, others[2])):
            pairs = [(theirs[seeds[one.seed]], curve) for one, curve in zip(whole, mine, strict=True) if one.seed in seeds]
            figures[protocol] = _figure([equal_loss(*pair) for pair in pairs])
    ends = [records[max(one.branches.items())[1].identity()] for one in whole]
    rates = sweep(study, scale, name, records)
    tried = [trial(study, scale, name, 0, rate) for rate in rates.losses]
    runs: dict[str, RunConfig] = {run.identity(): run for one in [*tried, *whole] for end in one.branches.values() for run in lineage(end)}
    diverged = tuple((record.name, record.diverged) for record in records.of(runs.values()) if record.diverged)
    return Finding(
        name, study.arms[name], rates, tuple(whole), tuple(annealed), tuple(constant), tuple(record.final_loss for record in ends),
        mean(record.flops for record in ends) if ends else math.nan, figures, diverged, ends[0] if ends else None,
    )  # fmt: skip


def _figure(found: Sequence[SpeedUp | None]) -> Figure | None:
    """Joins seeds; None when any seed's curves share no loss."""
    met = [one for one in found if one is not None]
    if len(met) < len(found) or not met:
        return None
    values = tuple(one.speed_up for one in met)
    return Figure(values, interval(values), bootstrap(values), mean(one.loss for one in met))
