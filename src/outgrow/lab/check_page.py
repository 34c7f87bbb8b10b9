"""The command `outgrow check`: tables of verdicts on a terminal and on a page."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import track

from outgrow.arch import Arch, arch_for
from outgrow.checkpoint.huggingface import stored_tensors
from outgrow.config import suggestion
from outgrow.errors import OutgrowError, one_line
from outgrow.extensions import checkpoint_problems
from outgrow.files import read_json
from outgrow.growth.operators import Operator
from outgrow.lab.check import LEGEND, Verdict, cell, check, markdown, tiny_source
from outgrow.lab.tiny import TINY, shrunk


def check_everything(
    operators: list[str] | None,
    families: list[str] | None,
    known: Mapping[str, Operator],
    page: Path | None,
    knobs: Mapping[str, Any] | None = None,
) -> list[str]:
    """Checks operators on families, prints the table, and returns what is not backed: claims, and operators named that no family takes."""
    if page and not page.absolute().parent.is_dir():
        raise OutgrowError(f"there is no directory '{page.parent}' for the table")
    names, tried = _chosen(operators, list(known), "operator"), _chosen(families, list(TINY), "family")
    _quiet()
    pairs = [(name, family) for name in names for family in tried]
    rows: dict[str, dict[str, Verdict]] = {name: {} for name in names}
    for name, family in track(pairs, "checking", console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()):
        rows[name][family] = check(name, TINY[family], knobs, operators=known)
    _print(rows, tried)
    if page:
        page.write_text(markdown(rows), encoding="utf-8")
    return _broken(rows, operators or ())


def check_family_file(
    families: Sequence[Arch],
    source: Path | None,
    operators: list[str] | None,
    known: Mapping[str, Operator],
    knobs: Mapping[str, Any] | None = None,
) -> list[str]:
    """Holds a family, the first of `families`, against a checkpoint's files, and then checks operators on its config or a smaller one."""
    arch = families[0]
    if source is None and operators:
        raise OutgrowError("operators are tried on a checkpoint's config, and none is given; give --source too, or leave --operator out")
    if source is None:
        print(f"the table of '{arch.family}' is whole in itself; give --source, a checkpoint directory, to hold it against its files")
        return []
    config = read_json(source / "config.json")
    if arch_for(config, families) is not arch:
        raise OutgrowError(
            f"'{source}' is a '{config['model_type']}', and the family '{arch.family}' describes {', '.join(arch.model_types)}"
        )
    shapes = {name: stored.entry.shape for name, stored in stored_tensors(source, arch).items()}
    if problems := checkpoint_problems(arch, config, shapes):
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        print("\n".join(problems[:20] + more))
        raise OutgrowError(f"the family '{arch.family}' does not describe '{source}': {len(problems)} lines to mend, listed above")
    print(f"'{arch.family}' describes all {len(shapes)} tensors of '{source}'")
    _quiet()
    names, tried = _chosen(operators, list(known), "operator"), shrunk(arch, config)
    try:
        tiny_source(json.dumps(tried, sort_keys=True))
    except Exception as error:  # transformers does not know the model, or lacks what it needs, and raises what it likes
        reason = f"transformers cannot run a model of its config: {one_line(error)}"
        if operators:
            raise OutgrowError(f"'{operators[0]}' was not tried: {reason}") from None
        print(f"the table alone was checked, and no operator: {reason}")
        return []
    rows = {
        name: {arch.family: check(name, tried, knobs, operators=known, families=families)}
        for name in track(names, "checking", console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    }
    _print(rows, [arch.family])
    return _broken(rows, operators or ())


def _chosen(wanted: list[str] | None, known: list[str], kind: str) -> list[str]:
    for name in wanted or []:
        if name not in known:
            raise OutgrowError(f"unknown {kind} '{name}'{suggestion(name, known)}")
    return wanted or known


def _print(rows: Mapping[str, Mapping[str, Verdict]], families: list[str]) -> None:
    """One block of lines a family on narrow output: tables of twelve columns do not fit a terminal."""
    width = max(len(name) for name in rows)
    for family in families:
        print(f"\n{family}")
        for name, row in rows.items():
            verdict = row[family]
            print(f"  {name:<{width}}  {cell(verdict)}{f'  {verdict.refusal}' if verdict.refusal else ''}")
    print(f"\n{LEGEND}")


def _broken(rows: Mapping[str, Mapping[str, Verdict]], named: Collection[str]) -> list[str]:
    """What the measurement does not back; of an operator that was asked for by name, nothing is backed where every family refuses it."""
    found = [f"{name} on {family} {one}" for name, row in rows.items() for family, verdict in row.items() for one in verdict.broken]
    refused = {name: [verdict.refusal for verdict in rows[name].values()] for name in named}
    return found + [f"{name} was refused everywhere: {reasons[0]}" for name, reasons in refused.items() if all(reasons)]


def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()
    if not sys.warnoptions:
        transformers.utils.logging.set_verbosity_error()
