"""Options that several commands share, and what is made of their texts."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any

import typer

from outgrow.errors import NOT_LITERAL, OutgrowError

Runs = Annotated[Path, typer.Option("--runs", help="Where runs and packed data are kept and found again.")]
Comparison = Annotated[Path | None, typer.Option("--comparison", help="What is compared (YAML); the built-in one if not given.")]
Seeds = Annotated[str, typer.Option("--seeds", help="How many, 0 and up, or which, such as 0,2,3; three or more give an interval.")]
Page = Annotated[
    Path | None,
    typer.Option("--output", help="Where the report goes; in RUNS if not given."),
]

SlurmOptions = Annotated[
    list[str] | None, typer.Option("--option", help="An option of SLURM, NAME=VALUE, such as partition=gpu. May be repeated.")
]
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


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TextKey = Annotated[str, typer.Option("--text-key", help="Where the text is in jsonl, parquet and hub records.")]
Sources = Annotated[list[str], typer.Argument(help="python, site-packages, files, folders, hub data sets as hf:owner/name[:config].")]
RecipeFile = Annotated[Path, typer.Argument(help="A recipe of stages, or one run (YAML).")]
Folder = Annotated[Path, typer.Option("--folder", help="Where studies, scales and results lie.")]


def refuse_given(command: typer.Context, option: str, because: str) -> None:
    """Refuses an option that was given, be it with its default value, and has no effect."""
    source = command.get_parameter_source(option.removeprefix("--").replace("-", "_"))
    if source and source.name == "COMMANDLINE":
        raise OutgrowError(f"{option} has no effect {because}; leave it out")


def pair(text: str, option: str) -> tuple[str, str]:
    """The two sides of NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise OutgrowError(f"{option} takes NAME=VALUE, not '{text}'")
    return name, value


def knob_of(text: str) -> tuple[str, Any]:
    """A knob and its value, as Python has it, or else as text."""
    name, value = pair(text, "--knob")
    try:
        return name, ast.literal_eval(value)
    except NOT_LITERAL:
        return name, value


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """Name -> value of an option that was given as NAME=VALUE any number of times."""
    return dict(pair(text, option) for text in texts or [])


def seeds_of(text: str) -> tuple[int, ...]:
    """Seeds: a number says how many, 0 and up; several with commas say which."""
    try:
        given = [int(part) for part in text.split(",")]
    except ValueError:
        given = []
    seeds = tuple(range(given[0])) if len(given) == 1 else tuple(given)
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise OutgrowError(f"--seeds takes how many, such as 3, or which, such as 0,2,3, not '{text}'")
    return seeds


def share_of(value: float) -> float:
    """A share between 0 and 1."""
    if not 0 < value < 1:
        raise OutgrowError(f"--validation-share takes a share between 0 and 1, such as 0.04, not {value:g}")
    return value


def operators_of(file: str | None) -> Any:
    """The operators that are known, with those of a file of one's own."""
    from outgrow.growth.operators import OPERATORS

    if file is None:
        return OPERATORS
    from outgrow.extensions import load_operators

    return load_operators(file)


def families_of(file: Path | None) -> Any:
    """The families that are known, with one of a file of one's own."""
    from outgrow.arch import FAMILIES

    if file is None:
        return FAMILIES
    from outgrow.extensions import load_family

    return (load_family(file), *FAMILIES)
