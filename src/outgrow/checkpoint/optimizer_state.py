"""An optimizer's state beside the weights: one safetensors file a moment, under the weights' names, and a clock."""

from __future__ import annotations

from pathlib import Path

from outgrow.checkpoint.safetensors_file import Stored, stored_in
from outgrow.growth.apply import Grown
from outgrow.growth.transport import Channel

CLOCK = "training.json"
BEHIND_MASKS = "behind_masks.safetensors"  # what is trained where the weights are still masked
# Moment -> how it moves. Adam's first moment and Muon's momentum add up gradients, Adam's second adds up their squares.
MOMENTS: dict[str, Channel] = {"exp_avg": "gradient", "exp_avg_sq": "square", "momentum_buffer": "gradient"}


def moment_file(directory: Path, moment: str) -> Path:
    """Where a directory keeps a moment."""
    return directory / f"{moment}.safetensors"


def stored_moments(directory: Path) -> dict[str, dict[str, Stored]]:
    """Moment -> name -> tensor, for the moments that a directory holds; each may cover some of the weights."""
    return {moment: stored_in(path) for moment in MOMENTS if (path := moment_file(directory, moment)).exists()}


def grown_names(grown: Grown, stored: dict[str, Stored]) -> list[str]:
    """The tensors of the target that have a moment, because the tensor of the source that they are like has it."""
    return [name for name in grown.tensors if grown.reference(name) in stored]
