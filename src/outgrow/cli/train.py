"""Commands that train: the demo, a recipe, a recipe on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outgrow.cli.app import app
from outgrow.cli.options import (
    DEFAULT_TRACK,
    Changes,
    Comparison,
    OperatorFile,
    Page,
    RecipeFile,
    Runs,
    Seeds,
    SlurmOptions,
    Track,
    pairs,
    seeds_of,
)
from outgrow.errors import OutgrowError


@app.command()
def demo(
    runs: Runs = Path("runs"),
    comparison: Comparison = None,
    seeds: Seeds = "1",
    output: Page = None,
) -> None:
    """Train a base, grow it, train the target and the same target from scratch; print and report the speed-up.

    Finished runs are found and not run again; an interrupted demo goes on where it stopped.
    """
    from outgrow.lab.demo import run_demo

    run_demo(comparison, seeds_of(seeds), runs, output or runs / "report.html")


@app.command()
def train(
    recipe: RecipeFile,
    runs: Runs = Path("runs"),
    change: Changes = None,
    track: Track = None,
    operator_file: OperatorFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it needs, and train nothing.")] = False,
    ranks: Annotated[int | None, typer.Option(min=1, help="With --dry-run: over how many ranks; 1 if not given.")] = None,
    days: Annotated[float | None, typer.Option(min=0.001, help="With --dry-run: how long it may take; 7 if not given.")] = None,
) -> None:
    """Train a recipe to its end, stage by stage, or one run and the runs it starts from; resume what was interrupted.

    'torchrun --nproc-per-node N --no-python outgrow train RECIPE' trains on N ranks. Stopped, it kills them after 30 seconds; with
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT=900 in the environment they have more to save.
    """
    from outgrow.extensions import use_operators
    from outgrow.lab.recipe import read_runs

    use_operators(operator_file)
    found = read_runs(recipe, change or [])
    if dry_run:
        from outgrow.lab.budget import need_lines

        print("\n".join(need_lines(found, ranks or 1, days or 7.0)))
        return
    if ranks or days:
        raise OutgrowError("--ranks and --days are questions to --dry-run and have no effect without it; torchrun starts the ranks")
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
    recipe: RecipeFile,
    runs: Runs = Path("runs"),
    change: Changes = None,
    track: Track = None,
    operator_file: OperatorFile = None,
    cluster: Annotated[str, typer.Option(help="slurm, or local for processes of this machine.")] = "slurm",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks on each node, one a GPU.")] = 8,
    hours: Annotated[float, typer.Option(min=0.01, help="After which the job is stopped, and queued again.")] = 24.0,
    option: SlurmOptions = None,
    logs: Annotated[Path, typer.Option(help="Where the ranks' output goes.")] = Path("logs"),
    follow: Annotated[bool, typer.Option("--wait", help="Wait for its end.")] = False,
) -> None:
    """Train a recipe as a SLURM job; when it is preempted or out of time it is queued again and goes on."""
    from outgrow.extensions import use_operators
    from outgrow.lab.recipe import find_recipe, read_runs
    from outgrow.lab.refusals import told_problems
    from outgrow.lab.submit import Job, executor, submit_with

    if option and cluster != "slurm":
        raise OutgrowError(f"--option is one of SLURM and has no effect with --cluster {cluster}; leave it out")
    operators = use_operators(operator_file)
    found = read_runs(recipe, change or [])
    made = executor(cluster, logs, nodes, ranks, hours, pairs(option, "--option"))
    if wrong := told_problems(found, nodes * ranks):  # here, and not in a log
        raise OutgrowError("; ".join(wrong))
    job = Job(find_recipe(recipe), tuple(change or ()), runs.absolute(), tuple(track or DEFAULT_TRACK), operators)
    handed = submit_with(made, logs)(job)
    print(f"job {handed.job.job_id}; its output: {logs}")
    if follow:
        for name, loss in handed.result().items():
            print(f"{name}: held-out loss {loss:.4f}")
