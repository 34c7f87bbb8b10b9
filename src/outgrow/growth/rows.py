"""Rows of a tensor: how many are made at once, and from which rows of its source."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import reduce

from outgrow.arch import Axis, size_of
from outgrow.spaces import MEAN, AnyLift, Lift, identity

_PIECE = 1 << 20  # numbers of a tensor that are made at once
_FEW = 32  # pieces at most, where each costs a look at the whole source


def pieces(shape: tuple[int, ...], few: bool = False) -> Iterator[slice]:
    """The rows of a tensor in pieces of a million numbers; or, where each piece costs a look at the whole source, in a few."""
    step = max(1, _PIECE // math.prod(shape[1:]))
    if few:
        step *= -(-shape[0] // (step * _FEW))
    return (slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step))


def folded(axis: Axis, lifts: Mapping[str, AnyLift], sizes: Mapping[str, int]) -> AnyLift | None:
    """The one lift of a stored axis, flattened from those of its spaces; None where it has none: dense maps or means among other spaces."""
    if axis.blocks == ((alone := axis.blocks[0][0],),):
        return lifts.get(alone)
    blocks: list[Lift] = []
    for block in axis.blocks:
        each = [lifts.get(space) or identity(size_of(space, sizes)) for space in block]
        plain = [lift for lift in each if isinstance(lift, Lift) and not (lift.source == MEAN).any()]
        if len(plain) < len(each):
            return None
        blocks.append(reduce(Lift.outer, plain))
    return reduce(Lift.beside, blocks)
