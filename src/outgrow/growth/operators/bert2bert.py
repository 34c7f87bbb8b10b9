"""Net2Net's and bert2BERT's width operators as published: FPI and AKI, with plain copies (arXiv 1511.05641, 2110.07143)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.growth.operators.parts import as_they_are, wider
from outgrow.growth.plan import Claims, GrowthPlan
from outgrow.spaces import copies


def fpi(arch: Arch, config: Config, hidden: int = 0, ffn: int = 0, kv: int = 0, group: int = 0) -> GrowthPlan:
    """Copies written as they are and read as 1/count. Exact but for uneven copies of what a norm reads; `direct-width` mends those."""
    asked = wider(arch, config, {"hidden": hidden, "ffn": ffn, "kv": kv, "group": group})
    lifts = {space: copies(old, new) for space, (old, new) in asked.items()}
    normed = [space for space in asked if arch.spaces[space].admits in ("RMSNorm", "LayerNorm", "even copies")]
    exact = not any(asked[space][1] % asked[space][0] for space in normed)
    knobs = {space: new for space, (_, new) in asked.items()}
    claims = Claims(preserves=exact, trains=True, dual=exact)
    return GrowthPlan("fpi", knobs, arch, config, as_they_are(arch, config), claims, "arXiv:2110.07143", lifts=lifts)


def aki(arch: Arch, config: Config, hidden: int = 0, ffn: int = 0, kv: int = 0, group: int = 0) -> GrowthPlan:
    """FPI, but new outputs come from the same module one layer up, which breaks the copies' symmetry and the function."""
    plain = fpi(arch, config, hidden, ffn, kv, group)
    claims = Claims(preserves=False, trains=True)
    return GrowthPlan("aki", plain.knobs, arch, config, plain.layers, claims, plain.citation, lifts=plain.lifts, rewrites={"above": {}})
