"""Noise on what was grown (arXiv 2405.15319: a share of 0.2 helps G_direct in width and slightly helps G_stack; more hurts)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.errors import OutgrowError
from outgrow.growth.operators.parts import as_they_are
from outgrow.growth.plan import Claims, GrowthPlan


def noise(arch: Arch, config: Config, share: float = 0.2, seed: int = 0) -> GrowthPlan:
    """W <- (1 - share) W + share eps on the matrices of all layers, eps at the scale of fresh weights. A stage after any other."""
    if not 0 < share < 1:
        raise OutgrowError(f"noise takes a share between 0 and 1, not {share}")
    return GrowthPlan(
        "noise", {"share": share, "seed": seed}, arch, config, as_they_are(arch, config), Claims(preserves=False, trains=True),
        "arXiv:2405.15319", rewrites={"noise": {"share": share}}, seed=seed,
    )  # fmt: skip
