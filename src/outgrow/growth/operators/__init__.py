"""Growth operators: functions from a config to a `GrowthPlan`, one idea and one citation a file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from outgrow.arch import Config
from outgrow.errors import OutgrowError
from outgrow.growth.operators.stack import stack
from outgrow.growth.plan import GrowthPlan

Operator = Callable[..., GrowthPlan]
OPERATORS: dict[str, Operator] = {"stack": stack}


def make_plan(name: str, config: Config, knobs: Mapping[str, Any]) -> GrowthPlan:
    """The plan of a named operator; a knob that it does not have, or that it lacks, is an error."""
    if name not in OPERATORS:
        raise OutgrowError(f"unknown operator '{name}'; known: {', '.join(OPERATORS)}")
    parameters = dict(list(inspect.signature(OPERATORS[name]).parameters.items())[1:])
    for knob in knobs:
        if knob not in parameters:
            raise OutgrowError(f"the operator '{name}' has no knob '{knob}'; it has: {', '.join(parameters)}")
    for knob, parameter in parameters.items():
        if parameter.default is parameter.empty and knob not in knobs:
            raise OutgrowError(f"the operator '{name}' needs the knob '{knob}'")
    for knob, value in knobs.items():
        default = parameters[knob].default
        if default is not parameters[knob].empty and type(value) is not type(default):
            raise OutgrowError(f"the knob '{knob}' of '{name}' must be of type {type(default).__name__}, not {value!r}")
    return OPERATORS[name](config, **knobs)
