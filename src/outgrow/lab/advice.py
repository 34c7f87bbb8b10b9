"""Advice as text for people and as JSON for machines."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from outgrow.arch import arch_for, parameter_counts
from outgrow.lab.advise import Advice, Hardware, Plan, recipe_file, settings_of, short
from outgrow.scaling.shapes import with_layers
from outgrow.scaling.strategies import Expected
from outgrow.training.accelerators import ACCELERATORS


def advice_lines(advice: Advice, directory: Path | None) -> Iterator[str]:
    """The advice, as text: the target, the strategies side by side, and each with its evidence and commands."""
    budget, machine = advice.budget, advice.hardware
    sizes = arch_for(budget.config).sizes(budget.config)
    heads = sizes["kv"] * sizes.get("group", 1)
    asked = f" (asked for {short(advice.asked_params)}, which laws and tables are read with)" if advice.asked_params else ""
    shape = f"{budget.layers} layers, hidden {sizes['hidden']:,}, ffn {sizes.get('ffn', 0):,}, {heads} heads, {sizes['kv']} kv heads"
    yield f"target: {shape}: {short(budget.params)} parameters{asked}"
    batch = f"batch {budget.batch_tokens:,}, context {budget.context:,}"
    yield f"budget: {short(budget.tokens)} tokens, {budget.tokens / budget.size:.1f} a parameter; {batch}"
    yield f"6ND: {6 * budget.size * budget.tokens:.3g} FLOPs; those below count what multiplies, the head among it, and attention"
    if machine:
        peak = f"{ACCELERATORS[machine.kind].flops / 1e12:,.0f} TFLOP/s"
        yield f"machine: {machine.count} x {machine.kind} at {machine.mfu:.0%} of {peak} (the MFU is given, not measured)"
    yield ""
    yield from _table(advice)
    for plan in advice.plans:
        yield ""
        yield from _details(advice, plan, directory)


def as_json(advice: Advice, directory: Path | None = None) -> dict[str, Any]:
    """The advice, for machines; with the commands for recipes that were written to a directory."""
    budget, machine = advice.budget, advice.hardware
    return {
        "target": {"config": dict(budget.config), "params": budget.params, "asked_params": advice.asked_params},
        "tokens": budget.tokens,
        "batch_tokens": budget.batch_tokens,
        "context": budget.context,
        "flops_6ND": 6 * budget.size * budget.tokens,
        "hardware": asdict(machine) if machine else None,
        "pilot": asdict(advice.pilot) | {"between": advice.pilot.between} if advice.pilot else None,
        "strategies": [_plan_json(advice, plan, directory) for plan in advice.plans],
    }


def _plan_json(advice: Advice, plan: Plan, directory: Path | None) -> dict[str, Any]:
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
        "fits_in_memory": advice.fits(plan),
        "warnings": list(_warnings(advice, plan)),
        "recipe": settings_of(plan),
        "recipe_file": str(recipe_file(plan, directory)) if directory else None,
        "commands": list(_commands(plan, directory, machine)) if directory else [],
    }


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
            short(strategy.growth_tokens) if strategy.growth_tokens else "-",
            f"{plan.flops:.3g}",
            _percent(expected) + ("" if not expected or expected.at_equal_loss else "*"),
            (f"{expected.saving:.0%}" + ("" if expected.at_equal_loss else "*")) if expected else "-",
            f"{same:.3g}" if same else "-",
        ]
        if machine:
            hours = machine.hours(plan.flops)
            row += [f"{hours:,.0f}", f"{hours / machine.count / 24:,.1f}", f"{machine.hours(same):,.0f}" if same else "-"]
        memory = f"{plan.rank_bytes / 1e9:,.1f} GB" + ("" if advice.fits(plan) else "!")
        rows.append([*row, memory, f"{plan.disk_bytes / 1e9:,.0f} GB"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    if any(plan.strategy.expected and not plan.strategy.expected.at_equal_loss for plan in advice.plans):
        yield "* at equal tokens, and not at equal loss"
    if machine and not all(map(advice.fits, advice.plans)):
        has = f"{ACCELERATORS[machine.kind].bytes / 1e9:,.0f} GB of a {machine.kind}"
        yield f"! more than the {has}: take more ranks, or a smaller micro_batch_tokens"


def _warnings(advice: Advice, plan: Plan) -> Iterator[str]:
    """What speaks against a plan on this machine."""
    yield from plan.strategy.warnings
    if advice.hardware and not advice.fits(plan):
        kind = advice.hardware.kind
        needs, has = f"{plan.rank_bytes / 1e9:,.1f} GB on each rank", f"{ACCELERATORS[kind].bytes / 1e9:,.0f} GB"
        yield f"it needs {needs}, and a {kind} has at most {has}: take more of them"


def _details(advice: Advice, plan: Plan, directory: Path | None) -> Iterator[str]:
    strategy, machine = plan.strategy, advice.hardware
    yield f"{strategy.name}: {strategy.summary}"
    for number, (phase, flops) in enumerate(zip(strategy.phases, strategy.flops, strict=True), 1):
        grown = f"{phase.grow} for 0 FLOPs, then " if phase.grow else ""
        hours = f", {machine.hours(flops):,.0f} hours" if machine else ""
        config = with_layers(advice.budget.config, phase.layers)
        size = short(parameter_counts(arch_for(config), config).total)
        what = f"{phase.layers} layers ({size} parameters) for {phase.tokens:,} tokens at {phase.learning_rate:g}"
        yield f"  {number}. {grown}{what}: {flops:.3e} FLOPs{hours}"
    schedule = strategy.schedule
    decays = f"decayed over the last {schedule.get('decay_tokens', 0):,} tokens"
    ends = f"down to {schedule['final']:.0%}" if schedule["kind"] == "cosine" else decays
    yield f"  {strategy.optimizer}, {schedule['kind']}, warm-up {schedule['warmup_tokens']:,} tokens, {ends}"
    if strategy.expected:
        yield f"  expected: {_percent(strategy.expected)} by {strategy.expected.source}; {strategy.expected.kind}"
    for one in strategy.evidence:
        outside = one.distance(advice.budget.size, advice.budget.tokens)
        yield f"  evidence: {one.source}: {one.says}; {'; '.join(outside) if outside else 'you are inside its range'}"
    for warning in _warnings(advice, plan):
        yield f"  but: {warning}"
    if directory:
        yield from (f"  $ {command}" for command in _commands(plan, directory, machine))


def _commands(plan: Plan, directory: Path, machine: Hardware | None) -> Iterator[str]:
    path, ranks = shlex.quote(str(recipe_file(plan, directory))), machine.count if machine else 1
    for source in plan.recipe.data.sources:
        if not Path(source.path).exists():
            yield f"outgrow data prepare TEXTS --tokenizer TOKENIZER --output {shlex.quote(source.path)}"
    yield f"outgrow train {path} --dry-run --ranks {ranks}"
    if ranks == 1:
        yield f"outgrow train {path}"
    elif ranks <= 8:
        yield f"torchrun --nproc-per-node {ranks} --no-python outgrow train {path}"
    else:
        per_node = max(count for count in range(1, 9) if ranks % count == 0)
        yield f"outgrow submit {path} --nodes {ranks // per_node} --ranks {per_node}"


def _percent(expected: Expected | None) -> str:
    if expected is None:
        return "-"
    known = expected.low is not None and expected.high is not None
    spread = f" ({expected.low:+.0%} to {expected.high:+.0%})" if known else " (no interval)"
    return f"{expected.speed_up:+.0%}{spread}"
