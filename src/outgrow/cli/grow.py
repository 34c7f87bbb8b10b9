"""Commands on checkpoints: grow, verify, learn, check, inspect."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from outgrow.cli.app import app
from outgrow.cli.options import (
    AsJson,
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
from outgrow.errors import Interrupted, OutgrowError


@app.command()
def grow(
    source: Annotated[str, typer.Argument(help="A checkpoint directory, a safetensors file or a hub id; only read.")],
    target: Annotated[str, typer.Argument(help="The directory to write.")],
    operator: Operators = None,
    factor: Factor = None,
    layers: Annotated[str | None, typer.Option(help="A layer list, 0-5,0-5,2-5 from 0 or the paper's 12-3456*5-56 from 1.")] = None,
    knob: Knobs = None,
    operator_file: OperatorFile = None,
    family_file: FamilyFile = None,
    plan: Annotated[Path | None, typer.Option(help="A plan (JSON) in place of an operator, such as 'outgrow learn' writes.")] = None,
    optimizer: Annotated[
        Literal["reset", "carry", "fresh-new"], typer.Option(help="What becomes of the optimizer's state beside the weights.")
    ] = "reset",
    dtype: Annotated[str | None, typer.Option(help="Store all weights as float32, bfloat16, ...; each keeps its own if not given.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest weight file, such as 500MB; 5GB if not given.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that stands at the target.")] = False,
    form: Annotated[
        Literal["huggingface", "dcp", "torchtitan"], typer.Option(help="What to write; dcp has the source's names, torchtitan its own.")
    ] = "huggingface",
    trust_pickle: TrustPickle = False,
    config: ConfigFile = None,
    measure: Annotated[
        bool | None, typer.Option(help="Measure the logit difference for the receipt; if not given, of small models that take arithmetic.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
) -> None:
    """Grow a checkpoint from one directory to another.

    Operators are applied one after another: --operator 'stack(factor=2), direct-width(hidden=2048, kv=8)'. docs/operators.md
    lists them. With --form dcp, 'torchrun --nproc-per-node N --no-python outgrow grow ...' writes from N processes.
    """
    from outgrow.checkpoint.describe import plan_lines, receipt_lines
    from outgrow.checkpoint.grow import grow_directory, refuse_place, settle
    from outgrow.checkpoint.hub import local
    from outgrow.checkpoint.huggingface import open_checkpoint
    from outgrow.checkpoint.ranks import join_ranks, leads, started
    from outgrow.files import read_json
    from outgrow.growth.apply import makes_copies_only
    from outgrow.growth.plan import GrowthPlan

    if not target:
        raise OutgrowError("TARGET is empty; give the directory to write")
    place = Path(target)
    families = families_of(family_file)
    checkpoint = open_checkpoint(local(source), families, trust_pickle, config)
    if plan:
        if operator or factor is not None or layers or knob or operator_file:
            raise OutgrowError("--plan says everything; give it alone, without --operator, --factor, --layers, --knob or --operator-file")
        content = read_json(plan)
        made = GrowthPlan.from_json(content.get("plan", content) if isinstance(content, dict) else content, families)  # a receipt's too
    else:
        made = _plan(checkpoint, operator, factor, layers, knob, operator_file)
    made.refuse_untrained()
    if form != "huggingface" and max_shard_size:
        raise OutgrowError(f"--max-shard-size has no effect with --form {form}; leave it out")
    if measure and (form != "huggingface" or checkpoint.held):
        raise OutgrowError("--measure has no effect with distributed checkpoints, which are not measured; leave it out")
    if form == "huggingface" and started() > 1:
        raise OutgrowError(
            f"torchrun started {started()} processes, and one writes a Hugging Face directory; leave torchrun out, or use --form dcp"
        )
    largest = _bytes(max_shard_size or "5GB")
    if dry_run:
        layout, _ = settle(checkpoint, made, largest, optimizer, dtype, form)
        refuse_place(checkpoint, place, layout, overwrite)
        print("\n".join(plan_lines(made)))
        return
    if form != "huggingface":
        join_ranks()
    claims_nothing = not made.claims.preserves and dtype is None and makes_copies_only(made)
    measuring = None if form != "huggingface" or checkpoint.held else _measure(measure, claims_nothing)
    try:
        with bar() as progress:
            grow_directory(checkpoint, place, made, largest, optimizer, dtype, overwrite, form, progress, measuring)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; '{place}' is as it was before, and the same command begins anew") from None
    if not leads():
        return
    print("\n".join([*plan_lines(made, every_tensor=False), *receipt_lines(place)]))
    print(f"written to {place}")


@app.command()
def verify(
    target: Annotated[Path, typer.Argument(help="A directory that outgrow has grown.")],
    source: Annotated[str, typer.Option(help="What it was grown from: a directory, a file or a hub id.")],
    family_file: FamilyFile = None,
    trust_pickle: TrustPickle = False,
    config: ConfigFile = None,
) -> None:
    """Prove that every tensor of a grown checkpoint is, byte for byte, what its stored plan makes of its source."""
    from outgrow import api

    count = api.verify(target, source, trust_pickle=trust_pickle, config=config, families=families_of(family_file))
    print(f"{target}: all {count} tensors are what the plan makes of {source}")


@app.command()
def learn(
    source: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint directory; only read.")],
    plan: Annotated[Path, typer.Argument(help="The plan (JSON) to write, for 'outgrow grow --plan'.")],
    operator: Annotated[str, typer.Option(help="learn-depth or learn-width with its knobs, and operators around it.")] = "learn-depth",
    factor: Factor = None,
    knob: Knobs = None,
    operator_file: OperatorFile = None,
    data: Annotated[Path | None, typer.Option(help="The 'data' of the run that the source comes from (YAML).")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 100,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per step.")] = 4096,
    learning_rate: Annotated[float, typer.Option(min=0, help="Learning rate of the maps.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Order of the data.")] = 0,
    runs: Runs = Path("runs"),
) -> None:
    """Train the maps of learn-depth or learn-width with the base frozen, and write them into a plan."""
    from outgrow.checkpoint.huggingface import open_checkpoint
    from outgrow.config import load, parse
    from outgrow.data.config import DataConfig
    from outgrow.files import write_json
    from outgrow.lab.execute import learned_plan
    from outgrow.training.config import LearnConfig

    checkpoint = open_checkpoint(source)
    if plan.exists() or not plan.absolute().parent.is_dir():
        raise OutgrowError(f"'{plan}' exists already, or its directory does not; choose another place")
    made = _plan(checkpoint, operator, factor, None, knob, operator_file)
    text = load(DataConfig, data) if data else DataConfig()  # type: ignore[call-arg]
    given = {"steps": steps, "batch_tokens": batch_tokens, "learning_rate": learning_rate}
    settings = parse(LearnConfig, given, where="outgrow learn")
    trained = learned_plan(made, source, text, settings, seed, runs)
    write_json(plan, trained.as_json())
    print(f"written to {plan}: {steps} steps, {sum(stage.flops for stage in trained.stages):.3e} FLOPs")


@app.command()
def check(
    operator: Annotated[list[str] | None, typer.Option(help="An operator to check; all if not given. May be repeated.")] = None,
    knob: Knobs = None,
    family: Annotated[list[str] | None, typer.Option(help="A family to check; all if not given. May be repeated.")] = None,
    operator_file: OperatorFile = None,
    family_file: FamilyFile = None,
    source: Annotated[Path | None, typer.Option(help="A checkpoint directory to hold --family-file against; its config is tried.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table as a page.")] = None,
) -> None:
    """Measure what operators claim, on tiny float64 models of every family: preserves, trains, dual gradients.

    With --family-file and --source, first say what the family's table lacks against the checkpoint's files. Exits with 1 where a
    measurement does not back a claim, and where an operator that is named is refused everywhere.
    """
    from outgrow.lab.check_page import check_everything, check_family_file

    if knob and len(operator or ()) != 1:
        raise OutgrowError("--knob is a knob of a single operator; give one --operator")
    operators, knobs = operators_of(operator_file), dict(knob_of(text) for text in knob or []) or None
    if family_file:
        if family or markdown:
            raise OutgrowError(f"--{'family' if family else 'markdown'} has no effect with --family-file; leave it out")
        broken = check_family_file(families_of(family_file), source, operator, operators, knobs)
    else:
        if source:
            raise OutgrowError("--source is what --family-file is held against; give that file too")
        broken = check_everything(operator, family, operators, markdown, knobs)
    if broken:
        raise OutgrowError(f"{len(broken)} claims are not backed: {broken[0]}")


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A checkpoint directory, a safetensors file or a hub id.")],
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of context for the FLOPs; what the config says if not given.")] = None,
    as_json: AsJson = False,
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
    return make_plan("stack" if operator is None else operator, checkpoint.arch, checkpoint.config, knobs, operators_of(operator_file))


MEASURED_UNASKED = 1 << 30  # bytes of memory that measuring may take without being asked for


def _measure(asked: bool | None, copies_only: bool) -> Any:
    """What measures a receipt's logits, or says why it does not."""
    reasons = {
        "it was not asked for": asked is False,
        "copies are byte for byte, and need no torch; --measure measures them": asked is None and copies_only,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), "")
    if not reason:
        try:
            from outgrow.models.measure import measured
        except ModuleNotFoundError as error:
            reason = f"it needs '{error.name}'; pip install 'outgrow[train]'"
        else:
            return partial(measured, most_bytes=None if asked else MEASURED_UNASKED)
    return lambda source, target, plan: {"not measured": reason}


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not (number.isascii() and number.isdigit()) or int(number) == 0:
        raise OutgrowError(f"--max-shard-size takes a size such as 500MB or 5GB, not '{text}'")
    return int(number) * units[unit]
