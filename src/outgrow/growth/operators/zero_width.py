"""G_zero in width: new channels, neurons and heads that the old function does not see (arXiv 2405.15319)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.growth.operators.parts import as_they_are, has_dual, room, wider
from outgrow.growth.plan import Claims, GrowthPlan


def zero_width(arch: Arch, config: Config, hidden: int = 0, ffn: int = 0, kv: int = 0, group: int = 0, seed: int = 0) -> GrowthPlan:
    """Widens spaces with zeros in what writes the residual stream, and random weights elsewhere.

        q, k, v, gate, up:  [[W, A], [B, C]]     o, down:  [[W, 0], [0, 0]]     embeddings:  [E, 0]     A, B, C random

    The paper zeroes B and draws the last column of o and down. That leaves SwiGLU neurons dead where only the ffn grows, gate and
    up both zero; here what reads a new neuron is zero in place of what it reads, so the function stays and all of it trains.
    """
    asked = wider(arch, config, {"hidden": hidden, "ffn": ffn, "kv": kv, "group": group})
    lifts = {space: room(arch, space, old, new) for space, (old, new) in asked.items()}
    knobs = {space: new for space, (_, new) in asked.items()}
    return GrowthPlan(
        "zero-width", {**knobs, "seed": seed}, arch, config, as_they_are(arch, config),
        Claims(preserves=True, trains=True, dual=has_dual(lifts)), "arXiv:2405.15319", lifts=lifts, fill="quiet", seed=seed,
    )  # fmt: skip
