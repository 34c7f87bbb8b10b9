"""What plans, lifts and learned maps are as plain JSON, and lifts and maps back from it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

from outgrow.errors import OutgrowError
from outgrow.spaces import AnyLift, Dense, Floats, Lift

Whole = Annotated[int, Field(ge=-2, lt=1 << 40)]
Number = Annotated[float, Field(allow_inf_nan=False)]
_STRICT = ConfigDict(strict=True, extra="forbid")


@with_config(_STRICT)
class LiftJson(TypedDict):
    """`spaces.Lift`."""

    size: Whole
    source: list[Whole]
    write: list[Number]
    read: list[Number]
    gain: list[Number]


@with_config(_STRICT)
class ArrayJson(TypedDict):
    """An array as its shape and its float64 bytes, little-endian, in base64."""

    shape: list[Whole]
    float64: str


@with_config(_STRICT)
class MatrixJson(TypedDict):
    """`spaces.Dense`."""

    matrix: ArrayJson


@with_config(_STRICT)
class ShareJson(TypedDict):
    """The argument of rewrites that add noise."""

    share: Annotated[float, Field(ge=0, le=1)]


@with_config(_STRICT)
class NothingJson(TypedDict):
    """The arguments of rewrites that have none."""


RewritesJson = TypedDict(
    "RewritesJson",
    {
        "noise": NotRequired[ShareJson],
        "projected noise": NotRequired[ShareJson],
        "above": NotRequired[NothingJson],
        "diagonal": NotRequired[NothingJson],
    },
)
with_config(_STRICT)(RewritesJson)


@with_config(_STRICT)
class PlanJson(TypedDict):
    """`growth.plan.GrowthPlan`."""

    operator: str
    knobs: dict[str, Any]
    source_config: dict[str, Any]
    layers: list[Whole]
    claims: dict[Literal["preserves", "trains", "dual"], bool]
    citation: str
    lifts: NotRequired[dict[str, LiftJson | MatrixJson]]
    ends: NotRequired[list[Number]]
    depth_maps: NotRequired[dict[str, ArrayJson]]
    fill: NotRequired[Literal["zero", "quiet", "masked"]]
    rewrites: NotRequired[RewritesJson]
    seed: NotRequired[Annotated[int, Field(ge=0)]]
    target_family: NotRequired[str | None]
    keys: NotRequired[dict[str, str | None]]
    config: NotRequired[dict[str, Any]]
    trains_only_fresh: NotRequired[bool]
    flops: NotRequired[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    after: NotRequired[PlanJson | None]


_PLAN: TypeAdapter[PlanJson] = TypeAdapter(PlanJson)


def checked_plan(content: Any) -> PlanJson:
    """The same content, if it has the form of a plan; otherwise says where it has not."""
    try:
        return _PLAN.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise OutgrowError(f"the plan is not one that outgrow wrote: {where}: {first['msg']}") from None


def lift_to_json(lift: AnyLift) -> dict[str, Any]:
    """A lift: its vectors as lists; a learned one as its matrix."""
    if isinstance(lift, Dense):
        return {"matrix": array_to_json(lift.matrix)}
    return {key: getattr(lift, key) if key == "size" else getattr(lift, key).tolist() for key in Lift.__dataclass_fields__}


def lift_from_json(content: Mapping[str, Any]) -> AnyLift:
    """What `lift_to_json` wrote, as a lift again."""
    if "matrix" in content:
        return Dense(array_from_json(content["matrix"]))
    write, read, gain = (np.array(content[role], np.float64) for role in ("write", "read", "gain"))
    return Lift(content["size"], np.array(content["source"], np.int64), write, read, gain)


def array_to_json(array: Any) -> dict[str, Any]:
    """An array as its shape and its float64 bytes, little-endian, in base64."""
    values = np.asarray(array, "<f8")
    return {"shape": list(values.shape), "float64": base64.b64encode(values.tobytes()).decode()}


def array_from_json(content: Mapping[str, Any]) -> Floats:
    """What `array_to_json` wrote, as an array again."""
    values = np.frombuffer(base64.b64decode(content["float64"]), np.dtype("<f8"))
    return np.reshape(values, tuple(content["shape"]))
