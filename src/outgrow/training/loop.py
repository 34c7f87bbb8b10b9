"""The training loop: one run from its start, or from where it was left, to its last token."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from outgrow.arch import arch_for, flops_per_token
from outgrow.checkpoint.lineage import Lineage, read_lineage
from outgrow.data.packed import Batches, Packed, validation_batches
from outgrow.errors import Interrupted, OutgrowError
from outgrow.files import write_json
from outgrow.growth.fresh import masked
from outgrow.growth.plan import GrowthPlan
from outgrow.models.build import initialised, loaded, resolved
from outgrow.models.decoder import Decoder
from outgrow.models.loss import next_token_loss
from outgrow.models.masks import Masks, make_masks
from outgrow.training.config import RunConfig
from outgrow.training.optim import adamw
from outgrow.training.schedule import share_of_peak
from outgrow.training.state import Clock, read_clock, restore_behind_masks, restore_optimizer, save

METRICS, CHECKPOINTS, FINISHED = "metrics.jsonl", "checkpoints", "finished.json"
Row = dict[str, Any]


class Observer(Protocol):
    """Whoever watches a run: told each row, asked whether to stop."""

    def row(self, row: Row) -> None: ...
    def stop(self) -> bool: ...


@dataclass
class Run:
    """A run in memory: everything the loop needs, ready at `clock`."""

    config: RunConfig
    directory: Path
    packed: Packed
    model: Any
    decoder: Decoder
    optimizer: torch.optim.AdamW
    clock: Clock
    first: int  # the clock at which this run began
    flops_per_token: int
    masks: Masks | None = None

    def seen(self) -> dict[str, Tensor] | None:
        """The parameters that the model runs on where masks still hide some; None once all are open."""
        share = self._open_share()
        return self.masks.opened(dict(self.model.named_parameters()), share) if self.masks and share < 1 else None

    def forward(self) -> Decoder:
        """The forward pass over what is seen."""
        seen = self.seen()
        return self.decoder if seen is None else self.decoder.over(seen)

    def _open_share(self) -> float:
        """c, from 0 at the run's first token to 1 after `unmask_tokens`, a tenth of the run if not given."""
        start = self.config.start
        whole = (start.unmask_tokens if start else None) or (self.config.tokens - self.first) / 10
        return min(1.0, (self.clock.tokens - self.first) / whole)


def train(config: RunConfig, directory: Path, packed: Packed, start: Path | None, observer: Observer) -> None:
    """Trains a run to its end, resuming it where it was left.

    Args:
        config: the run.
        directory: where its metrics and checkpoints lie.
        packed: its data.
        start: the checkpoint directory whose weights it begins with; None draws them from the seed.
        observer: told each row of metrics; may ask it to stop.

    Raises:
        Interrupted: the observer asked to stop; a checkpoint was written first.
        OutgrowError: too little data, or a loss that is not a number.
    """
    run = _open(config, directory, packed, start)
    batches = _batches(config, packed)
    if run.clock.tokens == run.first:
        _record(run, observer, _validation_row(run))
    while run.clock.tokens < config.tokens:
        began = time.perf_counter()
        values = _step(run, batches)
        speed = config.batch_tokens / (time.perf_counter() - began)
        tokens = run.clock.tokens
        _record(run, observer, _row(run, **values, tokens_per_second=speed))
        if _due(run, config.validate_every):
            _record(run, observer, _validation_row(run))
        stopping = observer.stop() and tokens < config.tokens
        if stopping or _due(run, config.save_every) or tokens in config.keep:
            _save(run)
        if stopping:
            raise Interrupted(f"'{config.name}' is saved at {tokens:,} tokens; the same command goes on from there")
    write_json(directory / FINISHED, {"tokens": run.clock.tokens, "flops": run.clock.flops})


def _step(run: Run, batches: Batches) -> dict[str, float]:
    """One optimizer step; returns the mean training loss, the gradient norm before clipping, and the learning rate."""
    config, clock = run.config, run.clock
    share = share_of_peak(config.schedule, clock.tokens - run.first, config.batch_tokens, config.tokens - run.first)
    rate = config.optimizer.learning_rate * share
    rows = torch.from_numpy(batches.at(clock.tokens, config.batch_tokens // config.data.context))
    micro = (config.micro_batch_tokens or config.batch_tokens) // config.data.context
    total = 0.0
    for part in rows.split(micro):
        decoder = run.forward()
        loss = next_token_loss(decoder.hidden_states(part[:, :-1]), decoder.head, part[:, 1:])
        loss = loss * (len(part) / len(rows))
        loss.backward()
        total += loss.item()
    if not math.isfinite(total):
        raise OutgrowError(
            f"the loss of '{config.name}' is {total} at {clock.tokens:,} tokens (learning rate {rate:g}); lower optimizer.learning_rate"
        )
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.optimizer.clip)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad()
    step_flops = run.flops_per_token * config.batch_tokens
    run.clock = Clock(clock.tokens + config.batch_tokens, clock.flops + step_flops, clock.steps + 1)
    return {"loss": total, "gradient_norm": float(norm), "learning_rate": rate}


def _open(config: RunConfig, directory: Path, packed: Packed, start: Path | None) -> Run:
    """The run where it was left, or at its beginning."""
    origin = read_lineage(start) if start else None
    first = origin.tokens if origin else 0
    latest = latest_checkpoint(directory)
    source = latest or start
    model = loaded(source) if source else initialised(resolved(config.model or {}), config.seed)
    arch, model_config = arch_for(model.config.to_dict()), model.config.to_dict()
    if arch.sizes(model_config)["vocab"] < config.data.vocab:
        raise OutgrowError(f"the model's vocabulary is smaller than data.vocab ({config.data.vocab})")
    parameters = dict(model.named_parameters())
    if origin and origin.trains is not None:
        for name, value in parameters.items():
            value.requires_grad_(name in origin.trains)
    masks = _masks(start, origin, parameters, latest) if start and origin else None
    if config.start and config.start.unmask_tokens and masks is None:
        raise OutgrowError(f"start.unmask_tokens has no effect: '{start}' was not grown behind masks; remove it")
    optimizer = adamw(config.optimizer, parameters, arch, model_config)
    clock = Clock(first, origin.flops if origin else 0.0, 0)
    if latest:
        clock = read_clock(latest)
        restore_optimizer(latest, model, optimizer)
    elif start and config.start and config.start.optimizer != "reset":
        clock = Clock(clock.tokens, clock.flops, restore_optimizer(start, model, optimizer))
    if first >= config.tokens or first % config.batch_tokens:
        raise OutgrowError(
            f"'{config.name}' starts at {first:,} tokens; its end ({config.tokens:,}) must lie beyond, and its batch_tokens "
            f"({config.batch_tokens:,}) must divide the start"
        )
    _forget_rows_after(directory / METRICS, clock.tokens if latest else -1)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]
    flops = flops_per_token(arch, model_config, config.data.context)
    return Run(config, directory, packed, model, Decoder(model, dtype), optimizer, clock, first, flops, masks)


def _masks(start: Path, origin: Lineage, parameters: dict[str, Tensor], latest: Path | None) -> Masks | None:
    """The masks of a run that starts from masked growth, with what is behind them in its parameters."""
    plan = GrowthPlan.from_json(origin.plan) if origin.plan else None
    found = masked(plan) if plan else {}
    if not found:
        return None
    behind = {name: (torch.from_numpy(where.copy()), torch.from_numpy(values)) for name, (where, values) in found.items()}
    if latest is None:
        return make_masks(parameters, behind)
    masks = make_masks(dict(loaded(start).named_parameters()), behind)
    restore_behind_masks(latest, parameters)
    return masks


def _batches(config: RunConfig, packed: Packed) -> Batches:
    """The run's data; refuses a run that would read it more often than data.epochs allows."""
    batches = Batches(packed.training, config.data.context, config.seed)
    usable = batches.sequences_per_epoch * config.data.context
    if usable < config.batch_tokens:
        raise OutgrowError(f"the corpus has {usable:,} training tokens, too few for one batch of {config.batch_tokens:,}; give more text")
    if config.tokens > config.data.epochs * usable:
        raise OutgrowError(
            f"'{config.name}' reads {config.tokens:,} tokens, and the corpus has {usable:,}; give more text, or allow "
            f"repetition with data.epochs: {math.ceil(config.tokens / usable)}"
        )
    return batches


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """Mean held-out loss in nats per token."""
    sequences = (run.config.micro_batch_tokens or run.config.batch_tokens) // run.config.data.context
    total = count = 0.0
    decoder = run.forward()
    for rows in validation_batches(run.packed, run.config.data, sequences):
        part = torch.from_numpy(rows)
        loss = next_token_loss(decoder.hidden_states(part[:, :-1]), decoder.head, part[:, 1:])
        total, count = total + float(loss) * len(rows), count + len(rows)
    if not count:
        raise OutgrowError(f"the held-out text is shorter than one sequence of {run.config.data.context}; raise data.validation_share")
    return total / count


def _validation_row(run: Run) -> Row:
    loss = validation_loss(run)
    return _row(run, validation_loss=loss, bits_per_byte=loss / math.log(2) / run.packed.bytes_per_token)


def _row(run: Run, **values: float) -> Row:
    return {"tokens": run.clock.tokens, "flops": run.clock.flops, **values}


def _record(run: Run, observer: Observer, row: Row) -> None:
    with (run.directory / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    observer.row(row)


def _due(run: Run, every: int) -> bool:
    """Did the last step pass a multiple of `every`, or end the run?"""
    tokens, batch = run.clock.tokens, run.config.batch_tokens
    return tokens // every > (tokens - batch) // every or tokens >= run.config.tokens


def _save(run: Run) -> None:
    """Writes a checkpoint and removes those that nothing needs any more."""
    place = checkpoint_at(run.directory, run.clock.tokens)
    if not place.exists():
        save(place, run.model, run.optimizer, run.clock, run.config.identity(), run.packed.tokenizer_files, run.seen())
    wanted = {checkpoint_at(run.directory, tokens) for tokens in (*run.config.keep, run.clock.tokens)}
    for old in place.parent.iterdir():
        if old not in wanted:
            shutil.rmtree(old)


def checkpoint_at(directory: Path, tokens: int) -> Path:
    """Where a run keeps its checkpoint at a clock."""
    return directory / CHECKPOINTS / f"{tokens:015d}"


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    found = sorted(path for path in (directory / CHECKPOINTS).glob("*") if path.name.isdigit())
    return found[-1] if found else None


def read_rows(directory: Path) -> list[Row]:
    """The metrics of a run, in order."""
    return [json.loads(line) for line in (directory / METRICS).read_text(encoding="utf-8").splitlines()]


def _forget_rows_after(path: Path, tokens: int) -> None:
    """Cuts the record back to a clock, so that a resumed run writes what an uninterrupted one would have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    whole = (line for line in lines if line.endswith("}"))  # a killed writer leaves half a line
    kept = [line + "\n" for line in whole if json.loads(line)["tokens"] <= tokens]
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
