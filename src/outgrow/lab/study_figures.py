"""What studies found, as figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from statistics import mean, median
from typing import Any

import numpy as np

from outgrow.errors import OutgrowError
from outgrow.lab.figures import RED, Series
from outgrow.lab.figures import Figure as Picture
from outgrow.lab.findings import PROTOCOLS, Finding
from outgrow.lab.records import Record, Records
from outgrow.lab.speedup import SpeedUp, equal_loss, loss_at
from outgrow.lab.studies import Studied, last_growth, quoted
from outgrow.lab.study import Trial
from outgrow.scaling import LAWS, Fit, fit
from outgrow.scaling.laws import Columns
from outgrow.training.config import RunConfig

PAPER = "#f59e0b"


def pictures(studied: Studied) -> list[Picture]:
    """All figures that the records can draw."""
    makers = (curves, speed_ups, along, instants, by_budget, laws, after_growth)
    drawn = [make(studied) for make in makers]
    return [one for one in drawn if one]


def curves(studied: Studied) -> Picture | None:
    """Held-out loss of every arm, mean over seeds, against FLOPs, tokens and hours: annealed ends, and dotted the constant rate.

    Hours are those of a job that trains every model at the median speed of all records of its like, since machines differ.
    """
    series, speeds = list[Series](), _speeds(studied.records)
    for row in studied.rows:
        if not row.trials:
            continue
        series.append(_series(row.name, [_ends(one.branches.values(), studied.records, speeds) for one in row.trials]))
        series.append(_series(row.name, [_trunk_points(one, studied.records, speeds) for one in row.trials], dashed=True))
    best = studied.best
    if best and (figure := best.speed_ups["annealed"]) and best.end:
        met = list(_crossings(studied, best))
        ends = [_mean([one.grown_flops for one in met]), _mean([one.scratch_flops for one in met])]
        nowhere = {"tokens": [math.nan] * 2, "hours": [math.nan] * 2}  # where it lies is known in FLOPs alone
        series.append(Series(f"equal loss: {figure.speed_up:+.1%}", ends, [figure.loss] * 2, "lines+markers", RED, also=nowhere))
    title = f"{studied.study.name}: held-out loss"
    return Picture(title, "training FLOPs, ancestors included", "held-out loss, nats per token", series, log_x=True) if series else None


def speed_ups(studied: Studied) -> Picture | None:
    """Speed-ups of every arm with their intervals, and the paper's."""
    rows = [row for row in studied.rows if any(row.speed_ups.values()) and studied.study.against(row.name) != row.name]
    if not rows:
        return None
    names = [row.name for row in rows]
    series = list[Series]()
    for shift, protocol in zip((-0.12, 0.12), PROTOCOLS, strict=True):
        known = [(number, figure) for number, row in enumerate(rows) if (figure := row.speed_ups[protocol])]
        y = [100 * figure.speed_up for _, figure in known]
        ends = [figure.student or (figure.speed_up, figure.speed_up) for _, figure in known]
        between = [100 * low for low, _ in ends], [100 * high for _, high in ends]
        labels = [f"{names[number]} {quoted(figure)}" for number, figure in known]
        beyond = [figure.beyond for _, figure in known]
        series.append(
            Series(protocol, [number + shift for number, _ in known], y, "markers", labels=labels, between=between, beyond=beyond)
        )
    paper = [(float(number), 100 * row.arm.paper) for number, row in enumerate(rows) if row.arm.paper is not None]
    if paper:
        series.append(Series("the paper's", [x for x, _ in paper], [y for _, y in paper], "markers", PAPER))
    title = f"{studied.study.name}: speed-up"
    return Picture(title, _bounds(series), "at equal loss, 95% over seeds, %", series, level=0.0, ticks=names)


def along(studied: Studied) -> Picture | None:
    """Annealed speed-up along the study's axis, one line for every arm that others are compared with."""
    rows = [row for row in studied.rows if row.arm.along is not None and row.speed_ups["annealed"] and row.target]
    if not studied.study.axis or len(rows) < 3:
        return None
    series = list[Series]()
    for other, group in groupby(sorted(rows, key=lambda row: studied.study.against(row.name)), lambda row: studied.study.against(row.name)):
        chosen = sorted(group, key=lambda row: row.arm.along or 0.0)
        figures = [row.speed_ups["annealed"] for row in chosen]
        y = [100 * one.speed_up for one in figures if one]
        ends = [one.student or (one.speed_up, one.speed_up) for one in figures if one]
        between = [100 * low for low, _ in ends], [100 * high for _, high in ends]
        x = [row.arm.along or 0.0 for row in chosen]
        beyond = [one.beyond for one in figures if one]
        series.append(Series(f"against {other}", x, y, "markers", labels=[row.name for row in chosen], between=between, beyond=beyond))
    axis = "; ".join(text for text in (studied.study.axis, _bounds(series)) if text)
    return Picture(f"{studied.study.name}: annealed speed-up", axis, "speed-up, %", series, level=0.0)


def _bounds(series: Sequence[Series]) -> str:
    """How to read triangles, where there are any."""
    return "\u25b2 at least, \u25bc at most" if any(mark for one in series for mark in one.beyond) else ""


def instants(studied: Studied) -> Picture | None:
    """Annealed loss at equal FLOPs against the growth instant, with parabolas (`best_instants`)."""
    fits = best_instants(studied)
    if not fits:
        return None
    series = list[Series]()
    for flops, made in fits.items():
        x = made.columns["growth_tokens"]
        line = np.geomspace(x.min(), x.max(), 60)
        name = f"{flops:.2g} FLOPs"
        series.append(Series(name, x.tolist(), made.columns["loss"].tolist(), "markers"))
        series.append(Series(name, line.tolist(), made.law.prediction(made.theta, {"growth_tokens": line})[0].tolist(), "lines"))
    return Picture(f"{studied.study.name}: parabolas at equal FLOPs", "growth tokens d", "annealed held-out loss", series, log_x=True)


def best_instants(studied: Studied, levels: int = 3) -> Mapping[float, Fit]:
    """FLOPs -> a parabola in log d through the annealed losses of arms that differ in when they grow (arXiv 2405.15319, figure 6).

    Levels lie evenly, in log FLOPs, where all those arms' annealed curves are; arms whose instant is a share of each budget are left out,
    since they have no one d.
    """
    arms = [row for row in studied.rows if row.arm.along and row.trials and len(row.arm.growths) == 1 and not row.arm.late]
    if len(arms) < 3 or len({row.arm.growths[0].grow for row in arms}) > 1 or len({str(row.arm.base) for row in arms}) > 1:
        return {}
    lowest = max(curve[0][0] for row in arms for curve in row.annealed)
    highest = min(curve[-1][0] for row in arms for curve in row.annealed)
    if lowest >= highest:
        return {}
    found = dict[float, Fit]()
    for flops in np.geomspace(lowest, highest, levels):
        d, losses = list[float](), list[float]()
        for row in arms:
            for one, curve in zip(row.trials, row.annealed, strict=True):
                loss = loss_at(curve, float(flops))
                trunk = next(iter(one.trunks.values()))
                if loss is not None and trunk.start and trunk.start.tokens:
                    d.append(float(trunk.start.tokens))
                    losses.append(loss)
        if len(set(d)) >= 3:
            found[float(flops)] = fit(LAWS["parabola"], {"growth_tokens": np.array(d), "loss": np.array(losses)})
    return found


def after_growth(studied: Studied) -> Picture | None:
    """Held-out loss above that of what was grown, against tokens since growth; the last growth of the first seed's longest trunk."""
    series: list[Series] = []
    for row in studied.rows:
        if row.trials and (known := last_growth(row.trials[0], studied.records)):
            before, points = known
            series.append(Series(row.name, [float(tokens - points[0][0]) for tokens, _ in points], [loss - before for _, loss in points]))
    title = f"{studied.study.name}: loss after growth"
    return Picture(title, "tokens since growth", "nats above the loss of the base", series, level=0.0) if series else None


def by_budget(studied: Studied) -> Picture | None:
    """Annealed speed-up against tokens per parameter, where budgets span more than a factor of four."""
    series = list[Series]()
    for row in studied.rows:
        read = [(one.tokens / row.target.non_embedding, one.speed_up) for one in row.budgets if one.speed_up and row.target]
        if len(read) < 3 or read[-1][0] < 4 * read[0][0]:
            continue
        ends = [figure.student or (figure.speed_up, figure.speed_up) for _, figure in read]
        between = [100 * low for low, _ in ends], [100 * high for _, high in ends]
        name = f"{row.name} against {studied.study.against(row.name)}"
        beyond = [figure.beyond for _, figure in read]
        y = [100 * figure.speed_up for _, figure in read]
        series.append(Series(name, [x for x, _ in read], y, between=between, beyond=beyond))
    title = f"{studied.study.name}: does the gain fade?"
    axis = "; ".join(text for text in ("tokens per parameter", _bounds(series)) if text)
    return Picture(title, axis, "annealed speed-up, %", series, log_x=True, level=0.0) if series else None


def fitted_laws(
    studied: Studied, which: Sequence[str] = ("power", "chinchilla"), resamples: int = 1000
) -> dict[str, dict[str, Fit | str]]:  # fmt: skip
    """`scratch` and `grown` -> law, of those asked for, -> its fit through the annealed ends of all sizes, or why there is none.

    Nothing for a study of fewer than three sizes.
    """
    sizes = {row.target.non_embedding for row in studied.rows if row.target}
    if len(sizes) < 3 or not all(studied.study.against(row.name) in (row.name, "scratch") or row.arm.growths for row in studied.rows):
        return {}
    found = dict[str, dict[str, Fit | str]]()
    for kind, chosen in (
        ("scratch", [r for r in studied.rows if not r.arm.growths]),
        ("grown", [r for r in studied.rows if r.arm.growths]),
    ):
        last = [(one.end.flops, loss) for one in chosen if one.end for loss in one.end.losses]
        every = [
            (row.target.params, one.tokens, loss, f"{row.name} {seed}")
            for row in chosen if row.target for one in row.budgets for seed, loss in enumerate(one.losses)
        ]  # fmt: skip
        if len({flops for flops, _ in last}) < 3:
            return {}
        flops, losses = np.array(last).T
        *numbers, trunks = zip(*every, strict=True)
        params, tokens, annealed = np.array(numbers, dtype=float)
        read: dict[str, tuple[Columns, Any]] = {
            "power": ({"flops": flops, "loss": losses}, None),
            "chinchilla": ({"params": params, "tokens": tokens, "loss": annealed}, trunks),
        }
        found[kind] = {law: _fitted(law, *read[law], resamples) for law in which}
    return found


def _fitted(law: str, columns: Columns, trunks: Sequence[str] | None, resamples: int) -> Fit | str:
    try:
        return fit(LAWS[law], columns, resamples, trunks=trunks)
    except OutgrowError as error:
        return str(error)


def laws(studied: Studied) -> Picture | None:
    """L = a C^b through the largest budget of every size."""
    series = list[Series]()
    for kind, fits in fitted_laws(studied, ["power"], resamples=0).items():
        made = fits["power"]
        if isinstance(made, str):
            continue
        flops = made.columns["flops"]
        line = np.geomspace(flops.min(), flops.max(), 60)
        a, b = made.coefficients["a"], made.coefficients["b"]
        series.append(Series(f"{kind}: {a:.3g} C^{b:.3g}", flops.tolist(), made.columns["loss"].tolist(), "markers"))
        series.append(Series(f"{kind}: {a:.3g} C^{b:.3g}", line.tolist(), (a * line**b).tolist(), "lines"))
    title = f"{studied.study.name}: L = a C^b"
    return Picture(title, "training FLOPs", "annealed held-out loss", series, log_x=True, log_y=True) if series else None


def _mean(values: Sequence[float]) -> float:
    return mean(values) if values else math.nan


Points = Mapping[int, tuple[float, float, float]]  # tokens -> (FLOPs, held-out loss, hours)


def _series(name: str, seeds: Sequence[Points], dashed: bool = False) -> Series:
    """The mean over seeds at the clocks that all of them have: how often a run is validated may be changed on its way."""
    tokens = sorted(set.intersection(*(set(points) for points in seeds)))
    flops, losses, hours = ([mean(points[clock][which] for points in seeds) for clock in tokens] for which in range(3))
    mode = "lines" if dashed else "lines+markers"
    return Series(name, flops, losses, mode, dashed=dashed, also={"tokens": [float(clock) for clock in tokens], "hours": hours})


def _ends(runs: Iterable[RunConfig], records: Records, speeds: Mapping[Like, float]) -> Points:
    """The last point of each run."""
    ends = [records[run.identity()] for run in runs]
    return {end.tokens: (end.flops, end.final_loss, _hours(records, speeds, end)) for end in ends}


def _trunk_points(one: Trial, records: Records, speeds: Mapping[Like, float]) -> Points:
    """A trial's constant-rate curve: a trunk's validations, or, where every budget has a trunk of its own, their ends."""
    trunks = {run.identity(): run for run in one.trunks.values()}
    if len(trunks) > 1:
        return _ends(trunks.values(), records, speeds)
    trunk = records[next(iter(trunks))]
    return {int(at): (flops, loss, _hours(records, speeds, trunk, int(at))) for at, flops, loss, _ in trunk.points if flops}


Like = tuple[int, str, int]  # runs of one speed: parameters, optimizer, batch


def _like(record: Record) -> Like:
    return record.params, record.settings["optimizer"].get("kind", "adamw"), record.settings["batch_tokens"]  # identities leave AdamW out


def _speeds(records: Records) -> dict[Like, float]:
    """Tokens per second of runs of each kind, the median over records."""
    found: dict[Like, list[float]] = {}
    for record in records.values():
        if record.tokens_per_second:
            found.setdefault(_like(record), []).append(record.tokens_per_second)
    return {like: median(speeds) for like, speeds in found.items()}


def _hours(records: Records, speeds: Mapping[Like, float], record: Record, tokens: int | None = None) -> float:
    """Hours of training up to a clock, ancestors included."""
    end = record.tokens if tokens is None else tokens
    begin = int(record.points[0][0]) if record.points and record.parent else 0
    before = _hours(records, speeds, records[record.parent], begin) if record.parent and record.parent in records else 0.0
    return before + (end - begin) / speeds.get(_like(record), math.inf) / 3600


def _crossings(studied: Studied, best: Finding) -> Iterator[SpeedUp]:
    """Where each seed's annealed speed-up is read, of the seeds that the other arm has too."""
    other = studied.row(studied.study.against(best.name))
    theirs = {one.seed: curve for one, curve in zip(other.trials, other.annealed, strict=True)}
    for one, curve in zip(best.trials, best.annealed, strict=True):
        if one.seed in theirs and (met := equal_loss(theirs[one.seed], curve)):
            yield met
