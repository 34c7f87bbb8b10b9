"""G_stack: repeat the whole block list (arXiv 2405.15319, where it wins; StackBERT, Gong et al. 2019, doubles)."""

from __future__ import annotations

from outgrow.arch import Config, arch_for
from outgrow.errors import OutgrowError
from outgrow.growth.plan import Claims, GrowthPlan

MOST_LAYERS = 10_000  # far beyond any model: a slip of the finger should not fill the memory


def stack(config: Config, factor: int = 4) -> GrowthPlan:
    """Repeats all layers `factor` times, 012 -> 012012: target layer i is a copy of source layer i mod L."""
    if factor < 2:
        raise OutgrowError(f"stack needs a factor of at least 2, not {factor}")
    count = arch_for(config).layers(config)
    if count * factor > MOST_LAYERS:
        raise OutgrowError(f"stack would make {count} x {factor:,} layers, more than {MOST_LAYERS:,}; lower the factor")
    layers = tuple(range(count)) * factor
    return GrowthPlan("stack", {"factor": factor}, config, layers, Claims(preserves=False, trains=True), "arXiv:2405.15319")
