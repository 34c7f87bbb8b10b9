"""Finished runs as rows of a table: what a law is fitted to, and what a pilot says of growth."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from outgrow.arch import Counts, arch_for, parameter_counts
from outgrow.config import parse
from outgrow.errors import OutgrowError
from outgrow.files import read_json
from outgrow.lab.records import Record, Records
from outgrow.lab.runs import CONFIG, finished, first_token, lineage, model_of, read_result
from outgrow.lab.speedup import Curve, equal_loss, flops_at, interval
from outgrow.scaling.growth import Mixing, mixing_tokens
from outgrow.training.config import RunConfig
from outgrow.training.schedule import share_of_peak

LOW = 0.15  # of its peak: a rate that ends below has been annealed


@dataclass(frozen=True)
class Ended:
    """A run that ended.

    Attributes:
        label: the directory, or the line of a study's records, that it is read from.
        run: its settings, its ancestors inside.
        points: (tokens, FLOPs, held-out loss) at each validation.
    """

    label: str
    run: RunConfig
    points: tuple[tuple[int, float, float], ...]

    @property
    def loss(self) -> float:
        return self.points[-1][2]

    @property
    def flops(self) -> float:
        return self.points[-1][1]

    @cached_property
    def grown(self) -> RunConfig | None:
        """The run whose start grew a model last, among this one and its ancestors; None for scratch."""
        return next((one for one in reversed(list(lineage(self.run))) if one.start and one.start.operator), None)

    @property
    def operator(self) -> str:
        return (self.grown.start.operator or "") if self.grown and self.grown.start else ""

    @property
    def growth_tokens(self) -> int:
        """The clock at which it, or the ancestor that was, was grown last."""
        return first_token(self.grown) if self.grown else 0

    @cached_property
    def counts(self) -> Counts:
        config = model_of(self.run)
        return parameter_counts(arch_for(config), config)

    @property
    def growth_factor(self) -> float:
        """g in parameters without embedding and head; NaN where what was grown is not known."""
        source = self.grown.start.run if self.grown and self.grown.start else None
        if source is None:
            return math.nan
        config = model_of(source)
        return self.counts.non_embedding / max(1, parameter_counts(arch_for(config), config).non_embedding)

    def _share(self, tokens: int) -> float:
        """The learning rate of the step that ends at a clock, as a share of its peak."""
        batch, run = self.run.batch_tokens, self.run
        return share_of_peak(run.schedule, max(tokens - batch, 0), batch, first_token(run), run.tokens)

    @cached_property
    def annealed(self) -> bool:
        """Has its learning rate fallen at its end?"""
        return self._share(self.run.tokens) < LOW

    @cached_property
    def at_full_rate(self) -> list[tuple[int, float, float]]:
        """Its points where the rate is at its peak: what the paper's protocol reads."""
        return [point for point in self.points if point[1] and point[0] > first_token(self.run) and self._share(point[0]) >= 1]

    @cached_property
    def twin(self) -> str:
        """What runs must share to be compared, but the seed: the model, the text, the batch."""
        run = self.run
        return _key([_plain_model(run), run.data.identifying(), run.batch_tokens, run.precision])

    @cached_property
    def way(self) -> str:
        """How it was trained, but the rate, the seed and how long: its growths, its optimizer, the shape of its decay."""
        run, growths = self.run, list[Any]()
        for one in lineage(run):
            if one.start and one.start.operator:
                policy = one.start.identifying()
                growths.append(
                    [_plain_model(one.start.run) if one.start.run else one.start.checkpoint, first_token(one), policy | {"run": None}]
                )
        decay = round(run.schedule.decay_tokens / run.tokens, 2) if self.annealed else None
        return _key([growths, {**run.optimizer.identifying(), "learning_rate": None}, run.schedule.kind, decay])


@dataclass(frozen=True)
class Arm:
    """Runs that were trained in one way at the rate that suits it best, annealed or not, by seed."""

    annealed: bool
    seeds: Mapping[int, list[Ended]]

    @property
    def longest(self) -> Ended:
        return max((one for runs in self.seeds.values() for one in runs), key=lambda one: (one.run.tokens, -one.run.seed))

    @property
    def has_one_budget(self) -> bool:
        return self.annealed and len({one.run.tokens for runs in self.seeds.values() for one in runs}) == 1

    def curve(self, seed: int) -> Curve:
        """(FLOPs, held-out loss): the ends of annealed runs; of others every validation at full rate."""
        runs = self.seeds.get(seed, [])
        if self.annealed:
            return sorted((one.flops, one.loss) for one in runs)
        return sorted({(flops, loss) for one in runs for _, flops, loss in one.at_full_rate})


def read_ended(path: Path) -> list[Ended]:
    """Every finished run of a directory of runs, or of a study's records (JSON lines)."""
    if path.is_file():
        records = Records(path)
        known = dict[str, RunConfig]()
        runs = {record.identity: _run_of(record, records, known) for record in records.values()}
        found = [
            Ended(f"{path}:{record.name}", run, tuple((int(t), f, loss) for t, f, loss, _ in record.points))
            for record in records.values()
            if not record.diverged and (run := runs[record.identity])
        ]
    elif path.is_dir():
        configs = [parse(RunConfig, read_json(one), where=f"'{one}'") for one in sorted(path.glob(f"*/{CONFIG}"))]
        results = [read_result(run, path) for run in configs if finished(run, path)]
        found = [
            Ended(one.directory.name, one.config, tuple((row["tokens"], row["flops"], row["validation_loss"]) for row in one.validation))
            for one in results
        ]
    else:
        raise OutgrowError(f"there is no directory of runs and no file of records '{path}'")
    if not found:
        raise OutgrowError(f"'{path}' holds no finished run")
    return found


def is_records(path: Path) -> bool:
    """Is a file a study's records, and not a table of one's own?"""
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and {"identity", "settings", "points"} <= first.keys()


def rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where it came from, row) of every finished run: the columns of `outgrow fit`.

    `params` counts all parameters; `flops` and `tokens` include the ancestors'. `tuned`: no other learning rate was better for its way of
    training. `speed_up` is against the best scratch runs of the same model, text, batch, seed and optimizer that end like this one, at this
    run's loss.
    """
    found = read_ended(path)
    arms = _arms(found)
    tuned = {id(one) for arm in arms for runs in arm.seeds.values() for one in runs}
    return [(one.label, _row(one, arms, id(one) in tuned)) for one in found]


@dataclass(frozen=True)
class Pilot:
    """What finished runs say of one way to grow: a speed-up a seed, read annealed or not; `operator` is the last of its `hops`."""

    operator: str
    hops: int
    growth_factor: float
    growth_share: float
    params: int
    tokens_per_param: float
    annealed: bool
    speed_ups: tuple[float, ...]

    @property
    def between(self) -> tuple[float, float] | None:
        return interval(self.speed_ups)


def pilots(path: Path) -> list[Pilot]:
    """The speed-up of each way to grow that runs show against the best of their scratch twins, both at their best learning rate."""
    arms, found = _arms(read_ended(path)), list[Pilot]()
    for arm in arms:
        one = arm.longest
        scratch = _scratch_of(one, arms, arm.annealed)
        if not (one.grown and scratch):
            continue
        met = [equal_loss(scratch.curve(seed), arm.curve(seed)) for seed in arm.seeds if seed in scratch.seeds]
        speed_ups = tuple(pair.speed_up for pair in met if pair)
        if speed_ups and len(speed_ups) == len(met):  # the mean of those seeds alone that met scratch would flatter
            params, tokens = one.counts.total, one.run.tokens
            share, hops = one.growth_tokens / tokens, sum(1 for run in lineage(one.run) if run.start and run.start.operator)
            found.append(Pilot(one.operator, hops, one.growth_factor, share, params, tokens / params, arm.annealed, speed_ups))
    return found


def pilot_mixing(path: Path) -> Mixing | None:
    """Whether and when the loss of late expansions met scratch's, both at full rate; None where no two runs can say."""
    arms, found = _arms(read_ended(path)), list[float | None]()
    for arm in arms:
        for seed, runs in arm.seeds.items():
            for one in runs:
                scratch = _scratch_of(one, arms, arm.annealed)
                late = one.grown is not None and one.operator.startswith("expand") and one.run.identity() == one.grown.identity()
                if not late or scratch is None:
                    continue
                fixed = sorted({(tokens, loss) for twin in scratch.seeds.get(seed, []) for tokens, _, loss in twin.at_full_rate})
                grown = [(tokens, loss) for tokens, _, loss in one.at_full_rate]
                if len(fixed) > 1 and grown:
                    found.append(mixing_tokens(fixed, [(one.growth_tokens, one.points[0][2]), *grown]))
    met = [tokens for tokens in found if tokens is not None]
    return Mixing(len(found), len(met), mean(met) if met else math.nan) if found else None


def _arms(found: Iterable[Ended]) -> list[Arm]:
    """Every way of training, annealed and not, at its best rate: the one run from most seeds, or of the lowest loss at the longest."""
    ways: dict[tuple[str, str, bool], dict[float, list[Ended]]] = {}
    for one in found:
        for annealed in {one.annealed, False}:
            if annealed or one.at_full_rate:
                ways.setdefault((one.twin, one.way, annealed), {}).setdefault(one.run.optimizer.learning_rate, []).append(one)
    arms = list[Arm]()
    for (_, _, annealed), rates in ways.items():
        by_seed: dict[float, dict[int, list[Ended]]] = {rate: {} for rate in rates}
        for rate, runs in rates.items():
            for one in sorted(runs, key=lambda one: one.run.seed):
                by_seed[rate].setdefault(one.run.seed, []).append(one)

        def merit(rate: float, by_seed: Mapping[float, Mapping[int, list[Ended]]] = by_seed) -> tuple[int, int, float]:
            first = next(iter(by_seed[rate].values()))
            tokens, loss = max((one.run.tokens, -one.loss) for one in first)
            return len(by_seed[rate]), tokens, loss

        arms.append(Arm(annealed, by_seed[max(rates, key=merit)]))
    return arms


def _scratch_of(one: Ended, arms: Iterable[Arm], annealed: bool) -> Arm | None:
    """The best scratch runs that a run may be compared with: of the same model, text, batch and optimizer."""
    kind = one.run.optimizer.kind
    twins = [
        arm for arm in arms
        if arm.annealed == annealed and not arm.longest.grown and arm.longest.twin == one.twin and arm.longest.run.optimizer.kind == kind
    ]  # fmt: skip
    # Of what ends at one budget alone nothing can be interpolated.
    return min(twins, key=lambda arm: (-arm.longest.run.tokens, arm.has_one_budget, arm.longest.loss)) if twins else None


def _row(one: Ended, arms: Iterable[Arm], tuned: bool) -> dict[str, Any]:
    run, counts = one.run, one.counts
    row: dict[str, Any] = {
        "name": run.name, "seed": run.seed, "annealed": str(one.annealed).lower(), "tuned": str(tuned).lower(),
        "learning_rate": run.optimizer.learning_rate, "optimizer": run.optimizer.kind, "params": counts.total,
        "non_embedding_params": counts.non_embedding, "tokens": run.tokens, "flops": one.flops, "loss": one.loss,
        "tokens_per_param": run.tokens / counts.total, "operator": one.operator or "scratch",
    }  # fmt: skip
    if one.grown and one.grown.start and one.grown.start.run:
        scratch = _scratch_of(one, arms, one.annealed)
        cost = flops_at(scratch.curve(run.seed), one.loss) if scratch else None
        row["growth_factor"], row["growth_tokens"] = one.growth_factor, one.growth_tokens
        row["growth_share"] = one.growth_tokens / run.tokens
        row["speed_up"] = cost / one.flops - 1 if cost else math.nan
    return row


def _run_of(record: Record, records: Records, known: dict[str, RunConfig]) -> RunConfig:
    """The run that a record is of, its ancestors put back in the place of their identities."""
    if record.identity not in known:
        settings = {**record.settings, "name": record.name}
        start = settings.get("start")
        if start and start.get("run"):
            if start["run"] not in records:
                raise OutgrowError(f"'{records.path}' lacks the run {start['run']}, from which '{record.name}' starts; restore the file")
            settings["start"] = {**start, "run": _run_of(records[start["run"]], records, known)}
        known[record.identity] = parse(RunConfig, settings, where=f"'{record.name}' of '{records.path}'")
    return known[record.identity]


def _plain_model(run: RunConfig) -> dict[str, Any]:
    """The config of the model that a run trains; a lift may have touched the eps, which makes it no other model."""
    return {key: value for key, value in model_of(run).items() if not key.endswith(("_eps", "epsilon"))}


def _key(parts: Any) -> str:
    return json.dumps(parts, sort_keys=True, default=str)
