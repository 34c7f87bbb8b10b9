"""Checkpoints of a run: a Hugging Face directory with the optimizer's state beside the weights, under the same names."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from outgrow.checkpoint.lineage import LINEAGE, Lineage
from outgrow.errors import OutgrowError
from outgrow.files import new_directory, read_json, write_json
from outgrow.training.optim import MOMENTS, moments, restore

STATE = "training.json"


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


def save(directory: Path, model: Any, optimizer: torch.optim.AdamW, clock: Clock, run: str, tokenizer: list[Path]) -> None:
    """Writes one checkpoint; it appears whole or not at all."""
    with new_directory(directory) as temporary:
        model.save_pretrained(temporary)
        for kind, tensors in moments(optimizer, dict(model.named_parameters())).items():
            save_file(tensors, temporary / f"{kind}.safetensors", metadata={"format": "pt"})
        for path in tokenizer:
            shutil.copy(path, temporary)
        write_json(temporary / STATE, asdict(clock))
        write_json(temporary / LINEAGE, Lineage(tokens=clock.tokens, flops=clock.flops, run=run).as_json())


def read_clock(directory: Path) -> Clock:
    """The clock of a checkpoint that `save` wrote."""
    return Clock(**read_json(directory / STATE))


def restore_optimizer(directory: Path, model: Any, optimizer: torch.optim.AdamW) -> int:
    """Loads the optimizer's state of a checkpoint; returns its step count."""
    if not (directory / STATE).exists():
        raise OutgrowError(f"'{directory}' carries no optimizer state; set start.optimizer to 'reset'")
    steps = read_clock(directory).steps
    saved = {kind: load_file(directory / f"{kind}.safetensors") for kind in MOMENTS}
    restore(optimizer, dict(model.named_parameters()), saved, steps)
    return steps
