"""The one kernel: a tensor moved along its axes by the lifts of its spaces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from outgrow.arch import Axis, Spec, size_of
from outgrow.growth.fresh import entries
from outgrow.growth.rows import folded
from outgrow.spaces import AnyLift, Lift, Rows, at, empty_like, like

# What moves: parameters; what adds up like their gradients (Adam's and Muon's momentum); squares of those.
Channel = Literal["weight", "gradient", "square"]
Lifts = Mapping[str, AnyLift]
Sizes = Mapping[str, int]


def transport(
    spec: Spec, array: Any, lifts: Lifts, sizes: Sizes, channel: Channel = "weight", embedding: Spec | None = None, rows: Rows = slice(None)
) -> Any:  # fmt: skip
    """A tensor over the grown spaces: W' = D_out W R_in, a gain by its own factor; gradients by the dual lift.

    Args:
        spec: what the parameter writes and reads.
        array: numpy array or torch tensor, in its stored shape; of its rows those that `rows` need.
        lifts: space -> lift.
        sizes: old sizes of all spaces.
        channel: what `array` holds.
        embedding: spec of the embedding that the output head shares; None if it shares none.
        rows: those of the grown tensor that are made.
    """
    if not is_lifted(spec, lifts):
        return array
    is_weight = channel == "weight"
    power = 2 if channel == "square" else 1
    moved = array + 1 if spec.plus_one and is_weight else array
    used = moving(lifts, channel)
    for place, axis in enumerate(spec.axes):
        if axis.spaces & used.keys():
            moved = _along_axis(moved, place, axis, used, sizes, power, slice(None) if place else rows)
    if is_weight and spec.is_gain:  # a new channel begins with a gain of one
        moved = moved + like(moved, np.logical_or(*entries(spec, lifts, sizes, "empty")).astype(np.float64))
    scale = _multiplier(spec, lifts, channel)
    if spec.before_tied_head and embedding is not None:
        scale = scale / _multiplier(embedding, lifts, channel) * _fold(spec, used)
    if not np.all(scale == 1.0):
        moved *= like(moved, scale**power)  # ours: a lift has just made it
    return moved - 1 if spec.plus_one and is_weight else moved


def is_lifted(spec: Spec, lifts: Lifts) -> bool:
    """Does a parameter write, read or gain a space that grows? If not, growth copies it as it is."""
    return any(axis.spaces & lifts.keys() for axis in spec.axes)


def moving(lifts: Lifts, channel: Channel) -> Lifts:
    """The lifts by which a channel moves: their duals, but for weights."""
    return lifts if channel == "weight" else {name: _dual(lift) for name, lift in lifts.items()}


def _along_axis(array: Any, place: int, axis: Axis, lifts: Lifts, sizes: Sizes, power: int, rows: Rows) -> Any:
    """Moves one stored axis, or makes some rows of it."""
    lift = folded(axis, lifts, sizes)
    if lift is not None:
        return lift.part(rows, axis.role)[1].along(array, place, axis.role, power)
    # What cannot be folded is unfolded: each block into its spaces, moved along those that grow.
    before, after = tuple(array.shape[:place]), tuple(array.shape[place + 1 :])
    pieces: list[Any] = []
    begin = 0
    for block in axis.blocks:
        shape = [size_of(space, sizes) for space in block]
        end = begin + math.prod(shape)
        piece = array[at(place, slice(begin, end))].reshape(*before, *shape, *after)
        for offset, space in enumerate(block):
            if space in lifts:
                piece = lifts[space].along(piece, place + offset, axis.role, power)
        pieces.append(piece.reshape(*before, math.prod(piece.shape[place : place + len(block)]), *after))
        begin = end
    return pieces[0] if len(pieces) == 1 else _joined(pieces, place)


def _joined(pieces: list[Any], place: int) -> Any:
    """The pieces one after another on an axis, as one array of their kind."""
    shape = list(pieces[0].shape)
    shape[place] = sum(piece.shape[place] for piece in pieces)
    whole = empty_like(pieces[0], tuple(shape))
    begin = 0
    for piece in pieces:
        whole[at(place, slice(begin, begin + piece.shape[place]))] = piece
        begin += piece.shape[place]
    return whole


def _dual(lift: AnyLift) -> Lift:
    assert isinstance(lift, Lift)  # `state` refuses learned maps
    return lift.dual()


def _multiplier(spec: Spec, lifts: Lifts, channel: Channel) -> Any:
    """What undoes the growth of the model's own factor on a tensor, such as Gemma's sqrt(hidden) on embeddings."""
    lift = lifts.get(spec.times_sqrt or "")
    ratio = 1.0 if lift is None else (lift.size / lift.new) ** 0.5
    return ratio if channel == "weight" else 1 / ratio


def _fold(spec: Spec, lifts: Lifts) -> Any:
    """The factor for the norm before a tied head, over its one axis."""
    grown = (lifts.get(space) for space in spec.axes[0].spaces)
    return next((lift.tied_fold() for lift in grown if isinstance(lift, Lift)), np.ones(1))
