"""The training loop: one run from its start, or from where it was left, to its last token, on one rank or many."""

from __future__ import annotations

import gc
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from outgrow.checkpoint.ranks import agreed, leads, world
from outgrow.data.packed import Batches, Packed, validation_batches
from outgrow.errors import DivergedError, Interrupted, OutgrowError
from outgrow.files import write_json
from outgrow.training.accelerators import ACCELERATORS
from outgrow.training.config import RunConfig
from outgrow.training.distributed import device, local, mean_and_any, own_rows, wait
from outgrow.training.origin import Origin
from outgrow.training.record import (
    EVALUATED,
    FINISHED,
    METRICS,
    Row,
    checkpoint_at,
    checkpoints,
    forget_rollbacks_from,
    latest_checkpoint,
    read_rows,
)
from outgrow.training.run import Run, open_run
from outgrow.training.schedule import share_of_peak
from outgrow.training.state import Clock, state_of

Evaluate = Callable[[Path], Row]  # checkpoint directory -> such fields


class Observer(Protocol):
    """Whoever watches a run: told each row, asked whether to stop."""

    def row(self, row: Row) -> None: ...
    def stop(self) -> bool: ...


def train(
    config: RunConfig, directory: Path, packed: Packed, start: Path | Origin | None, observer: Observer, evaluate: Evaluate | None = None
) -> Run:  # fmt: skip
    """Trains a run to its end, resuming it where it was left; returns it as it is in memory. Under `torchrun` every rank calls this.

    Args:
        config: the run.
        directory: where its metrics and checkpoints lie.
        packed: its data.
        start: the checkpoint directory, or the run grown in memory, whose weights it begins with; None draws them from the seed.
        observer: told each row of metrics; may ask it to stop.
        evaluate: runs tasks on a checkpoint where `config.evaluate` asks for it; called on the first rank, the others wait.

    Raises:
        Interrupted: the observer asked to stop; a checkpoint was written first.
        OutgrowError: too little data, or a loss that is not a number.
    """
    run = open_run(config, directory, packed, start)
    if config.spike.action == "stop" and isinstance(start, Origin):
        start = None  # nothing goes back to it; a run that was grown in place may be forgotten
        gc.collect()  # a decoder refers to itself
    rolled_back = _rollbacks(run)
    batches = Batches(packed.training, config.data.context, config.seed)
    _record_first(run, observer, batches)
    _evaluate(run, observer, evaluate)
    while run.clock.tokens < config.tokens:
        before, spiked = run.clock, ""
        try:
            _advance(run, batches, observer, evaluate)
        except SpikeError as spike:
            rolled_back += 1
            if config.spike.action == "stop" or rolled_back > config.spike.times:
                raise
            spiked = str(spike)
        if spiked:  # the error, whose traceback holds the run, is gone
            run.writer.finish()
            # What was computed in vain was paid for; the batch that did it is left out.
            spent = before.flops + run.step_flops
            del run
            gc.collect()  # or there would be two in memory
            run = open_run(config, directory, packed, start)
            _record_first(run, observer, batches)
            _evaluate(run, observer, evaluate)
            run.clock = replace(run.clock, flops=spent, skipped=before.tokens + before.skipped + config.batch_tokens - run.clock.tokens)
            _record(run, observer, _row(run, rolled_back=spiked))
        elif isinstance(start, Origin) and start.has_weights and latest_checkpoint(directory):
            start = start.receipt()  # nothing goes back to what it was grown from any more
            gc.collect()
    run.writer.finish()
    _tidy(run)
    if leads():
        write_json(directory / FINISHED, {"tokens": run.clock.tokens, "flops": run.clock.flops})
    wait()
    return run


class SpikeError(DivergedError):
    """A step that diverged, before which a run may go back."""


def _rollbacks(run: Run) -> int:
    """How often this run has gone back before its clock; those from its clock it will make again, and their rows are forgotten."""
    if leads():
        forget_rollbacks_from(run.directory / METRICS, run.clock.tokens)
    wait()
    return agreed(sum("rolled_back" in row for row in read_rows(run.directory)))


def _advance(run: Run, batches: Batches, observer: Observer, evaluate: Evaluate | None) -> None:
    """One step and what is due after it: rows of metrics, validation, evaluation, a checkpoint."""
    config, began = run.config, time.perf_counter()
    values = _step(run, batches)
    seconds = time.perf_counter() - began
    _record(run, observer, _row(run, **values, **_speed(run, seconds)))
    tokens = run.clock.tokens
    if _due(run, config.validate_every):
        _record(run, observer, _validation_row(run, batches))
    _evaluate(run, observer, evaluate)
    stopping = mean_and_any(0.0, observer.stop() or run.writer.failed())[1] and tokens < config.tokens
    if stopping or _due(run, config.save_every) or tokens in config.keep:
        _save(run)
    if stopping:
        run.writer.finish()
        _tidy(run)
        raise Interrupted(f"'{config.name}' is saved at {tokens:,} tokens; the same command goes on from there")


def _step(run: Run, batches: Batches) -> dict[str, float]:
    """One optimizer step; returns the mean training loss, the gradient norm before clipping, and the learning rate."""
    config, clock = run.config, run.clock
    rate = config.optimizer.learning_rate * share_of_peak(config.schedule, clock.tokens, config.batch_tokens, run.first, config.tokens)
    sequences = config.batch_tokens // config.data.context
    rows = torch.from_numpy(batches.at(clock.tokens + clock.skipped, sequences, own_rows(sequences)))
    parts = rows.split((config.micro_batch_tokens or config.batch_tokens) // config.data.context // world())
    losses: list[Tensor] = []
    for part in parts:
        loss = run.loss(part) * (len(part) / len(rows))
        loss.backward()
        losses.append(loss.detach())
    total, _ = mean_and_any(sum(float(loss) for loss in losses), False)  # read here, so that the device is waited for once
    _refuse_spike(run, total, rate)
    with run.behind_masks():
        norm = float(_whole(torch.nn.utils.clip_grad_norm_(run.optimizer.parameters.values(), config.optimizer.clip)))
        if not math.isfinite(norm):
            raise _spike(run, f"the gradient's norm of '{config.name}' is {norm:.4g}", rate)
        warm = run.rewarm.share(clock.tokens + config.batch_tokens) if run.rewarm else 1.0
        if run.rewarm and warm < 1:
            run.rewarm.hold(run.optimizer.parameters)
        run.optimizer.step(rate)
        if run.rewarm and warm < 1:
            run.rewarm.shorten(run.optimizer.parameters, warm)
        run.clock = Clock(clock.tokens + config.batch_tokens, clock.flops + run.step_flops, clock.steps + 1, clock.skipped)
    return {"loss": total, "gradient_norm": norm, "learning_rate": rate}


def _refuse_spike(run: Run, loss: float, rate: float) -> None:
    config, recent, above = run.config, run.recent, run.config.spike.above
    mean = sum(recent) / len(recent) if len(recent) == config.spike.window else math.inf
    if not math.isfinite(loss) or (above is not None and loss > mean + above):
        usual = f", {loss - mean:.3g} over the mean of the last {len(recent)} steps" if math.isfinite(loss) else ""
        raise _spike(run, f"the loss of '{config.name}' is {loss:.4g}{usual}", rate)
    recent.append(loss)
    if len(recent) > config.spike.window:
        recent.popleft()


def _spike(run: Run, what: str, rate: float) -> SpikeError:
    """What went wrong, and at which batch."""
    config, clock = run.config, run.clock
    first = (clock.tokens + clock.skipped) // config.data.context
    last = first + config.batch_tokens // config.data.context - 1
    return SpikeError(
        f"{what} at {clock.tokens:,} tokens (learning rate {rate:g}, sequences {first} to {last} of seed {config.seed}); lower "
        "optimizer.learning_rate" + ("" if config.spike.action == "roll back" else ", or let spike.action be 'roll back'")
    )


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if world() > 1 and hasattr(norm, "full_tensor") else norm  # type: ignore[operator]


def _speed(run: Run, seconds: float) -> dict[str, float]:
    """Tokens per second, and, where the device's peak is known, the share of it that model FLOPs are."""
    speed = run.config.batch_tokens / seconds
    name = torch.cuda.get_device_name() if device().type == "cuda" else ""
    peak = next((one.flops for part, one in ACCELERATORS.items() if part in name), None)
    known = {"mfu": speed * run.flops_per_token / (peak * world())} if peak else {}
    return {"tokens_per_second": speed, **known}


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """Mean held-out loss in nats per token."""
    sequences = (run.config.micro_batch_tokens or run.config.batch_tokens) // run.config.data.context
    total = count = 0.0
    for rows in validation_batches(run.packed, run.config.data, sequences):
        mine = rows[own_rows(len(rows))]
        # A rank that has none takes part all the same, where parameters are gathered.
        share = len(mine) * world() / len(rows)
        loss, _ = mean_and_any(float(run.loss(torch.from_numpy(mine if len(mine) else rows[:1]))) * share, False)
        total, count = total + loss * len(rows), count + len(rows)
    if not count:
        raise OutgrowError(
            f"the held-out text is shorter than one sequence of {run.config.data.context}; raise data.validation_share, or, of "
            "data.sources, --validation-share of 'outgrow data prepare'"
        )
    return total / count


def _validation_row(run: Run, batches: Batches) -> Row:
    """The held-out loss, and how often the text has been read: of a mixture, the part that was read most."""
    loss = validation_loss(run)
    if not math.isfinite(loss):
        raise SpikeError(
            f"the held-out loss of '{run.config.name}' is {loss:.4g} at {run.clock.tokens:,} tokens; lower optimizer.learning_rate"
        )
    epochs = max(batches.epochs(run.clock.tokens + run.clock.skipped))
    return _row(run, validation_loss=loss, bits_per_byte=loss / math.log(2) / run.packed.bytes_per_token, epochs=round(epochs, 4))


def _record_first(run: Run, observer: Observer, batches: Batches) -> None:
    """The held-out loss before the first step, and the checkpoint of untrained weights, if that is asked for."""
    if run.clock.tokens > run.first:
        return
    if agreed(not read_rows(run.directory)):
        _record(run, observer, _validation_row(run, batches))
    if run.first in run.config.keep:
        _save(run)


def _evaluate(run: Run, observer: Observer, evaluate: Evaluate | None) -> None:
    """Runs tasks on a checkpoint of this clock, if they are due here and the record does not have them already.

    The checkpoint is written first, so a run that is killed before its row goes on from here and evaluates again.
    """
    if evaluate is None or not _evaluation_due(run):
        return
    if agreed(any(_is_evaluation(row, run.clock.tokens) for row in read_rows(run.directory))):
        return
    _save(run)
    run.writer.finish()
    if leads():
        _record(run, observer, _row(run, **evaluate(checkpoint_at(run.directory, run.clock.tokens))))
    wait()


def _evaluation_due(run: Run) -> bool:
    settings, tokens, start = run.config.evaluate, run.clock.tokens, run.config.start
    if settings is None:
        return False
    if tokens == run.first:
        return start is None or start.operator is not None or start.checkpoint is not None
    passed = settings.every is not None and tokens // settings.every > (tokens - run.config.batch_tokens) // settings.every
    return passed or tokens in settings.at or tokens >= run.config.tokens


def _is_evaluation(row: Row, tokens: int) -> bool:
    return row["tokens"] == tokens and any(name.startswith(EVALUATED) for name in row)


def _row(run: Run, **values: Any) -> Row:
    return {"tokens": run.clock.tokens, "flops": run.clock.flops, **values}


def _record(run: Run, observer: Observer, row: Row) -> None:
    if leads():
        with (run.directory / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        observer.row(row)


def _due(run: Run, every: int) -> bool:
    """Did the last step pass a multiple of `every`, or end the run?"""
    tokens, batch = run.clock.tokens, run.config.batch_tokens
    return tokens // every > (tokens - batch) // every or tokens >= run.config.tokens


def _save(run: Run) -> None:
    """Begins a checkpoint, once the one before it is whole and those that nothing needs any more are gone.

    Weights that are no numbers are never kept: nothing could go on from them, nor back to what was there before.
    """
    broken = not all(bool(local(value).isfinite().all()) for value in (*run.parameters.values(), *run.behind.values()))
    if mean_and_any(0.0, broken)[1]:
        raise SpikeError(f"weights of '{run.config.name}' are no numbers at {run.clock.tokens:,} tokens; lower optimizer.learning_rate")
    place = checkpoint_at(run.directory, run.clock.tokens)
    run.writer.finish()
    _tidy(run)
    if not agreed(place.exists()):
        state = state_of(run.model.config, run.parameters, run.optimizer, run.clock, run.config.identity(), run.behind, run.copies)
        run.writer.write(place, state, run.packed.tokenizer_files)


def _tidy(run: Run) -> None:
    """Removes the checkpoints that are neither among the newest nor wanted by name."""
    if not leads():
        return
    whole = checkpoints(run.directory)
    wanted = {checkpoint_at(run.directory, tokens) for tokens in run.config.keep} | set(whole[-run.config.keep_last :])
    for old in whole:
        if old not in wanted:
            shutil.rmtree(old)
