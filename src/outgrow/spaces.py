"""Spaces of a transformer and the maps that enlarge them.

A transformer is a set of spaces (hidden, ffn, kv, group, head, expert, vocab, layer). A parameter *writes* some of them and
*reads* others. Growing means making a space larger, and a `Lift` says how:

    x' = D x        write map D: every new index i holds  write[i] * x[source[i]]
    x  = R x'       read map R, a left inverse: R D = I, so what reads the space sees the old values

A parameter W: out <- in then becomes W' = D_out W R_in. D and R have one entry per new index, so they are stored as
vectors and applied as a gather and a scale; nothing is ever multiplied out. Only a learned lift is a dense matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from outgrow.errors import OutgrowError

Role = Literal["write", "read", "gain", "shift"]
Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Rows = slice | Indices  # some of an axis
ZERO, MEAN = -1, -2  # sources of a new index that copies no old one: it holds zero, or the mean of the old ones
FRESH = -1  # source of a new layer that copies none and starts from random weights
MOST_INDICES = 1 << 24  # of a space, far beyond any model: a slip of the finger should not fill the memory
_RUN = 16  # entries of a run that are worth copying by themselves


@dataclass(frozen=True, eq=False)
class Lift:
    """Enlarges one space: new index i is a scaled copy of old index `source[i]`; `ZERO` and `MEAN` mark indices that copy none.

    Attributes:
        size: old size of the space.
        source: [new] old index of each new index, or ZERO, or MEAN.
        write: [new] scale of the copy when it is written (D).
        read: [new] weight of the copy when it is read (R); 0 where nothing is copied.
        gain: [new] factor for a normalisation gain over the space; 0 where nothing is copied.
    """

    size: int
    source: Indices
    write: Floats
    read: Floats
    gain: Floats

    def __post_init__(self) -> None:
        if getattr(getattr(self.source, "dtype", None), "kind", "") not in ("i", "u"):
            raise OutgrowError(f"the sources of a lift of a space of {self.size} must be an array of whole numbers")
        lengths = {len(values) for values in (self.source, self.write, self.read, self.gain)}
        if len(lengths) > 1 or not len(self.source) or not (MEAN <= self.source.min() <= self.source.max() < self.size):
            raise OutgrowError(f"a lift of a space of {self.size} needs a source, a write, a read and a gain for each new index")

    @property
    def new(self) -> int:
        """New size of the space."""
        return len(self.source)

    @property
    def held(self) -> NDArray[np.bool_]:
        """[new] is this index a copy of an old one?"""
        return self.source >= 0

    @property
    def repeated(self) -> NDArray[np.bool_]:
        """[new] is this index anything but the first copy of an old one?"""
        first = np.zeros(self.new, np.bool_)
        first[np.unique(self.source, return_index=True)[1]] = True
        return ~(first & self.held)

    def twins(self, old: Indices, filled: bool) -> Indices:
        """[new] a number for each index, the same for those that are written and read alike.

        Args:
            old: the same numbers of the old indices.
            filled: is there something random at indices that copy none?
        """
        new = old.max() + 1 + np.arange(self.new) if filled else old.max() - self.source
        numbers = np.where(self.held, old[np.maximum(self.source, 0)], new)
        return np.unique(np.stack([numbers, self.write, self.read]), axis=1, return_inverse=True)[1].ravel()

    def scale(self, role: Role) -> Floats:
        """The [new] factors for a parameter that plays `role` on this space."""
        return {"write": self.write, "read": self.read, "gain": self.gain, "shift": self.write * self.held}[role]

    def along(self, array: Any, axis: int, role: Role, power: int = 1) -> Any:
        """Moves one axis of a numpy array or torch tensor, old size to new size; dtype is kept.

        With every factor 1 this is a pure copy, exact in any dtype. `power=2` moves Adam's second moment.
        """
        if array.shape[axis] != self.size:
            raise OutgrowError(f"axis {axis} has size {array.shape[axis]}, but the lift enlarges a space of {self.size}")
        moved = _taken(array, self.source, axis)
        means = self.source == MEAN
        if role == "write" and means.any():
            refuse_whole_numbers(array)
            moved[at(axis, np.flatnonzero(means))] = array.mean(axis, keepdims=True)
        factor = np.where(self.source == ZERO, 0.0, self.scale(role) ** power)
        if (factor == 1.0).all():
            return moved
        return _times(moved, factor, axis)

    def onto_old(self, array: Any, axis: int) -> Any:
        """A numpy array A that reads the new space, seen from the old one: A D, new size to old size.

        An index that holds the mean is zero behind the LayerNorm that stands before every reader, so nothing is seen of it.
        """
        old = np.zeros((*array.shape[:axis], self.size, *array.shape[axis + 1 :]))
        for copies in self._rounds:
            old[at(axis, _run(self.source[copies]))] += array[at(axis, _run(copies))] * _over(axis, array.ndim, self.write[copies])
        return old

    @cached_property
    def _rounds(self) -> list[Indices]:
        """The indices that copy: the first copy of each old index, then the second of each, and so on."""
        rounds, left = list[Indices](), np.flatnonzero(self.held)
        while len(left):
            firsts = left[np.sort(np.unique(self.source[left], return_index=True)[1])]
            rounds.append(firsts)
            left = np.setdiff1d(left, firsts)
        return rounds

    def part(self, rows: Rows, role: Role) -> tuple[Rows, Lift]:
        """The old indices that some of the new ones need, in order, and the lift from those alone; a mean needs all, and so do all."""
        if is_whole(rows):
            return rows, self
        source = self.source[rows]
        if role == "write" and (source == MEAN).any():
            return slice(None), Lift(self.size, source, self.write[rows], self.read[rows], self.gain[rows])
        needed = np.unique(np.maximum(source, 0))
        source = np.where(source < 0, source, np.searchsorted(needed, source))
        return needed, Lift(len(needed), source, self.write[rows], self.read[rows], self.gain[rows])

    def beside(self, other: Lift) -> Lift:
        """The lift of an axis that holds this space and then the other; neither may hold means."""
        source = np.concatenate([self.source, np.where(other.source < 0, other.source, other.source + self.size)])
        pairs = ((self.write, other.write), (self.read, other.read), (self.gain, other.gain))
        return Lift(self.size + other.size, source, *(np.concatenate(pair) for pair in pairs))

    def outer(self, other: Lift) -> Lift:
        """The lift of an axis that holds, for every index of this space, all of the other; neither may hold means."""
        both = np.where(self.source[:, None] < 0, ZERO, self.source[:, None] * other.size + other.source)
        source = np.where(other.source < 0, ZERO, both)
        pairs = ((self.write, other.write), (self.read, other.read), (self.gain, other.gain))
        return Lift(self.size * other.size, source.ravel(), *(np.outer(*pair).ravel() for pair in pairs))

    def dual(self) -> Lift:
        """The lift by which gradients, and so Adam's first moment, move: writes and reads trade places.

        A parameter's gradient is R_out^T dW D_in^T where the parameter is D_out W R_in (derived; checked in tests). What
        copies no old index gets zero.
        """
        safe = np.where(self.gain == 0, 1.0, self.gain)
        source = np.where(self.held, self.source, ZERO)
        return Lift(self.size, source, self.read, self.write * self.held, self.read * self.write / safe)

    def tied_fold(self) -> Floats:
        """[new] factor for the norm before a tied head: the head reads by what the embedding writes, so this is read / write."""
        return np.where(self.held, self.read / np.where(self.write == 0, 1.0, self.write), 1.0)

    def norm_factor(self) -> float | None:
        """rho with norm(D x) = rho norm(x), what a gain must be multiplied by and an eps by its square; None if there is none.

        rho^2 = s n/n', where s, the sum of write^2 over the copies of an index, must be the same for all (derived).
        """
        squares = np.bincount(self.source[self.held], self.write[self.held] ** 2, minlength=self.size)
        return float((squares[0] * self.size / self.new) ** 0.5) if np.ptp(squares) < 1e-9 else None

    def keeps_rms_norm(self) -> bool:
        """Does RMSNorm of the new space give D times RMSNorm of the old one? No new index may hold a mean."""
        rho = self.norm_factor()
        return rho is not None and np.allclose(self.gain[self.held], rho) and not (self.source == MEAN).any()

    def keeps_layer_norm(self) -> bool:
        """The same for LayerNorm, which takes the mean away first: even copies, or new indices that hold the mean (LEMON)."""
        rho = self.norm_factor()
        if rho is None or not np.allclose(self.gain[self.held], rho):
            return False
        rows = np.where(self.source == ZERO, 0.0, self.write)
        columns = np.bincount(self.source[self.held], self.write[self.held], minlength=self.size)
        return bool(np.ptp(rows) < 1e-9 and np.ptp(columns) < 1e-9)

    def without_gain(self) -> Lift:
        """The same lift scaled so that norms need neither another gain nor another eps: activations keep their size."""
        rho = self.norm_factor()
        if rho is None:
            raise OutgrowError("the lift changes the norms of its space unevenly; no scale mends that")
        return Lift(self.size, self.source, self.write / rho, self.read * rho, self.held.astype(np.float64))

    def identity_error(self) -> float:
        """max |R D - I|: zero when whatever reads the grown space sees the old values."""
        product = np.bincount(self.source[self.held], (self.read * self.write)[self.held], minlength=self.size)
        return float(np.abs(product - 1.0).max())


@dataclass(frozen=True, eq=False)
class Dense:
    """A learned lift B: [new, old], applied alike to whatever writes or reads the space (LiGO, arXiv 2303.00980).

    `matrix` may be a numpy array or a torch tensor that asks for gradients.
    """

    matrix: Any

    @property
    def size(self) -> int:
        return self.matrix.shape[1]

    @property
    def new(self) -> int:
        return self.matrix.shape[0]

    def along(self, array: Any, axis: int, role: Role, power: int = 1) -> Any:
        """W'_..i.. = sum_j B[i, j] W_..j.. on one axis of a numpy array or torch tensor."""
        matrix: Any = self.matrix
        matrix = like(array, matrix) if isinstance(matrix, np.ndarray) else matrix
        return (array.swapaxes(axis, -1) @ matrix.T).swapaxes(axis, -1)

    def twins(self, old: Indices, filled: bool) -> Indices:
        """[new] a number for each index, the same where the map has the same row, once old indices of the same number are one."""
        matrix: Any = self.matrix
        rows = np.zeros((old.max() + 1, self.new))
        np.add.at(rows, old, matrix.T)
        return np.unique(rows, axis=1, return_inverse=True)[1].ravel()

    def part(self, rows: Rows, role: Role) -> tuple[Rows, Dense]:
        """The old indices that some of the new ones need, which is all of them, and the map from those."""
        return slice(None), Dense(self.matrix[rows])


AnyLift = Lift | Dense


def is_whole(rows: Rows) -> bool:
    """Are these all rows, and in order?"""
    return isinstance(rows, slice) and rows == slice(None)


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
    the plan must do (derived).
    """
    source = _tiled(size, new)
    scale = _counts(size, source) ** -0.5
    return Lift(size, source, scale, scale, np.full(new, (size / new) ** 0.5))


def tiling(size: int, new: int) -> Lift:
    """The isometry without its gain: exact under RMSNorm at any ratio with gain and eps as they are; `copies` where the ratio is whole."""
    return copies(size, new) if new % size == 0 else isometry(size, new).without_gain()


def pad(size: int, new: int) -> Lift:
    """Appends indices that hold zero. Under RMSNorm the gain is scaled by sqrt(size/new) (MSG, arXiv 2305.02869)."""
    return _appended(size, new, ZERO)


def mean(size: int, new: int) -> Lift:
    """Appends indices that hold the mean of the old ones: what LayerNorm needs in place of `pad` (LEMON, arXiv 2310.07999)."""
    return _appended(size, new, MEAN)


def split(size: int, new: int, seed: int = 0) -> Lift:
    """Tiles the space like `copies`, but each copy is read with a share of its own, so that copies do not stay alike (LEMON).

    The shares of an index are drawn from [1/2, 3/2] and sum to one.
    """
    even = copies(size, new)
    shares = even.read * np.random.default_rng(seed).uniform(0.5, 1.5, new)
    totals = np.bincount(even.source, shares, minlength=size)
    return Lift(size, even.source, even.write, shares / totals[even.source], even.gain)


def _appended(size: int, new: int, source: int) -> Lift:
    indices = np.concatenate([np.arange(size), np.full(_larger(size, new) - size, source)]).astype(np.int64)
    held = (indices >= 0).astype(np.float64)
    return Lift(size, indices, np.where(indices == ZERO, 0.0, 1.0), held, held * (size / new) ** 0.5)


def _tiled(size: int, new: int) -> Indices:
    return np.arange(_larger(size, new), dtype=np.int64) % size


def _larger(size: int, new: int) -> int:
    if new < size:
        raise OutgrowError(f"cannot grow a space of {size} to {new}: the new size is smaller")
    if new > MOST_INDICES:
        raise OutgrowError(f"cannot grow a space of {size} to {new:,}: that is more than {MOST_INDICES:,}")
    return new


def _counts(size: int, source: Indices) -> Floats:
    return np.bincount(source, minlength=size)[source].astype(np.float64)


def at(axis: int, indices: Any) -> tuple[Any, ...]:
    """What takes those indices of an axis, and all of the axes before and behind it."""
    return (slice(None),) * axis + (indices,)


def _run(indices: Indices) -> Indices | slice:
    """Indices as a slice, if they are one run: numpy is many times as fast over those."""
    return slice(indices[0], indices[-1] + 1) if (np.diff(indices) == 1).all() else indices


def _taken(array: Any, source: Indices, axis: int) -> Any:
    """The entries of an axis at `source`, zero at its marks. Runs are copied whole, which takes a tenth of the time of single entries."""
    held = source >= 0
    breaks = np.diff(held) | (held[1:] & (np.diff(source) != 1))
    ends = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(source)]
    if len(ends) * _RUN > len(source):
        taken = array[at(axis, np.maximum(source, 0))]
        taken[at(axis, np.flatnonzero(~held))] = 0
        return taken
    taken = empty_like(array, (*array.shape[:axis], len(source), *array.shape[axis + 1 :]))
    for begin, end in pairwise(ends):
        first = int(source[begin])
        taken[at(axis, slice(begin, end))] = array[at(axis, slice(first, first + end - begin))] if first >= 0 else 0
    return taken


def _times(array: Any, factor: Floats, axis: int) -> Any:
    """Scales an array of ours in place: large ones should not be held twice."""
    array *= like(array, _over(axis, array.ndim, factor))
    return array


def _over(axis: int, axes: int, values: Floats) -> Floats:
    """Values of an axis, shaped so that they broadcast over an array of so many axes."""
    return np.expand_dims(values, [other for other in range(axes) if other != axis])


def like(array: Any, values: Any) -> Any:
    """Numbers as an array of the same kind and dtype: numpy, or torch without importing it."""
    refuse_whole_numbers(array)
    return array.new_tensor(values) if hasattr(array, "new_tensor") else np.asarray(values, array.dtype)


def refuse_whole_numbers(array: Any) -> None:
    """Copies of whole numbers are exact, and nothing else that growth makes of them would be."""
    if not (array.is_floating_point() if hasattr(array, "is_floating_point") else array.dtype.kind not in "biu"):
        raise OutgrowError(f"growth computes with what it grows, and an array of {array.dtype} holds none but whole numbers; give floats")


def empty_like(array: Any, shape: tuple[int, ...]) -> Any:
    """An array of the same kind and dtype and another shape, its entries yet to be set."""
    return array.new_empty(shape) if hasattr(array, "new_empty") else np.empty(shape, array.dtype)
