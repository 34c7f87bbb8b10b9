"""HyperCloning: every space tiled by one whole factor (arXiv 2409.12903)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.errors import OutgrowError
from outgrow.growth.operators.parts import as_they_are, parting
from outgrow.growth.plan import Claims, GrowthPlan
from outgrow.spaces import copies


def hypercloning(arch: Arch, config: Config, factor: int = 2, noise: float = 0.0, seed: int = 0) -> GrowthPlan:
    """Tiles hidden, ffn and key-value heads `factor` times, fan-in divided by it; `noise` is a share of projected noise."""
    if factor < 2:
        raise OutgrowError(f"hypercloning needs a factor of at least 2, not {factor}")
    sizes = arch.sizes(config)
    lifts = {space: copies(sizes[space], sizes[space] * factor) for space in ("hidden", "ffn", "kv")}
    return GrowthPlan(
        "hypercloning", {"factor": factor} | ({"noise": noise, "seed": seed} if noise else {}), arch, config, as_they_are(arch, config),
        Claims(preserves=True, trains=True, dual=not noise), "arXiv:2409.12903", lifts=lifts, rewrites=parting(noise), seed=seed,
    )  # fmt: skip
