"""Interpolation, or interposition: repeat layers in place (arXiv 2405.15319, where stacking beats it; 2510.08008, where it wins late)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.errors import OutgrowError
from outgrow.growth.operators.parts import block_of, refuse_factor
from outgrow.growth.plan import Claims, GrowthPlan


def interpolate(arch: Arch, config: Config, factor: int = 2, block: int = 0, protect: int = 0) -> GrowthPlan:
    """Repeats each block of `block` layers `factor` times in place, 012 -> 001122, but the first and last `protect` layers.

    A block of 0 is one layer, or one period where layers of several kinds take turns.
    """
    refuse_factor(arch, config, factor)
    block, count = block_of(arch, config, block), arch.layers(config)
    middle = range(protect, count - protect)
    if block < 1 or protect < 0 or not middle or len(middle) % block:
        raise OutgrowError(f"interpolate repeats whole blocks of {block} layers between {protect} protected ones at each end of {count}")
    blocks = (middle[start : start + block] for start in range(0, len(middle), block))
    inner = tuple(layer for one in blocks for _ in range(factor) for layer in one)
    layers = (*range(protect), *inner, *range(count - protect, count))
    knobs = {"factor": factor, "block": block, "protect": protect}
    return GrowthPlan("interpolate", knobs, arch, config, layers, Claims(preserves=False, trains=True), "arXiv:2405.15319")
