"""G_learn in depth: every new layer is a learned mixture of the old ones, one map a module (LiGO, arXiv 2303.00980)."""

from __future__ import annotations

import numpy as np

from outgrow.arch import Arch, Config
from outgrow.growth.operators.parts import repeated
from outgrow.growth.plan import Claims, GrowthPlan


def learn_depth(arch: Arch, config: Config, factor: int = 2) -> GrowthPlan:
    """W'_l = sum_j D[l, j] W_j, with D at the pattern of `stack` until `outgrow learn` has trained it."""
    layers = repeated(arch, config, factor)
    start = np.eye(arch.layers(config))[list(layers)]
    modules = {key.rpartition(".")[0] for key in arch.layer}
    return GrowthPlan(
        "learn-depth", {"factor": factor}, arch, config, layers, Claims(preserves=False, trains=True), "arXiv:2303.00980",
        depth_maps={module: start for module in sorted(modules)},
    )  # fmt: skip
