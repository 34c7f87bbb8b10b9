"""Gradual stacking and MIDAS: one stage of growth inserts a copy of the last, or of the middle, block of layers (arXiv 2409.19044).

A block of 0 is one layer, or one period where layers of several kinds take turns.
"""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.errors import OutgrowError
from outgrow.growth.operators.parts import block_of
from outgrow.growth.plan import Claims, GrowthPlan


def gradual(arch: Arch, config: Config, block: int = 0) -> GrowthPlan:
    """Appends a copy of the last `block` layers, 0123 -> 012323 with a block of 2."""
    block = block_of(arch, config, block)
    return _insert("gradual", arch, config, block, arch.layers(config) - block)


def midas(arch: Arch, config: Config, block: int = 0) -> GrowthPlan:
    """Inserts a copy of the middle `block` layers after them, 012345 -> 01232345 with a block of 2.

    MIDAS gives its stages i = 1..k the share i^alpha / sum_j j^alpha of the training tokens.
    """
    block = block_of(arch, config, block)
    blocks = arch.layers(config) // max(block, 1)
    return _insert("midas", arch, config, block, (blocks - 1) // 2 * block + (arch.layers(config) % max(block, 1)) // 2)


def _insert(name: str, arch: Arch, config: Config, block: int, begin: int) -> GrowthPlan:
    count = arch.layers(config)
    if not 1 <= block <= count:
        raise OutgrowError(f"{name} copies a block of 1 to {count} layers, not {block}")
    order = tuple(range(count))
    layers = order[: begin + block] + order[begin:]
    return GrowthPlan(name, {"block": block}, arch, config, layers, Claims(preserves=False, trains=True), "arXiv:2409.19044")
