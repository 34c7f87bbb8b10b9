"""A law fitted to points: coefficients, bootstrap intervals, outliers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from outgrow.errors import OutgrowError
from outgrow.scaling.laws import Columns, Floats, Law

LEAST_EXPLAINED = 0.1  # of the spread of the points, by a law that they follow
LEAST = 1e-5  # singular value of the scaled design that still tells coefficients apart
FINITE = 0.975  # of the resamples must have a figure; an interval of the others alone would be too narrow
OUTLIER = 3.5  # robust standard deviations
TRIES = 20  # draws for each resample that is wanted; those that settle nothing are drawn anew
Between = tuple[float, float]


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        law, columns: what was fitted to what.
        theta: the law's inner coefficients.
        objective: the sum of Huber losses at them.
        draws: inner coefficients of each bootstrap resample, (R, K); none if none were asked for.
    """

    law: Law
    columns: Columns
    theta: Floats
    objective: float
    draws: Floats = field(default_factory=lambda: np.zeros((0, 0)))

    @property
    def coefficients(self) -> dict[str, float]:
        return dict(zip(self.law.coefficients, map(float, self.law.reported(self.theta)), strict=True))

    @property
    def derived(self) -> dict[str, float]:
        """What follows from the coefficients; NaN where it does not, here or in more than one of forty resamples."""
        values = self.law.derived(self.law.reported(self.theta))
        known = [name for name in values if self._has_levels(name) and (not len(self.draws) or name in self.intervals)]
        return {name: value if name in known else math.nan for name, value in values.items()}

    @property
    def intervals(self) -> dict[str, Between]:
        """The 95% interval of each coefficient and of each derived figure; empty without resamples."""
        found = self.interval(lambda values: {**dict(zip(self.law.coefficients, values, strict=True)), **self.law.derived(values)})
        return {name: between for name, between in found.items() if self._has_levels(name)}

    def _has_levels(self, name: str) -> bool:
        """Can points say where a best value lies? Through three levels, the middle one best, a parabola has its top between them always."""
        column = self.columns.get(name.removeprefix("best ")) if name.startswith("best ") else None
        return column is None or len(np.unique(_level(column))) > 3

    def interval(self, figures: Callable[[Floats], Mapping[str, float]]) -> dict[str, Between]:
        """The 95% percentile interval of any figures that follow from the reported coefficients; of those alone that resamples have."""
        rows = [figures(self.law.reported(theta)) for theta in self.draws]
        found: dict[str, Between] = {}
        for name in rows[0] if rows else ():
            values = np.array([row[name] for row in rows])
            values = values[np.isfinite(values)]
            if len(values) >= FINITE * len(rows):
                low, high = np.percentile(values, [2.5, 97.5])
                found[name] = (float(low), float(high))
        return found

    @property
    def residuals(self) -> Floats:
        """Observed minus predicted, in the law's own measure: of logs where the law predicts a log."""
        return self.law.observed(self.columns) - self.law.prediction(self.theta, self.columns)[0]

    @property
    def predicted(self) -> Floats:
        """In the measure of `law.observed`."""
        return self.law.prediction(self.theta, self.columns)[0]

    @property
    def outliers(self) -> list[int]:
        """Points further than 3.5 robust standard deviations (1.4826 x median absolute deviation) from the law, farthest first."""
        distance = np.abs(self.residuals - np.median(self.residuals))
        spread = max(1.4826 * float(np.median(distance)), 1e-9)
        return [int(index) for index in np.argsort(-distance) if distance[index] > OUTLIER * spread]


def fit(
    law: Law, columns: Columns, resamples: int = 0, seed: int = 0, starts: Callable[[Columns], Floats] | None = None,
    trunks: Sequence[str] | None = None,
) -> Fit:  # fmt: skip
    """Fits a law by the sum (not the mean) of Huber losses.

    Args:
        law: one of `LAWS`.
        columns: its columns, one value a point.
        resamples: of the trajectories with replacement, for intervals; each is fitted anew from the solution, or from a start of
            its own where a coefficient of the solution is next to nothing, from where it could not come back.
        seed: of the resamples.
        starts: in place of the law's own; `hoffmann_grid` repeats Hoffmann et al.'s L-BFGS from 4,500 starts.
        trunks: of which trajectory each point is; points of one are drawn together, since they do not vary apart.

    Raises:
        OutgrowError: too few or degenerate points; the sentence says what is missing.
    """
    columns = _checked(law, columns)
    begun = (starts or law.starts)(columns)
    theta = _best(law, columns, (_descended if starts else _polished)(law, columns, begun))
    theta = _solve(law, columns, theta, tolerance=1e-13)
    if missing := _strange(law, columns, theta) or _missing(law, columns, theta):
        raise OutgrowError(missing)
    stuck = bool(np.any(theta < np.add(law.least, 1)))
    rng, count, draws = np.random.default_rng(seed), _count(columns), list[Floats]()
    kept = _together(trunks or [str(point) for point in range(count)])
    for _ in range(TRIES * resamples):
        if len(draws) == resamples:
            break
        chosen = np.concatenate([kept[one] for one in rng.integers(0, len(kept), len(kept))])
        drawn = {name: values[chosen] for name, values in columns.items()}
        if _missing(law, drawn, theta):  # a resample of too few different values says nothing
            continue
        draws.append(_solve(law, drawn, _best(law, drawn, law.starts(drawn)) if stuck else theta, tolerance=1e-6 if stuck else 1e-9))
    if len(draws) < resamples:
        raise OutgrowError(f"resamples of the {count} points rarely settle '{law.name}', so there is no interval: add runs")
    made = Fit(law, columns, theta, _objective(law, theta, columns)[0], np.array(draws).reshape(len(draws), len(theta)))
    inside = {name: low <= made.coefficients[name] <= high for name, (low, high) in made.intervals.items() if name in made.coefficients}
    if not any(inside.values() or [True]):
        raise OutgrowError(
            f"resamples of the {count} points settle '{law.name}' elsewhere than all of them do: {_APART.format(', '.join(law.inputs))}"
        )
    return made


def _level(column: Floats) -> Floats:
    """Values within some 7% are one: growth factors of 3.99 and 4.00, counted without embeddings, settle no curve."""
    return np.log2(column).round(1)


def _together(trunks: Sequence[str]) -> list[NDArray[np.intp]]:
    """The indices of each trajectory's points."""
    found: dict[str, list[int]] = {}
    for index, trunk in enumerate(trunks):
        found.setdefault(trunk, []).append(index)
    return [np.array(indices) for indices in found.values()]


_APART = "vary its inputs ({}) separately"


def _strange(law: Law, columns: Columns, theta: Floats) -> str:
    """Where a fit says that the points do not follow the law, as a sentence; empty where they do."""
    for name, value in zip(law.coefficients, law.reported(theta), strict=True):
        low, high = law.between.get(name, (-math.inf, math.inf))
        if not low < value < high:
            return f"the points do not follow '{law.name}': it would have {name} = {value:.3g}, which must lie between {low:g} and {high:g}"
    observed = law.observed(columns)
    spread, left = ((values**2).sum() for values in (observed - observed.mean(), observed - law.prediction(theta, columns)[0]))
    if law.between and left > (1 - LEAST_EXPLAINED) * spread:
        return f"the points do not follow '{law.name}': '{law.predicts}' does not fall with {' and '.join(law.inputs)} as it has it"
    return ""


def _checked(law: Law, columns: Columns) -> Columns:
    found = {name: np.asarray(columns[name], dtype=np.float64) for name in law.columns if name in columns}
    for name in law.columns:
        if name not in found:
            raise OutgrowError(f"the law '{law.name}' needs a column '{name}'")
        wrong = ~np.isfinite(found[name]) if name == "speed_up" else ~(np.isfinite(found[name]) & (found[name] > 0))
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            limit = "a finite number" if name == "speed_up" else "a finite number above zero"
            many = f"; {wrong.sum()} points are so" if wrong.sum() > 1 else ""
            raise OutgrowError(f"'{name}' of point {first + 1} is {found[name][first]:g}, and must be {limit}{many}: mend or remove it")
    needed, count = len(law.coefficients) + 1, _count(found)
    if count < needed:
        raise OutgrowError(f"the law '{law.name}' has {needed - 1} coefficients, so it needs {needed} points or more, not {count}")
    missing = _missing(law, found, law.starts(found)[0])
    if missing:
        raise OutgrowError(missing)
    return found


def _missing(law: Law, columns: Columns, theta: Floats) -> str:
    """What keeps points from settling the coefficients near `theta`, as a sentence; empty where nothing does."""
    for name, needed in law.distinct.items():
        values = len(np.unique(_level(columns[name])))
        if values < needed:
            same = f"all points have the same {name}" if values == 1 else f"there are only {values} different values of {name}"
            return f"{same}, and the law '{law.name}' needs {needed}: add runs that differ in it"
    design = law.prediction(theta, columns)[1]
    size = np.linalg.norm(design, axis=0)
    if not np.all(size) or np.linalg.matrix_rank(design / size, tol=LEAST) < design.shape[1]:
        inputs = ", ".join(law.inputs)
        return f"the points lie so that the coefficients of '{law.name}' cannot be told apart: {_APART.format(inputs)}"
    return ""


def _best(law: Law, columns: Columns, found: Iterable[Floats]) -> Floats:
    return min(found, key=lambda theta: _objective(law, theta, columns)[0])


def _polished(law: Law, columns: Columns, starts: Floats) -> list[Floats]:
    return [_solve(law, columns, start) for start in starts]


def _solve(law: Law, columns: Columns, start: Floats, tolerance: float = 1e-9) -> Floats:
    observed = law.observed(columns)
    if np.isinf(law.delta):
        return law.starts(columns)[0]  # the law is linear, so its one start is the solution
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # of resamples that say little
        found = optimize.least_squares(
            lambda theta: law.prediction(theta, columns)[0] - observed,
            np.maximum(start, np.nextafter(law.least, np.inf)),
            bounds=(law.least, np.inf),
            jac=lambda theta: law.prediction(theta, columns)[1],  # type: ignore[arg-type]
            loss="huber", f_scale=law.delta, x_scale="jac", ftol=tolerance, xtol=tolerance, gtol=tolerance, max_nfev=500,
        )  # fmt: skip
    return found.x


def _descended(law: Law, columns: Columns, starts: Floats) -> list[Floats]:
    """L-BFGS from every start."""
    with np.errstate(over="ignore", invalid="ignore"):
        return [optimize.minimize(lambda theta: _objective(law, theta, columns), start, jac=True, method="L-BFGS-B").x for start in starts]


def _objective(law: Law, theta: Floats, columns: Columns) -> tuple[float, Floats]:
    """The sum of Huber losses and its gradient."""
    predicted, jacobian = law.prediction(theta, columns)
    error = predicted - law.observed(columns)
    size = np.abs(error)
    if np.isinf(law.delta):
        return float((error**2).sum() / 2), jacobian.T @ error
    losses = np.where(size <= law.delta, error**2 / 2, law.delta * (size - law.delta / 2))
    return float(losses.sum()), jacobian.T @ np.clip(error, -law.delta, law.delta)


def _count(columns: Columns) -> int:
    return len(next(iter(columns.values())))
