"""G_zero in depth: new blocks that add nothing (arXiv 2405.15319; LEMON, 2310.07999)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.growth.operators.parts import identity_blocks, repeated
from outgrow.growth.plan import Claims, GrowthPlan


def zero_depth(arch: Arch, config: Config, factor: int = 2) -> GrowthPlan:
    """Stacks `factor` times with what ends the new blocks' branches at zero: they pass the residual stream on as it is."""
    layers = repeated(arch, config, factor)
    return GrowthPlan(
        "zero-depth", {"factor": factor}, arch, config, layers, Claims(preserves=True, trains=True, dual=True), "arXiv:2405.15319",
        ends=identity_blocks(layers),
    )  # fmt: skip
