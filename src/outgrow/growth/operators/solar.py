"""SOLAR depth up-scaling: two copies of the model, overlapping without their seam (arXiv 2312.15166)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.errors import OutgrowError
from outgrow.growth.plan import Claims, GrowthPlan


def solar(arch: Arch, config: Config, removed: int = 8) -> GrowthPlan:
    """[0 .. L - m - 1] + [m .. L - 1]: the last `removed` layers of one copy and the first of the other are left out; 32 -> 48 for 8."""
    count = arch.layers(config)
    if not removed >= 0 or 2 * removed >= count:
        raise OutgrowError(f"solar removes fewer than half of the {count} layers from each copy, not {removed}")
    layers = (*range(count - removed), *range(removed, count))
    return GrowthPlan("solar", {"removed": removed}, arch, config, layers, Claims(preserves=False, trains=True), "arXiv:2312.15166")
