"""Any layer list, as ranges or in the paper's notation (arXiv 2405.15319, appendix on partial stacking)."""

from __future__ import annotations

import re

from outgrow.arch import Arch, Config
from outgrow.errors import OutgrowError
from outgrow.growth.operators.parts import MOST_LAYERS
from outgrow.growth.plan import Claims, GrowthPlan


def arrange(arch: Arch, config: Config, layers: str, scale: float = 1.0) -> GrowthPlan:
    """Takes layers in the order given; `scale` multiplies what ends the branches of every layer that stands more than once.

    `0-5,0-5,2-5` counts from 0, both ends included. `12-3456*5-56` is the paper's notation and counts from 1: one digit a layer,
    parts joined by "-", `*n` after the part that is repeated n times.
    """
    order = layer_list(layers)
    ends = tuple(scale if order.count(layer) > 1 else 1.0 for layer in order) if scale != 1 else ()
    knobs = {"layers": layers} | ({"scale": scale} if scale != 1 else {})
    same = order == tuple(range(arch.layers(config)))
    return GrowthPlan("arrange", knobs, arch, config, order, Claims(preserves=same, trains=True, dual=same), "arXiv:2405.15319", ends=ends)


def layer_list(text: str) -> tuple[int, ...]:
    """Source layers, from 0, of a layer list in either notation."""
    if re.fullmatch(r"[1-9]+(\*\d{1,4})?(-[1-9]+(\*\d{1,4})?)*", text) and "*" in text:
        parts = (part.partition("*") for part in text.split("-"))
        order = [int(digit) - 1 for digits, _, times in parts for digit in digits * int(times or 1)]
    elif re.fullmatch(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", text):
        ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
        if sum(abs(end[-1] - end[0]) + 1 for end in ends) > MOST_LAYERS:
            raise OutgrowError(f"the layer list '{text}' names more than {MOST_LAYERS:,} layers")
        order = [layer for end in ends for layer in range(end[0], end[-1] + 1)]
        if any(end[0] > end[-1] for end in ends):
            raise OutgrowError(f"the layer list '{text}' has a range that runs backwards; write the smaller layer first")
    else:
        raise OutgrowError(f"'{text[:80]}' is not a layer list; write 0-5,0-5,2-5 (from 0) or the paper's 12-3456*5-56 (from 1)")
    if len(order) > MOST_LAYERS:
        raise OutgrowError(f"the layer list '{text}' names more than {MOST_LAYERS:,} layers")
    return tuple(order)
