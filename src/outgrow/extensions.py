"""A user's own operators and families, from files named on the command line."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from outgrow.arch import FAMILIES, Arch, parse
from outgrow.arch.spec import Admits, Space
from outgrow.config import Settings, load
from outgrow.errors import OutgrowError
from outgrow.growth.operators import OPERATORS, Operator, calls_of

BUILT_IN = frozenset(OPERATORS)


class SpaceFile(Settings):
    """A space, as a family file describes it."""

    size: str
    edit: tuple[str, ...] = ()
    admits: Admits = "copies"
    scales: tuple[str, ...] = ()


class FamilyFile(Settings):
    """A family, as a data file describes it: the fields of `arch.Arch`; what is left out is as in the family `like`."""

    family: str
    model_types: tuple[str, ...] = Field(min_length=1)
    like: str | None = Field(None, description="a built-in family to start from")
    spaces: dict[str, SpaceFile] | None = None
    top: dict[str, str] | None = None
    layer: dict[str, str] | None = None
    layer_prefix: str | None = None
    layer_count: str | None = None
    layer_tables: tuple[str, ...] | None = None
    layer_bounds: dict[str, str] | None = None
    period: int | None = None
    products: dict[str, tuple[str, ...]] | None = None
    norm_eps: str | None = None
    init: str | None = None
    requires: dict[str, Any] | None = None
    whole_heads: tuple[str, ...] | None = None
    listed_rope: tuple[str, ...] | None = None
    backbone_prefix: str | None = None
    buffers: tuple[str, ...] | None = None
    defaults: dict[str, Any] | None = None


def load_operators(place: str) -> dict[str, Operator]:
    """The operators that `FILE.py` defines: its functions whose first two parameters are `arch` and `config`, by their names.

    The file is run, as any Python file that is imported is.
    """
    path = Path(place)
    spec = importlib.util.spec_from_file_location(f"operators of {path.absolute()}", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise OutgrowError(f"there is no Python file '{place}' to take operators from")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for their names
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise OutgrowError(f"'{place}' cannot be run: {type(error).__name__}: {error}") from None
    own = {name: value for name, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == spec.name}
    operators = {name: value for name, value in own.items() if list(inspect.signature(value).parameters)[:2] == ["arch", "config"]}
    found = {name.replace("_", "-"): value for name, value in operators.items() if not name.startswith("_")}
    if taken := sorted(found.keys() & BUILT_IN):
        raise OutgrowError(f"'{place}' defines '{taken[0]}', which is an operator of outgrow; give yours another name")
    if not found:
        raise OutgrowError(f"'{place}' defines no operator: a function of (arch, config, knobs...) that returns a GrowthPlan")
    return {**OPERATORS, **found}


def use_operators(place: str | None) -> str | None:
    """Makes the operators of a file known to all of this process: to recipes, studies and reports, which name operators in text.

    Returns its full path, for processes that start elsewhere.
    """
    if place is None:
        return None
    OPERATORS.update(load_operators(place))
    return str(Path(place).absolute())


def own_code(text: str) -> str | None:
    """A hash over the Python files of those operators of a text that do not come with outgrow; None where all do, or are unknown."""
    files = sorted({inspect.getfile(OPERATORS[name]) for name, _ in calls_of(text) if name in OPERATORS.keys() - BUILT_IN})
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16] if files else None


def load_family(path: Path) -> Arch:
    """Reads a family from a data file (YAML or JSON); refuses lines that do not parse and spaces that are not declared."""
    file = load(FamilyFile, path)
    known = {arch.family: arch for arch in FAMILIES}
    if file.like is not None and file.like not in known:
        raise OutgrowError(f"'{path}' starts from the family '{file.like}'; known: {', '.join(known)}")
    given = {name: value for name, value in file if name not in ("like", "spaces") and (name in file.model_fields_set)}
    if file.spaces is not None:
        given["spaces"] = {name: Space(**dict(space)) for name, space in file.spaces.items()}
    missing = [name for name in ("spaces", "top", "layer") if name not in given and file.like is None]
    if missing:
        raise OutgrowError(f"'{path}' lacks {', '.join(repr(name) for name in missing)}; give them, or a family to start from with 'like'")
    arch = replace(known[file.like], **given) if file.like else Arch(**given)
    if problems := family_problems(arch):
        raise OutgrowError(f"'{path}': {'; '.join(problems)}")
    return arch


def family_problems(arch: Arch) -> list[str]:
    """What is wrong with a family by itself, whatever the checkpoint."""
    problems: list[str] = []
    ends = 0
    for key, line in {**arch.top, **arch.layer}.items():
        spec = parse(line)
        ends += spec.ends_branch and key in arch.layer
        for space in sorted({s for axis in spec.axes for s in axis.spaces if not s.isdigit()} - set(arch.spaces)):
            problems.append(f"'{key}' uses the space '{space}', which 'spaces' does not declare")
        if spec.tied and spec.tied not in arch.top:
            problems.append(f"'{key}' is tied to '{spec.tied}', which is not in 'top'")
    order = list(arch.spaces)
    for name, space in arch.spaces.items():
        late = [word for word in space.size.split() if word in order and order.index(word) >= order.index(name)]
        problems += [f"the size of '{name}' uses '{word}', which must stand before it in 'spaces'" for word in late]
    if arch.layer_prefix.count("{}") != 1 or set("{}") & set(arch.layer_prefix.replace("{}", "")):
        problems.append("'layer_prefix' needs {} once, where the number of a layer stands, and no other brace")
    if not ends:
        problems.append("no line of 'layer' has '| ends branch'; mark the last map of each branch, which identity blocks zero")
    if not arch.residual:
        problems.append("no space says that RMSNorm or LayerNorm reads it ('admits'); the residual stream's does")
    problems += [f"there is no space '{space}'" for space in ("vocab", "hidden", "kv", "head") if space not in arch.spaces]
    if arch.period < 1:
        problems.append(f"'period' counts layers, at least 1, not {arch.period}")
    return problems


def checkpoint_problems(arch: Arch, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Where a family and a checkpoint's files part ways: tensors that one lacks, and shapes."""
    expected = arch.shapes(config)
    ignored = set(arch.aliases(config)) | {arch.name(key, layer) for layer in range(arch.layers(config)) for key in arch.buffers}
    problems = [f"the files hold no '{name}' {list(expected[name])}, which the family lists" for name in expected if name not in shapes]
    unknown = (name for name in shapes if name not in expected and name not in ignored)
    problems += [f"the family lacks a line for '{name}' {list(shapes[name])}" for name in unknown]
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape:
            problems.append(f"'{name}' has shape {list(shapes[name])} in the files, and {list(shape)} by its line")
    return problems
