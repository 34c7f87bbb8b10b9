"""Finished runs as rows of a table: what a law is fitted to, and what a pilot says of growth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outgrow.arch import arch_for, parameter_counts
from outgrow.config import parse
from outgrow.errors import OutgrowError
from outgrow.files import read_json
from outgrow.lab.runs import CONFIG, Result, finished, lineage, model_of, read_result
from outgrow.lab.speedup import Curve, SpeedUp, equal_loss, flops_at, interval
from outgrow.scaling.growth import mixing_tokens
from outgrow.training.config import RunConfig


@dataclass(frozen=True)
class Entry:
    """A finished run and what is known of its growth.

    Attributes:
        grown: the run whose start grew a model last among the run and its ancestors; None for scratch.
        setting: what runs must share to be compared: the model, the text, the batch, the seed.
        annealed: did its learning rate fall at the end?
    """

    result: Result
    grown: RunConfig | None
    setting: str
    annealed: bool

    @property
    def run(self) -> RunConfig:
        return self.result.config

    @property
    def operator(self) -> str:
        return (self.grown.start.operator or "") if self.grown and self.grown.start else ""


def read_entries(root: Path) -> list[Entry]:
    """Every finished run under a directory of runs."""
    if not root.is_dir():
        raise OutgrowError(f"there is no directory '{root}' of runs")
    runs = [parse(RunConfig, read_json(path), where=f"'{path}'") for path in sorted(root.glob(f"*/{CONFIG}"))]
    found = [_entry(read_result(run, root)) for run in runs if finished(run, root)]
    if not found:
        raise OutgrowError(f"'{root}' holds no finished run")
    return found


def rows(root: Path) -> list[tuple[str, dict[str, Any]]]:
    """(name of the directory, row) of every finished run: the columns of `outgrow fit`.

    `params` counts all parameters; `flops` and `tokens` include the ancestors'. `speed_up` is against scratch runs of the same model, text,
    batch and seed that end like this one, at this run's loss.
    """
    entries = read_entries(root)
    return [(entry.result.directory.name, _row(entry, entries)) for entry in entries]


@dataclass(frozen=True)
class Pilot:
    """What finished runs say of one way to grow: a speed-up a seed, read annealed or not."""

    operator: str
    growth_share: float
    params: int
    tokens_per_param: float
    annealed: bool
    speed_ups: tuple[float, ...]

    @property
    def between(self) -> tuple[float, float] | None:
        return interval(self.speed_ups)


def pilots(root: Path) -> list[Pilot]:
    """The speed-up of each way to grow that runs under a directory show against their scratch twins, annealed first."""
    entries = read_entries(root)
    found: dict[tuple[Any, ...], list[tuple[Entry, SpeedUp]]] = {}
    for annealed in (True, False):
        for first, arm in _arms(entries, annealed):
            scratch = _curve([one for one in entries if not one.grown and one.annealed == annealed and one.setting == first.setting])
            met = equal_loss(scratch, _curve(arm)) if len(scratch) > 1 and len(arm) + len(first.result.curve) > 1 else None
            if met and first.grown:
                begun = first.grown.start
                key = (annealed, begun.operator, json.dumps(begun.knobs), _growth_tokens(first), str(_model(first.run)))  # type: ignore[union-attr]
                found.setdefault(key, []).append((first, met))
    return [_pilot(key[0], pairs) for key, pairs in found.items()]


def pilot_mixing(root: Path) -> float | None:
    """The mean number of tokens after a late expansion until its loss meets scratch's; None where runs do not show that."""
    entries = read_entries(root)
    found = list[float]()
    for entry in entries:
        late = entry.grown is not None and entry.operator.startswith("expand") and entry.run.identity() == entry.grown.identity()
        if entry.annealed or not late:
            continue
        twins = [one for one in entries if not one.grown and not one.annealed and one.setting == entry.setting]
        fixed = sorted({(row["tokens"], row["validation_loss"]) for one in twins for row in one.result.validation})
        met = mixing_tokens(fixed, [(row["tokens"], row["validation_loss"]) for row in entry.result.validation]) if len(fixed) > 1 else None
        found += [met] if met is not None else []
    return sum(found) / len(found) if found else None


def _arms(entries: list[Entry], annealed: bool) -> Iterator[tuple[Entry, list[Entry]]]:
    """Runs of one setting that come from one growth, with the longest first."""
    arms: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry.grown and entry.annealed == annealed:
            arms.setdefault((entry.setting, entry.grown.identity()), []).append(entry)
    for arm in arms.values():
        yield max(arm, key=lambda entry: entry.run.tokens), arm


def _curve(entries: list[Entry]) -> Curve:
    """(FLOPs, held-out loss): the ends of annealed runs; of others, which do not end for good, every validation."""
    points = [(one.result.flops, one.result.final_loss) for one in entries if one.annealed]
    points += [point for one in entries if not one.annealed for point in one.result.curve]
    return sorted(points)


def _pilot(annealed: bool, pairs: list[tuple[Entry, SpeedUp]]) -> Pilot:
    entry = pairs[0][0]
    params = parameter_counts(arch_for(_model(entry.run)), _model(entry.run)).total
    share = _growth_tokens(entry) / entry.run.tokens
    return Pilot(entry.operator, share, params, entry.run.tokens / params, annealed, tuple(met.speed_up for _, met in pairs))


def _entry(result: Result) -> Entry:
    run = result.config
    grown = [one for one in lineage(run) if one.start and one.start.operator]
    same = [_model(run), run.data.identifying(), run.batch_tokens, run.precision, run.seed]
    schedule = run.schedule
    falls = schedule.kind == "cosine" or bool(schedule.decay_tokens)
    return Entry(result, grown[-1] if grown else None, json.dumps(same, sort_keys=True), falls)


def _row(entry: Entry, entries: list[Entry]) -> dict[str, Any]:
    run = entry.run
    config = _model(run)
    counts = parameter_counts(arch_for(config), config)
    row: dict[str, Any] = {
        "name": run.name, "seed": run.seed, "annealed": str(entry.annealed).lower(), "params": counts.total,
        "non_embedding_params": counts.non_embedding, "tokens": run.tokens, "flops": entry.result.flops, "loss": entry.result.final_loss,
        "tokens_per_param": run.tokens / counts.total, "operator": entry.operator or "scratch",
    }  # fmt: skip
    if entry.grown and entry.grown.start and entry.grown.start.run:
        source = _model(entry.grown.start.run)
        before = parameter_counts(arch_for(source), source).non_embedding
        row["growth_factor"] = counts.non_embedding / before
        row["growth_tokens"] = _growth_tokens(entry)
        row["growth_share"] = row["growth_tokens"] / run.tokens
        scratch = _curve([one for one in entries if not one.grown and one.annealed == entry.annealed and one.setting == entry.setting])
        cost = flops_at(scratch, entry.result.final_loss)
        row["speed_up"] = cost / entry.result.flops - 1 if cost else float("nan")
    return row


def _growth_tokens(entry: Entry) -> int:
    """The clock at which a run, or the ancestor that was, was grown last."""
    start = entry.grown.start if entry.grown else None
    if not (start and start.run):
        return 0
    return start.run.tokens if start.tokens is None else start.tokens


def _model(run: RunConfig) -> dict[str, Any]:
    return dict(model_of(run))
