"""G_stack, G_direct in depth: repeat the whole block list (arXiv 2405.15319, where it wins; StackBERT, Gong et al. 2019, doubles)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.growth.operators.parts import repeated
from outgrow.growth.plan import Claims, GrowthPlan


def stack(arch: Arch, config: Config, factor: int = 4) -> GrowthPlan:
    """Repeats all layers `factor` times, 012 -> 012012: target layer i is a copy of source layer i mod L."""
    claims = Claims(preserves=False, trains=True)
    return GrowthPlan("stack", {"factor": factor}, arch, config, repeated(arch, config, factor), claims, "arXiv:2405.15319")
