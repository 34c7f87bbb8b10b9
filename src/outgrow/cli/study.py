"""Commands that measure and plan: studies, reports, fits, advice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from outgrow.cli.app import app
from outgrow.cli.options import AsJson, Comparison, Factor, Folder, OperatorFile, Page, Runs, SlurmOptions, pairs, refuse_given, seeds_of
from outgrow.cli.show import refuse_picture
from outgrow.errors import OutgrowError


@app.command()
def study(
    names: Annotated[list[str], typer.Argument(help="Studies of the folder, such as operators, or files (YAML), or all.")],
    scale: Annotated[str, typer.Option(help="A scale of the folder, such as nano, micro or small, or a file (YAML).")] = "nano",
    seeds: Annotated[int, typer.Option(min=1, help="How many, 0 and up; three or more give an interval.")] = 3,
    runs: Annotated[Path | None, typer.Option(help="Where runs and their checkpoints are kept; runs/SCALE if not given.")] = None,
    folder: Folder = Path("studies"),
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each run on a CPU.")] = 1,
    cluster: Annotated[str | None, typer.Option(help="slurm, or local: every run a job of submitit.")] = None,
    option: SlurmOptions = None,
    operator_file: OperatorFile = None,
    show: Annotated[bool, typer.Option("--list", help="Say what is done and what is left, and run nothing.")] = False,
) -> None:
    """Run what a study lacks: every arm's sweep of the learning rate, then all seeds; killed, the same command goes on.

    Records go to FOLDER/results/SCALE.jsonl, a line a run; 'outgrow report NAME' makes tables and figures of them.
    """
    from outgrow.extensions import use_operators
    from outgrow.lab.campaign import refuse_arms, run_study
    from outgrow.lab.findings import state_lines
    from outgrow.lab.records import Records
    from outgrow.lab.studies import named, results_file
    from outgrow.lab.study import open_study
    from outgrow.lab.submit import executor, submit_with

    if option and cluster != "slurm":
        raise OutgrowError("--option is one of SLURM and has no effect without --cluster slurm; leave it out")
    operators = use_operators(operator_file)
    found = [open_study(name, scale, folder) for name in named(names, folder)]
    records = Records(results_file(folder, scale))
    where = runs or Path("runs") / Path(scale).stem
    submit = None
    if cluster and not show:
        logs = where / "logs"
        submit = submit_with(executor(cluster, logs, 1, 1, 24.0, pairs(option, "--option")), logs)
    for asked, size in found:
        if show:
            refuse_arms(asked, size)
        else:
            run_study(asked, size, seeds, where, records, jobs, threads, lambda line: print(line, flush=True), submit, operators)
        print("\n".join(state_lines(asked, size, seeds, records)))


@app.command()
def report(
    studies: Annotated[list[str] | None, typer.Argument(help="Studies, or all; a comparison if none.", metavar="[STUDY]...")] = None,
    runs: Runs = Path("runs"),
    comparison: Comparison = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many, 0 and up: 1 of a comparison and 3 of studies if not given; of a comparison also which.")
    ] = None,
    output: Page = None,
    scale: Annotated[str, typer.Option(help="The scale of the studies.")] = "nano",
    folder: Folder = Path("studies"),
    operator_file: OperatorFile = None,
    pictures: Annotated[Path | None, typer.Option(help="Where figures of studies go too, as PNG and SVG for papers.")] = None,
    against: Annotated[str | None, typer.Option(help="An arm with which all others are compared, in place of what the study says.")] = None,
) -> None:
    """Write the report of a finished comparison, or of studies, from their files alone: one page that opens offline."""
    if not studies:
        if against or pictures or operator_file:
            raise OutgrowError("--against, --pictures and --operator-file are of studies; name the studies too")
        from outgrow.lab.demo import open_comparison, show
        from outgrow.lab.outcome import read_outcome

        found, tried = open_comparison(comparison)
        show(read_outcome(found, seeds_of(seeds or "1"), runs), output or runs / "report.html", tried)
        return
    if comparison:
        raise OutgrowError("--comparison is a report of its own; name studies, or give it, and not both")
    from outgrow.extensions import use_operators
    from outgrow.lab.studies import read_studies
    from outgrow.lab.study_page import show_studies, write_studies

    count = len(seeds_of(seeds or "3"))
    if seeds_of(seeds or "3") != tuple(range(count)):
        raise OutgrowError(f"--seeds of studies says how many, such as 3, not '{seeds}'")
    use_operators(operator_file)
    read = read_studies(studies, scale, count, folder, against)
    show_studies(read)
    page = output or runs / f"studies-{Path(scale).stem}.html"
    write_studies(read, page, pictures)
    print(f"report: {page}")


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
    as_json: AsJson = False,
    operator_file: OperatorFile = None,
) -> None:
    """Fit a law to runs: coefficients, 95% intervals, outliers, residual plots.

    chinchilla reads params, tokens and loss; power flops and loss; parabola growth_tokens and loss (--by flops); timing params, tokens
    and growth_tokens; speed-up growth_factor, growth_share, tokens_per_param and speed_up.
    """
    from outgrow.extensions import use_operators
    from outgrow.lab import fitting
    from outgrow.lab.advise import quantity

    use_operators(operator_file)
    refuse_picture(figure)
    named, rows = pairs(column, "--column"), pairs(only, "--only")
    budget = quantity(flops, "--flops") if flops else None
    found = fitting.fit_files(files, law, named, rows, by, resamples, grid)
    if as_json:
        print(json.dumps([fitting.as_json(one, by, budget) for one in found], indent=2))
    else:
        print("\n".join(line for one in found for line in fitting.fit_lines(one, by, budget)))
    fitting.write_fits(found, by, budget, output, figure)


@app.command()
def advise(
    command: typer.Context,
    tokens: Annotated[str, typer.Option(help="Tokens that may be read, such as 300B.")],
    params: Annotated[str | None, typer.Option(help="Parameters of the target, such as 7B.")] = None,
    target: Annotated[Path | None, typer.Option(help="The target's config.json, in place of --params.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Accelerators, such as h200:64; FLOPs alone if not given.")] = None,
    mfu: Annotated[float, typer.Option(help="The share of their peak that training reaches.")] = 0.4,
    pilot: Annotated[
        Path | None, typer.Option(help="A directory of your own runs, or a study's records, in place of the paper's table.")
    ] = None,
    factor: Factor = None,
    vocab: Annotated[int, typer.Option(min=257, help="Vocabulary, with --params.")] = 32_000,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of a sequence; 2,048, or what the target takes, if not given.")] = None,
    batch: Annotated[str | None, typer.Option(help="Tokens of a step, such as 512K; the paper's 2,097,152, fewer in short runs.")] = None,
    data: Annotated[str, typer.Option(help="The directory of prepared text that the recipes read.")] = "prepared-text",
    output: Annotated[Path | None, typer.Option(help="A directory for the recipes, one a strategy.")] = None,
    as_json: AsJson = False,
    operator_file: OperatorFile = None,
) -> None:
    """Plan a target: scratch, G_stack, late expansion and gradual stacking side by side, with costs, evidence and recipes."""
    from outgrow.extensions import use_operators
    from outgrow.lab import advice
    from outgrow.lab import advise as planner

    use_operators(operator_file)
    if target:
        refuse_given(command, "--vocab", "with --target, whose config has it")
    if hardware is None:
        refuse_given(command, "--mfu", "without --hardware")
    found = planner.advise(params, tokens, target, hardware, mfu, pilot, factor, vocab, context, data, batch)
    if output:
        planner.write_recipes(found, output)
    print(json.dumps(advice.as_json(found, output), indent=2) if as_json else "\n".join(advice.advice_lines(found, output)))
