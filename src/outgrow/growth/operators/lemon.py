"""LEMON: lossless growth of width and depth, with unequal shares so that copies part ways (arXiv 2310.07999)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.growth.operators.parts import as_they_are, evenly, has_dual, identity_blocks, room, wider
from outgrow.growth.plan import Claims, GrowthPlan
from outgrow.spaces import Lift, copies, split


def lemon(
    arch: Arch, config: Config, hidden: int = 0, ffn: int = 0, kv: int = 0, group: int = 0, layers: int = 0, seed: int = 0
) -> GrowthPlan:  # fmt: skip
    """Copies neurons and heads, read by unequal shares; new layers add nothing.

    New channels hold the mean under LayerNorm and zero under RMSNorm. Heads that are normed together are read by equal shares.
    """
    depth = evenly(arch, config, layers) if layers else as_they_are(arch, config)
    deeper = len(depth) > arch.layers(config)
    asked = wider(arch, config, {"hidden": hidden, "ffn": ffn, "kv": kv, "group": group}, deeper)
    lifts = {space: _lift(arch, space, old, new, seed) for space, (old, new) in asked.items()}
    knobs = {space: new for space, (_, new) in asked.items()} | ({"layers": layers} if layers else {})
    return GrowthPlan(
        "lemon", {**knobs, "seed": seed}, arch, config, depth, Claims(preserves=True, trains=True, dual=has_dual(lifts)),
        "arXiv:2310.07999", lifts=lifts, ends=identity_blocks(depth), fill="quiet", seed=seed,
    )  # fmt: skip


def _lift(arch: Arch, space: str, old: int, new: int, seed: int) -> Lift:
    if space in arch.residual:
        return room(arch, space, old, new)
    return copies(old, new) if arch.spaces[space].admits == "even copies" else split(old, new, seed)
