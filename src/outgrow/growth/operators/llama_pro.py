"""LLaMA Pro: identity blocks between the old ones, and only they are trained (arXiv 2401.02415)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.errors import OutgrowError
from outgrow.growth.operators.parts import block_of, identity_blocks
from outgrow.growth.plan import Claims, GrowthPlan


def llama_pro(arch: Arch, config: Config, blocks: int = 8, layers: int = 0) -> GrowthPlan:
    """After every L / `blocks` layers inserts copies of the last `layers` of them that add nothing yet; the old layers are frozen."""
    count, layers = arch.layers(config), block_of(arch, config, layers)
    if not 1 <= blocks <= count or count % blocks or not 1 <= layers <= count // blocks:
        raise OutgrowError(f"llama-pro splits the {count} layers into equal groups of at least {layers}; {blocks} groups do not fit")
    size = count // blocks
    groups = (tuple(range(start, start + size)) for start in range(0, count, size))
    order = tuple(layer for group in groups for layer in group + group[-layers:])
    return GrowthPlan(
        "llama-pro", {"blocks": blocks, "layers": layers}, arch, config, order, Claims(preserves=True, trains=True, dual=True),
        "arXiv:2401.02415", ends=identity_blocks(order), trains_only_fresh=True,
    )  # fmt: skip
