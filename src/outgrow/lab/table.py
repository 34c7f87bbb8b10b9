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
from outgrow.lab.ancestry import lineage, model_of, same_budget
from outgrow.lab.records import Record, Records
from outgrow.lab.runs import SETTINGS, finished, read_result
from outgrow.lab.speedup import Curve, equal_loss, interval
from outgrow.scaling.growth import Mixing, mixing_tokens
from outgrow.training.config import RunConfig, first_token
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

    @property
    def trunk(self) -> str:
        """The run whose branches, and itself, are pieces of one trajectory: that which grew last, or the first."""
        return (self.grown or next(iter(lineage(self.run)))).identity()

    @cached_property
    def counts(self) -> Counts:
        config = model_of(self.run)
        return parameter_counts(arch_for(config), config)

    @property
    def growth_factor(self) -> float:
        """g in parameters without embedding and head, over all growths; NaN where the first model is not known or has no layer."""
        first = next(iter(lineage(self.run)))
        if first.start:
            return math.nan
        config = model_of(first)
        arch = arch_for(config)
        return self.counts.non_embedding / parameter_counts(arch, config).non_embedding if arch.layers(config) else math.nan

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
                policy = one.start.identifying() | {"run": None, "restarts": _restarts(one)}
                growths.append([_plain_model(one.start.run) if one.start.run else one.start.checkpoint, first_token(one), policy])
        decay = round(run.schedule.decay_tokens / run.tokens, 2) if self.annealed else None
        return _key([growths, {**run.optimizer.identifying(), "learning_rate": None}, run.schedule.kind, decay])


@dataclass(frozen=True)
class Arm:
    """Runs that were trained in one way at one learning rate, annealed or not, by seed."""

    annealed: bool
    seeds: Mapping[int, list[Ended]]

    @cached_property
    def longest(self) -> Ended:
        return max((one for runs in self.seeds.values() for one in runs), key=lambda one: (one.run.tokens, -one.run.seed))

    @cached_property
    def has_one_budget(self) -> bool:
        return self.annealed and len({one.run.tokens for runs in self.seeds.values() for one in runs}) == 1

    def curve(self, seed: int, tokens: float = math.inf) -> Curve:
        """(FLOPs, held-out loss) of runs of about so many tokens at most: annealed ones' ends; others' validations at full rate."""
        runs = [one for one in self.seeds.get(seed, []) if one.run.tokens < tokens or same_budget(one.run.tokens, tokens)]
        if self.annealed:
            return sorted((one.flops, one.loss) for one in runs)
        return sorted({(flops, loss) for one in runs for _, flops, loss in one.at_full_rate})


@dataclass(frozen=True)
class Way:
    """One way of training, annealed or not, at every learning rate that was tried."""

    rates: Mapping[float, Arm]

    @cached_property
    def longest(self) -> Ended:
        return max((arm.longest for arm in self.rates.values()), key=lambda one: one.run.tokens)

    def tuned(self, tokens: int) -> Arm:
        """At the rate that suits runs of about so many tokens best: that of most seeds, and of the lowest mean loss over them."""
        near = _nearest(tokens, (one for arm in self.rates.values() for runs in arm.seeds.values() for one in runs))

        def merit(arm: Arm) -> tuple[int, float]:
            losses = [next((one.loss for one in runs if one.run.tokens == near.run.tokens), None) for runs in arm.seeds.values()]
            losses = [loss for loss in losses if loss is not None]
            return len(losses), -mean(losses) if losses else -math.inf

        return max(self.rates.values(), key=merit)


Ways = Mapping[tuple[str, str, bool], Way]  # by twin, way and whether annealed


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
        configs = [parse(RunConfig, read_json(one), where=f"'{one}'") for one in sorted(path.glob(f"*/{SETTINGS}"))]
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
    training and its length. `speed_up` is against the best scratch runs of the same model, text, batch, seed and optimizer that end like
    this one and are no longer, at the lowest loss that they and the arm of this run reach. `trunk` is shared by runs that are pieces of
    one trajectory.
    """
    found = read_ended(path)
    ways = _ways(found)
    return [(one.label, _row(one, ways)) for one in found]


@dataclass(frozen=True)
class Pilot:
    """What finished runs say of one way to grow: a speed-up a seed, read annealed or not; `operator` is the last of its `hops`."""

    operator: str
    hops: int
    optimizer: str
    batch_tokens: int
    restarts: bool
    state: str
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
    ways, found = _ways(read_ended(path)), list[Pilot]()
    for way in ways.values():
        arm = way.tuned(way.longest.run.tokens)
        one = arm.longest
        scratch = _scratch_of(one, ways, arm.annealed)
        if not (one.grown and one.grown.start and scratch):
            continue
        tokens = one.run.tokens
        curves = [(scratch.curve(seed, tokens), arm.curve(seed)) for seed in arm.seeds if seed in scratch.seeds]
        met = [equal_loss(*pair) for pair in curves if all(pair)]
        speed_ups = tuple(pair.speed_up for pair in met if pair)
        if speed_ups and len(speed_ups) == len(met):  # the mean of those seeds alone that met scratch would flatter
            params = one.counts.total
            hops = sum(1 for run in lineage(one.run) if run.start and run.start.operator)
            found.append(
                Pilot(
                    one.operator, hops, one.run.optimizer.kind, one.run.batch_tokens, _restarts(one.grown), one.grown.start.optimizer,
                    one.growth_factor, one.growth_tokens / tokens, params, tokens / params, arm.annealed, speed_ups,
                )
            )  # fmt: skip
    return found


def pilot_mixing(path: Path) -> Mixing | None:
    """Whether and when the loss of late expansions met scratch's, both at full rate; None where no two runs can say."""
    ways, found = _ways(read_ended(path)), list[float | None]()
    for way in ways.values():
        arm = way.tuned(way.longest.run.tokens)
        scratch = _scratch_of(arm.longest, ways, arm.annealed)
        for seed, runs in arm.seeds.items():
            if scratch is None:
                continue
            fixed = sorted({(tokens, loss) for twin in scratch.seeds.get(seed, []) for tokens, _, loss in twin.at_full_rate})
            for one in runs:
                late = one.grown is not None and one.operator.startswith("expand") and one.run.identity() == one.grown.identity()
                grown = [(tokens, loss) for tokens, _, loss in one.at_full_rate]
                if late and len(fixed) > 1 and grown:
                    found.append(mixing_tokens(fixed, [(one.growth_tokens, one.points[0][2]), *grown]))
    met = [tokens for tokens in found if tokens is not None]
    return Mixing(len(found), len(met), mean(met) if met else math.nan) if found else None


def _ways(found: Iterable[Ended]) -> Ways:
    """Every way of training, annealed and not."""
    ways: dict[tuple[str, str, bool], dict[float, dict[int, list[Ended]]]] = {}
    for one in sorted(found, key=lambda one: one.run.seed):
        for annealed in {one.annealed, False}:
            if annealed or one.at_full_rate:
                rates = ways.setdefault((one.twin, one.way, annealed), {})
                rates.setdefault(one.run.optimizer.learning_rate, {}).setdefault(one.run.seed, []).append(one)
    return {key: Way({rate: Arm(key[2], seeds) for rate, seeds in rates.items()}) for key, rates in ways.items()}


def _scratch_of(one: Ended, ways: Ways, annealed: bool) -> Arm | None:
    """The best scratch runs that a run may be compared with: of the same model, text, batch and optimizer, tuned for its length."""
    kind, tokens = one.run.optimizer.kind, one.run.tokens
    scratch = [way.tuned(tokens) for way in ways.values() if not way.longest.grown and way.longest.twin == one.twin]
    twins = [arm for arm in scratch if arm.annealed == annealed and arm.longest.run.optimizer.kind == kind]

    def merit(arm: Arm) -> tuple[bool, float]:
        return arm.has_one_budget, _nearest(tokens, next(iter(arm.seeds.values()))).loss  # of one budget nothing can be interpolated

    return min(twins, key=merit) if twins else None


def _nearest(tokens: int, runs: Iterable[Ended]) -> Ended:
    """Of runs the one whose length is nearest, as a ratio."""
    return min(runs, key=lambda one: (abs(math.log(one.run.tokens / tokens)), -one.run.tokens))


def _row(one: Ended, ways: Ways) -> dict[str, Any]:
    run, counts, rate = one.run, one.counts, one.run.optimizer.learning_rate
    way = ways.get((one.twin, one.way, one.annealed))
    arm = way.rates[rate] if way else None
    row: dict[str, Any] = {
        "name": run.name, "seed": run.seed, "annealed": str(one.annealed).lower(),
        "tuned": str(way is not None and way.tuned(run.tokens) is arm).lower(), "learning_rate": rate, "optimizer": run.optimizer.kind,
        "params": counts.total, "non_embedding_params": counts.non_embedding, "tokens": run.tokens, "flops": one.flops, "loss": one.loss,
        "tokens_per_param": run.tokens / counts.total, "operator": one.operator or "scratch", "trunk": one.trunk,
    }  # fmt: skip
    if one.grown and one.grown.start and one.grown.start.run:
        scratch = _scratch_of(one, ways, one.annealed)
        curves = (scratch.curve(run.seed, run.tokens), arm.curve(run.seed, run.tokens)) if scratch and arm else ((), ())
        met = equal_loss(*curves) if all(curves) else None
        row["growth_factor"], row["growth_tokens"] = one.growth_factor, one.growth_tokens
        row["growth_share"] = one.growth_tokens / run.tokens
        row["speed_up"] = met.speed_up if met else math.nan
    return row


def _restarts(run: RunConfig) -> bool:
    """Does a run's learning rate warm up anew where it begins?"""
    return run.schedule.begin is None and run.schedule.warmup_tokens > 0


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
