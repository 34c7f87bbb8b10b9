"""What is wrong with a run, found before anything is built: every problem at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from outgrow.arch import Config, arch_for, positions
from outgrow.checkpoint.ranks import world
from outgrow.data.packed import Batches, Packed
from outgrow.errors import OutgrowError
from outgrow.models.build import empty
from outgrow.training.config import RunConfig, first_token


def refuse(config: RunConfig, model: Config, first: int, packed: Packed) -> None:
    """Raises an OutgrowError that tells all of a run's `problems`."""
    if found := list(problems(config, model, first, packed, world())):
        raise OutgrowError("; ".join(f"'{config.name}': {problem}" for problem in found))


def problems(config: RunConfig, model: Config, first: int, packed: Packed | None, ranks: int) -> Iterator[str]:
    """What keeps a run from being trained, a sentence each.

    Args:
        config: the run.
        model: config.json of the model that it trains.
        first: clock at which it begins.
        packed: its text, where that is known already.
        ranks: that share a batch.
    """
    yield from _of_the_clock(config, first)
    yield from _of_the_parent(config)
    yield from _of_the_model(config, model)
    micro = (config.micro_batch_tokens or config.batch_tokens) // config.data.context
    if micro % ranks:
        yield f"{ranks} ranks do not divide the {micro} sequences of a forward pass; change micro_batch_tokens, batch_tokens or the ranks"
    if packed:
        yield from _of_the_text(config, model, packed)


def _of_the_clock(config: RunConfig, first: int) -> Iterator[str]:
    if first >= config.tokens or first % config.batch_tokens:
        yield (
            f"it starts at {first:,} tokens; its end ({config.tokens:,}) must lie beyond, and its batch_tokens ({config.batch_tokens:,}) "
            "must divide the start"
        )
    parent = config.start.run if config.start else None
    if parent and (not first_token(parent) <= first <= parent.tokens or first % parent.batch_tokens):
        yield (
            f"it starts at {first:,} tokens of '{parent.name}', which has steps of {parent.batch_tokens:,}, begins at "
            f"{first_token(parent):,} and ends at {parent.tokens:,}; let start.tokens be one of its steps"
        )
    if early := [clock for clock in config.keep if clock < first]:
        yield f"keep names the clocks {early}, which lie before its first token ({first:,}); remove them"
    for name in ("unmask_tokens", "rewarm_tokens"):
        length = getattr(config.start, name, None)
        if length and length > config.tokens - first:
            yield f"start.{name} ({length:,}) is more than the {config.tokens - first:,} tokens that it trains for; lower it"
    schedule = config.schedule
    begin, end = first if schedule.begin is None else schedule.begin, schedule.end or config.tokens
    if begin > first:
        yield f"schedule.begin ({begin:,}) lies behind the run's first token ({first:,}); it says where the schedule began, so lower it"
    is_stub = end - begin == config.batch_tokens  # the base of a study's arm that grows before it has learned anything
    if (schedule.decay_tokens or not is_stub) and schedule.warmup_tokens + schedule.decay_tokens > end - begin:
        yield (
            f"schedule.warmup_tokens ({schedule.warmup_tokens:,}) and schedule.decay_tokens ({schedule.decay_tokens:,}) are more than the "
            f"{end - begin:,} tokens of the schedule, which never reaches its peak; lower them"
        )


def _of_the_parent(config: RunConfig) -> Iterator[str]:
    """A run that goes on at another's clock leaves out what that has read where both read in one order, and nowhere else."""
    parent = config.start.run if config.start else None
    if parent and (changed := [name for name, value in _order(parent).items() if _order(config)[name] != value]):
        yield (
            f"it has another {' and another '.join(changed)} than '{parent.name}' and so would read again some of what that has read; "
            "give it the same, or let start.checkpoint be that run's checkpoint, with which any is allowed"
        )


def _order(config: RunConfig) -> dict[str, Any]:
    """What the order in which a run reads depends on."""
    data = {f"data.{name}": value for name, value in config.data if name not in ("epochs", "validation_tokens")}
    return {"seed": config.seed, **data}


def _of_the_model(config: RunConfig, model: Config) -> Iterator[str]:
    arch = arch_for(model)
    sizes = arch.sizes(model)
    if unknown := sorted(set(config.optimizer.tuned_at or {}) - set(sizes)):
        yield f"optimizer.tuned_at names the space '{unknown[0]}'; the model has {', '.join(sizes)}"
    most = positions(model)
    if most is not None and config.data.context > most:
        yield f"data.context ({config.data.context:,}) is more than the {most:,} positions that the model has; lower it"
    built = {name for name, _ in empty(model).named_parameters()}
    if odd := sorted(built ^ set(arch.shapes(model))):
        yield (
            f"transformers keeps '{odd[0]}' of a '{model.get('model_type')}' under another name, or stacked with others, and training does "
            "not map that; grow the checkpoint here and train it elsewhere"
        )


def _of_the_text(config: RunConfig, model: Config, packed: Packed) -> Iterator[str]:
    vocab = arch_for(model).sizes(model)["vocab"]
    if vocab < packed.vocab:
        yield f"the model's vocabulary ({vocab:,}) is smaller than the tokenizer's ({packed.vocab:,}); give it so many entries"
    usable = Batches(packed.training, config.data.context, config.seed).sequences_per_epoch * config.data.context
    if usable < config.batch_tokens:
        yield f"the corpus has {usable:,} training tokens, too few for one batch of {config.batch_tokens:,}; give more text"
    elif config.tokens > config.data.epochs * usable:
        yield (
            f"it reads {config.tokens:,} tokens, and the corpus has {usable:,}; give more text, or allow repetition with "
            f"data.epochs: {math.ceil(config.tokens / usable)}"
        )
