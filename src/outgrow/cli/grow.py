"""Commands on checkpoints: grow, verify, learn, check, inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from outgrow.cli.app import app
from outgrow.cli.options import (
    ConfigFile,
    Factor,
    FamilyFile,
    Knobs,
    OperatorFile,
    Operators,
    Runs,
    TrustPickle,
    families_of,
    knob_of,
    operators_of,
)
from outgrow.cli.show import bar, plain
from outgrow.errors import OutgrowError


@app.command()
def grow(
    source: Annotated[str, typer.Argument(help="A checkpoint directory, a safetensors file or a hub id; only read.")],
    target: Annotated[Path, typer.Argument(help="The directory to write.")],
    operator: Operators = None,
    factor: Factor = None,
    layers: Annotated[str | None, typer.Option(help="A layer list, 0-5,0-5,2-5 from 0 or the paper's 12-3456*5-56 from 1.")] = None,
    knob: Knobs = None,
    operator_file: OperatorFile = None,
    family_file: FamilyFile = None,
    plan: Annotated[Path | None, typer.Option(help="A plan (JSON) in place of an operator, such as 'outgrow learn' writes.")] = None,
    optimizer: Annotated[str, typer.Option(help="The optimizer's state beside the weights: reset, carry or fresh-new.")] = "reset",
    dtype: Annotated[str | None, typer.Option(help="Store all weights as float32, bfloat16, ...; each keeps its own if not given.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 500MB or 5GB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that stands at the target.")] = False,
    form: Annotated[str, typer.Option(help="What to write: huggingface, dcp (the source's names) or torchtitan.")] = "huggingface",
    trust_pickle: TrustPickle = False,
    config: ConfigFile = None,
    measure: Annotated[bool, typer.Option(help="Measure the logit difference for the receipt, where memory allows.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
) -> None:
    """Grow a checkpoint from one directory to another.

    Operators are applied one after another: --operator 'stack(factor=2), direct-width(hidden=2048, kv=8)'. docs/operators.md
    lists them. With --form dcp, 'torchrun --nproc-per-node N --no-python outgrow grow ...' writes from N processes.
    """
    from outgrow.checkpoint.describe import plan_lines, receipt_lines
    from outgrow.checkpoint.grow import grow_directory
    from outgrow.checkpoint.hub import local
    from outgrow.checkpoint.huggingface import open_checkpoint
    from outgrow.checkpoint.ranks import join_ranks, leads
    from outgrow.files import read_json
    from outgrow.growth.plan import GrowthPlan

    checkpoint = open_checkpoint(local(source), families_of(family_file), trust_pickle, config)
    if plan:
        if operator or factor is not None or layers or knob:
            raise OutgrowError("--plan says everything; give it alone, without --operator, --factor, --layers or --knob")
        made = GrowthPlan.read(read_json(plan), checkpoint.arch)
    else:
        made = _plan(checkpoint, operator, factor, layers, knob, operator_file)
    if any(stage.is_untrained for stage in made.stages):
        raise OutgrowError(f"the maps of '{operator}' are not trained yet; run 'outgrow learn' first and give its plan with --plan")
    if optimizer not in ("reset", "carry", "fresh-new"):
        raise OutgrowError(f"--optimizer takes reset, carry or fresh-new, not '{optimizer}'")
    if dry_run:
        print("\n".join(plan_lines(made)))
        return
    if form not in ("huggingface", "dcp", "torchtitan"):
        raise OutgrowError(f"--form takes huggingface, dcp or torchtitan, not '{form}'")
    if form != "huggingface":
        join_ranks()
    measuring = _measure() if measure and form == "huggingface" and not checkpoint.held else None
    with bar() as progress:
        grow_directory(checkpoint, target, made, _bytes(max_shard_size), optimizer, dtype, overwrite, form, progress, measuring)
    if not leads():
        return
    print("\n".join([*plan_lines(made, every_tensor=False), *receipt_lines(target)]))
    print(f"written to {target}")


@app.command()
def verify(
    target: Annotated[Path, typer.Argument(help="A directory that outgrow has grown.")],
    source: Annotated[str, typer.Option(help="What it was grown from: a directory, a file or a hub id.")],
    family_file: FamilyFile = None,
    trust_pickle: TrustPickle = False,
    config: ConfigFile = None,
) -> None:
    """Prove that every tensor of a grown checkpoint is, byte for byte, what its stored plan makes of its source."""
    from outgrow.checkpoint.hub import local
    from outgrow.checkpoint.huggingface import open_checkpoint
    from outgrow.checkpoint.verify import verify as verified

    families = families_of(family_file)
    after, before = open_checkpoint(target, families, trust_pickle), open_checkpoint(local(source), families, trust_pickle, config)
    count = verified(after, before)
    print(f"{target}: all {count} tensors are what the plan makes of {source}")


@app.command()
def learn(
    source: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint directory; only read.")],
    plan: Annotated[Path, typer.Argument(help="The plan (JSON) to write, for 'outgrow grow --plan'.")],
    operator: Operators = "learn-depth",
    factor: Factor = None,
    knob: Knobs = None,
    data: Annotated[Path | None, typer.Option(help="The 'data' of the run that the source comes from (YAML).")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 100,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per step.")] = 4096,
    learning_rate: Annotated[float, typer.Option(min=0, help="Learning rate of the maps.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Order of the data.")] = 0,
    runs: Runs = Path("runs"),
) -> None:
    """Train the maps of learn-depth or learn-width with the base frozen, and write them into a plan."""
    from outgrow.checkpoint.huggingface import open_checkpoint
    from outgrow.config import load
    from outgrow.data.config import DataConfig
    from outgrow.files import write_json
    from outgrow.lab.runs import learned_plan
    from outgrow.training.config import LearnConfig

    checkpoint = open_checkpoint(source)
    made = _plan(checkpoint, operator, factor, None, knob, None)
    text = load(DataConfig, data) if data else DataConfig()  # type: ignore[call-arg]
    settings = LearnConfig(steps=steps, batch_tokens=batch_tokens, learning_rate=learning_rate)
    trained = learned_plan(made, source, text, settings, seed, runs)
    write_json(plan, trained.as_json())
    print(f"written to {plan}: {steps} steps, {sum(stage.flops for stage in trained.stages):.3e} FLOPs")


@app.command()
def check(
    operator: Annotated[list[str] | None, typer.Option(help="An operator to check; all if not given. May be repeated.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="A family to check; all if not given. May be repeated.")] = None,
    operator_file: OperatorFile = None,
    family_file: FamilyFile = None,
    source: Annotated[Path | None, typer.Option(help="A checkpoint directory to hold --family-file against; its config is tried.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table as a page.")] = None,
) -> None:
    """Measure what operators claim, on tiny float64 models of every family: preserves, trains, dual gradients.

    With --family-file and --source, first say what the family's table lacks against the checkpoint's files. Exits with 1 where a
    measurement does not back a claim.
    """
    from outgrow.lab.checks import check_everything, check_family_file

    operators = operators_of(operator_file)
    if family_file:
        broken = check_family_file(families_of(family_file), source, operator, operators)
    else:
        if source:
            raise OutgrowError("--source is what --family-file is held against; give that file too")
        broken = check_everything(operator, family, operators, markdown)
    if broken:
        raise OutgrowError(f"{len(broken)} claims are not backed: {broken[0]}")


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A checkpoint directory, a safetensors file or a hub id.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens of context for the FLOPs.")] = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    family_file: FamilyFile = None,
    trust_pickle: TrustPickle = False,
    config: ConfigFile = None,
) -> None:
    """Print what a checkpoint is: family, sizes, parameters, FLOPs, dtypes, files, lineage."""
    from outgrow.checkpoint.describe import checkpoint_facts
    from outgrow.checkpoint.hub import local
    from outgrow.checkpoint.huggingface import open_checkpoint

    facts = checkpoint_facts(open_checkpoint(local(path), families_of(family_file), trust_pickle, config), context)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(len(name) for name in facts)
        print("\n".join(f"{name:<{width}}  {plain(value)}" for name, value in facts.items()))


def _plan(
    checkpoint: Any, operator: str | None, factor: int | None, layers: str | None, knob: list[str] | None, operator_file: str | None
) -> Any:  # fmt: skip
    """The plan that the options ask for."""
    from outgrow.growth.operators import make_plan

    if layers is not None and operator is None:
        operator = "arrange"
    knobs = dict(knob_of(text) for text in knob or [])
    given = {"factor": factor, "layers": layers}
    knobs |= {name: value for name, value in given.items() if value is not None}
    return make_plan(operator or "stack", checkpoint.arch, checkpoint.config, knobs, operators_of(operator_file))


def _measure() -> Any:
    """What measures a receipt's logits; without torch or transformers it says that they are missing."""
    try:
        from outgrow.models.measure import measured
    except ModuleNotFoundError as error:
        reason = {"not measured": f"it needs '{error.name}'; pip install 'outgrow[train]'"}
        return lambda source, target, plan: reason
    return measured


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.isdigit() or int(number) == 0:
        raise OutgrowError(f"--max-shard-size takes a size such as 500MB or 5GB, not '{text}'")
    return int(number) * units[unit]
