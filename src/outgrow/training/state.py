"""Checkpoints of a run: a Hugging Face directory with the optimizer's state beside the weights, under the same names."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from outgrow.checkpoint.lineage import LINEAGE, Lineage
from outgrow.checkpoint.optimizer_state import CLOCK, moment_file
from outgrow.errors import OutgrowError
from outgrow.files import new_directory, read_json, write_json
from outgrow.training.optim import MOMENTS, moments, restore

BEHIND_MASKS = "behind_masks.safetensors"  # what is trained where the weights are still masked


@dataclass(frozen=True)
class Clock:
    """How far a run is.

    Attributes:
        tokens: tokens seen, those of its ancestors included.
        flops: training FLOPs spent, those of its ancestors included.
        steps: optimizer steps since the optimizer's state was fresh.
    """

    tokens: int
    flops: float
    steps: int


def save(
    directory: Path,
    model: Any,
    optimizer: torch.optim.AdamW,
    clock: Clock,
    run: str,
    tokenizer: list[Path],
    seen: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes one checkpoint; it appears whole or not at all.

    `seen` are the parameters that the model runs on where masks still hide some; the weight file has those, as any tool would
    have to run them, and what is behind the masks stands beside it.
    """
    parameters = dict(model.named_parameters())
    hidden = {name: parameters[name].detach().clone() for name in seen or {} if seen and seen[name] is not parameters[name]}
    with new_directory(directory) as temporary:
        try:
            _put(parameters, {name: seen[name] for name in hidden} if seen else {})
            model.save_pretrained(temporary)
        finally:
            _put(parameters, hidden)
        if hidden:
            save_file(hidden, temporary / BEHIND_MASKS, metadata={"format": "pt"})
        for kind, tensors in moments(optimizer, parameters).items():
            save_file(tensors, moment_file(temporary, kind), metadata={"format": "pt"})
        for path in tokenizer:
            shutil.copy(path, temporary)
        write_json(temporary / CLOCK, asdict(clock))
        trained = [name for name, value in parameters.items() if value.requires_grad]
        trains = trained if len(trained) < len(parameters) else None
        write_json(temporary / LINEAGE, Lineage(tokens=clock.tokens, flops=clock.flops, run=run, trains=trains).as_json())


def read_clock(directory: Path) -> Clock:
    """The clock of a checkpoint that `save` wrote."""
    return Clock(**read_json(directory / CLOCK))


def restore_optimizer(directory: Path, model: Any, optimizer: torch.optim.AdamW) -> int:
    """Loads the optimizer's state of a checkpoint; returns its step count."""
    if not (directory / CLOCK).exists():
        raise OutgrowError(f"'{directory}' carries no optimizer state; set start.optimizer to 'reset'")
    steps = read_clock(directory).steps
    saved = {kind: load_file(moment_file(directory, kind)) for kind in MOMENTS}
    restore(optimizer, dict(model.named_parameters()), saved, steps)
    return steps


def restore_behind_masks(directory: Path, parameters: Mapping[str, Tensor]) -> None:
    """Puts what was trained behind masks back into the parameters that a masked checkpoint was loaded into."""
    if (directory / BEHIND_MASKS).exists():
        _put(parameters, load_file(directory / BEHIND_MASKS))


@torch.no_grad()
def _put(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
