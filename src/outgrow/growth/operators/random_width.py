"""G_random in width: random channels, neurons and heads behind masks that training opens (arXiv 2405.15319; MSG, 2305.02869)."""

from __future__ import annotations

from outgrow.arch import Arch, Config
from outgrow.growth.operators.parts import as_they_are, has_dual, room, wider
from outgrow.growth.plan import Claims, GrowthPlan


def random_width(arch: Arch, config: Config, hidden: int = 0, ffn: int = 0, kv: int = 0, group: int = 0, seed: int = 0) -> GrowthPlan:
    """Widens spaces with random weights, W' = [[W, A], [B, C]], masked until training unmasks what they put out.

    An output's mask is a mask on the weights that carry it into the residual stream, o, down and the embeddings.
    """
    asked = wider(arch, config, {"hidden": hidden, "ffn": ffn, "kv": kv, "group": group})
    lifts = {space: room(arch, space, old, new) for space, (old, new) in asked.items()}
    knobs = {space: new for space, (_, new) in asked.items()}
    return GrowthPlan(
        "random-width", {**knobs, "seed": seed}, arch, config, as_they_are(arch, config),
        Claims(preserves=True, trains=True, dual=has_dual(lifts)), "arXiv:2405.15319", lifts=lifts, fill="masked", seed=seed,
    )  # fmt: skip
