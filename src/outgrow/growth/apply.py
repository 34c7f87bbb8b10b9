"""A grown checkpoint and its optimizer state, made by a plan a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from outgrow.arch import Spec, Tensor, parse
from outgrow.errors import OutgrowError
from outgrow.growth.fresh import entries, is_silent, mask_of, normal_rows
from outgrow.growth.plan import GrowthPlan
from outgrow.growth.rewrites import REWRITES
from outgrow.growth.rows import folded, pieces
from outgrow.growth.transport import Channel, is_lifted, moving, transport
from outgrow.spaces import MEAN, AnyLift, Dense, Lift, Rows, empty_like, is_whole, like

Policy = Literal["reset", "carry", "fresh-new"]


class Grown:
    """A grown checkpoint and its optimizer state, made one tensor at a time from whatever `read` gives of the source.

    Args:
        plan: how it is made.
        read: (name, rows) -> those rows of an array of the source; one checkpoint for weights, others for the moments under the same names.
    """

    def __init__(self, plan: GrowthPlan, read: Callable[[str, Rows], Any]) -> None:
        self.plan = plan
        self.tensors: dict[str, Tensor] = {tensor.name: tensor for tensor in plan.grown_arch.tensors(plan.target_config)}
        self._before = Grown(plan.after, read) if plan.after else None
        self._read = read
        self._means: dict[tuple[str, Policy], float] = {}
        self._lock = Lock()
        self._sizes = plan.arch.sizes(plan.source_config)
        tied = plan.arch.aliases(plan.source_config).values()
        self._embedding = next((parse(plan.arch.top[name]) for name in tied), None)
        self._sources = {tensor.name for tensor in plan.arch.tensors(plan.source_config)}

    def pieces(self, name: str) -> Iterator[slice]:
        """Rows of a parameter that can be made one after another, so that memory never holds a second one of its size."""
        return pieces(self.shape(name), few=not self.reads_apart(name)) if self._has_rows(name) else iter([slice(None)])

    def weight(self, name: str, rows: Rows = slice(None)) -> Any:
        """A parameter of the target, or, if it comes in `pieces`, some rows of it."""
        plan, tensor = self.plan, self.tensors[name]

        def moved(other: Tensor) -> Any:
            return self._moved(other, self._weight_read, "weight", rows)

        array = self._from_nothing(tensor, rows) if plan.source_of(tensor) is None else moved(tensor)
        for rewrite, knobs in plan.rewrites.items():
            if REWRITES[rewrite].touches(plan, tensor):
                array = REWRITES[rewrite].apply(plan, tensor, array, moved, rows, **knobs)
        return array

    def state(self, name: str, channel: Channel, policy: Policy, rows: Rows = slice(None)) -> Any:
        """A moment of the target's optimizer, from the source's of the same kind; if it comes in `pieces`, or some rows of it.

        `carry` moves it by the dual lift. `fresh-new` gives it to what was there before and not to the copies. What no entry
        of the source stands behind begins at zero; its second moment begins at the tensor's mean, because zero with an old
        step count would take far too large a first step.
        """
        plan, tensor = self.plan, self.tensors[name]
        if plan.depth_maps or any(isinstance(lift, Dense) for lift in plan.lifts.values()):
            raise OutgrowError(f"no law moves optimizer state through the learned maps of '{plan.operator}'; use --optimizer reset")
        if plan.source_of(tensor) is None:
            shape = (len(np.arange(self.shape(tensor.name)[0])[rows]), *self.shape(tensor.name)[1:])
            return like(self._kind(name), np.full(shape, self._begin(tensor, channel, policy)))
        moved = self._state_moved(tensor, channel, policy, rows)
        is_new = mask_of(plan, tensor, "repeated" if policy == "fresh-new" else "empty", rows)
        if not np.any(is_new):
            return moved
        moved = moved * like(moved, 1.0 - is_new)
        moved += like(moved, is_new * self._begin(tensor, channel, policy))
        return moved

    def _weight_read(self, source: str, rows: Rows) -> Any:
        return self._before.weight(source, rows) if self._before else self._read(source, rows)

    def _state_read(self, source: str, channel: Channel, policy: Policy, rows: Rows) -> Any:
        return self._before.state(source, channel, policy, rows) if self._before else self._read(source, rows)

    def _state_moved(self, tensor: Tensor, channel: Channel, policy: Policy, rows: Rows) -> Any:
        return self._moved(tensor, lambda source, some: self._state_read(source, channel, policy, some), channel, rows)

    def _begin(self, tensor: Tensor, channel: Channel, policy: Policy) -> float:
        """With what a moment begins where no entry of the source stands behind it."""
        if channel != "square":
            return 0.0
        key = tensor.name, policy
        with self._lock:  # whoever makes another piece of the tensor waits for the same mean
            if key not in self._means and self.plan.source_of(tensor) is not None:
                self._means[key] = _mean(self._state_moved(tensor, channel, policy, rows) for rows in self.pieces(tensor.name))
            elif key not in self._means:
                near = self._near(tensor)
                shape = self.plan.arch.shapes(self.plan.source_config)[near]
                parts = self._before.pieces(near) if self._before else pieces(shape)
                self._means[key] = _mean(self._state_read(near, channel, policy, rows) for rows in parts)
            return self._means[key]

    def copied_from(self, name: str) -> str | None:
        """The tensor of the very first source that this one equals byte for byte, if it does by construction."""
        plan, tensor = self.plan, self.tensors[name]
        source = plan.source_of(tensor)
        changed = is_lifted(tensor.spec, plan.lifts) or plan.factor(tensor) != 1 or _module(tensor) in plan.depth_maps
        if source is None or changed or any(REWRITES[rewrite].touches(plan, tensor) for rewrite in plan.rewrites):
            return None
        return self._before.copied_from(source) if self._before else source

    def has_source(self, name: str) -> bool:
        """Is a tensor made of one of the very first source, and not out of nothing?"""
        return self.plan.first_source(self.tensors[name]) is not None

    def _has_rows(self, name: str) -> bool:
        """Can some rows of a tensor be made without the others?"""
        tensor, source = self.tensors[name], self.plan.source_of(self.tensors[name])
        if not tensor.spec.decays or (source is not None and self._before is not None and not self._before._has_rows(source)):
            return False
        return source is None or not tensor.spec.axes[0].spaces & self.plan.lifts.keys() or self._first_lift(tensor, "weight") is not None

    def reads_apart(self, name: str) -> bool:
        """Do some rows of a tensor need some rows of its source, and not all?"""
        source = self.plan.source_of(self.tensors[name])
        if source is None or not self._has_rows(name):
            return source is None
        lift, writes = self._first_lift(self.tensors[name], "weight"), self.tensors[name].spec.axes[0].role == "write"
        apart = lift is None or (isinstance(lift, Lift) and not (writes and (lift.source == MEAN).any()))
        return apart and (self._before is None or self._before.reads_apart(source))

    def reference(self, name: str) -> str:
        """A tensor of the very first source that this one is made from, or is like: for its dtype."""
        near = self._near(self.tensors[name])
        return self._before.reference(near) if self._before else near

    def _kind(self, name: str) -> Any:
        """An array like one that is made of nothing: what it is made of elsewhere may not come by rows, and the very first source does."""
        return self._read(self.reference(name), slice(0, 1))

    def _near(self, tensor: Tensor) -> str:
        """The tensor that one is made from; for a fresh one the same in the first layer, or, if there is none, any."""
        plan = self.plan
        same = plan.arch.name(plan.keys.get(tensor.key) or tensor.key, None if tensor.layer is None else 0, tensor.expert)
        return plan.source_of(tensor) or (same if same in self._sources else min(self._sources))

    def _moved(self, tensor: Tensor, read: Callable[[str, Rows], Any], channel: Channel, rows: Rows) -> Any:
        """Rows of a tensor that has a source: along its spaces, and times its branch's factor."""
        plan = self.plan
        source = plan.source_of(tensor)
        assert source is not None
        lift = self._first_lift(tensor, channel)
        needed = rows if lift is None else lift.part(rows, tensor.spec.axes[0].role)[0]
        if depth_map := _depth_map(plan, tensor):
            names = [plan.arch.name(tensor.key, layer, tensor.expert) for layer in range(len(depth_map))]
            array = sum(weight * read(name, needed) for name, weight in zip(names, depth_map, strict=True))
        else:
            array = read(source, needed)
        moved = transport(tensor.spec, array, plan.lifts, self._sizes, channel, self._embedding, rows)
        if channel == "weight":
            return self._fill(tensor, _times(tensor.spec, moved, plan.factor(tensor)), rows)
        share = _gradient_share(plan, tensor)
        return moved if share == 1 else moved * share ** (2 if channel == "square" else 1)

    def _fill(self, tensor: Tensor, array: Any, rows: Rows) -> Any:
        """Random weights where a lift gives nothing, but not in what must be silent at first."""
        plan = self.plan
        if plan.fill == "zero" or not tensor.spec.decays or not is_lifted(tensor.spec, plan.lifts) or is_silent(plan, tensor):
            return array
        masks = entries(tensor.spec, plan.lifts, self._sizes, "empty")
        where = np.logical_or(*(mask[rows] if len(mask) > 1 else mask for mask in masks))
        if not where.any():
            return array
        where = np.broadcast_to(where, tuple(array.shape))
        for some, values in self._random(tensor, rows):
            array[some] += like(array, values * where[some])  # ours: a lift has just made it
        return array

    def _from_nothing(self, tensor: Tensor, rows: Rows) -> Any:
        """Rows of a fresh tensor: gains one, biases zero, matrices random."""
        plan, (length, *others) = self.plan, self.shape(tensor.name)
        array = empty_like(self._kind(tensor.name), (len(np.arange(length)[rows]), *others))
        if tensor.spec.decays:
            for some, values in self._random(tensor, rows):
                array[some] = like(array, values)
        else:
            array[...] = 0.0 if tensor.spec.plus_one or not tensor.spec.is_gain else 1.0
        return _times(tensor.spec, array, plan.factor(tensor))

    def _first_lift(self, tensor: Tensor, channel: Channel) -> AnyLift | None:
        """The lift of a tensor's rows; None where they stay as they are, or where they cannot be told apart."""
        axis = tensor.spec.axes[0]
        return folded(axis, moving(self.plan.lifts, channel), self._sizes) if axis.spaces & self.plan.lifts.keys() else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter of the target."""
        return self.plan.grown_arch.shape(self.tensors[name].spec, self.plan.grown_arch.sizes(self.plan.target_config))

    def _random(self, tensor: Tensor, rows: Rows) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        plan = self.plan
        deviation = plan.grown_arch.deviation(tensor.spec, plan.target_config)
        for some, values in normal_rows(plan.seed, tensor.name, self.shape(tensor.name), rows):
            values *= deviation
            yield some, values


def makes_copies_only(plan: GrowthPlan) -> bool:
    """Does every tensor of the target equal one of the source byte for byte?"""
    grown = Grown(plan, lambda name, rows: None)
    return all(grown.copied_from(name) is not None for name in grown.tensors)


def grow(plan: GrowthPlan, tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (name, array) of the grown checkpoint, one at a time, from the arrays of the source.

    A copy is the source's own array, not a clone. Raises OutgrowError when the source lacks a tensor.
    """
    grown = Grown(plan, rows_of(tensors))
    for name in grown.tensors:
        yield name, grown.weight(name)


def rows_of(arrays: Mapping[str, Any]) -> Callable[[str, Rows], Any]:
    """What reads rows of arrays in memory, for `Grown`; all rows are the array itself, not a clone."""

    def read(name: str, rows: Rows) -> Any:
        if name not in arrays:
            raise OutgrowError(f"the source has no tensor '{name}', which the plan reads")
        return arrays[name] if is_whole(rows) else arrays[name][rows]

    return read


def _mean(parts: Iterable[Any]) -> float:
    """The mean of a tensor that comes in parts; the same to the last bit however large they are."""
    total, count = 0.0, 0
    for part in parts:
        total = sum((float(part[some].sum()) for some in pieces(tuple(part.shape))), total)
        count += math.prod(part.shape)
    return total / count


def _times(spec: Spec, array: Any, factor: float) -> Any:
    if factor == 1:
        return array
    return (array + 1) * factor - 1 if spec.plus_one else array * factor


def _depth_map(plan: GrowthPlan, tensor: Tensor) -> Any:
    """The learned weights of the source's layers in a tensor; empty where it is a copy."""
    if tensor.layer is None or _module(tensor) not in plan.depth_maps:
        return ()
    return tuple(plan.depth_maps[_module(tensor)][tensor.layer])


def _gradient_share(plan: GrowthPlan, tensor: Tensor) -> float:
    """By what a gradient is multiplied besides the dual lifts: the factors that stand behind the tensor and not in it (derived).

    The gradient of y = W x is dL/dy x^T, whatever W was scaled by; what lies before it in its branch sees that scale. An expert sees the
    weight with which it is read: those of a dense block's copies sum to one, and on average they are equal.
    """
    share, lift = 1.0, plan.lifts.get("expert")
    if plan.ends and tensor.layer is not None and not tensor.spec.ends_branch:
        share = plan.ends[tensor.layer] or 1.0  # of a branch that begins at zero, `state` keeps nothing but the size of its second moment
    if tensor.expert is not None and isinstance(lift, Lift):
        share *= float(lift.read[tensor.expert])
    elif tensor.expert is not None and "expert" not in plan.arch.spaces:
        share /= plan.grown_arch.sizes(plan.target_config)["expert"]
    return share


def _module(tensor: Tensor) -> str:
    return tensor.key.rpartition(".")[0]
