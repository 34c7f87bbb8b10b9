"""G_direct in width: copies of channels, neurons and heads that share what they are read with (arXiv 2405.15319; Net2Net, 1511.05641)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.growth.operators.parts import as_they_are, exact_copies, has_dual, parting, wider
from outgrow.growth.plan import Claims, GrowthPlan


def direct_width(
    arch: Arch, config: Config, hidden: int = 0, ffn: int = 0, kv: int = 0, group: int = 0, noise: float = 0.0, seed: int = 0
) -> GrowthPlan:  # fmt: skip
    """Widens spaces to the sizes given, at any ratio and exactly: W' = D_out W R_in.

    Under RMSNorm uneven copies are scaled by their count; under LayerNorm new channels of an uneven ratio hold the mean.
    `noise` is a share of projected noise, which lets copies part ways and leaves the function as it is.
    """
    asked = wider(arch, config, {"hidden": hidden, "ffn": ffn, "kv": kv, "group": group})
    lifts = {space: exact_copies(arch, space, old, new) for space, (old, new) in asked.items()}
    knobs = {space: new for space, (_, new) in asked.items()}
    claims = Claims(preserves=True, trains=True, dual=has_dual(lifts) and not noise)
    return GrowthPlan(
        "direct-width", {**knobs, **({"noise": noise, "seed": seed} if noise else {})}, arch, config, as_they_are(arch, config), claims,
        "arXiv:2405.15319", lifts=lifts, rewrites=parting(noise), seed=seed,
    )  # fmt: skip
