"""The command line: it reads arguments, calls the library, and prints. Bad input is one sentence and a non-zero exit."""

from __future__ import annotations

import errno
import json
import sys
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
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
Runs = Annotated[Path, typer.Option("--runs", help="Where runs and packed data are kept and found again.")]
Recipe = Annotated[Path | None, typer.Option("--recipe", help="A comparison recipe (YAML); the built-in one if not given.")]
Seeds = Annotated[str, typer.Option("--seeds", help="Seeds, such as 0 or 0,1,2; three or more give an interval.")]
Page = Annotated[Path | None, typer.Option("--output", help="Where the report goes; RUNS/report.html if not given.")]


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
    config: Annotated[Path, typer.Argument(help="A run (YAML): model or start, data, tokens, optimizer, schedule.")],
    runs: Runs = Path("runs"),
) -> None:
    """Train one run to its end, and first the runs it starts from; resume what was interrupted."""
    from outgrow.config import load
    from outgrow.lab.runs import final_checkpoint
    from outgrow.lab.watch import execute_all
    from outgrow.training.config import RunConfig

    run = load(RunConfig, config)
    result = execute_all([run], runs)[run.identity()]
    print(f"held-out loss {result.final_loss:.4f} at {run.tokens:,} tokens, {result.flops:.3e} FLOPs; {final_checkpoint(run, runs)}")


@app.command()
def grow(
    source: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint directory; only read.")],
    target: Annotated[Path, typer.Argument(help="The directory to write; must not exist.")],
    operator: Annotated[str, typer.Option(help="The growth operator.")] = "stack",
    factor: Annotated[int | None, typer.Option(help="Growth factor g: how often the layers are repeated.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 500MB or 5GB.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
) -> None:
    """Grow a checkpoint from one directory to another."""
    from outgrow.checkpoint.describe import plan_lines
    from outgrow.checkpoint.grow import grow_directory
    from outgrow.checkpoint.huggingface import open_checkpoint
    from outgrow.growth.operators import make_plan

    knobs = {} if factor is None else {"factor": factor}
    plan = make_plan(operator, open_checkpoint(source).config, knobs)
    if dry_run:
        print("\n".join(plan_lines(plan)))
        return
    grow_directory(source, target, plan, _bytes(max_shard_size))
    print("\n".join(plan_lines(plan, every_tensor=False)))
    print(f"written to {target}")


@app.command()
def report(
    runs: Runs = Path("runs"),
    recipe: Recipe = None,
    seeds: Seeds = "0",
    output: Page = None,
) -> None:
    """Write the report of a finished comparison, from its files alone."""
    from outgrow.lab.demo import open_recipe, show
    from outgrow.lab.outcome import read_outcome

    found = open_recipe(recipe)
    show(read_outcome(found.comparison, _seeds(seeds), runs), found, output or runs / "report.html")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint directory.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens of context for the FLOPs.")] = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a checkpoint is: family, sizes, parameters, FLOPs, dtypes, files, lineage."""
    from outgrow.checkpoint.describe import checkpoint_facts
    from outgrow.checkpoint.huggingface import open_checkpoint

    facts = checkpoint_facts(open_checkpoint(path), context)
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


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise OutgrowError(f"--seeds takes distinct whole numbers, such as 0 or 0,1,2, not '{text}'")
    return seeds


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
