"""What growth left in the weights of a checkpoint: how large they are, how many directions they use, how alike copies still are.

No model is run here; one tensor, or a pair of copies, is in memory at a time. What each layer adds to the loss is in `skipped`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from outgrow.arch import Axis, Tensor, size_of
from outgrow.checkpoint.huggingface import Checkpoint, open_checkpoint
from outgrow.checkpoint.lineage import read_lineage
from outgrow.errors import OutgrowError

Layers = list[float]


@dataclass(frozen=True)
class Diagnosis:
    """A checkpoint, layer by layer.

    Attributes:
        tokens: training tokens that led to it.
        sources: [layers] layer of the base that each was copied from at the last growth, negative for none; empty where none was copied.
        rms: matrix of a block -> [layers] root mean square of its entries.
        rank: matrix of a block -> [layers] its effective rank over the largest it could have, exp(entropy of the normalised singular
            values) / min(rows, columns) (Roy and Vetterli, EUSIPCO 2007); empty if it was not asked for.
        likeness: [layers] cosine similarity to the first layer copied from the same source, the mean over matrices; NaN for first ones.
        neurons: space that was widened by copies -> [layers] cosine similarity of a copied index to the first of its source, mean
            over copies and matrices.
        skipped: [layers] held-out loss without the layer minus held-out loss, nats a token; empty if it was not asked for.
        loss: held-out loss, nats a token; None if it was not asked for.
    """

    tokens: int
    sources: Sequence[int]
    rms: Mapping[str, Layers]
    rank: Mapping[str, Layers]
    likeness: Layers
    neurons: Mapping[str, Layers]
    skipped: Layers
    loss: float | None = None

    @property
    def seams(self) -> list[int]:
        """Layers whose neighbour before them was not their neighbour in the base: where copies meet, or new layers."""
        pairs = enumerate(pairwise(self.sources), 1)
        return [layer for layer, (before, after) in pairs if before < 0 or after != before + 1]

    @property
    def seam_step(self) -> tuple[float, float] | None:
        """(at seams, elsewhere) mean |log2| of the ratio of neighbouring layers' RMS, over matrices; None without both."""
        seams = set(self.seams)
        steps: dict[bool, list[float]] = {True: [], False: []}
        for values in self.rms.values():
            for layer in range(1, len(values)):
                if values[layer] > 0 and values[layer - 1] > 0:
                    steps[layer in seams].append(abs(math.log2(values[layer] / values[layer - 1])))
        return (mean(steps[True]), mean(steps[False])) if steps[True] and steps[False] else None


def diagnose(directory: Path, ranks: bool = True) -> Diagnosis:
    """Reads a checkpoint's weights.

    Args:
        directory: grown, trained, or from elsewhere; copies are known where outgrow grew it or trained it since.
        ranks: also singular values, whose cost is cubic in the width.
    """
    checkpoint = open_checkpoint(directory)
    lineage = read_lineage(directory)
    copies = lineage.copies or {}
    matrices = _matrices(checkpoint)
    count = checkpoint.arch.layers(checkpoint.config)
    sources = copies.get("layer", [])
    if len(sources) != count:
        sources = []
    rms: dict[str, Layers] = {}
    rank: dict[str, Layers] = {}
    for key, by_layer in matrices.items():
        found = [[_measured(checkpoint, tensor, ranks) for tensor in by_layer.get(layer, ())] for layer in range(count)]
        rms[key] = [mean(size for size, _ in layer) if layer else math.nan for layer in found]
        if ranks:
            rank[key] = [mean(share for _, share in layer) if layer else math.nan for layer in found]
    widened = {space: found for space, found in copies.items() if space != "layer" and space in checkpoint.arch.spaces}
    return Diagnosis(
        tokens=lineage.tokens, sources=sources, rms=rms, rank=rank, likeness=_likeness(checkpoint, matrices, sources),
        neurons={space: _alike_inside(checkpoint, matrices, space, found, count) for space, found in widened.items()}, skipped=[],
    )  # fmt: skip


def _measured(checkpoint: Checkpoint, tensor: Tensor, ranks: bool) -> tuple[float, float]:
    """(RMS, effective rank if asked for) of one tensor, which is let go again."""
    value = _read(checkpoint, tensor)
    return _rms(value), effective_rank(value) if ranks else math.nan


def effective_rank(matrix: Any) -> float:
    """exp(entropy of the singular values' shares) of a matrix, over the smaller of its sides; 0 for zeros."""
    values = torch.linalg.svdvals(matrix.flatten(1).float())
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum())) / len(values) if len(shares) else 0.0


def cosine(one: Any, other: Any) -> float:
    """Of two tensors of a shape, as vectors; NaN where one is zero."""
    a, b = one.flatten().double(), other.flatten().double()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else math.nan


def _matrices(checkpoint: Checkpoint) -> dict[str, dict[int, list[Tensor]]]:
    """Key of a block's matrix -> layer -> its tensors, more than one where there are experts."""
    found: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for tensor in checkpoint.arch.tensors(checkpoint.config):
        if tensor.layer is not None and tensor.spec.decays:
            found[tensor.key][tensor.layer].append(tensor)
    return found


def _read(checkpoint: Checkpoint, tensor: Tensor) -> Any:
    value: Any = checkpoint.tensors[tensor.name].read()
    if not bool(value.isfinite().all()):
        raise OutgrowError(f"'{tensor.name}' of '{checkpoint.directory}' holds what is no number; give a checkpoint from before that")
    return value


def _rms(tensor: Any) -> float:
    return float(tensor.double().square().mean().sqrt())


def _likeness(checkpoint: Checkpoint, matrices: Mapping[str, Mapping[int, Sequence[Tensor]]], sources: Sequence[int]) -> Layers:
    """[layers] how alike each is to the first layer of the same source."""
    found: Layers = []
    for layer, source in enumerate(sources):
        first = list(sources).index(source)
        if source < 0 or first == layer:
            found.append(math.nan)
            continue
        pairs = (pair for by_layer in matrices.values() for pair in zip(by_layer.get(first, ()), by_layer.get(layer, ()), strict=True))
        found.append(_mean([cosine(*(_read(checkpoint, one) for one in pair)) for pair in pairs]))
    return found


def _alike_inside(
    checkpoint: Checkpoint, matrices: Mapping[str, Mapping[int, Sequence[Tensor]]], space: str, sources: Sequence[int], count: int
) -> Layers:  # fmt: skip
    """[layers] how alike the copied indices of a space are to the first of their source, over all matrices that it is an axis of."""
    first = [list(sources).index(source) for source in sources]
    copied = [index for index, source in enumerate(sources) if source >= 0 and first[index] != index]
    found: Layers = []
    for layer in range(count):
        values: list[float] = []
        for experts in (
            one[layer] for one in matrices.values() if space == "expert" and one.get(layer) and one[layer][0].expert is not None
        ):
            values += [cosine(*(_read(checkpoint, experts[one]) for one in (first[index], index))) for index in copied]
        for tensor in (one for by_layer in matrices.values() for one in by_layer.get(layer, ())):
            for rows in _along(checkpoint, tensor, space):
                same = torch.nn.functional.cosine_similarity(rows[copied], rows[[first[index] for index in copied]])
                values += [float(one) for one in same if one]
        found.append(_mean(values))
    return found


def _along(checkpoint: Checkpoint, tensor: Tensor, space: str) -> list[Any]:
    """A tensor's entries as [index of a space, all else], once for each axis block that it is part of."""
    sizes = checkpoint.arch.sizes(checkpoint.config)
    found: list[Any] = []
    for number, axis in enumerate(tensor.spec.axes):
        if space not in axis.spaces:
            continue
        begin = 0
        moved = _read(checkpoint, tensor).movedim(number, 0)
        for block, size in zip(axis.blocks, _sizes(axis, sizes), strict=True):
            part = moved[begin : begin + math.prod(size)].reshape(*size, -1)
            begin += math.prod(size)
            if space in block:
                found.append(part.movedim(block.index(space), 0).flatten(1).double())
    return found


def _sizes(axis: Axis, sizes: Mapping[str, int]) -> list[list[int]]:
    return [[size_of(space, sizes) for space in block] for block in axis.blocks]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return mean(known) if known else math.nan
