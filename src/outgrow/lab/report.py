"""One HTML file that opens offline: what growth saved, where the curves cross, what every run cost."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import plotly.graph_objects as go

from outgrow.arch import arch_for
from outgrow.files import read_json
from outgrow.lab.diagnosing import diagnoses_of, figures, recoveries_of, sentences
from outgrow.lab.evaluating import ERROR, shown
from outgrow.lab.figures import as_plotly
from outgrow.lab.outcome import ARMS, Outcome, cost
from outgrow.lab.page import write_page
from outgrow.lab.recovery import Recovery
from outgrow.lab.runs import parent_of
from outgrow.lab.speedup import Curve, OverSeeds, over_seeds
from outgrow.training.record import EVALUATED

COLOURS: Mapping[str, str] = {"scratch": "#6b7280", "grown": "#0f766e"}
NAMES: Mapping[str, str] = {"scratch": "from scratch", "grown": "grown (base + target)"}


def write_report(outcome: Outcome, path: Path, tried: Path | None = None) -> None:
    """Writes the report of a comparison; `tried` is the JSON file of what was tried to tune its recipe."""
    tasks = outcome.evaluated()
    diagnoses = diagnoses_of(outcome)
    main = [draw(outcome), *([draw_task(outcome, tasks[-1])] if tasks else [])]
    write_page(
        "report.html.j2",
        path,
        [*main, *(as_plotly(one, 380) for one in figures(diagnoses))],
        first_diagnosis=len(main),
        diagnosed=list(sentences(diagnoses)),
        recovery=recovery_sentence(recoveries_of(outcome)),
        outcome=outcome,
        recipe=outcome.recipe,
        base_layers=arch_for(outcome.recipe.model).layers(outcome.recipe.base_model()),
        annealed=over_seeds(outcome.speed_ups("annealed")),
        constant=over_seeds(outcome.speed_ups("constant")),
        sentence=sentence(over_seeds(outcome.speed_ups("annealed")), len(outcome.seeds)),
        costs=[cost(result) for result in outcome.runs()],
        parent_of=parent_of,
        tried=read_json(tried) if tried else None,
        tasks=[task.removeprefix(EVALUATED) for task in tasks],
        instants=task_rows(outcome, tasks),
        at_equal=[
            (
                task.removeprefix(EVALUATED),
                *(over_seeds(outcome.task_speed_ups(kind, task)) for kind in ("annealed", "constant")),
                partial(shown, task),
            )
            for task in tasks
        ],
    )


def task_rows(outcome: Outcome, tasks: list[str]) -> list[tuple[str, str, list[str]]]:
    """(what, FLOPs, a cell a task) of the base, the grown model before a step, and both models at their ends.

    One seed has the standard error of each task's documents; several have the mean over them, and the error of that mean.
    """
    found = [outcome.instants(seed) for seed in outcome.seeds] if tasks else []
    rows: list[tuple[str, str, list[str]]] = []
    for name in found[0] if found else ():
        at = [instants[name] for instants in found]
        cells = [shown(task, *_mean_and_error([row[task] for row in at], at[0].get(f"{task}{ERROR}"))) for task in tasks]
        rows.append((name, f"{at[0]['flops']:.3e}", cells))
    return rows


def _mean_and_error(values: list[float], own: float | None) -> tuple[float, float | None]:
    return (mean(values), stdev(values) / len(values) ** 0.5) if len(values) > 1 else (values[0], own)


def recovery_sentence(found: list[Recovery]) -> str:
    """The spike at growth and its length, over seeds."""
    lengths = [one.tokens for one in found if one.tokens is not None]
    whole = len(lengths) == len(found)
    back = f"made good after {mean(lengths):,.0f} tokens" if whole else f"not made good at constant rate in {len(found) - len(lengths)}"
    return (
        f"At growth the held-out loss went from {mean(one.before for one in found):.3f} to {mean(one.after for one in found):.3f}, and "
        f"reached {mean(one.peak for one in found):.3f} at most: a spike of {mean(one.spike for one in found):.3f} nats, {back} "
        f"({'mean of ' if len(found) > 1 else ''}{len(found)} seed{'s' if len(found) > 1 else ''}, read at validations)."
    )


def sentence(found: OverSeeds | None, seeds: int) -> str:
    """The finding in one sentence, with both numbers and how sure it is."""
    if found is None:
        return "The two annealed curves share no loss, so there is no equal-loss speed-up to quote: train to closer losses."
    verb = "faster" if found.speed_up >= 0 else "slower"
    cost = f"saving {found.saving:.1%} of" if found.saving >= 0 else f"taking {-found.saving:.1%} more of"
    text = (
        f"At an annealed held-out loss of {found.loss:.3f} nats per token, growth is {abs(found.speed_up):.1%} {verb} than scratch "
        f"({cost} the FLOPs, the base's included)"
    )
    if found.student:
        return f"{text}; mean of {seeds} seeds, 95% interval of the speed-up {found.student[0]:+.1%} to {found.student[1]:+.1%}."
    return f"{text}; {seeds} seed{'s' if seeds > 1 else ''}, so no interval."


def draw(outcome: Outcome) -> go.Figure:
    """Held-out loss against training FLOPs: constant-rate trunks, annealed ends, and the crossing."""
    drawn = go.Figure()
    for arm in ARMS:
        for seed in outcome.seeds:
            first = seed == outcome.seeds[0]
            _line(drawn, outcome.constant(arm, seed), f"{NAMES[arm]}, constant rate", COLOURS[arm], "lines", first)
            _line(drawn, outcome.annealed(arm, seed), f"{NAMES[arm]}, annealed", COLOURS[arm], "lines+markers", first)
    for number, one in enumerate(outcome.speed_ups("annealed")):
        if one is not None:
            drawn.add_trace(
                go.Scatter(
                    x=[one.grown_flops, one.scratch_flops],
                    y=[one.loss, one.loss],
                    name="equal loss",
                    mode="lines+markers+text",
                    text=[f"{one.speed_up:+.1%} ", ""] if len(outcome.seeds) == 1 else None,
                    textposition="middle left",
                    textfont={"color": "#dc2626"},
                    line={"color": "#dc2626", "width": 2},
                    marker={"symbol": "line-ns-open", "size": 14},
                    legendgroup="crossing",
                    showlegend=number == 0,
                    hovertemplate="equal loss %{y:.4f}<br>%{x:.3e} FLOPs<extra></extra>",
                )
            )
    _lay_out(drawn, "held-out loss, nats per token", 560)
    return drawn


def draw_task(outcome: Outcome, task: str) -> go.Figure:
    """One field of evaluations against training FLOPs, both arms."""
    drawn = go.Figure()
    for arm in ARMS:
        for seed in outcome.seeds:
            for kind, mode in (("constant", "lines"), ("annealed", "lines+markers")):
                name = f"{NAMES[arm]}, {'constant rate' if kind == 'constant' else kind}"
                _line(drawn, outcome.on_task(kind, arm, seed, task), name, COLOURS[arm], mode, seed == outcome.seeds[0], "")
    _lay_out(drawn, task.removeprefix(EVALUATED).replace("_", " "), 400)
    return drawn


def _lay_out(drawn: go.Figure, y: str, height: int) -> None:
    x = {"title": {"text": "training FLOPs, ancestors included", "standoff": 8}, "type": "log", "dtick": "D2", "exponentformat": "power"}
    drawn.update_layout(
        template="simple_white",
        height=height,
        margin={"l": 60, "r": 16, "t": 16, "b": 60},
        legend={"orientation": "h", "yref": "container", "y": 0, "x": 0, "yanchor": "bottom"},
        xaxis=x,
        yaxis={"title": y},
        font={"family": "system-ui, sans-serif", "size": 14},
    )


def _line(drawn: go.Figure, curve: Curve, name: str, colour: str, mode: str, in_legend: bool, unit: str = " nats") -> None:
    dash = "dot" if mode == "lines" else "solid"
    drawn.add_trace(
        go.Scatter(
            x=[flops for flops, _ in curve],
            y=[loss for _, loss in curve],
            name=name,
            mode=mode,
            line={"color": colour, "dash": dash, "width": 2},
            marker={"size": 8},
            legendgroup=name,
            showlegend=in_legend,
            hovertemplate=f"{name}<br>%{{y:.4f}}{unit}<br>%{{x:.3e}} FLOPs<extra></extra>",
        )
    )
