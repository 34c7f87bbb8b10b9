"""G_learn in width: a learned matrix a space, W' = B_out W B_in^T (LiGO, arXiv 2303.00980)."""

from __future__ import annotations

import numpy as np

from outgrow.arch import Arch, Config
from outgrow.growth.fresh import normal
from outgrow.growth.operators.parts import as_they_are, wider
from outgrow.growth.plan import Claims, GrowthPlan
from outgrow.spaces import Dense, Floats, isometry


def learn_width(
    arch: Arch, config: Config, hidden: int = 0, ffn: int = 0, kv: int = 0, group: int = 0, noise: float = 0.2, seed: int = 0
) -> GrowthPlan:  # fmt: skip
    """Widens spaces by learned maps, which begin as isometries and a share of noise until `outgrow learn` has trained them.

    Without `noise` the rows of copies get the same gradient at every step, and neither these maps nor later training ever parts them.
    """
    asked = wider(arch, config, {"hidden": hidden, "ffn": ffn, "kv": kv, "group": group})
    lifts = {space: Dense(_matrix(old, new) + noise * _noise(space, old, new, seed)) for space, (old, new) in asked.items()}
    knobs = {space: new for space, (_, new) in asked.items()}
    claims = Claims(preserves=False, trains=True)
    return GrowthPlan(
        "learn-width", {**knobs, "noise": noise, "seed": seed}, arch, config, as_they_are(arch, config), claims, "arXiv:2303.00980",
        lifts=lifts, seed=seed,
    )  # fmt: skip


def _matrix(old: int, new: int) -> Floats:
    start = isometry(old, new)
    matrix = np.zeros((new, old))
    matrix[np.arange(new), start.source] = start.write
    return matrix


def _noise(space: str, old: int, new: int, seed: int) -> Floats:
    """[new, old] noise whose rows are as long as the isometry's, on average."""
    return normal(seed, f"map {space}", (new, old)).astype(np.float64) * (isometry(old, new).write / old**0.5)[:, None]
