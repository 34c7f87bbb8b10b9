"""What a receipt measures: the grown model's logits against the source's, in float64, where both fit in memory."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from outgrow.checkpoint.huggingface import CONFIG, INDEX, SINGLE, Checkpoint, open_checkpoint
from outgrow.errors import OutgrowError, one_line
from outgrow.files import read_json
from outgrow.growth.plan import GrowthPlan
from outgrow.models.exact import exact_logits, exact_model

SEQUENCES, LENGTH = 2, 16
_ROUNDING = {"F64": 1e-10, "F32": 1e-3, "F16": 0.1, "BF16": 0.5}  # of the logits' deviation; what storing may do to an exact plan


def measured(source: Checkpoint, target: Path, plan: GrowthPlan, most_bytes: int | None = None) -> dict[str, Any]:
    """The largest logit difference on a few random tokens, or why it was not measured.

    Args:
        source, target: of a growth.
        plan: that was carried out.
        most_bytes: of memory that may be used; what is free if not given.

    Raises:
        OutgrowError: the plan claims to preserve the function, and what was written does not, beyond its dtype's rounding; or
            transformers runs the source and refuses what was written.
    """
    entries = sum(math.prod(shape) for shape in plan.grown_arch.shapes(plan.target_config).values())
    needed, free = 3 * 8 * entries, _free_bytes()
    if most_bytes is not None and needed > most_bytes:
        return {"not measured": f"float64 needs about {needed:,} bytes of memory; --measure takes them"}
    if needed > free:
        return {"not measured": f"float64 needs about {needed:,} bytes of memory, and {free:,} are free"}
    if not _is_what_transformers_opens(source):
        return {"not measured": "the source is not a directory that transformers opens by itself"}
    vocab = plan.arch.sizes(plan.origin)["vocab"]
    tokens = torch.randint(0, vocab, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    transformers.utils.logging.disable_progress_bar()
    try:
        before = _logits(source.directory, tokens)
        after = _logits_of_grown(target, tokens, plan)
    except OutgrowError:
        raise
    except Exception as error:  # transformers does not know the model, or lacks what it needs, and raises what it likes
        return {"not measured": f"transformers cannot run it: {one_line(error)}"}
    difference, deviation = float((before - after).abs().max()), float(before.std())
    if plan.claims.preserves and all(stage.claims.preserves for stage in plan.stages):
        stored = (*source.tensors.values(), *open_checkpoint(target, (plan.grown_arch,)).tensors.values())
        rounding = max(_ROUNDING.get(one.entry.dtype, 0.5) for one in stored)
        if difference > rounding * deviation:
            raise OutgrowError(
                f"'{plan.operator}' claims to preserve the function, and the logits differ by {difference:.2g} at a deviation of "
                f"{deviation:.2g}; nothing was written. Let an operator of your own claim preserves=False; of one of ours, please report it"
            )
    return {"logit_difference": difference, "logit_deviation": deviation, "tokens": SEQUENCES * LENGTH, "computed_in": "float64"}


def _is_what_transformers_opens(source: Checkpoint) -> bool:
    """Does the directory hold this config and these weights under the names that transformers looks for?"""
    config, names = source.directory / CONFIG, {path.name for path in source.weight_files}
    by_index = SINGLE not in names and (source.directory / INDEX).is_file()
    return config.is_file() and read_json(config) == source.config and (names == {SINGLE} or by_index)


@torch.no_grad()
def _logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    return exact_logits(exact_model(directory), tokens)


def _logits_of_grown(target: Path, tokens: torch.Tensor, plan: GrowthPlan) -> torch.Tensor:
    try:
        return _logits(target, tokens)
    except StrictDataclassError as error:
        raise OutgrowError(
            f"transformers refuses what '{plan.operator}' makes of it: {one_line(error)}; nothing was written. Choose other sizes, or use "
            "--no-measure to write it all the same"
        ) from None


def _free_bytes() -> int:
    """Memory that can be had, as the system says it."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
