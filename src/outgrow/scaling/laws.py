"""Laws as data: what each predicts from which columns of a table of runs, with the derivatives a fit needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from outgrow.errors import OutgrowError

Floats = NDArray[np.float64]
Columns = Mapping[str, Floats]


@dataclass(frozen=True)
class Law:
    """A law, fitted by the sum of Huber losses of its residuals.

    Attributes:
        name: what the command line calls it.
        equation: as people write it.
        citation: whose form it is.
        predicts, inputs: columns it reads.
        coefficients: names of what is reported.
        delta: where the Huber loss turns from squares to absolute values; infinite for plain least squares.
        prediction: (inner coefficients (K,), columns of n rows) -> the prediction (n,) and its Jacobian (n, K).
        observed: what the prediction is held against, (n,).
        unlog: from the measure of `observed` to that of the column it is of.
        starts: columns -> inner coefficients (S, K) to begin from, best first.
        reported: inner coefficients -> reported ones.
        derived: reported coefficients -> what follows from them, by name; NaN where nothing does.
        distinct: input -> how many different values the coefficients need.
        least: inner coefficient, or of each, below which nothing changes; an optimum at minus infinity is looked for no further down.
        between: reported coefficient -> bounds outside of which points do not follow the law.
    """

    name: str
    equation: str
    citation: str
    predicts: str
    inputs: tuple[str, ...]
    coefficients: tuple[str, ...]
    delta: float
    prediction: Callable[[Floats, Columns], tuple[Floats, Floats]]
    observed: Callable[[Columns], Floats]
    starts: Callable[[Columns], Floats]
    reported: Callable[[Floats], Floats]
    distinct: Mapping[str, int]
    derived: Callable[[Floats], Mapping[str, float]] = lambda coefficients: {}
    unlog: Callable[[Floats], Floats] = lambda values: values
    least: tuple[float, ...] | float = -np.inf
    between: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, "tuple[float, float]"])

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.inputs, self.predicts)


def compute_optimal(coefficients: Mapping[str, float], flops: float) -> tuple[float, float]:
    """N and D that make E + A/N^alpha + B/D^beta least where 6 N D = `flops` (Hoffmann et al., arXiv 2203.15556)."""
    A, alpha, B, beta = (coefficients[name] for name in ("A", "alpha", "B", "beta"))
    if min(A, alpha, B, beta) <= 0:
        raise OutgrowError("this fit has no compute-optimal size: A, alpha, B and beta must all be above zero")
    params = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    return params, flops / 6 / params


def _chinchilla(theta: Floats, columns: Columns) -> tuple[Floats, Floats]:
    """log(E + A/N^alpha + B/D^beta), theta = log E, log A, log B, alpha, beta; as a log of a sum of exponentials."""
    params, tokens = np.log(columns["params"]), np.log(columns["tokens"])
    terms = np.stack([np.full_like(params, theta[0]), theta[1] - theta[3] * params, theta[2] - theta[4] * tokens])
    largest = terms.max(axis=0)
    shares = np.exp(terms - largest)
    total = shares.sum(axis=0)
    shares /= total
    return largest + np.log(total), np.stack([*shares, -shares[1] * params, -shares[2] * tokens], axis=1)


def _projected(columns: Columns, exponents: int = 20, kept: int = 6) -> Floats:
    """Starts by variable projection: for each alpha and beta of a grid the best E, A, B follow from linear least squares.

    Relative errors are minimised, which near the law are errors of log L; so the grid's best points are near the optimum of the
    Huber loss, and what is left has no local minima (arXiv 2603.22339).
    """
    loss = columns["loss"]
    grid = np.geomspace(0.03, 2.0, exponents)
    alpha, beta = (one.ravel() for one in np.meshgrid(grid, grid, indexing="ij"))  # G points of the grid
    scale = {name: np.exp(np.log(columns[name]).mean()) for name in ("params", "tokens")}
    x_Gn = (columns["params"] / scale["params"]) ** -alpha[:, None]
    y_Gn = (columns["tokens"] / scale["tokens"]) ** -beta[:, None]
    design = np.stack([np.ones_like(x_Gn), x_Gn, y_Gn], axis=2) / loss[:, None]
    normal = design.transpose(0, 2, 1) @ design + 1e-12 * len(loss) * np.eye(3)
    linear = np.linalg.solve(normal, design.sum(axis=1)[..., None])[..., 0]
    linear = np.maximum(linear, 1e-3 * loss.min())  # E, A and B are above zero
    errors = ((design @ linear[..., None])[..., 0] - 1) ** 2
    best = np.argsort(errors.sum(axis=1))[:kept]
    E, A, B = np.log(linear[best]).T
    alpha, beta = alpha[best], beta[best]
    return np.stack([E, A + alpha * np.log(scale["params"]), B + beta * np.log(scale["tokens"]), alpha, beta], axis=1)


def hoffmann_grid(columns: Columns) -> Floats:
    """The 4,500 starts of Hoffmann et al. (arXiv 2203.15556, appendix D.3), whatever the columns."""
    a, b = np.arange(0.0, 30.0, 5.0), np.arange(0.0, 2.5, 0.5)
    corners = np.meshgrid(np.arange(-1.0, 1.5, 0.5), a, a, b, b, indexing="ij")
    return np.stack([corner.ravel() for corner in corners], axis=1)


def _linear(terms: Callable[[Columns], Floats]) -> Callable[[Floats, Columns], tuple[Floats, Floats]]:
    """The prediction of a law that is linear in its coefficients."""

    def prediction(theta: Floats, columns: Columns) -> tuple[Floats, Floats]:
        design = terms(columns)
        return design @ theta, design

    return prediction


def _solved(terms: Callable[[Columns], Floats], observed: Callable[[Columns], Floats]) -> Callable[[Columns], Floats]:
    """The least-squares solution of a linear law, as the one start."""
    return lambda columns: np.asarray(np.linalg.lstsq(terms(columns), observed(columns), rcond=None)[0], dtype=np.float64)[None]


def _log_loss(columns: Columns) -> Floats:
    return np.log(columns["loss"])


def _power_terms(columns: Columns) -> Floats:
    flops = np.log(columns["flops"])
    return np.stack([np.ones_like(flops), flops], axis=1)


def _timing_terms(columns: Columns) -> Floats:
    flops = np.log10(6 * columns["params"] * columns["tokens"])
    return np.stack([np.log10(columns["params"]), 1 / flops, np.ones_like(flops)], axis=1)


def _parabola_terms(columns: Columns) -> Floats:
    instant = np.log10(columns["growth_tokens"])
    return np.stack([np.ones_like(instant), instant, instant**2], axis=1)


def _best_instant(coefficients: Floats) -> Mapping[str, float]:
    _, slope, bend = coefficients
    return {"best growth_tokens": float(10 ** (-slope / (2 * bend))) if bend > 0 else float("nan")}


def _speed_up_terms(columns: Columns) -> Floats:
    factor, share, tokens = (np.log2(columns[name]) for name in ("growth_factor", "growth_share", "tokens_per_param"))
    return np.stack([np.ones_like(factor), factor, factor**2, share, share**2, tokens], axis=1)


def _best_factor(coefficients: Floats) -> Mapping[str, float]:
    def top(slope: float, bend: float) -> float:
        return float(2 ** (-slope / (2 * bend))) if bend < 0 else float("nan")

    return {"best growth_factor": top(*coefficients[1:3]), "best growth_share": top(*coefficients[3:5])}


def _as_it_is(theta: Floats) -> Floats:
    return theta


def _linear_law(name: str, terms: Callable[[Columns], Floats], observed: Callable[[Columns], Floats], **rest: object) -> Law:
    return Law(name=name, prediction=_linear(terms), observed=observed, starts=_solved(terms, observed), **rest)  # type: ignore[arg-type]


LAWS: Mapping[str, Law] = {
    law.name: law
    for law in (
        Law(
            "chinchilla", "L = E + A / N^alpha + B / D^beta", "arXiv:2203.15556", "loss", ("params", "tokens"),
            ("E", "A", "B", "alpha", "beta"), 1e-3, _chinchilla, _log_loss, _projected,
            lambda theta: np.concatenate([np.exp(theta[:3]), theta[3:]]), {"params": 3, "tokens": 3},
            unlog=np.exp, least=(math.log(1e-4), -np.inf, -np.inf, -np.inf, -np.inf), between={"alpha": (0.0, 4.0), "beta": (0.0, 4.0)},
        ),
        _linear_law(
            "power", _power_terms, _log_loss, equation="L = a C^b", citation="arXiv:2405.15319", predicts="loss", inputs=("flops",),
            coefficients=("a", "b"), delta=1e-3, reported=lambda theta: np.array([np.exp(theta[0]), theta[1]]), distinct={"flops": 2},
            unlog=np.exp, between={"b": (-4.0, 0.0)},
        ),
        _linear_law(
            "timing", _timing_terms, lambda columns: np.log10(columns["growth_tokens"]),
            equation="log10 d = a log10 N + b / log10(6 N D) + c", citation="arXiv:2405.15319", predicts="growth_tokens",
            inputs=("params", "tokens"), coefficients=("a", "b", "c"), delta=np.inf, reported=_as_it_is,
            distinct={"params": 2, "tokens": 2}, unlog=lambda values: 10.0**values,
        ),
        _linear_law(
            "parabola", _parabola_terms, lambda columns: columns["loss"],
            equation="L = a + b log10 d + c (log10 d)^2, at equal FLOPs", citation="arXiv:2405.15319", predicts="loss",
            inputs=("growth_tokens",), coefficients=("a", "b", "c"), delta=np.inf, reported=_as_it_is, distinct={"growth_tokens": 3},
            derived=_best_instant,
        ),
        _linear_law(
            "speed-up", _speed_up_terms, lambda columns: columns["speed_up"],
            equation="sp = c0 + c1 log2 g + c2 (log2 g)^2 + c3 log2 s + c4 (log2 s)^2 + c5 log2(D / N), s = d / D",
            citation="outgrow", predicts="speed_up", inputs=("growth_factor", "growth_share", "tokens_per_param"),
            coefficients=("c0", "c1", "c2", "c3", "c4", "c5"), delta=np.inf, reported=_as_it_is,
            distinct={"growth_factor": 3, "growth_share": 3, "tokens_per_param": 2}, derived=_best_factor,
        ),
    )
}  # fmt: skip
