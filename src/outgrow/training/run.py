"""A run in memory, opened at its beginning or where it was left."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outgrow.arch import arch_for, flops_per_token, step_flops
from outgrow.checkpoint.optimizer_state import BEHIND_MASKS
from outgrow.checkpoint.ranks import agreed, leads, world
from outgrow.checkpoint.safetensors_file import stored_in
from outgrow.data.packed import Packed
from outgrow.errors import OutgrowError
from outgrow.files import mend
from outgrow.growth.fresh import masked
from outgrow.growth.plan import GrowthPlan
from outgrow.models.build import empty, materialise, resolved
from outgrow.models.decoder import Decoder
from outgrow.models.forward import ModelForward, blocks_of, forward_of
from outgrow.models.masks import Masks
from outgrow.training.config import RunConfig, unmasking
from outgrow.training.distributed import device, fill, from_files, held_rows, like_parameter, local, product_dtype, shard, wait
from outgrow.training.optim import Optimizer
from outgrow.training.origin import Origin, from_directory, from_seed
from outgrow.training.record import CHECKPOINTS, METRICS, forget_rows_after, latest_checkpoint, read_rows
from outgrow.training.refusals import refuse
from outgrow.training.rewarm import Rewarm, rewarm_of
from outgrow.training.state import Clock, Writer, read_clock, restore_optimizer


@dataclass
class Run:
    """A run in memory: everything the loop needs, ready at `clock`."""

    config: RunConfig
    directory: Path
    packed: Packed
    model: Any
    parameters: dict[str, Tensor]  # by name, each rank's part of sharded ones
    decoder: Decoder | ModelForward
    optimizer: Optimizer
    clock: Clock
    first: int  # the clock at which this run began
    flops_per_token: int  # the model's
    step_flops: int  # the optimizer's among them
    copies: dict[str, list[int]] | None = None  # at the last growth
    masks: Masks | None = None  # until they are open
    behind: dict[str, Tensor] = field(default_factory=dict[str, Tensor])  # what is trained where the model does not run on it yet
    rewarm: Rewarm | None = None
    writer: Writer = field(default_factory=Writer)
    recent: deque[float] = field(default_factory=deque)  # losses of the last steps, for spikes

    def loss(self, rows: Tensor) -> Tensor:
        """Mean cross-entropy of sequences [B, T + 1]; through the model's own call where FSDP has hooks on it."""
        rows = rows.to(device())
        return (self.model if world() > 1 else self.decoder.loss)(rows[:, :-1], rows[:, 1:])

    @contextmanager
    @torch.no_grad()
    def behind_masks(self) -> Generator[None, None, None]:
        """Inside, parameters and gradients are of what is trained, and not of what the model runs on while masks hide some of it."""
        if self.masks is None:
            yield
            return
        own = {name: local(self.parameters[name]) for name in self.behind}
        gradients = {name: local(grad) for name in own if (grad := self.parameters[name].grad) is not None}
        self.masks.through(gradients, self._open_share())
        for name, value in self.behind.items():
            own[name].copy_(local(value))
        yield
        for name, value in self.behind.items():
            local(value).copy_(own[name])
        share = self._open_share()
        for name, value in self.masks.opened(own, share).items():
            own[name].copy_(value)
        if share >= 1:
            self.masks, self.behind = None, {}

    def _open_share(self) -> float:
        """c, from 0 at the run's first token to 1 after `unmask_tokens`, a tenth of the run if not given."""
        return min(1.0, (self.clock.tokens - self.first) / unmasking(self.config, self.first))


def open_run(config: RunConfig, directory: Path, packed: Packed, start: Path | Origin | None) -> Run:
    """The run where it was left, or at its beginning."""
    if not isinstance(start, Origin):
        start = from_directory(start) if start else from_seed(resolved(config.model or {}), config.seed)
    origin = start.lineage
    first = origin.tokens
    latest = agreed(latest_checkpoint(directory))
    source = from_directory(latest) if latest else start
    model_config = dict(source.config)
    refuse(config, model_config, first, packed)
    model = empty(model_config, buffers=True)
    arch = arch_for(model_config)
    dtype = product_dtype(config.precision)
    decoder = forward_of(model, dtype, config.compile, config.recompute)
    if world() > 1:
        # The decoder keeps the residual stream in fp32 whatever is gathered; transformers' own forward pass takes it from the embedding.
        shard(model, blocks_of(model), dtype if device().type == "cuda" and isinstance(decoder, Decoder) else None)
        decoder = decoder.through(model)
        model.forward = decoder.loss
    parameters = _materialised(model, source.read)
    if world() == 1 and isinstance(decoder, Decoder):
        decoder = decoder.over(parameters)
    if origin.trains is not None:
        for name, value in parameters.items():
            value.requires_grad_(name in origin.trains)
    plan = GrowthPlan.from_json(origin.plan) if origin.plan else None
    hidden = masked(plan) if plan and start.directory else {}
    if config.start and config.start.unmask_tokens and not hidden:
        raise OutgrowError(f"start.unmask_tokens has no effect: '{start.directory}' was not grown behind masks; remove it")
    masks, behind = _masks(start, hidden, parameters, latest)
    warm = config.start.rewarm_tokens if config.start else None
    rewarm = rewarm_of(plan, parameters, first, warm) if plan and warm else None
    optimizer = Optimizer(config.optimizer, parameters, arch, model_config)
    clock = Clock(first, origin.flops, 0, origin.skipped or 0)
    if latest:
        clock = read_clock(latest)
        restore_optimizer(latest, optimizer)
    elif config.start and config.start.optimizer != "reset":
        clock = replace(clock, steps=start.restore(optimizer))
    if leads():
        mend(directory / CHECKPOINTS)
        forget_rows_after(directory / METRICS, clock.tokens)
    wait()
    flops = flops_per_token(arch, model_config, config.data.context)
    of_step = step_flops(arch, model_config, config.data.context, config.batch_tokens, config.optimizer.kind)
    run = Run(
        config, directory, packed, model, parameters, decoder, optimizer, clock, first, flops, of_step, origin.copies, masks, behind, rewarm
    )
    losses = [row["loss"] for row in read_rows(directory) if "loss" in row]
    run.recent.extend(agreed(losses[-config.spike.window :]))
    return run


def _materialised(model: Any, read: Any) -> dict[str, Tensor]:
    """The parameters of a model on the meta device, each rank's part on its device and set to what `read` gives."""
    materialise(model, device())
    parameters = dict(model.named_parameters())
    fill(parameters, read)
    return parameters


def _masks(
    start: Origin, hidden: Mapping[str, tuple[Any, Any]], parameters: Mapping[str, Tensor], latest: Path | None
) -> tuple[Masks | None, dict[str, Tensor]]:
    """The masks of a run that starts from masked growth, and what is behind them; None once they are open."""
    if not hidden or (latest and not (latest / BEHIND_MASKS).exists()):
        return None, {}
    where, preserving, behind = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for name, (mask, values) in hidden.items():
        own, rows = local(parameters[name].detach()), held_rows(parameters[name])
        where[name] = torch.from_numpy(mask[rows].copy()).to(own)
        preserving[name] = start.read(name, rows).to(own)
        random = torch.from_numpy(values(rows)).to(own)
        behind[name] = like_parameter(parameters[name], torch.where(where[name] != 0, random, own))
    if latest:
        fill(behind, from_files(stored_in(latest / BEHIND_MASKS)))
    return Masks(where, preserving), behind
