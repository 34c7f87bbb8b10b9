"""Zero/one-layer expansion: from a model of no or one block to full depth at once (arXiv 2511.04981)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.errors import OutgrowError
from outgrow.growth.operators.parts import MOST_LAYERS
from outgrow.growth.plan import Claims, GrowthPlan
from outgrow.spaces import FRESH


def expand(arch: Arch, config: Config, layers: int, weights: str = "copy", seed: int = 0) -> GrowthPlan:
    """Makes a model of `layers` blocks: copies of the source's, over and over, or random ones (`weights="random"`) after them."""
    count = arch.layers(config)
    if weights not in ("copy", "random") or (weights == "copy" and not count):
        raise OutgrowError(f"expand fills with weights 'copy' or 'random' (a base without layers: 'random' alone), not '{weights}'")
    if not count < layers <= MOST_LAYERS:
        raise OutgrowError(f"expand makes more layers than the source's {count}, at most {MOST_LAYERS:,}, not {layers}")
    order = tuple(layer % count if weights == "copy" else layer if layer < count else FRESH for layer in range(layers))
    knobs = {"layers": layers, "weights": weights, "seed": seed}
    return GrowthPlan("expand", knobs, arch, config, order, Claims(preserves=False, trains=True), "arXiv:2511.04981", seed=seed)
