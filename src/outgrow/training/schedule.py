"""The learning rate as a pure function of the run's clock."""

from __future__ import annotations

import math

from outgrow.training.config import ScheduleConfig


def share_of_peak(schedule: ScheduleConfig, seen: int, batch: int, length: int) -> float:
    """The learning rate of one step, as a share of its peak.

    Args:
        schedule: its shape.
        seen: tokens of this run before the step.
        batch: tokens of the step.
        length: tokens of the whole run.

    Warm-up is linear; WSD then holds the peak and decays linearly over the last `decay_tokens`; cosine falls from the
    end of warm-up to the end of the run.
    """
    warm = min(1.0, (seen + batch) / schedule.warmup_tokens) if schedule.warmup_tokens else 1.0
    return warm * (schedule.final + (1 - schedule.final) * _fall(schedule, seen, length))


def _fall(schedule: ScheduleConfig, seen: int, length: int) -> float:
    """From 1 to 0 over the part of the run that decays."""
    if schedule.kind == "wsd" and schedule.decay_tokens:
        return min(1.0, (length - seen) / schedule.decay_tokens)
    if schedule.kind == "cosine":
        done = max(0, seen - schedule.warmup_tokens) / max(1, length - schedule.warmup_tokens)
        return 0.5 + 0.5 * math.cos(math.pi * done)
    return 1.0
