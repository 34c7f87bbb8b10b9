"""Staged training's growth: double the width block-diagonally, or the depth by identity blocks (arXiv 2203.06211)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.growth.operators.hypercloning import hypercloning
from outgrow.growth.operators.parts import evenly, identity_blocks
from outgrow.growth.plan import Claims, GrowthPlan


def staged_width(arch: Arch, config: Config) -> GrowthPlan:
    """W' = [[W, 0], [0, W]], and the head reads both halves by 1/2. The carried moments are m/2 and v/4, as published."""
    plan = hypercloning(arch, config, 2)
    claims = Claims(preserves=True, trains=True, dual=True)
    rewrites: dict[str, dict[str, object]] = {"diagonal": {}}
    return GrowthPlan(
        "staged-width", {}, arch, config, plan.layers, claims, "arXiv:2203.06211", lifts=plan.lifts, rewrites=rewrites
    )  # fmt: skip


def staged_depth(arch: Arch, config: Config) -> GrowthPlan:
    """Doubles the layers, each followed by a copy that adds nothing yet."""
    layers = evenly(arch, config, 2 * arch.layers(config))
    claims = Claims(preserves=True, trains=True, dual=True)
    return GrowthPlan("staged-depth", {}, arch, config, layers, claims, "arXiv:2203.06211", ends=identity_blocks(layers))
