"""The planner: strategies for a target and a budget, what each costs on real machines, and the recipes and commands to run it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from outgrow.arch import arch_for
from outgrow.config import parse, suggestion
from outgrow.errors import OutgrowError
from outgrow.files import read_json
from outgrow.lab.budget import need_of
from outgrow.lab.recipe import Recipe
from outgrow.lab.table import Pilot, pilot_mixing, pilots
from outgrow.scaling.shapes import target_config, with_layers
from outgrow.scaling.strategies import Budget, Expected, Strategy, budget_of, strategies
from outgrow.training.loop import PEAKS

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
MOST_MICRO_TOKENS = 8192  # per rank and forward pass
TOKEN_BYTES = 2  # on disk, of vocabularies up to 65,536; 4 above


@dataclass(frozen=True)
class Hardware:
    """So many accelerators of a kind, and the share of their peak that training reaches."""

    kind: str
    count: int
    mfu: float

    def hours(self, flops: float) -> float:
        """Accelerator hours, over all of them."""
        return flops / (PEAKS[self.kind] * self.mfu) / 3600


@dataclass(frozen=True)
class Plan:
    """A strategy with its recipe and what that needs.

    Attributes:
        strategy, recipe: what to run.
        rank_bytes: the largest memory of a stage on each rank: weights, gradients, optimizer and about the activations.
        disk_bytes: packed text and the checkpoints that are kept, two while one replaces the other.
    """

    strategy: Strategy
    recipe: Recipe
    rank_bytes: int
    disk_bytes: int

    @property
    def flops(self) -> float:
        return sum(self.strategy.flops)


@dataclass(frozen=True)
class Advice:
    """What the planner says."""

    budget: Budget
    asked_params: float | None
    hardware: Hardware | None
    plans: tuple[Plan, ...]
    pilot: Pilot | None

    @property
    def scratch_flops(self) -> float:
        return self.plans[0].flops

    def equal_loss_flops(self, plan: Plan) -> float | None:
        """FLOPs to scratch's loss, if the expected speed-up comes true."""
        expected = plan.strategy.expected
        return self.scratch_flops / (1 + expected.speed_up) if expected else None


def advise(
    params: str | None,
    tokens: str,
    target: Path | None = None,
    hardware: str | None = None,
    mfu: float = 0.4,
    pilot: Path | None = None,
    factor: int | None = None,
    vocab: int = 32_000,
    context: int = 2048,
    data: str = "prepared-text",
) -> Advice:
    """Plans a target model.

    Args:
        params: its size, such as `7B`; or
        target: its config.json.
        tokens: that may be read, such as `300B`.
        hardware: `h200:64`; without it costs are FLOPs alone.
        mfu: share of the peak that training reaches.
        pilot: a directory of runs; its speed-up stands in for the paper's.
        factor: g; 4 where that divides.
        vocab, context: of a target given by its size.
        data: the directory of prepared text that the recipes read.
    """
    if (params is None) == (target is None):
        raise OutgrowError("say what to train with --params 7B, or with --target CONFIG.JSON; one of the two")
    wanted = quantity(params, "--params") if params else None
    config = dict(read_json(target)) if target else target_config(wanted or 0, vocab, context)
    machine = _hardware(hardware, mfu)
    budget = budget_of(config, quantity(tokens, "--tokens"), context, wanted)
    measured = _best(pilot) if pilot else None
    mixing = pilot_mixing(pilot) if pilot else None
    found = strategies(budget, factor, _as_expected(measured) if measured else None, mixing)
    ranks = machine.count if machine else 1
    return Advice(budget, wanted, machine, tuple(_plan(one, budget, ranks, data) for one in found), measured)


def quantity(text: str, option: str) -> float:
    """A number with a unit: 7B, 300B, 1.5T, 410M, 1e9."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[+]?[0-9]{1,2})?)([kmbt]?)", text.strip().replace("_", "").replace(",", "").lower())
    value = float(match[1]) * UNITS[match[2]] if match else 0.0
    if not match or value <= 0:
        raise OutgrowError(f"{option} takes a number above zero with K, M, B or T after it, such as 7B or 1.5T, not '{text}'")
    return value


def write_recipes(advice: Advice, directory: Path) -> list[Path]:
    """Writes one recipe a strategy; refuses to replace other ones."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for plan in advice.plans:
        path = directory / f"{plan.recipe.name}.yaml"
        title = f"# {plan.strategy.name}: {plan.strategy.summary}. Planned by outgrow advise.\n"
        text = title + yaml.safe_dump(_settings(plan), sort_keys=False)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise OutgrowError(f"'{path}' exists already and differs; give another --output, or remove it")
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def advice_lines(advice: Advice, directory: Path | None) -> Iterator[str]:
    """The advice, as text: the target, the strategies side by side, and each with its evidence and commands."""
    budget, machine = advice.budget, advice.hardware
    sizes = arch_for(budget.config).sizes(budget.config)
    heads = sizes["kv"] * sizes.get("group", 1)
    asked = f" (asked for {_short(advice.asked_params)}, which laws and tables are read with)" if advice.asked_params else ""
    shape = f"{budget.layers} layers, hidden {sizes['hidden']:,}, ffn {sizes.get('ffn', 0):,}, {heads} heads, {sizes['kv']} kv heads"
    yield f"target: {shape}: {_short(budget.params)} parameters{asked}"
    batch = f"batch {budget.batch_tokens:,}, context {budget.context:,}"
    yield f"budget: {_short(budget.tokens)} tokens, {budget.tokens / budget.size:.1f} a parameter; {batch}"
    if machine:
        peak = f"{PEAKS[machine.kind] / 1e12:,.0f} TFLOP/s"
        yield f"machine: {machine.count} x {machine.kind} at {machine.mfu:.0%} of {peak} (the MFU is given, not measured)"
    yield ""
    yield from _table(advice)
    for plan in advice.plans:
        yield ""
        yield from _details(advice, plan, directory)


def as_json(advice: Advice) -> dict[str, Any]:
    """The advice, for machines."""
    budget, machine = advice.budget, advice.hardware
    return {
        "target": {"config": dict(budget.config), "params": budget.params, "asked_params": advice.asked_params},
        "tokens": budget.tokens,
        "batch_tokens": budget.batch_tokens,
        "hardware": asdict(machine) if machine else None,
        "pilot": asdict(advice.pilot) | {"between": advice.pilot.between} if advice.pilot else None,
        "strategies": [_plan_json(advice, plan) for plan in advice.plans],
    }


def _plan_json(advice: Advice, plan: Plan) -> dict[str, Any]:
    strategy, machine = plan.strategy, advice.hardware
    return {
        "name": strategy.name,
        "summary": strategy.summary,
        "growth_tokens": strategy.growth_tokens,
        "phases": [{**asdict(phase), "flops": flops} for phase, flops in zip(strategy.phases, strategy.flops, strict=True)],
        "flops": plan.flops,
        "equal_loss_flops": advice.equal_loss_flops(plan),
        "accelerator_hours": machine.hours(plan.flops) if machine else None,
        "expected": asdict(strategy.expected) | {"saving": strategy.expected.saving} if strategy.expected else None,
        "rank_bytes": plan.rank_bytes,
        "disk_bytes": plan.disk_bytes,
        "evidence": [asdict(one) | {"outside": one.distance(advice.budget.size, advice.budget.tokens)} for one in strategy.evidence],
        "warnings": list(strategy.warnings),
        "recipe": _settings(plan),
    }


def _plan(strategy: Strategy, budget: Budget, ranks: int, data: str) -> Plan:
    recipe = _recipe(strategy, budget, ranks, data)
    trunk = recipe.trunk()
    needs = [need_of(run, ranks) for run in trunk]
    kept = sum(need.checkpoint_bytes for need in needs) + (recipe.keep_last + 1) * needs[-1].checkpoint_bytes
    token = TOKEN_BYTES if budget.config["vocab_size"] <= 65_536 else 2 * TOKEN_BYTES
    return Plan(strategy, recipe, max(need.state_bytes + need.activation_bytes for need in needs), kept + token * budget.tokens)


def _recipe(strategy: Strategy, budget: Budget, ranks: int, data: str) -> Recipe:
    first, *rest = strategy.phases
    target_rate = strategy.phases[-1].learning_rate
    stages: list[dict[str, Any]] = [{"tokens": first.tokens}]
    stages += [{"tokens": phase.tokens, "grow": phase.grow, "rate": phase.rate} for phase in rest]
    for stage, phase in zip(stages, strategy.phases, strict=True):
        if phase.learning_rate != target_rate:
            stage["learning_rate"] = phase.learning_rate
    settings = {
        "name": f"{_short(budget.size).lower()}-{strategy.name}",
        "model": with_layers(budget.config, first.layers),
        "data": {"sources": [{"path": data}], "context": budget.context, "validation_tokens": 512 * budget.context},
        "stages": stages,
        "batch_tokens": budget.batch_tokens,
        "micro_batch_tokens": _micro_batch(budget, ranks),
        "optimizer": {"learning_rate": target_rate, "kind": strategy.optimizer},
        "schedule": dict(strategy.schedule),
        "recompute": budget.params > 2e9,
        "compile": True,
        "keep_last": 2,
        "save_every": budget.whole(budget.tokens / 150),
        "validate_every": budget.whole(budget.tokens / 300),
    }
    return parse(Recipe, settings, where=f"the recipe of '{strategy.name}'")


def _micro_batch(budget: Budget, ranks: int) -> int:
    """Tokens of one forward pass over all ranks: a divisor of the batch in which every rank has whole sequences."""
    sequences = budget.batch_tokens // budget.context
    if sequences % ranks:
        raise OutgrowError(f"a batch of {sequences:,} sequences does not divide over {ranks} accelerators; take a divisor of it")
    per_rank = sequences // ranks
    fitting = [count for count in range(1, per_rank + 1) if per_rank % count == 0 and count * budget.context <= MOST_MICRO_TOKENS]
    return (max(fitting) if fitting else 1) * ranks * budget.context


def _settings(plan: Plan) -> dict[str, Any]:
    """A recipe as its file has it: what was set, in the order of its fields."""
    return plan.recipe.model_dump(mode="json", exclude_unset=True)


def _table(advice: Advice) -> Iterator[str]:
    """Strategies side by side."""
    machine = advice.hardware
    header = ["strategy", "layers", "grown at", "FLOPs, same tokens", "expected speed-up", "saving", "FLOPs, same loss"]
    rows = [[*header, *([f"{machine.kind} hours", "days", "hours, same loss"] if machine else []), "memory a rank", "disk"]]
    for plan in advice.plans:
        strategy, same = plan.strategy, advice.equal_loss_flops(plan)
        expected = strategy.expected
        row = [
            strategy.name,
            " > ".join(str(phase.layers) for phase in strategy.phases),
            _short(strategy.growth_tokens) if strategy.growth_tokens else "-",
            f"{plan.flops:.3g}",
            _percent(expected),
            f"{expected.saving:.0%}" if expected else "-",
            f"{same:.3g}" if same else "-",
        ]
        if machine:
            hours = machine.hours(plan.flops)
            row += [f"{hours:,.0f}", f"{hours / machine.count / 24:,.1f}", f"{machine.hours(same):,.0f}" if same else "-"]
        rows.append([*row, f"{plan.rank_bytes / 1e9:,.1f} GB", f"{plan.disk_bytes / 1e9:,.0f} GB"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _details(advice: Advice, plan: Plan, directory: Path | None) -> Iterator[str]:
    strategy, machine = plan.strategy, advice.hardware
    yield f"{strategy.name}: {strategy.summary}"
    for number, (phase, flops) in enumerate(zip(strategy.phases, strategy.flops, strict=True), 1):
        grown = f"{phase.grow} for 0 FLOPs, then " if phase.grow else ""
        hours = f", {machine.hours(flops):,.0f} hours" if machine else ""
        yield f"  {number}. {grown}{phase.layers} layers for {phase.tokens:,} tokens at {phase.learning_rate:g}: {flops:.3e} FLOPs{hours}"
    schedule = strategy.schedule
    decays = f"decayed over the last {schedule.get('decay_tokens', 0):,} tokens"
    ends = f"down to {schedule['final']:.0%}" if schedule["kind"] == "cosine" else decays
    yield f"  {strategy.optimizer}, {schedule['kind']}, warm-up {schedule['warmup_tokens']:,} tokens, {ends}"
    if strategy.expected:
        yield f"  expected: {_percent(strategy.expected)} by {strategy.expected.source}; {strategy.expected.kind}"
    for one in strategy.evidence:
        outside = one.distance(advice.budget.size, advice.budget.tokens)
        yield f"  evidence: {one.source}: {one.says}; {'; '.join(outside) if outside else 'you are inside its range'}"
    for warning in strategy.warnings:
        yield f"  but: {warning}"
    if directory:
        yield from (f"  $ {command}" for command in _commands(plan, directory, machine))


def _commands(plan: Plan, directory: Path, machine: Hardware | None) -> Iterator[str]:
    path = directory / f"{plan.recipe.name}.yaml"
    ranks = machine.count if machine else 1
    yield f"outgrow train {path} --dry-run --ranks {ranks}"
    if ranks == 1:
        yield f"outgrow train {path}"
    elif ranks <= 8:
        yield f"torchrun --nproc-per-node {ranks} --no-python outgrow train {path}"
    else:
        yield f"outgrow submit {path} --nodes {-(-ranks // 8)} --ranks 8"


def _hardware(text: str | None, mfu: float) -> Hardware | None:
    if not 0 < mfu <= 1:
        raise OutgrowError(f"--mfu takes a share of the peak between 0 and 1, such as 0.45, not {mfu:g}")
    if text is None:
        return None
    kind, _, count = text.partition(":")
    if kind.upper() not in PEAKS:
        raise OutgrowError(f"unknown accelerator '{kind}'{suggestion(kind.upper(), PEAKS)}")
    if not (count or "1").isdigit() or int(count or "1") < 1:
        raise OutgrowError(f"--hardware takes a kind and how many, such as h200:64, not '{text}'")
    return Hardware(kind.upper(), int(count or "1"), mfu)


def _best(root: Path) -> Pilot:
    """What a pilot says of stacking once, annealed if it has that, over as many seeds as there are."""
    found = [one for one in pilots(root) if one.operator.startswith("stack")]
    if not found:
        raise OutgrowError(f"'{root}' holds no stacked runs beside scratch runs of the same model, text and seed that reach a common loss")
    return max(found, key=lambda one: (one.annealed, len(one.speed_ups)))


def _as_expected(pilot: Pilot) -> Expected:
    between = pilot.between
    mean = sum(pilot.speed_ups) / len(pilot.speed_ups)
    seeds = f"{len(pilot.speed_ups)} seeds" if len(pilot.speed_ups) > 1 else "one seed, so no interval"
    kind = f"{'annealed' if pilot.annealed else 'un-annealed'}, {seeds}" + (", 95% interval" if between else "")
    source = f"your pilot of {_short(pilot.params)} parameters at {pilot.tokens_per_param:.1f} tokens a parameter"
    return Expected(mean, *(between or (None, None)), source, kind)


def _percent(expected: Expected | None) -> str:
    if expected is None:
        return "-"
    known = expected.low is not None and expected.high is not None
    spread = f" ({expected.low:+.0%} to {expected.high:+.0%})" if known else " (no interval)"
    return f"{expected.speed_up:+.0%}{spread}"


def _short(value: float) -> str:
    """7B, 1.1B, 410M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
