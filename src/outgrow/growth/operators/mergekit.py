"""The practice of repeating layers of a trained model with their branches scaled by sqrt(1/2) (mergekit issue 198)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.growth.operators.arrange import arrange
from outgrow.growth.plan import GrowthPlan


def mergekit(arch: Arch, config: Config, layers: str) -> GrowthPlan:
    """Takes layers in the order given (see `arrange`), the branches of those that stand more than once scaled by sqrt(1/2)."""
    plan = arrange(arch, config, layers, 0.5**0.5)
    source = "https://github.com/arcee-ai/mergekit/issues/198"
    return GrowthPlan("mergekit", {"layers": layers}, arch, config, plan.layers, plan.claims, source, ends=plan.ends)
