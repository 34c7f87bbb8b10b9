"""Figures described once and drawn twice: interactive for a page (plotly), and as PNG, SVG or PDF for a paper (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go

COLOURS = (
    "#0f766e", "#6b7280", "#b45309", "#1d4ed8", "#be185d", "#4d7c0f", "#7c3aed", "#111827", "#a16207", "#0891b2",
    "#9f1239", "#65a30d", "#c026d3", "#78350f", "#60a5fa", "#fb923c",
)  # fmt: skip
RED = "#dc2626"  # of what a figure is about
_SYMBOLS = {"": ("circle", "o"), ">": ("triangle-up", "^"), "<": ("triangle-down", "v")}  # of points and bounds, on a page and on paper


@dataclass(frozen=True)
class Series:
    """Points or a line, labelled point by point if asked; series of one name share a colour and an entry of the legend.

    `between` are the lower and upper ends of error bars along y; `beyond` says of each point that the truth lies above it (`>`) or below
    it (`<`); `also` are other values for x, by what they are, to switch to on a page.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    mode: Literal["lines", "markers", "lines+markers"] = "lines+markers"
    colour: str | None = None
    dashed: bool = False
    labels: Sequence[str] | None = None
    between: tuple[Sequence[float], Sequence[float]] | None = None
    beyond: Sequence[str] = ()
    also: Mapping[str, Sequence[float]] = field(default_factory=dict)


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
    marks: Sequence[float] = ()  # thin vertical lines
    ticks: Sequence[str] = ()  # what stands at x = 0, 1, ...

    def coloured(self) -> list[tuple[Series, str, bool]]:
        """(series, its colour, is it the first of its name)."""
        names = list(dict.fromkeys(one.name for one in self.series))
        firsts = [self.series[number].name not in (one.name for one in self.series[:number]) for number in range(len(self.series))]
        colours = [one.colour or COLOURS[names.index(one.name) % len(COLOURS)] for one in self.series]
        return list(zip(self.series, colours, firsts, strict=True))

    @property
    def long_ticks(self) -> bool:
        return max(map(len, self.ticks), default=0) > 6

    @property
    def in_legend(self) -> bool:
        return len({one.name for one in self.series}) > 1


def as_plotly(figure: Figure, height: int = 460) -> go.Figure:
    """For a page; a long legend, which takes a line a name on a phone, makes it higher."""
    drawn = go.Figure()
    height += 20 * max(0, len({one.name for one in figure.series}) - 3)
    for one, colour, first in figure.coloured():
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
                legendgroup=one.name,
                showlegend=first,
                mode=one.mode,
                line={"color": colour, "width": 2, "dash": "dot" if one.dashed else "solid"},
                marker={"size": 7, "color": colour, "symbol": [_SYMBOLS[mark][0] for mark in one.beyond] or "circle"},
                error_y=bars,
                text=list(one.labels) if one.labels else None,
                hovertemplate=("%{text}<br>" if one.labels else "") + f"{one.name}<br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
            )
        )
    if figure.level is not None:
        drawn.add_hline(y=figure.level, line={"color": "#9ca3af", "width": 1})
    for mark in figure.marks:
        drawn.add_vline(x=mark, line={"color": "#9ca3af", "width": 1, "dash": "dash"})
    drawn.update_layout(
        template="simple_white",
        height=height,
        title={"text": figure.title, "font": {"size": 16}, "x": 0, "xref": "paper"},
        margin={"l": 60, "r": 16, "t": 44, "b": 56},
        legend={"orientation": "h", "yref": "container", "y": 0, "x": 0, "yanchor": "bottom"},
        showlegend=figure.in_legend,
        xaxis={
            "title": {"text": figure.x, "standoff": 8},
            "automargin": True,
            "type": "log" if figure.log_x else "linear",
            "exponentformat": "power",
        },
        yaxis={"title": {"text": figure.y, "font": {"size": 13}}, "automargin": True, "type": "log" if figure.log_y else "linear"},
        font={"family": "system-ui, sans-serif", "size": 14},
    )
    if figure.ticks:
        texts = [tick.replace("\n", "<br>") for tick in figure.ticks]
        drawn.update_xaxes(tickvals=list(range(len(texts))), ticktext=texts, tickangle=-45 if figure.long_ticks else 0)
    if menus := _menus(figure):
        drawn.update_layout(updatemenus=menus, margin_t=88, height=height + 120)
    return drawn


def _menus(figure: Figure) -> list[dict[str, Any]]:
    """Buttons that switch x to what else the series know, and both axes between linear and log."""
    others = list(dict.fromkeys(name for one in figure.series for name in one.also))
    if not others:
        return []
    ways = list[dict[str, Any]]()
    for name in (figure.x, *others):
        x = [list(one.also.get(name, one.x)) for one in figure.series]
        ways.append({"label": name.partition(",")[0], "method": "update", "args": [{"x": x}, {"xaxis.title.text": name}]})
    scales = list[dict[str, Any]]()
    for x, y in (("log", "linear"), ("linear", "linear"), ("log", "log")):
        scales.append({"label": f"{x} x, {y} y", "method": "relayout", "args": [{"xaxis.type": x, "yaxis.type": y}]})
    chosen = 0 if figure.log_x else 1
    place = {"type": "dropdown", "direction": "down", "y": 1.02, "yanchor": "bottom", "xanchor": "left", "font": {"size": 12}}
    return [{**place, "buttons": ways, "x": 0}, {**place, "buttons": scales, "x": 0.5, "active": chosen}]


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
        for one, colour, first in figure.coloured():
            style = {"lines": ("-", ""), "markers": ("", "o"), "lines+markers": ("-", "o")}[one.mode]
            line = ":" if one.dashed and style[0] else style[0]
            label = one.name if first else "_"
            points = list(zip(one.x, one.y, one.beyond or [""] * len(one.x), strict=True))
            for beyond in ("", *sorted({*one.beyond} - {""})):
                x, y = ([point[axis] for point in points if point[2] == beyond] for axis in (0, 1))
                marker = _SYMBOLS[beyond][1] if style[1] else None
                axes.plot(
                    x, y, linestyle=line or "none", marker=marker, color=colour, label="_" if beyond else label, markersize=3.5, lw=1.4
                )
            if one.between:
                axes.vlines(one.x, one.between[0], one.between[1], colors=colour, lw=0.8)
        if figure.level is not None:
            axes.axhline(figure.level, color="#9ca3af", lw=0.8)
        for mark in figure.marks:
            axes.axvline(mark, color="#9ca3af", lw=0.8, ls="--")
        axes.set_title(figure.title, loc="left", fontsize=10)
        axes.set_xlabel(figure.x, fontsize=9)
        axes.set_ylabel(figure.y, fontsize=9)
        axes.set_xscale("log" if figure.log_x else "linear")
        axes.set_yscale("log" if figure.log_y else "linear")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, which="both")
        if figure.ticks:
            turned = {"rotation": 45, "ha": "right"} if figure.long_ticks else {}
            axes.set_xticks(range(len(figure.ticks)), figure.ticks, **turned)
        if figure.in_legend:
            axes.legend(fontsize=7, frameon=False, **_legend_place(figure))
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)


def _legend_place(figure: Figure) -> dict[str, Any]:
    """Below the axes for many names, which would lie over the lines; above them for points of every arm, which leave no room inside."""
    if len({one.name for one in figure.series}) > 5:
        return {"loc": "upper left", "bbox_to_anchor": (0, -0.18), "ncols": 3}
    return {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 3} if figure.ticks else {}
