"""MSG: masked growth of width and depth at once (arXiv 2305.02869)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.growth.operators.parts import as_they_are, evenly, has_dual, identity_blocks, room, wider
from outgrow.growth.plan import Claims, GrowthPlan
from outgrow.spaces import FRESH


def msg(
    arch: Arch, config: Config, hidden: int = 0, ffn: int = 0, kv: int = 0, group: int = 0, layers: int = 0, seed: int = 0
) -> GrowthPlan:  # fmt: skip
    """Widens spaces and inserts layers, all of it random behind masks that training opens."""
    depth = evenly(arch, config, layers) if layers else as_they_are(arch, config)
    deeper = len(depth) > arch.layers(config)
    asked = wider(arch, config, {"hidden": hidden, "ffn": ffn, "kv": kv, "group": group}, deeper)
    lifts = {space: room(arch, space, old, new) for space, (old, new) in asked.items()}
    knobs = {space: new for space, (_, new) in asked.items()} | ({"layers": layers} if layers else {})
    depth = tuple(FRESH if layer in depth[:place] else layer for place, layer in enumerate(depth))
    return GrowthPlan(
        "msg", {**knobs, "seed": seed}, arch, config, depth, Claims(preserves=True, trains=True, dual=has_dual(lifts)),
        "arXiv:2305.02869", lifts=lifts, ends=identity_blocks(depth), fill="masked", seed=seed,
    )  # fmt: skip
