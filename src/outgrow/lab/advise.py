"""The planner: strategies for a target and a budget, what each costs on real machines, and the recipes and commands to run it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from outgrow.arch import positions
from outgrow.config import parse, suggestion
from outgrow.errors import OutgrowError
from outgrow.files import read_json
from outgrow.lab.budget import need_of
from outgrow.lab.recipe import Recipe
from outgrow.lab.refusals import told_problems
from outgrow.lab.table import Pilot, pilot_mixing, pilots
from outgrow.scaling.shapes import target_config, with_layers
from outgrow.scaling.strategies import Budget, Evidence, Expected, Strategy, advised_factor, budget_of, growth_share, strategies
from outgrow.training.accelerators import ACCELERATORS

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
MOST_MICRO_TOKENS = 8192  # per rank and forward pass
CONTEXT = 2048  # tokens of a sequence that are planned with
TOKEN_BYTES = 2  # on disk, of vocabularies up to 65,536; 4 above


@dataclass(frozen=True)
class Hardware:
    """So many accelerators of a kind, and the share of their peak that training reaches."""

    kind: str
    count: int
    mfu: float

    def hours(self, flops: float) -> float:
        """Accelerator hours, over all of them."""
        return flops / (ACCELERATORS[self.kind].flops * self.mfu) / 3600


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
        """FLOPs to scratch's loss, if the expected speed-up comes true; None where it is not one at equal loss."""
        expected = plan.strategy.expected
        return self.scratch_flops / (1 + expected.speed_up) if expected and expected.at_equal_loss else None

    def fits(self, plan: Plan) -> bool:
        """Does a rank's memory hold a plan, as far as that is known?"""
        return not self.hardware or plan.rank_bytes <= ACCELERATORS[self.hardware.kind].bytes


def advise(
    params: str | None,
    tokens: str,
    target: Path | None = None,
    hardware: str | None = None,
    mfu: float = 0.4,
    pilot: Path | None = None,
    factor: int | None = None,
    vocab: int = 32_000,
    context: int | None = None,
    data: str = "prepared-text",
    batch: str | None = None,
) -> Advice:
    """Plans a target model.

    Args:
        params: its size, such as `7B`; or
        target: its config.json.
        tokens: that may be read, such as `300B`.
        hardware: `h200:64`; without it costs are FLOPs alone.
        mfu: share of the peak that training reaches.
        pilot: a directory of runs, or a study's records; their speed-up stands in for the paper's.
        factor: g; 4 where that divides.
        vocab: of a target given by its size.
        context: tokens of a sequence; 2,048, or what the target takes at once if that is less.
        data: the directory of prepared text that the recipes read.
        batch: tokens of a step, such as `512K`.
    """
    if (params is None) == (target is None):
        raise OutgrowError("say what to train with --params 7B, or with --target CONFIG.JSON; one of the two")
    wanted = quantity(params, "--params") if params else None
    given = read_json(target) if target else None
    if target and not isinstance(given, dict):
        raise OutgrowError(f"'{target}' must hold a JSON object, a model's config.json")
    context = context or min(CONTEXT, positions(given or {}) or CONTEXT)
    config = dict(given) if given else target_config(wanted or 0, vocab, context)
    machine = _hardware(hardware, mfu)
    budget = budget_of(config, quantity(tokens, "--tokens"), context, wanted, round(quantity(batch, "--batch")) if batch else None)
    chosen = factor or advised_factor(budget)
    measured = _best(pilot, chosen, growth_share(budget)) if pilot else None
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
        path = recipe_file(plan, directory)
        title = f"# {plan.strategy.name}: {plan.strategy.summary}. Planned by outgrow advise.\n"
        text = title + yaml.safe_dump(settings_of(plan), sort_keys=False)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise OutgrowError(f"'{path}' exists already and differs; give another --output, or remove it")
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def _plan(strategy: Strategy, budget: Budget, ranks: int, data: str) -> Plan:
    recipe = _recipe(strategy, budget, ranks, data)
    trunk = recipe.trunk()
    if wrong := told_problems(trunk, ranks):
        raise OutgrowError(f"the recipe of '{strategy.name}' cannot be trained: {wrong[0]}")
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
        "name": f"{short(budget.size).lower()}-{strategy.name}",
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
        near = math.ceil(sequences / ranks) * ranks * budget.context
        raise OutgrowError(f"a batch of {sequences:,} sequences does not divide over {ranks} accelerators; --batch {near} does")
    per_rank = sequences // ranks
    fitting = [count for count in range(1, per_rank + 1) if per_rank % count == 0 and count * budget.context <= MOST_MICRO_TOKENS]
    return (max(fitting) if fitting else 1) * ranks * budget.context


def settings_of(plan: Plan) -> dict[str, Any]:
    """A recipe as its file has it: what was set, in the order of its fields."""
    return plan.recipe.model_dump(mode="json", exclude_unset=True)


def recipe_file(plan: Plan, directory: Path) -> Path:
    """Where a plan's recipe is written."""
    return directory / f"{plan.recipe.name}.yaml"


def _hardware(text: str | None, mfu: float) -> Hardware | None:
    if not 0 < mfu <= 1:
        raise OutgrowError(f"--mfu takes a share of the peak between 0 and 1, such as 0.45, not {mfu:g}")
    if text is None:
        return None
    kind, _, count = text.partition(":")
    if kind.upper() not in ACCELERATORS:
        raise OutgrowError(f"unknown accelerator '{kind}'{suggestion(kind.upper(), ACCELERATORS)}")
    if not (count or "1").isdecimal() or int(count or "1") < 1:
        raise OutgrowError(f"--hardware takes a kind and how many, such as h200:64, not '{text}'")
    return Hardware(kind.upper(), int(count or "1"), mfu)


def _best(root: Path, factor: int, share: float) -> Pilot:
    """What a pilot says of stacking once: under AdamW and annealed if it has that, by a factor and at an instant near those planned."""
    known = [one for one in pilots(root) if one.operator.startswith("stack") and one.growth_share > 0]
    found = [one for one in known if one.hops == 1 and math.isfinite(one.growth_factor)]
    if not found:
        raise OutgrowError(
            f"'{root}' shows no speed-up of stacking: that takes a stacked run and scratch runs of the same model, text, batch, optimizer "
            "and seed whose held-out losses overlap, so two scratch budgets, or validations at full rate"
        )

    def far(one: Pilot) -> tuple[float, ...]:
        off = (abs(math.log(found / wanted)) for found, wanted in ((one.growth_factor, factor), (one.growth_share, share)))
        other = (one.optimizer != "adamw", not one.annealed)
        return *other, *(round(by, 1) for by in off), not one.restarts, one.state != "reset", -one.params, -len(one.speed_ups)

    return min(found, key=far)


def _as_expected(pilot: Pilot) -> tuple[Expected, Evidence]:
    between = pilot.between
    mean = sum(pilot.speed_ups) / len(pilot.speed_ups)
    seeds = f"{len(pilot.speed_ups)} seeds" if len(pilot.speed_ups) > 1 else "one seed, so no interval"
    kind = f"{'annealed' if pilot.annealed else 'un-annealed'}, {seeds}" + (", 95% interval" if between else "")
    source = f"your pilot of {short(pilot.params)} parameters at {pilot.tokens_per_param:.1f} tokens a parameter"
    grown = f"{pilot.operator} at {pilot.growth_share:.0%} of the run under {pilot.optimizer}, {pilot.batch_tokens:,} tokens a step"
    evidence = Evidence("your pilot", f"{mean:+.1%} by {grown}, {kind}", ((pilot.params, pilot.tokens_per_param),))
    return Expected(mean, *(between or (None, None)), f"{source}, {grown}", kind), evidence


def short(value: float) -> str:
    """7B, 1.1B, 410M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
