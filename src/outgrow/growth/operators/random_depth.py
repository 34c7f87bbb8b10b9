"""G_random in depth: new random blocks behind a mask that training opens (arXiv 2405.15319)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.errors import OutgrowError
from outgrow.growth.operators.parts import MOST_LAYERS, as_they_are, identity_blocks
from outgrow.growth.plan import FRESH, Claims, GrowthPlan


def random_depth(arch: Arch, config: Config, factor: int = 2, seed: int = 0) -> GrowthPlan:
    """Adds random blocks on top of the old ones, `factor` times as many in all. Their outputs are masked until training unmasks them."""
    count = arch.layers(config)
    if not 2 <= factor <= MOST_LAYERS // max(count, 1):
        raise OutgrowError(f"the growth factor must be at least 2 and leave at most {MOST_LAYERS:,} layers, not {factor}")
    layers = as_they_are(arch, config) + (FRESH,) * (count * (factor - 1))
    return GrowthPlan(
        "random-depth", {"factor": factor, "seed": seed}, arch, config, layers, Claims(preserves=True, trains=True, dual=True),
        "arXiv:2405.15319", ends=identity_blocks(layers), fill="masked", seed=seed,
    )  # fmt: skip
