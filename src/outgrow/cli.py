"""The command line: it reads arguments, calls the library, and prints. Bad input is one sentence and a non-zero exit."""

from __future__ import annotations

import ast
import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from outgrow.errors import Interrupted, OutgrowError

app = typer.Typer(
    help="Model growth for LLM pre-training: train a small model, grow it, finish sooner.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Text to packed tokens.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
Runs = Annotated[Path, typer.Option("--runs", help="Where runs and packed data are kept and found again.")]
Recipe = Annotated[Path | None, typer.Option("--recipe", help="A comparison recipe (YAML); the built-in one if not given.")]
Seeds = Annotated[str, typer.Option("--seeds", help="Seeds, such as 0 or 0,1,2; three or more give an interval.")]
Page = Annotated[Path | None, typer.Option("--output", help="Where the report goes; RUNS/report.html if not given.")]

Changes = Annotated[
    list[str] | None, typer.Option("--set", help="A setting in place of the file's: optimizer.learning_rate=0.001. May be repeated.")
]
Track = Annotated[list[str] | None, typer.Option("--track", help="tensorboard (if not given) or wandb. May be repeated.")]
DEFAULT_TRACK = ("tensorboard",)
Operators = Annotated[str | None, typer.Option("--operator", help="A growth operator, or several with their knobs; stack if not given.")]
Factor = Annotated[int | None, typer.Option("--factor", help="Growth factor g, for an operator that has one.")]
Knobs = Annotated[list[str] | None, typer.Option("--knob", help="A knob of a single operator, NAME=VALUE. May be repeated.")]
OperatorFile = Annotated[str | None, typer.Option("--operator-file", help="A Python file with operators of your own; it is run.")]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Open the metadata of a distributed checkpoint, a pickle; DCP's own classes alone.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="The config.json, where none lies beside the weights.")]
FamilyFile = Annotated[Path | None, typer.Option("--family-file", help="A data file (YAML) that describes a family of your own.")]
TokenizerOf = Annotated[str | None, typer.Option("--tokenizer", help="A directory with the tokenizer, where the checkpoint has none.")]
ContextOf = Annotated[int | None, typer.Option("--context", min=2, help="Tokens seen at once; what the config says if not given.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ...; cuda where there is one if not given.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as stored; float32 on a CPU), float32, bfloat16 or float16.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences at once.")]
Share = Annotated[float, typer.Option("--validation-share", help="Share of documents held out, as in training.")]
Corpora = Annotated[
    list[str] | None, typer.Option("--corpus", help="python, site-packages, a file, a folder, hf:owner/name. May be repeated.")
]


@app.command()
def demo(
    runs: Runs = Path("runs"),
    recipe: Recipe = None,
    seeds: Seeds = "0",
    output: Page = None,
) -> None:
    """Train a base, grow it, train the target and the same target from scratch; print and report the speed-up.

    Finished runs are found and not run again; an interrupted demo goes on where it stopped.
    """
    from outgrow.lab.demo import run_demo

    run_demo(recipe, _seeds(seeds), runs, output or runs / "report.html")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe of stages, or one run (YAML).")],
    runs: Runs = Path("runs"),
    change: Changes = None,
    track: Track = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it needs, and train nothing.")] = False,
    ranks: Annotated[int, typer.Option(min=1, help="With --dry-run: over how many ranks.")] = 1,
    days: Annotated[float, typer.Option(min=0.001, help="With --dry-run: how long it may take.")] = 7.0,
) -> None:
    """Train a recipe to its end, stage by stage, or one run and the runs it starts from; resume what was interrupted.

    'torchrun --nproc-per-node N --no-python outgrow train RECIPE' trains on N ranks.
    """
    from outgrow.lab.recipe import read_runs

    found = read_runs(recipe, change or [])
    if dry_run:
        from outgrow.lab.budget import need_lines

        print("\n".join(need_lines(found, ranks, days)))
        return
    from outgrow.checkpoint.ranks import join_ranks, leads
    from outgrow.lab.runs import final_checkpoint
    from outgrow.lab.watch import execute_all

    join_ranks()
    results = execute_all(found, runs, track=tuple(track or DEFAULT_TRACK))
    for run in found if leads() else []:
        result = results[run.identity()]
        cost = f"held-out loss {result.final_loss:.4f} at {run.tokens:,} tokens, {result.flops:.3e} FLOPs"
        print(f"{run.name}: {cost}; {final_checkpoint(run, runs)}")


@app.command()
def submit(
    recipe: Annotated[Path, typer.Argument(help="A recipe of stages, or one run (YAML).")],
    runs: Runs = Path("runs"),
    change: Changes = None,
    track: Track = None,
    cluster: Annotated[str, typer.Option(help="slurm, or local for processes of this machine.")] = "slurm",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks on each node, one a GPU.")] = 8,
    hours: Annotated[float, typer.Option(min=0.01, help="After which the job is stopped, and queued again.")] = 24.0,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of SLURM, NAME=VALUE, such as partition=gpu. May be repeated.")
    ] = None,
    logs: Annotated[Path, typer.Option(help="Where the ranks' output goes.")] = Path("logs"),
    follow: Annotated[bool, typer.Option("--wait", help="Wait for its end.")] = False,
) -> None:
    """Train a recipe as a SLURM job; when it is preempted or out of time it is queued again and goes on."""
    from outgrow.lab.recipe import read_runs
    from outgrow.lab.submit import Job
    from outgrow.lab.submit import submit as handed_over

    read_runs(recipe, change or [])  # mistakes are told here, not in a log
    job = Job(recipe.absolute(), tuple(change or ()), runs.absolute(), tuple(track or DEFAULT_TRACK))
    made = handed_over(job, cluster, logs, nodes, ranks, hours, dict(_knob(text) for text in option or []))
    print(f"job {made.job_id}; its output: {logs}")
    if follow:
        for name, loss in made.results()[0].items():
            print(f"{name}: held-out loss {loss:.4f}")


@app.command()
def study(
    names: Annotated[list[str], typer.Argument(help="Studies of the folder, such as operators, or files (YAML), or all.")],
    scale: Annotated[str, typer.Option(help="A scale of the folder, such as nano, micro or small, or a file (YAML).")] = "nano",
    seeds: Annotated[int, typer.Option(min=1, help="How many, 0 and up; three or more give an interval.")] = 3,
    runs: Annotated[Path | None, typer.Option(help="Where runs and their checkpoints are kept; runs/SCALE if not given.")] = None,
    folder: Annotated[Path, typer.Option(help="Where studies, scales and results lie.")] = Path("studies"),
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each run on a CPU.")] = 1,
    cluster: Annotated[str | None, typer.Option(help="slurm, or local: every run a job of submitit.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="An option of SLURM, NAME=VALUE. May be repeated.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Say what is done and what is left, and run nothing.")] = False,
) -> None:
    """Run what a study lacks: every arm's sweep of the learning rate, then all seeds; killed, the same command goes on.

    Records go to FOLDER/results/SCALE.jsonl, a line a run; 'outgrow report NAME' makes tables and figures of them.
    """
    from outgrow.lab.campaign import run_study
    from outgrow.lab.findings import state_lines
    from outgrow.lab.records import Records
    from outgrow.lab.studies import named, results_file
    from outgrow.lab.study import open_study
    from outgrow.lab.submit import executor

    found = [open_study(name, scale, folder) for name in named(names, folder)]
    records = Records(results_file(folder, scale))
    where = runs or Path("runs") / Path(scale).stem
    submit = None
    if cluster and not show:
        submit = executor(cluster, where / "logs", 1, 1, 24.0, dict(_pair(text, "--option") for text in option or [])).submit
    for asked, size in found:
        if not show:
            run_study(asked, size, seeds, where, records, jobs, threads, lambda line: print(line, flush=True), submit)
        print("\n".join(state_lines(asked, size, seeds, records)))


@app.command()
def fit(
    files: Annotated[list[Path], typer.Argument(help="Tables of runs (CSV, JSON lines), or directories of finished runs.")],
    law: Annotated[str, typer.Option(help="chinchilla, power, parabola, timing or speed-up.")] = "chinchilla",
    column: Annotated[list[str] | None, typer.Option(help="Where a column is, OURS=THEIRS, such as params=N. May be repeated.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Rows that count, COLUMN=PATTERN, such as annealed=true. May be repeated.")] = None,
    by: Annotated[str | None, typer.Option(help="A column whose values are fitted apart, such as flops or operator.")] = None,
    resamples: Annotated[int, typer.Option(min=0, help="Of the bootstrap; none gives no intervals.")] = 1000,
    flops: Annotated[str | None, typer.Option(help="Also the compute-optimal size for so many FLOPs, such as 1e21.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="L-BFGS from Hoffmann's 4,500 starts in place of variable projection.")] = False,
    output: Annotated[Path | None, typer.Option(help="A page (HTML) with tables and residual plots.")] = None,
    figure: Annotated[Path | None, typer.Option(help="The plots as PNG, SVG or PDF.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fit a law to runs: coefficients, 95% intervals, outliers, residual plots.

    chinchilla reads params, tokens and loss; power flops and loss; parabola growth_tokens and loss (--by flops); timing params, tokens
    and growth_tokens; speed-up growth_factor, growth_share, tokens_per_param and speed_up.
    """
    from outgrow.lab import fitting
    from outgrow.lab.advise import quantity

    _picture(figure)
    named, rows = (dict(_pair(text, option) for text in given or []) for given, option in ((column, "--column"), (only, "--only")))
    budget = quantity(flops, "--flops") if flops else None
    found = fitting.fit_files(files, law, named, rows, by, resamples, grid)
    if as_json:
        print(json.dumps([fitting.as_json(one, by, budget) for one in found], indent=2))
    else:
        print("\n".join(line for one in found for line in fitting.fit_lines(one, by, budget)))
    fitting.write_fits(found, by, budget, output, figure)


@app.command()
def advise(
    params: Annotated[str | None, typer.Option(help="Parameters of the target, such as 7B.")] = None,
    tokens: Annotated[str, typer.Option(help="Tokens that may be read, such as 300B.")] = "",
    target: Annotated[Path | None, typer.Option(help="The target's config.json, in place of --params.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Accelerators, such as h200:64; FLOPs alone if not given.")] = None,
    mfu: Annotated[float, typer.Option(help="The share of their peak that training reaches.")] = 0.4,
    pilot: Annotated[Path | None, typer.Option(help="A directory of your own runs, whose speed-up stands in for the paper's.")] = None,
    factor: Factor = None,
    vocab: Annotated[int, typer.Option(min=257, help="Vocabulary, with --params.")] = 32_000,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 2048,
    data: Annotated[str, typer.Option(help="The directory of prepared text that the recipes read.")] = "prepared-text",
    output: Annotated[Path | None, typer.Option(help="A directory for the recipes, one a strategy.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan a target: scratch, G_stack, late expansion and gradual stacking side by side, with costs, evidence and recipes."""
    from outgrow.lab import advise as planner

    if not tokens:
        raise OutgrowError("say how many tokens may be read, with --tokens 300B")
    found = planner.advise(params, tokens, target, hardware, mfu, pilot, factor, vocab, context, data)
    if output:
        planner.write_recipes(found, output)
    print(json.dumps(planner.as_json(found), indent=2) if as_json else "\n".join(planner.advice_lines(found, output)))


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

    checkpoint = open_checkpoint(local(source), _families(family_file), trust_pickle, config)
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
    with _bar() as progress:
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

    families = _families(family_file)
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

    operators = _operators(operator_file)
    if family_file:
        broken = check_family_file(_families(family_file), source, operator, operators)
    else:
        if source:
            raise OutgrowError("--source is what --family-file is held against; give that file too")
        broken = check_everything(operator, family, operators, markdown)
    if broken:
        raise OutgrowError(f"{len(broken)} claims are not backed: {broken[0]}")


@data_app.command("prepare")
def data_prepare(
    sources: Annotated[list[str], typer.Argument(help="python, site-packages, files, folders, hub data sets as hf:owner/name[:config].")],
    output: Annotated[Path, typer.Option(help="The directory to write, for data.sources of a run.")],
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer.json, a directory with one, or a hub id.")] = None,
    vocab: Annotated[int | None, typer.Option(min=257, help="Train a byte-level BPE of this size instead.")] = None,
    validation_share: Annotated[float, typer.Option(help="Share of documents held out.")] = 0.04,
    text_key: Annotated[str, typer.Option(help="Where the text is in jsonl, parquet and hub records.")] = "text",
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens per file.")] = 2**27,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that tokenize; one per core if not given.")] = None,
) -> None:
    """Pack text into shards of tokens with a manifest, each distinct document once and on one side of the split.

    Folders may hold .jsonl, .jsonl.zst, .jsonl.gz, .parquet and text. An interrupted command goes on where it stopped.
    """
    if workers:
        os.environ["RAYON_NUM_THREADS"] = str(workers)  # read once, when the tokenizers' threads start
    from outgrow.data.packing import prepare_sources
    from outgrow.files import read_json

    with _bar() as progress:
        prepare_sources(sources, output, tokenizer, vocab, _share(validation_share), text_key, shard_tokens, progress)
    made = read_json(output / "manifest.json")
    counts = (f"{made['tokens'][part]:,} {part} tokens of {made['documents'][part]:,} documents" for part in ("training", "validation"))
    print(f"{', '.join(counts)}; vocabulary {made['vocab']:,}; {output}")


@app.command()
def report(
    studies: Annotated[
        list[str] | None, typer.Argument(help="Studies, or all; a comparison of --recipe if none.", metavar="[STUDY]...")
    ] = None,
    runs: Runs = Path("runs"),
    recipe: Recipe = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds: 0 or 0,1,2 of a comparison; how many of studies, 3 if not given.")] = None,
    output: Page = None,
    scale: Annotated[str, typer.Option(help="The scale of the studies.")] = "nano",
    folder: Annotated[Path, typer.Option(help="Where studies, scales and results lie.")] = Path("studies"),
    pictures: Annotated[Path | None, typer.Option(help="Where figures of studies go too, as PNG and SVG for papers.")] = None,
) -> None:
    """Write the report of a finished comparison, or of studies, from their files alone: one page that opens offline."""
    if not studies:
        from outgrow.lab.demo import open_recipe, show
        from outgrow.lab.outcome import read_outcome

        found = open_recipe(recipe)
        show(read_outcome(found.comparison, _seeds(seeds or "0"), runs), found, output or runs / "report.html")
        return
    from outgrow.lab.studies import read_studies
    from outgrow.lab.study_page import show_studies, write_studies

    if seeds is not None and not (seeds.isdigit() and int(seeds)):
        raise OutgrowError(f"--seeds of studies says how many, such as 3, not '{seeds}'")
    read = read_studies(studies, scale, int(seeds or 3), folder)
    show_studies(read)
    page = output or Path("runs") / f"studies-{Path(scale).stem}.html"
    write_studies(read, page, pictures)
    print(f"report: {page}")


@data_app.command("tasks")
def data_tasks(
    sources: Annotated[list[str], typer.Argument(help="python, site-packages, files, folders, hub data sets as hf:owner/name[:config].")],
    output: Annotated[Path, typer.Option(help="The directory to write, for 'outgrow eval --tasks'.")],
    count: Annotated[int, typer.Option(min=1, help="Questions of a task, at most.")] = 400,
    validation_share: Share = 0.04,
    text_key: Annotated[str, typer.Option(help="Where the text is in jsonl, parquet and hub records.")] = "text",
) -> None:
    """Make evaluation tasks of the held-out Python of a corpus: a name, a bracket, an indentation to choose, and bits per byte.

    They are jsonl files and task files of lm-evaluation-harness, the same on every machine that has the same text.
    """
    from outgrow.evaluation.local_tasks import write_tasks

    made = write_tasks(sources, output, count, _share(validation_share), text_key)
    print(f"{', '.join(f'{task} {records:,}' for task, records in made.items())}; {output}")


@app.command("eval")
def evaluate(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoint directories or hub ids, grown, trained or others.")],
    tasks: Annotated[
        str, typer.Option(help="paper8, paper-7b, code, task names with commas between, a YAML file or a directory.")
    ] = "code",
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task, at most; all if not given.")] = None,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    tokenizer: TokenizerOf = None,
    context: ContextOf = None,
    corpus: Corpora = None,
    validation_share: Share = 0.04,
    runs: Runs = Path("runs"),
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Let task files run the Python that lies beside them.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run tasks of lm-evaluation-harness on checkpoints, side by side; results are kept in evaluation/ beside the weights.

    The tasks of 'code' are made of held-out Python and need no network; --corpus says of which text, as in data.corpus of a run.
    """
    from outgrow.checkpoint.hub import local
    from outgrow.evaluation import harness, results
    from outgrow.evaluation.local_tasks import made_tasks
    from outgrow.evaluation.suite import needs_made, read_suite

    harness.require()
    suite = read_suite(tasks)
    made = made_tasks(runs / "data", corpus or ["python"], validation_share=_share(validation_share)) if needs_made(suite) else None
    if corpus and not made:
        raise OutgrowError("--corpus has no effect: none of the tasks is made of a corpus; leave it out")
    loaded = harness.load_tasks(suite, made, trust_code)
    found = {
        name: results.evaluate(local(name), suite, loaded, limit, batch_size, tokenizer, context, device, dtype, _told)
        for name in dict.fromkeys(checkpoints)
    }
    if as_json:
        print(json.dumps(found, indent=2))
        return
    _print_table(results.table(suite, dict(zip(_short(list(found)), found.values(), strict=True))))
    if rows := results.reference_table(suite):
        _print_table(rows)
        print(f"reference: {suite.reference.source if suite.reference else ''}")


@app.command()
def loss(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint directory or a hub id.")],
    corpus: Corpora = None,
    validation_share: Share = 0.04,
    everything: Annotated[bool, typer.Option("--all", help="Read all documents, not the held-out ones alone.")] = False,
    documents: Annotated[int | None, typer.Option(min=1, help="Of each corpus, at most; all if not given.")] = None,
    by_file: Annotated[bool, typer.Option("--by-file", help="One row a file, and not one a corpus.")] = False,
    text_key: Annotated[str, typer.Option(help="Where the text is in jsonl, parquet and hub records.")] = "text",
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    tokenizer: TokenizerOf = None,
    context: ContextOf = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure loss and bits per byte on the held-out documents of any text, by source, with standard errors over documents."""
    from outgrow.checkpoint.hub import local
    from outgrow.evaluation.loss import corpus_loss
    from outgrow.evaluation.model import open_model

    opened = open_model(local(checkpoint), tokenizer, context, device, dtype)
    share = None if everything else _share(validation_share)
    rows = corpus_loss(opened, corpus or ["python"], share, text_key, documents, by_file, batch_size)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    shown = [["corpus", "documents", "tokens", "loss, nats per token", "bits per byte"]]
    for name, row in rows.items():
        measured = (
            f"{row[key]:.4f}" + ("" if row[f"{key}_stderr"] is None else f" ± {row[f'{key}_stderr']:.4f}")
            for key in ("loss", "bits_per_byte")
        )
        shown.append([name, f"{row['documents']:,}", f"{row['tokens']:,}", *measured])
    _print_table(shown)


@app.command()
def sample(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint directory or a hub id.")],
    prompt: Annotated[str, typer.Option(help="How the text begins.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="Of the distribution that is drawn from; 0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from so many of the likeliest tokens; from all if not given.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same text.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Texts.")] = 1,
    device: Device = None,
    dtype: Dtype = "auto",
    tokenizer: TokenizerOf = None,
) -> None:
    """Write text with a checkpoint."""
    from outgrow.checkpoint.hub import local
    from outgrow.evaluation.model import open_model
    from outgrow.evaluation.sample import sample as written

    if temperature == 0 and count > 1:
        raise OutgrowError("--count has no effect with --temperature 0, which writes the same text each time; leave either out")
    texts = written(open_model(local(checkpoint), tokenizer, None, device, dtype), prompt, tokens, temperature, top_k, seed, count)
    print("\n\n".join(f"--- {number}\n{text}" for number, text in enumerate(texts, 1)) if count > 1 else texts[0])


@app.command(name="diagnose")
def diagnose_(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoint directories or hub ids; several of one run show how copies part.")],
    documents: Annotated[int, typer.Option(min=0, help="Held-out documents on which each layer is skipped in turn; 0 skips none.")] = 20,
    no_ranks: Annotated[bool, typer.Option("--no-ranks", help="Leave out effective ranks, whose cost is cubic in the width.")] = False,
    corpus: Corpora = None,
    validation_share: Share = 0.04,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    tokenizer: TokenizerOf = None,
    output: Annotated[Path | None, typer.Option(help="A page (HTML) with all figures.")] = None,
    figure: Annotated[Path | None, typer.Option(help="The figures as PNG, SVG or PDF.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what growth left in checkpoints, layer by layer: size, effective rank, likeness of copies, what each layer adds to the loss."""
    from dataclasses import asdict

    from outgrow.checkpoint.hub import local
    from outgrow.evaluation.skipped import held_out
    from outgrow.lab import diagnosing

    _picture(figure)
    names = list(dict.fromkeys(checkpoints))
    texts = held_out(corpus or ["python"], documents, _share(validation_share) or 0.04) if documents else []
    found = {
        short: diagnosing.diagnose_with(local(name), texts, not no_ranks, batch_size, device=device, dtype=dtype, tokenizer=tokenizer)
        for short, name in zip(names if as_json else _short(names), names, strict=True)
    }
    if as_json:
        print(json.dumps(_without_nan({name: asdict(one) for name, one in found.items()}), indent=2))
    else:
        for name, one in found.items():
            print(f"{name}: {one.tokens:,} tokens" + ("" if one.loss is None else f", held-out loss {one.loss:.4f}"))
            _print_table(diagnosing.rows(one))
        print("\n".join(diagnosing.sentences(found)))
    diagnosing.write_diagnosis(found, output, figure)


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

    facts = checkpoint_facts(open_checkpoint(local(path), _families(family_file), trust_pickle, config), context)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(len(name) for name in facts)
        print("\n".join(f"{name:<{width}}  {_plain(value)}" for name, value in facts.items()))


def main() -> None:
    """The console script: what people can mend is one sentence on stderr, without a traceback."""
    try:
        status = app(standalone_mode=False)
        if status == INTERRUPTED:  # typer turns Ctrl-C into a status
            raise KeyboardInterrupt
        sys.exit(status)
    except typer.TyperException as error:  # a mistake in the arguments
        _fail(f"{error}; see 'outgrow --help'", 2)
    except Interrupted as stop:
        _fail(str(stop), INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; nothing unfinished was kept, and the same command goes on from what is whole", INTERRUPTED)
    except OutgrowError as error:
        _fail(str(error), 1)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("outgrow"):
            raise
        _fail(f"this command needs '{error.name}', which is not installed; pip install 'outgrow[train,report]'", 1)
    except OSError as error:
        place = f": '{error.filename}'" if error.filename else ""
        way_out = "; make room, and the same command goes on from its last whole checkpoint" if error.errno == errno.ENOSPC else ""
        _fail(f"{error.strerror or error}{place}{way_out}", 1)


def _fail(message: str, status: int) -> None:
    print(f"outgrow: {message}", file=sys.stderr)
    sys.exit(status)


def _plan(
    checkpoint: Any, operator: str | None, factor: int | None, layers: str | None, knob: list[str] | None, operator_file: str | None
) -> Any:  # fmt: skip
    """The plan that the options ask for."""
    from outgrow.growth.operators import make_plan

    if layers is not None and operator is None:
        operator = "arrange"
    knobs = dict(_knob(text) for text in knob or [])
    given = {"factor": factor, "layers": layers}
    knobs |= {name: value for name, value in given.items() if value is not None}
    return make_plan(operator or "stack", checkpoint.arch, checkpoint.config, knobs, _operators(operator_file))


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise OutgrowError(f"{option} takes NAME=VALUE, not '{text}'")
    return name, value


def _knob(text: str) -> tuple[str, Any]:
    name, value = _pair(text, "--knob")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _operators(file: str | None) -> Any:
    from outgrow.growth.operators import OPERATORS

    if file is None:
        return OPERATORS
    from outgrow.extensions import load_operators

    return load_operators(file)


def _families(file: Path | None) -> Any:
    from outgrow.arch import FAMILIES

    if file is None:
        return FAMILIES
    from outgrow.extensions import load_family

    return (load_family(file), *FAMILIES)


@contextmanager
def _bar() -> Iterator[Any]:
    """A progress bar on a terminal, for what takes longer than a moment; yields what is told (bytes done, bytes in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _measure() -> Any:
    """What measures a receipt's logits; without torch or transformers it says that they are missing."""
    try:
        from outgrow.models.measure import measured
    except ModuleNotFoundError as error:
        reason = {"not measured": f"it needs '{error.name}'; pip install 'outgrow[train]'"}
        return lambda source, target, plan: reason
    return measured


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise OutgrowError(f"--seeds takes distinct whole numbers, such as 0 or 0,1,2, not '{text}'")
    return seeds


def _share(value: float) -> float:
    if not 0 < value < 1:
        raise OutgrowError(f"--validation-share takes a share between 0 and 1, such as 0.04, not {value:g}")
    return value


def _picture(path: Path | None) -> None:
    if path and path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise OutgrowError(f"--figure takes a file that ends in .png, .svg or .pdf, not '{path}'")


def _without_nan(value: Any) -> Any:
    """Plain data in which what is not known is null, as JSON has it."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and value != value else value


def _short(names: list[str]) -> list[str]:
    """Paths without the parts that all of them have in front or behind, so that what tells them apart stays."""
    parts = [Path(name).parts for name in names]
    if len(parts) < 2:
        return [Path(name).name for name in names]
    shortest = min(map(len, parts))
    front = next((i for i in range(shortest) if len({one[i] for one in parts}) > 1), shortest - 1)
    back = next((i for i in range(shortest - front) if len({one[-1 - i] for one in parts}) > 1), shortest - front - 1)
    return ["/".join(one[front : len(one) - back]) for one in parts]


def _told(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_table(rows: list[list[str]]) -> None:
    """Rows of text, a heading first, as wide as the terminal; as wide as they are where there is none."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0])
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.isdigit() or int(number) == 0:
        raise OutgrowError(f"--max-shard-size takes a size such as 500MB or 5GB, not '{text}'")
    return int(number) * units[unit]


def _plain(value: Any) -> str:
    """A fact as people read it: thousands separated, lists joined."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
