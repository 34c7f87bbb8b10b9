"""One HTML file that opens offline: what growth saved, where the curves cross, what every run cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from outgrow.arch import arch_for
from outgrow.files import read_json
from outgrow.lab.ancestry import parent_of
from outgrow.lab.comparison import Arm
from outgrow.lab.diagnosing import diagnoses_of, figures, recoveries_of, sentences
from outgrow.lab.evaluating import ERROR, shown
from outgrow.lab.figures import RED, Figure, Series, as_plotly
from outgrow.lab.outcome import ARMS, Outcome, cost
from outgrow.lab.page import write_page
from outgrow.lab.recovery import Recovery
from outgrow.lab.speedup import Curve, OverSeeds, over_seeds
from outgrow.training.record import EVALUATED

COLOURS: Mapping[str, str] = {"scratch": "#6b7280", "grown": "#0f766e"}
FLOPS = "training FLOPs, ancestors included"
NAMES: Mapping[str, str] = {"scratch": "from scratch", "grown": "grown (base + target)"}


def write_report(outcome: Outcome, path: Path, tried: Path | None = None) -> None:
    """Writes the report of a comparison; `tried` is the JSON file of what was tried to tune it."""
    tasks = outcome.evaluated()
    diagnoses = diagnoses_of(outcome)
    main = [draw(outcome), *([draw_task(outcome, tasks[-1])] if tasks else [])]
    write_page(
        "report.html.j2",
        path,
        [*(as_plotly(one, 560) for one in main), *(as_plotly(one, 380) for one in figures(diagnoses))],
        first_diagnosis=len(main),
        diagnosed=list(sentences(diagnoses)),
        recovery=recovery_sentence(recoveries_of(outcome)),
        outcome=outcome,
        comparison=outcome.comparison,
        base_layers=arch_for(outcome.comparison.model).layers(outcome.comparison.base_model()),
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


def draw(outcome: Outcome) -> Figure:
    """Held-out loss against training FLOPs: constant-rate trunks, annealed ends, and the crossing."""
    series = [
        *_lines(outcome, "constant rate", outcome.constant),
        *_lines(outcome, "annealed", outcome.annealed),
    ]
    for one in outcome.speed_ups("annealed"):
        if one is not None:
            name = f"equal loss: {one.speed_up:+.1%}" if len(outcome.seeds) == 1 else "equal loss"
            series.append(Series(name, [one.grown_flops, one.scratch_flops], [one.loss] * 2, "lines+markers", RED))
    return Figure("Held-out loss", FLOPS, "nats per token", series, log_x=True)


def draw_task(outcome: Outcome, task: str) -> Figure:
    """One field of evaluations against training FLOPs, both arms."""
    series = [
        *_lines(outcome, "constant rate", lambda arm, seed: outcome.on_task("constant", arm, seed, task)),
        *_lines(outcome, "annealed", lambda arm, seed: outcome.on_task("annealed", arm, seed, task)),
    ]
    name = task.removeprefix(EVALUATED).replace("_", " ")
    return Figure(name, FLOPS, name, series, log_x=True)


def _lines(outcome: Outcome, kind: str, curve: Callable[[Arm, int], Curve]) -> Iterator[Series]:
    """A line for each arm and seed; annealed ends are marked, the constant rate is dotted."""
    constant = kind == "constant rate"
    for arm in ARMS:
        for seed in outcome.seeds:
            flops, values = zip(*curve(arm, seed), strict=True)
            mode = "lines" if constant else "lines+markers"
            yield Series(f"{NAMES[arm]}, {kind}", flops, values, mode, COLOURS[arm], dashed=constant)
