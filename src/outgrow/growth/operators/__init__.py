"""Growth operators: functions from an architecture and a config to a `GrowthPlan`, one idea and one citation a file."""

from __future__ import annotations

import ast
import copy
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from outgrow.arch import Arch, Config
from outgrow.errors import NOT_LITERAL, OutgrowError, one_line
from outgrow.growth.operators.arrange import arrange, layer_list
from outgrow.growth.operators.bert2bert import aki, fpi
from outgrow.growth.operators.direct_width import direct_width
from outgrow.growth.operators.expand import expand
from outgrow.growth.operators.experts import more_experts, upcycle
from outgrow.growth.operators.gradual import gradual, midas
from outgrow.growth.operators.hypercloning import hypercloning
from outgrow.growth.operators.interpolate import interpolate
from outgrow.growth.operators.learn_depth import learn_depth
from outgrow.growth.operators.learn_width import learn_width
from outgrow.growth.operators.lemon import lemon
from outgrow.growth.operators.llama_pro import llama_pro
from outgrow.growth.operators.mergekit import mergekit
from outgrow.growth.operators.msg import msg
from outgrow.growth.operators.noise import noise
from outgrow.growth.operators.random_depth import random_depth
from outgrow.growth.operators.random_width import random_width
from outgrow.growth.operators.solar import solar
from outgrow.growth.operators.stack import stack
from outgrow.growth.operators.staged import staged_depth, staged_width
from outgrow.growth.operators.zero_depth import zero_depth
from outgrow.growth.operators.zero_width import zero_width
from outgrow.growth.plan import GrowthPlan

__all__ = ["OPERATORS", "Operator", "layer_list", "make_plan", "single_plan"]

Operator = Callable[..., GrowthPlan]
# The eight of arXiv 2405.15319 first; `stack` is what the paper calls G_stack, its direct operator in depth.
OPERATORS: dict[str, Operator] = {
    "stack": stack, "direct-width": direct_width, "learn-depth": learn_depth, "learn-width": learn_width,
    "zero-depth": zero_depth, "zero-width": zero_width, "random-depth": random_depth, "random-width": random_width,
    "arrange": arrange, "interpolate": interpolate, "gradual": gradual, "midas": midas, "solar": solar, "llama-pro": llama_pro,
    "mergekit": mergekit, "expand": expand, "fpi": fpi, "aki": aki, "hypercloning": hypercloning, "lemon": lemon, "msg": msg,
    "staged-depth": staged_depth, "staged-width": staged_width, "upcycle": upcycle, "more-experts": more_experts, "noise": noise,
}  # fmt: skip


def make_plan(
    text: str, arch: Arch, config: Config, knobs: Mapping[str, Any] | None = None, operators: Mapping[str, Operator] = OPERATORS
) -> GrowthPlan:  # fmt: skip
    """The plan of an operator, or of several one after another: `stack(factor=2), direct-width(hidden=48)`.

    `knobs` are those of a single operator named without any. A knob that an operator does not have, or that it lacks, is an error.
    """
    plan: GrowthPlan | None = None
    calls = list(calls_of(text))
    if knobs and (len(calls) > 1 or calls[0][1]):
        raise OutgrowError(f"'{text}' has knobs of its own, and {', '.join(knobs)} stand apart; write them into the parentheses")
    for name, own in calls:
        one = single_plan(name, plan.grown_arch if plan else arch, plan.target_config if plan else config, own or knobs or {}, operators)
        plan = plan.then(one) if plan else one
    assert plan is not None
    return plan


def single_plan(
    name: str, arch: Arch, config: Config, knobs: Mapping[str, Any], operators: Mapping[str, Operator] = OPERATORS
) -> GrowthPlan:  # fmt: skip
    """The plan of one named operator."""
    taken = list(inspect.signature(operator := operator_of(name, operators)).parameters.items())[2:]
    if variable := next((knob for knob, one in taken if one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL)), None):
        raise OutgrowError(f"the operator '{name}' takes any '{variable}'; let it name its knobs, so that they can be checked and told")
    parameters = dict(taken)
    for knob, value in knobs.items():
        if knob not in parameters:
            has = f"it has: {', '.join(parameters)}" if parameters else "it has none"
            raise OutgrowError(f"the operator '{name}' has no knob '{knob}'; {has}")
        kind = _kind(operator, parameters[knob])
        if not _is_of(value, kind):
            said = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).removeprefix("typing.")
            raise OutgrowError(f"the knob '{knob}' of '{name}' must be of type {said}, not {value!r}")
        if kind is float and not abs(value) <= sys.float_info.max:
            raise OutgrowError(f"the knob '{knob}' of '{name}' must be a finite number, not {str(value)[:40]}")
        if knob == "seed" and kind is int and value < 0:
            raise OutgrowError(f"the seed of '{name}' must be at least 0, not {value}")
    for knob, parameter in parameters.items():
        if parameter.default is parameter.empty and knob not in knobs:
            raise OutgrowError(f"the operator '{name}' needs the knob '{knob}'")
    try:
        made: Any = operator(arch, copy.deepcopy(config), **knobs)
    except OutgrowError:
        raise
    except Exception as error:  # of an operator of someone's own
        raise OutgrowError(f"the operator '{name}' fails for {arch.family}: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(made, GrowthPlan):
        raise OutgrowError(f"the operator '{name}' returned {str(made)[:60]!r}, and must return a GrowthPlan")
    return made


def _kind(operator: Operator, knob: inspect.Parameter) -> Any:
    """The type that an operator says for a knob; object where it says none, or one that it imports for type checkers alone."""
    if knob.annotation is knob.empty:
        return object
    try:
        return get_type_hints(
            SimpleNamespace(__annotations__={"it": knob.annotation}), getattr(inspect.unwrap(operator), "__globals__", {})
        )["it"]
    except NameError:
        return object


def _is_of(value: Any, kind: Any) -> bool:
    """Is a knob's value of the type that its operator says: a class, `int | None`, `list[int]`, `Literal["top", "bottom"]`?"""
    if get_origin(kind) in (Union, UnionType):
        return any(_is_of(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(kind))
    return kind in (object, Any) or type(value) is (get_origin(kind) or kind) or (kind is float and type(value) is int)


def operator_of(name: str, operators: Mapping[str, Operator] = OPERATORS) -> Operator:
    """The operator of a name."""
    if name not in operators:
        raise OutgrowError(f"unknown operator '{name}'; known: {', '.join(operators)}, and those of a file given with --operator-file")
    return operators[name]


def calls_of(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The operators of a text and their knobs: names, each with `(knob=value, ...)` or without."""
    pattern = r"\s*([A-Za-z][\w.-]*)\s*(\([^()]*\))?\s*(,|$)"
    place = 0
    while place < len(text) or place == 0:
        found = re.compile(pattern).match(text, place)
        if not found:
            raise OutgrowError(f"cannot read the operator '{text}'; write a name, or name(knob=value), several separated by commas")
        try:
            call = ast.parse(f"f{found[2] or '()'}", mode="eval").body
            assert isinstance(call, ast.Call)
            knobs = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
            plain = not call.args and None not in [one.arg for one in call.keywords]
        except (*NOT_LITERAL, AssertionError):
            plain, knobs = False, {}
        if not plain:
            raise OutgrowError(f"cannot read the knobs '{found[2]}' of '{found[1]}'; write (knob=value, ...) with plain numbers or texts")
        yield found[1], knobs
        place = found.end()
