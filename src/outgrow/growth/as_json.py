"""Lifts and learned maps as plain JSON, and back."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from outgrow.spaces import AnyLift, Dense, Floats, Lift


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
