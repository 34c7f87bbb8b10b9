"""What a receipt measures: the grown model's logits against the source's, in float64, where both fit in memory."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
import transformers

from outgrow.checkpoint.huggingface import open_checkpoint
from outgrow.errors import OutgrowError
from outgrow.growth.plan import GrowthPlan
from outgrow.models.exact import exact_logits, exact_model

SEQUENCES, LENGTH = 2, 16
_ROUNDING = {"F64": 1e-10, "F32": 1e-3, "F16": 0.1, "BF16": 0.5}  # of the logits' deviation; what storing may do to an exact plan


def measured(source: Path, target: Path, plan: GrowthPlan) -> dict[str, Any]:
    """The largest logit difference on a few random tokens, or why it was not measured.

    Raises:
        OutgrowError: the plan claims to preserve the function, and what was written does not, beyond its dtype's rounding.
    """
    entries = sum(math.prod(shape) for shape in plan.grown_arch.shapes(plan.target_config).values())
    needed, free = 3 * 8 * entries, _free_bytes()
    if needed > free:
        return {"not measured": f"float64 needs about {needed:,} bytes of memory, and {free:,} are free"}
    vocab = plan.arch.sizes(plan.origin)["vocab"]
    tokens = torch.randint(0, vocab, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    transformers.utils.logging.disable_progress_bar()
    try:
        before, after = (_logits(directory, tokens) for directory in (source, target))
    except (ValueError, OSError, RuntimeError, KeyError) as error:  # transformers does not know the model, or not like this
        return {"not measured": f"transformers cannot run it: {str(error).splitlines()[0][:200]}"}
    difference, deviation = float((before - after).abs().max()), float(before.std())
    if plan.claims.preserves and all(stage.claims.preserves for stage in plan.stages):
        dtype = next(iter(open_checkpoint(source).tensors.values())).entry.dtype
        if difference > _ROUNDING.get(dtype, 0.5) * deviation:
            raise OutgrowError(
                f"'{plan.operator}' claims to preserve the function, and the logits differ by {difference:.2g} at a deviation of "
                f"{deviation:.2g}; nothing was written. Please report this, or use --no-measure to write it all the same"
            )
    return {"logit_difference": difference, "logit_deviation": deviation, "tokens": SEQUENCES * LENGTH, "computed_in": "float64"}


@torch.no_grad()
def _logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    return exact_logits(exact_model(directory), tokens)


def _free_bytes() -> int:
    """Memory that can be had, as the system says it."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
