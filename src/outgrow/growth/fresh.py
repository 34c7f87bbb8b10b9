"""Which entries of a grown tensor are new, and the random numbers that fill them: seeded by the tensor's name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from outgrow.arch import Spec, Tensor, size_of
from outgrow.growth.plan import GrowthPlan
from outgrow.growth.rows import pieces
from outgrow.spaces import AnyLift, Lift, Rows

Mask = NDArray[np.bool_]
# empty: nothing is copied there. repeated: that, or a second copy of something.
Newness = Literal["empty", "repeated"]


def entries(spec: Spec, lifts: Mapping[str, AnyLift], sizes: Mapping[str, int], newness: Newness) -> tuple[Mask, Mask]:
    """Two masks that broadcast over the grown tensor: entries that write, and that read, a new index of some space."""
    masks = {"write": np.zeros([1] * len(spec.axes), np.bool_), "read": np.zeros([1] * len(spec.axes), np.bool_)}
    for place, axis in enumerate(spec.axes):
        flags = np.concatenate([_flags(block, lifts, sizes, newness) for block in axis.blocks])
        shape = [1] * len(spec.axes)
        shape[place] = len(flags)
        role = "read" if axis.role == "read" else "write"
        masks[role] = masks[role] | np.reshape(flags, shape)
    return masks["write"], masks["read"]


def mask_of(plan: GrowthPlan, tensor: Tensor, newness: Newness, rows: Rows = slice(None)) -> Any:
    """[shape of those rows of the tensor, or broadcasting to it] 1 where growth made an entry, 0 where it was before; as floats."""
    if plan.adds_nothing(tensor.layer) or plan.source_of(tensor) is None or (newness == "repeated" and plan.is_new(tensor)):
        return np.ones([1] * len(tensor.spec.axes))
    masks = entries(tensor.spec, plan.lifts, plan.arch.sizes(plan.source_config), newness)
    return np.logical_or(*(mask[rows] if len(mask) > 1 else mask for mask in masks)).astype(np.float32)


def is_silent(plan: GrowthPlan, tensor: Tensor) -> bool:
    """Must new entries of a tensor be zero (or masked) at first, because it writes the residual stream?

    Not in an identity block behind the norm that ends its branches: zeros on both sides of that norm would never train.
    """
    behind = plan.adds_nothing(tensor.layer) and not tensor.spec.ends_branch
    return not behind and any(tensor.spec.writes(space) for space in plan.arch.residual)


def normal(seed: int, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal numbers that depend on the seed and the tensor's name alone."""
    return np.concatenate([values for _, values in normal_rows(seed, name, shape)])


def normal_rows(
    seed: int, name: str, shape: tuple[int, ...], rows: Rows = slice(None)
) -> Iterator[tuple[slice, NDArray[np.float32]]]:  # fmt: skip
    """The same numbers, a piece after another, for tensors of which memory should not hold a second one.

    With `rows`, in order, only those; the slices count among them. A piece is drawn whole, so that a number does not depend on what
    is asked for with it.
    """
    wanted = np.arange(shape[0])[rows]
    for piece in pieces(shape):
        begin, end = np.searchsorted(wanted, (piece.start, piece.stop))
        if begin == end:
            continue
        key = f"{seed} {name} {piece.start}" if piece.start else f"{seed} {name}"
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")))
        drawn = generator.standard_normal((piece.stop - piece.start, *shape[1:]), np.float32)
        yield slice(begin, end), drawn if len(drawn) == end - begin else drawn[wanted[begin:end] - piece.start]


def masked(plan: GrowthPlan) -> dict[str, tuple[Mask, Callable[..., NDArray[np.float32]]]]:
    """What a training run unmasks: tensor name -> (where its outputs are masked, what draws the random values behind some rows or all)."""
    if plan.fill != "masked":
        return {}
    found: dict[str, tuple[Mask, Callable[..., NDArray[np.float32]]]] = {}
    sizes, config = plan.grown_arch.sizes(plan.target_config), plan.target_config
    old = plan.arch.sizes(plan.source_config)
    for tensor in plan.grown_arch.tensors(config):
        spec, shape = tensor.spec, plan.grown_arch.shape(tensor.spec, sizes)
        if plan.factor(tensor) == 0:
            where = np.ones(shape, np.bool_)
        elif plan.source_of(tensor) is not None and spec.decays and is_silent(plan, tensor):
            where = np.broadcast_to(np.logical_or(*entries(spec, plan.lifts, old, "empty")), shape)
        else:
            continue
        if where.any():
            found[tensor.name] = (where, partial(_behind, plan, tensor, shape))
    return found


def _behind(plan: GrowthPlan, tensor: Tensor, shape: tuple[int, ...], rows: Rows = slice(None)) -> NDArray[np.float32]:
    """Random values of some rows of a tensor that is masked; gains are one."""
    begin = 0.0 if tensor.spec.plus_one or not tensor.spec.is_gain else 1.0
    deviation = plan.grown_arch.deviation(tensor.spec, plan.target_config)
    made = np.full((len(np.arange(shape[0])[rows]), *shape[1:]), begin, np.float32)
    for some, values in normal_rows(plan.seed, tensor.name, shape, rows):
        made[some] += values * deviation
    return made


def _flags(block: tuple[str, ...], lifts: Mapping[str, AnyLift], sizes: Mapping[str, int], newness: Newness) -> Mask:
    """[new size of the flattened block] is the index new in any of its spaces?"""
    flags = np.zeros(1, np.bool_)
    for space in block:
        lift = lifts.get(space)
        one = np.zeros(lift.new if lift else size_of(space, sizes), np.bool_)
        if isinstance(lift, Lift):
            one = ~lift.held if newness == "empty" else lift.repeated
        flags = np.ravel(flags[:, None] | one[None, :])
    return flags
