"""Spaces of a transformer and the maps that enlarge them.

A transformer is a set of spaces (hidden, ffn, kv, group, head, vocab, layer). A parameter *writes* some of them and
*reads* others. Growing means making a space larger, and a `Lift` says how:

    x' = D x        write map D: every new index i holds  write[i] * x[source[i]]
    x  = R x'       read map R, a left inverse: R D = I, so what reads the space sees the old values

A parameter W: out <- in then becomes W' = D_out W R_in. D and R have one entry per new index, so they are stored as
vectors and applied as a gather and a scale; nothing is ever multiplied out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from outgrow.errors import OutgrowError

Role = Literal["write", "read", "gain"]
Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Lift:
    """Enlarges one space: new index i is a scaled copy of old index `source[i]`; -1 marks an index that holds zero.

    Attributes:
        size: old size of the space.
        source: [new] old index of each new index, or -1.
        write: [new] scale of the copy when it is written (D).
        read: [new] weight of the copy when it is read (R).
        gain: [new] factor for a normalisation gain over the space.
    """

    size: int
    source: Indices
    write: Floats
    read: Floats
    gain: Floats

    def scale(self, role: Role) -> Floats:
        """The [new] factors for a parameter that plays `role` on this space."""
        return {"write": self.write, "read": self.read, "gain": self.gain}[role]

    def along(self, array: Any, axis: int, role: Role, power: int = 1) -> Any:
        """Moves one axis of a numpy array or torch tensor, old size to new size; dtype is kept.

        With every factor 1 this is a pure copy, exact in any dtype. `power=2` moves Adam's second moment.
        """
        if array.shape[axis] != self.size:
            raise OutgrowError(f"axis {axis} has size {array.shape[axis]}, but the lift enlarges a space of {self.size}")
        moved = array[(slice(None),) * axis + (np.maximum(self.source, 0),)]
        factor = np.where(self.source < 0, 0.0, self.scale(role) ** power)
        if (factor == 1.0).all():
            return moved
        factor = np.expand_dims(factor, [a for a in range(array.ndim) if a != axis])
        if hasattr(moved, "new_tensor"):  # torch, without importing it
            return moved * moved.new_tensor(factor)
        return moved * factor.astype(array.dtype)

    def dual(self) -> Lift:
        """The lift by which gradients, and so Adam's first moment, move: writes and reads trade places.

        A parameter's gradient is R_out^T dW D_in^T where the parameter is D_out W R_in (derived; checked in tests).
        """
        safe = np.where(self.gain == 0, 1.0, self.gain)
        return Lift(self.size, self.source, self.read, self.write, self.read * self.write / safe)

    def then(self, after: Lift) -> Lift:
        """The composition `after` o `self`: old -> middle -> new."""
        if after.size != len(self.source):
            raise OutgrowError(f"cannot compose: the first lift ends at {len(self.source)}, the second starts at {after.size}")
        middle = np.maximum(after.source, 0)
        source = np.where(after.source < 0, -1, self.source[middle])
        pairs = ((a[middle], b) for a, b in ((self.write, after.write), (self.read, after.read), (self.gain, after.gain)))
        return Lift(self.size, source, *(a * b for a, b in pairs))

    def fits_rms_norm(self) -> bool:
        """Is `gain` what RMSNorm needs, sqrt(s n/n') with the same s, the sum of write^2 over the copies of an index, for all?

        The norm of the new space is sqrt(s n/n') times the old one; uneven plain copies have no common s (derived).
        """
        held = self.source >= 0
        squares = np.bincount(self.source[held], self.write[held] ** 2, minlength=self.size)
        needed = (squares * self.size / len(self.source)) ** 0.5
        return bool(np.ptp(squares) < 1e-9 and np.allclose(self.gain[held], needed[0]))

    def identity_error(self) -> float:
        """max |R D - I|: zero when whatever reads the grown space sees the old values."""
        held = self.source >= 0
        product = np.bincount(self.source[held], (self.read * self.write)[held], minlength=self.size)
        return float(np.abs(product - 1.0).max())


def identity(size: int) -> Lift:
    """The lift that changes nothing."""
    return copies(size, size)


def copies(size: int, new: int) -> Lift:
    """Tiles the space, 012 -> 01201: a copy is written as it is and read as 1/count (HyperCloning, arXiv 2409.12903)."""
    source = _tiled(size, new)
    ones = np.ones(new)
    return Lift(size, source, ones, 1.0 / _counts(size, source), ones)


def isometry(size: int, new: int) -> Lift:
    """Tiles the space at any ratio with D^T D = I: copies are written and read as 1/sqrt(count).

    Exact under RMSNorm once its gain is scaled by sqrt(size/new), which `gain` does, and its eps by size/new, which
    the plan must do. Reads equal writes, so tied embeddings stay tied (derived).
    """
    source = _tiled(size, new)
    scale = _counts(size, source) ** -0.5
    return Lift(size, source, scale, scale, np.full(new, (size / new) ** 0.5))


def pad(size: int, new: int) -> Lift:
    """Appends indices that hold zero. Under RMSNorm the gain is scaled by sqrt(size/new) (MSG, arXiv 2305.02869)."""
    source = np.concatenate([np.arange(size), np.full(new - size, -1)]).astype(np.int64)
    held = (source >= 0).astype(np.float64)
    return Lift(size, source, held, held, held * (size / new) ** 0.5)


def _tiled(size: int, new: int) -> Indices:
    if new < size:
        raise OutgrowError(f"cannot grow a space of {size} to {new}: the new size is smaller")
    return np.arange(new, dtype=np.int64) % size


def _counts(size: int, source: Indices) -> Floats:
    return np.bincount(source, minlength=size)[source].astype(np.float64)
