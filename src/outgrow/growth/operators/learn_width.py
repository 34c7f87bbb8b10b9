"""G_learn in width: a learned matrix a space, W' = B_out W B_in^T (LiGO, arXiv 2303.00980)."""

from __future__ import annotations

import numpy as np

from outgrow.arch import Arch, Config
from outgrow.growth.operators.parts import as_they_are, wider
from outgrow.growth.plan import Claims, GrowthPlan
from outgrow.spaces import Dense, isometry


def learn_width(arch: Arch, config: Config, hidden: int = 0, ffn: int = 0, kv: int = 0, group: int = 0) -> GrowthPlan:
    """Widens spaces by learned maps, which begin as isometries until `outgrow learn` has trained them."""
    asked = wider(arch, config, {"hidden": hidden, "ffn": ffn, "kv": kv, "group": group})
    lifts = {space: Dense(_matrix(old, new)) for space, (old, new) in asked.items()}
    knobs = {space: new for space, (_, new) in asked.items()}
    claims = Claims(preserves=False, trains=True)
    return GrowthPlan("learn-width", knobs, arch, config, as_they_are(arch, config), claims, "arXiv:2303.00980", lifts=lifts)


def _matrix(old: int, new: int) -> np.ndarray:
    start = isometry(old, new)
    matrix = np.zeros((new, old))
    matrix[np.arange(new), start.source] = start.write
    return matrix
