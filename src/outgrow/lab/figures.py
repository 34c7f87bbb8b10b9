"""Figures described once and drawn twice: interactive for a page (plotly), and as PNG, SVG or PDF for a paper (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import plotly.graph_objects as go

COLOURS = ("#0f766e", "#6b7280", "#b45309", "#1d4ed8", "#be185d", "#4d7c0f", "#7c3aed", "#0e7490", "#a16207", "#dc2626")


@dataclass(frozen=True)
class Series:
    """Points or a line, labelled point by point if asked; `between` are the lower and upper ends of error bars along y."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    mode: Literal["lines", "markers", "lines+markers"] = "lines+markers"
    colour: str | None = None
    dashed: bool = False
    labels: Sequence[str] | None = None
    between: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Figure:
    """Axes and what is drawn on them."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    level: float | None = None  # a thin horizontal line

    def coloured(self) -> list[tuple[Series, str]]:
        return [(one, one.colour or COLOURS[number % len(COLOURS)]) for number, one in enumerate(self.series)]


def as_plotly(figure: Figure, height: int = 460) -> go.Figure:
    """For a page."""
    drawn = go.Figure()
    for one, colour in figure.coloured():
        bars = None
        if one.between:
            low, high = one.between
            up, down = [b - a for a, b in zip(one.y, high, strict=True)], [a - b for a, b in zip(one.y, low, strict=True)]
            bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1}
        drawn.add_trace(
            go.Scatter(
                x=list(one.x),
                y=list(one.y),
                name=one.name,
                mode=one.mode,
                line={"color": colour, "width": 2, "dash": "dot" if one.dashed else "solid"},
                marker={"size": 7, "color": colour},
                error_y=bars,
                text=list(one.labels) if one.labels else None,
                hovertemplate=("%{text}<br>" if one.labels else "") + f"{one.name}<br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
            )
        )
    if figure.level is not None:
        drawn.add_hline(y=figure.level, line={"color": "#9ca3af", "width": 1})
    drawn.update_layout(
        template="simple_white",
        height=height,
        title={"text": figure.title, "font": {"size": 16}, "x": 0, "xref": "paper"},
        margin={"l": 60, "r": 16, "t": 44, "b": 56},
        legend={"orientation": "h", "y": -0.22, "x": 0, "yanchor": "top"},
        showlegend=len(figure.series) > 1,
        xaxis={"title": figure.x, "type": "log" if figure.log_x else "linear", "exponentformat": "power"},
        yaxis={"title": figure.y, "type": "log" if figure.log_y else "linear"},
        font={"family": "system-ui, sans-serif", "size": 14},
    )
    return drawn


def save_figures(figures: Sequence[Figure], path: Path) -> None:
    """Writes figures side by side, two in a row, to a PNG, SVG or PDF file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawn

    columns = min(2, len(figures))
    rows = -(-len(figures) // columns)
    drawn = Drawn(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(drawn)
    for number, figure in enumerate(figures, 1):
        axes = drawn.add_subplot(rows, columns, number)
        for one, colour in figure.coloured():
            style = {"lines": ("-", ""), "markers": ("", "o"), "lines+markers": ("-", "o")}[one.mode]
            line = ":" if one.dashed and style[0] else style[0]
            axes.plot(one.x, one.y, linestyle=line or "none", marker=style[1] or None, color=colour, label=one.name, markersize=3.5, lw=1.4)
            if one.between:
                axes.vlines(one.x, one.between[0], one.between[1], colors=colour, lw=0.8)
        if figure.level is not None:
            axes.axhline(figure.level, color="#9ca3af", lw=0.8)
        axes.set_title(figure.title, loc="left", fontsize=10)
        axes.set_xlabel(figure.x, fontsize=9)
        axes.set_ylabel(figure.y, fontsize=9)
        axes.set_xscale("log" if figure.log_x else "linear")
        axes.set_yscale("log" if figure.log_y else "linear")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, which="both")
        if len(figure.series) > 1:
            axes.legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
