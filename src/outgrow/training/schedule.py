"""The learning rate as a pure function of the run's clock."""

from __future__ import annotations

import math

from outgrow.training.config import ScheduleConfig


def share_of_peak(schedule: ScheduleConfig, clock: int, batch: int, first: int, last: int) -> float:
    """The learning rate of one step, as a share of its peak.

    Args:
        schedule: its shape.
        clock: tokens seen before the step.
        batch: tokens of the step.
        first: clock at which the run began.
        last: clock at which it ends.

    Warm-up is linear; WSD then holds the peak and decays linearly over the last `decay_tokens`; cosine falls from the
    end of warm-up to the end. Beyond `schedule.end` the rate stays where the decay ended.
    """
    begin = first if schedule.begin is None else schedule.begin
    seen, length = clock - begin, (schedule.end or last) - begin
    warm = min(1.0, max(0.0, (seen + batch) / schedule.warmup_tokens)) if schedule.warmup_tokens else 1.0
    return warm * (schedule.final + (1 - schedule.final) * _fall(schedule, seen, length))


def _fall(schedule: ScheduleConfig, seen: int, length: int) -> float:
    """From 1 to 0 over the part that decays."""
    if schedule.kind == "wsd" and schedule.decay_tokens:
        return min(1.0, max(0.0, (length - seen) / schedule.decay_tokens))
    if schedule.kind == "cosine":
        done = max(0, seen - schedule.warmup_tokens) / max(1, length - schedule.warmup_tokens)
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, done))
    return 1.0
