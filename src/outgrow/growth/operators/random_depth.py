"""G_random in depth: new random blocks behind a mask that training opens (arXiv 2405.15319)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.growth.operators.parts import as_they_are, identity_blocks, refuse_factor
from outgrow.growth.plan import Claims, GrowthPlan
from outgrow.spaces import FRESH


def random_depth(arch: Arch, config: Config, factor: int = 2, seed: int = 0) -> GrowthPlan:
    """Adds random blocks on top of the old ones, `factor` times as many in all. Their outputs are masked until training unmasks them."""
    refuse_factor(arch, config, factor)
    layers = as_they_are(arch, config) + (FRESH,) * (arch.layers(config) * (factor - 1))
    return GrowthPlan(
        "random-depth", {"factor": factor, "seed": seed}, arch, config, layers, Claims(preserves=True, trains=True, dual=True),
        "arXiv:2405.15319", ends=identity_blocks(layers), fill="masked", seed=seed,
    )  # fmt: skip
