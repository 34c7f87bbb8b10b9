"""What a study found, worked out from its records alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from outgrow.lab.ancestry import lineage, own_flops, same_budget
from outgrow.lab.records import Record, Records
from outgrow.lab.speedup import Curve, OverSeeds, bound, equal_loss, interval, over_seeds
from outgrow.lab.study import Arm, Scale, Study, Trial, budgets_of, trial
from outgrow.lab.sweep import Sweep, chosen_trials, sweep, wanted

PROTOCOLS = ("annealed", "un-annealed")


@dataclass(frozen=True)
class AtBudget:
    """An arm at one budget.

    Attributes:
        tokens, flops: the budget, and what it costs, ancestors included.
        losses: annealed, a seed each.
        gap: mean loss above that of the arm it is compared with at equal tokens, paired by seed, with Student's interval.
        speed_up: annealed, of both arms' curves up to this budget.
    """

    tokens: int
    flops: float
    losses: tuple[float, ...]
    gap: tuple[float, tuple[float, float] | None] | None
    speed_up: OverSeeds | None


@dataclass(frozen=True)
class Finding:
    """What is known of one arm.

    Attributes:
        name, arm, sweep: it, and the learning rates tried.
        trials: its runs at the best rate, a seed each; those whose records are all there.
        annealed: the curves of annealed ends, a seed each: (FLOPs, held-out loss).
        budgets: the annealed ends, smallest first.
        speed_ups: protocol -> against the arm it is compared with; None where nothing can be read.
        diverged: names and reasons of runs that did, the sweep's among them.
        records: of all its runs, the sweep's among them, parents first.
        is_baseline: is it what it would be compared with?
        lost: seeds that diverged at the best rate. Figures over the others alone would flatter, so there are none.
    """

    name: str
    arm: Arm
    sweep: Sweep
    trials: tuple[Trial, ...]
    annealed: tuple[Curve, ...]
    budgets: tuple[AtBudget, ...]
    speed_ups: dict[str, OverSeeds | None]
    diverged: tuple[tuple[str, str], ...]
    records: tuple[Record, ...]
    is_baseline: bool
    lost: tuple[int, ...]

    @property
    def end(self) -> AtBudget | None:
        """At the largest budget; None before any seed is whole."""
        return self.budgets[-1] if self.budgets else None

    @property
    def target(self) -> Record | None:
        """A record of its target, for sizes; None before any seed is whole."""
        last = self.trials[0].branches[max(self.trials[0].branches)].identity() if self.trials else None
        return next((record for record in self.records if record.identity == last), None)


def findings(study: Study, scale: Scale, seeds: int, records: Records) -> list[Finding]:
    """What the records say of every arm."""
    known = {name: _known(study, scale, name, seeds, records) for name in study.arms}
    return [_finding(study, scale, name, seeds, records, known) for name in study.arms]


def state_lines(study: Study, scale: Scale, seeds: int, records: Records) -> Iterator[str]:
    """What is done and what is left, an arm a line; what it will cost."""
    yield f"{study.name}: {study.asks}"
    known, unknown = list[Record](), list[str]()
    for name in study.arms:
        tried = sweep(study, scale, name, seeds, records)
        whole = chosen_trials(study, scale, name, seeds, tried.best)
        ends = records.of(branch for one in whole for branch in one.branches.values())
        known += _records_of(study, scale, name, seeds, tried, whole, records)
        unknown += [name] if tried.lacking else []
        rates = ", ".join(f"{rate:g}: {'diverged' if math.isinf(loss) else f'{loss:.4f}'}" for rate, loss in sorted(tried.losses.items()))
        unsettled = f"{len(tried.lacking)} trials of rates to run" if tried.lacking else "diverges at every rate"
        best = f"best {tried.best:g}" if tried.best else unsettled
        yield f"  {name:<16} rates {rates or '-'}; {best}; {len(ends)} of {len(budgets_of(study.arms[name], scale)) * seeds} annealed ends"
    left = {run.identity(): run for run in wanted(study, scale, seeds, records)}
    # Arms that are still swept will be run at their best rate too, whichever that is.
    later = {
        run.identity(): run for name in unknown for seed in range(seeds) for run in trial(study, scale, name, seed, scale.rates[0]).runs()
    }
    cost = sum(own_flops(run) for key, run in {**left, **later}.items() if key not in records)
    seconds = records.seconds(cost)
    hours = f", about {seconds / 3600:.1f} hours of one job" if seconds else ""
    done = {record.identity: record for record in known}.values()
    now = {key for key in left if key not in records}
    more = len({key for key in later if key not in records} - now)
    yield (
        f"left: {len(now)} runs now"
        + (f", {more} once rates are chosen" if more else "")
        + f", {cost:.3g} FLOPs{hours}; done: {len(done)} runs, {sum(record.own_flops for record in done):.3g} FLOPs, "
        f"{sum(record.seconds for record in done) / 3600:.1f} hours of one job"
    )


def rank_correlation(rows: Sequence[Finding], protocol: str) -> tuple[float, int] | None:
    """Spearman's correlation of our speed-ups with the paper's over the arms that have both, and how many; None below four."""
    from scipy import stats

    pairs = [(row.arm.paper, _standing(row, protocol)) for row in rows if row.arm.paper is not None and row.budgets]
    pairs = [(paper, ours) for paper, ours in pairs if ours is not None]
    if len(pairs) < 4:
        return None
    paper, ours = zip(*pairs, strict=True)
    return float(stats.spearmanr(paper, ours)[0]), len(pairs)  # type: ignore[arg-type]


def spread(values: Sequence[float]) -> float:
    """The standard deviation over seeds; NaN of one."""
    return stdev(values) if len(values) > 1 else math.nan


def _standing(row: Finding, protocol: str) -> float | None:
    """A number to rank by: the speed-up, but a bound is none; 0 for what others are compared with."""
    if row.is_baseline:
        return 0.0
    figure = row.speed_ups[protocol]
    return figure.speed_up if figure and not figure.beyond else None


@dataclass(frozen=True)
class _Known:
    """What the records have of one arm: its sweep; the trials at its best rate, with both protocols' curves; those that diverged."""

    sweep: Sweep
    whole: list[Trial]
    annealed: list[Curve]
    constant: list[Curve]
    lost: list[Trial]


def _known(study: Study, scale: Scale, name: str, seeds: int, records: Records) -> _Known:
    tried = sweep(study, scale, name, seeds, records)
    trials = chosen_trials(study, scale, name, seeds, tried.best)
    whole = [one for one in trials if _recorded(one, records)]
    ends = [[records[run.identity()] for run in one.branches.values()] for one in whole]
    annealed: list[Curve] = [[(end.flops, end.final_loss) for end in one] for one in ends]
    lost = [one for one in trials if _diverged(one, records)]
    return _Known(tried, whole, annealed, [_constant(one, records) for one in whole], lost)


def _recorded(one: Trial, records: Records) -> bool:
    return all(run.identity() in records and not records[run.identity()].diverged for run in one.runs())


def _diverged(one: Trial, records: Records) -> bool:
    return any(record.diverged for record in records.of(one.runs()))


def _constant(one: Trial, records: Records) -> Curve:
    """The constant-rate curve of the target: a trunk's validations, or, where every budget has a trunk of its own, their ends."""
    trunks = {run.identity(): run for run in one.trunks.values()}
    if len(trunks) > 1:
        return sorted((records[key].flops, records[key].final_loss) for key in trunks)
    return records[next(iter(trunks))].curve


def _finding(study: Study, scale: Scale, name: str, seeds: int, records: Records, known: dict[str, _Known]) -> Finding:
    own, other = known[name], known[study.against(name)]
    is_baseline = study.against(name) == name
    compares = not is_baseline and not own.lost and not other.lost
    pairs = [(mine, theirs) for mine, one in enumerate(own.whole) for theirs, two in enumerate(other.whole) if one.seed == two.seed]
    figures: dict[str, OverSeeds | None] = dict.fromkeys(PROTOCOLS)
    if compares:
        for protocol, ours, others in (("annealed", own.annealed, other.annealed), ("un-annealed", own.constant, other.constant)):
            curves = [(others[theirs], ours[mine]) for mine, theirs in pairs]
            figures[protocol] = None if any(_is_one_run(*pair) for pair in curves) else _figure(curves)
    budgets = list[AtBudget]()
    for tokens in own.whole[0].branches if own.whole else ():
        ends = [records[one.branches[tokens].identity()] for one in own.whole]
        both = [(own.whole[a], other.whole[b]) for a, b in pairs]
        losses = [(_loss(one, tokens, records), _loss(two, tokens, records)) for one, two in both]
        gaps = [mine - theirs for mine, theirs in losses if mine is not None and theirs is not None]
        gap = (mean(gaps), interval(gaps)) if gaps and compares else None
        cut = [(_until(other.whole[b], other.annealed[b], tokens), _until(own.whole[a], own.annealed[a], tokens)) for a, b in pairs]
        speed_up = _figure(cut) if compares and all(len(curve) > 1 for pair in cut for curve in pair) else None
        budgets.append(AtBudget(tokens, mean(end.flops for end in ends), tuple(end.final_loss for end in ends), gap, speed_up))
    recorded = _records_of(study, scale, name, seeds, own.sweep, [*own.whole, *own.lost], records)
    diverged = tuple((record.name, record.diverged) for record in recorded if record.diverged)
    return Finding(
        name, study.arms[name], own.sweep, tuple(own.whole), tuple(own.annealed), tuple(budgets), figures, diverged,
        tuple(recorded), is_baseline, tuple(one.seed for one in own.lost),
    )  # fmt: skip


def _records_of(
    study: Study, scale: Scale, name: str, seeds: int, rates: Sweep, whole: Sequence[Trial], records: Records
) -> list[Record]:  # fmt: skip
    """Of all runs of an arm, the sweep's among them, parents first."""
    tried = [trial(study, scale, name, seed, rate) for rate in rates.losses for seed in range(seeds if rate in rates.means else 1)]
    return records.of({run.identity(): run for one in [*tried, *whole] for end in one.branches.values() for run in lineage(end)}.values())


def _loss(one: Trial, tokens: int, records: Records) -> float | None:
    """The annealed loss at a budget; None where the arm has none there."""
    return next((records[run.identity()].final_loss for budget, run in one.branches.items() if same_budget(budget, tokens)), None)


def _until(one: Trial, annealed: Curve, tokens: int) -> Curve:
    """An annealed curve up to a budget."""
    return [point for budget, point in zip(one.branches, annealed, strict=True) if budget < tokens or same_budget(budget, tokens)]


def _is_one_run(one: Curve, other: Curve) -> bool:
    """Are two curves pieces of one trajectory, as constant-rate trunks of arms that differ in their decay alone?"""
    shared = min(len(one), len(other)) - 1  # the last is a validation at the end of the shorter
    return shared > 0 and one[:shared] == other[:shared]


def _figure(pairs: Sequence[tuple[Curve, Curve]]) -> OverSeeds | None:
    """Joins seeds' (scratch, grown) curves; None where there are none, and where one seed is known from above and another from below."""
    met = [equal_loss(*pair) for pair in pairs]
    if all(met):
        return over_seeds(met)
    known = [(one.speed_up, "") if one else bound(*pair) for one, pair in zip(met, pairs, strict=True)]
    read = [one for one in known if one is not None]
    sides = {side for _, side in read} - {""}
    if len(read) < len(known) or len(sides) > 1:
        return None
    return OverSeeds(tuple(value for value, _ in read), math.nan, beyond=">" if ">" in sides else "<")
