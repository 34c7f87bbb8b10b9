"""Diagnoses of checkpoints as figures, tables and a page; and those of a finished comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from outgrow.data.corpus import Document
from outgrow.evaluation.diagnostics import Diagnosis, Layers, diagnose
from outgrow.lab.figures import Figure, Series, as_plotly, save_figures
from outgrow.lab.outcome import Outcome
from outgrow.lab.page import write_page
from outgrow.lab.recovery import Recovery, recovery
from outgrow.training.record import checkpoints, latest_checkpoint

DOCUMENTS = 8  # held-out ones, in which layers are skipped for a report


def diagnose_with(
    directory: Path, documents: Sequence[Document], ranks: bool = True, batch_size: int = 8, **opening: str | None
) -> Diagnosis:
    """A diagnosis, with what each layer adds to the loss of some documents where any are given; `opening` is for `open_model`."""
    found = diagnose(directory, ranks)
    if not documents:
        return found
    from outgrow.evaluation.model import open_model
    from outgrow.evaluation.skipped import skipped_losses

    loss, skipped = skipped_losses(open_model(directory, **opening), documents, batch_size)  # type: ignore[arg-type]
    return replace(found, loss=loss, skipped=skipped)


def diagnoses_of(outcome: Outcome) -> dict[str, Diagnosis]:
    """Name -> diagnosis of a comparison's checkpoints, first seed; empty where none are kept, as in a clone of its records."""
    from outgrow.evaluation.skipped import first_held_out

    comparison, seed, last = outcome.comparison, outcome.seeds[0], max(outcome.comparison.budgets)
    grown = outcome.result(comparison.trunk("grown", seed)).directory
    named: dict[str, Path | None] = {"base": latest_checkpoint(outcome.result(comparison.base(seed)).directory)}
    named |= {f"grown, {int(place.name) / 1e6:.2f}M": place for place in checkpoints(grown)}
    ends = {
        f"{arm}, annealed": latest_checkpoint(outcome.result(comparison.branch(arm, seed, last)).directory) for arm in ("grown", "scratch")
    }
    there = {name: place for name, place in {**named, **ends}.items() if place}
    data = comparison.data
    documents = first_held_out([data.corpus], DOCUMENTS, data.validation_share) if there and not data.sources else []
    return {name: diagnose_with(place, documents if name in ends else []) for name, place in there.items()}


def recoveries_of(outcome: Outcome) -> list[Recovery]:
    """One a seed."""
    found: list[Recovery] = []
    for seed in outcome.seeds:
        base, grown = outcome.result(outcome.comparison.base(seed)), outcome.result(outcome.comparison.trunk("grown", seed))
        found.append(recovery(base.final_loss, [(row["tokens"], row["validation_loss"]) for row in grown.validation]))
    return found


def figures(found: Mapping[str, Diagnosis]) -> list[Figure]:
    """What there is to draw: layer by layer, and copies over training where there are several checkpoints."""
    drawn: list[Figure] = []
    grown = next((one for one in found.values() if one.sources), None)
    for title, y, layers_of in (
        ("size of the weights", "root mean square", lambda one: _over_matrices(one.rms)),
        ("effective rank", "share of the largest", lambda one: _over_matrices(one.rank)),
        ("what a layer adds", "rise of the loss without it", lambda one: one.skipped),
        ("likeness of copied layers", "cosine to the first copy", lambda one: one.likeness),
    ):
        series = [line for name, one in found.items() if (line := _line(name, layers_of(one)))]
        ticks = [_layer(grown, layer) for layer in range(len(grown.sources))] if grown else []
        if series:
            x, seams = (
                "layer, and what it copies; dashed: seams" if grown else "layer",
                [seam - 0.5 for seam in grown.seams] if grown else [],
            )
            drawn.append(Figure(title, x, y, series, ticks=ticks, marks=seams))
    drawn += _over_training(found)
    return drawn


def sentences(found: Mapping[str, Diagnosis]) -> Iterator[str]:
    """What stands out, in words."""
    seamed = [name for name, one in found.items() if one.seam_step]
    for name, one in found.items():
        if name in (*seamed[:1], *seamed[-1:]) and (step := one.seam_step):
            yield (
                f"{name}: neighbouring layers differ in size by a factor of {2 ** step[0]:.3f} at the seams between copies "
                f"(before layers {', '.join(map(str, one.seams))}), and by {2 ** step[1]:.3f} elsewhere."
            )
        if one.loss is not None and one.skipped:
            least = min(range(len(one.skipped)), key=lambda layer: one.skipped[layer])
            yield f"{name}: layer {least} adds least; without it the loss of {one.loss:.4f} changes by {one.skipped[least]:+.4f} nats."


def rows(one: Diagnosis) -> list[list[str]]:
    """A checkpoint layer by layer as text, a heading first."""
    shown: dict[str, Layers] = {"RMS of weights": _over_matrices(one.rms)}
    shown |= {"effective rank": _over_matrices(one.rank)} if one.rank else {}
    shown |= {"likeness to first copy": one.likeness} if one.likeness else {}
    shown |= {f"likeness of {space} copies": layers for space, layers in one.neurons.items()}
    shown |= {"adds, nats": one.skipped} if one.skipped else {}
    count = len(next(iter(one.rms.values()), []))
    return [
        ["layer", *(["copy of"] if one.sources else []), *shown],
        *(
            [str(layer), *([_source(one, layer)] if one.sources else []), *(_number(layers[layer]) for layers in shown.values())]
            for layer in range(count)
        ),
    ]


def write_diagnosis(found: Mapping[str, Diagnosis], page: Path | None, pictures: Path | None) -> None:
    """Writes the page, and its figures as one PNG, SVG or PDF."""
    drawn = figures(found)
    if page:
        tables = {name: rows(one) for name, one in found.items()}
        write_page("diagnosis.html.j2", page, [as_plotly(one, 380) for one in drawn], tables=tables, says=list(sentences(found)))
    if pictures:
        save_figures(drawn, pictures)


def _over_training(found: Mapping[str, Diagnosis]) -> list[Figure]:
    """Mean likeness of copies against tokens."""
    points: dict[str, list[tuple[int, float]]] = {}
    for one in found.values():
        for what, layers in {"layers": one.likeness, **{f"indices of {space}": of for space, of in one.neurons.items()}}.items():
            if known := [value for value in layers if not math.isnan(value)]:
                points.setdefault(f"copied {what}", []).append((one.tokens, mean(known)))
    if not any(len({tokens for tokens, _ in of}) > 1 for of in points.values()):
        return []
    series = [Series(name, [x for x, _ in sorted(of)], [y for _, y in sorted(of)]) for name, of in points.items()]
    return [Figure("copies part as they train", "training tokens", "cosine to the first copy", series)]


def _over_matrices(values: Mapping[str, Layers]) -> Layers:
    layers = zip(*values.values(), strict=True)
    return [mean(known) if (known := [one for one in layer if not math.isnan(one)]) else math.nan for layer in layers]


def _line(name: str, layers: Layers) -> Series | None:
    known = [(float(layer), value) for layer, value in enumerate(layers) if not math.isnan(value)]
    return Series(name, [x for x, _ in known], [y for _, y in known]) if known else None


def _source(one: Diagnosis, layer: int) -> str:
    return str(one.sources[layer]) if one.sources[layer] >= 0 else "new"


def _layer(one: Diagnosis, layer: int) -> str:
    return f"{layer}\n{_source(one, layer)}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
