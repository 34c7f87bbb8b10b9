"""AdamW with weight decay on matrices only, its state named as the parameters are named on disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from outgrow.arch import Arch, Config
from outgrow.training.config import AdamWConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(settings: AdamWConfig, parameters: dict[str, Tensor], arch: Arch, config: Config) -> torch.optim.AdamW:
    """AdamW over every parameter of the arch table; matrices decay, gains and biases do not."""
    decays = {tensor.name: tensor.spec.decays for tensor in arch.tensors(config)}
    groups: list[dict[str, Any]] = [
        {"params": [parameters[name] for name in decays if decays[name]], "weight_decay": settings.weight_decay},
        {"params": [parameters[name] for name in decays if not decays[name]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True)


def moments(optimizer: torch.optim.AdamW, parameters: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """exp_avg and exp_avg_sq under the parameters' names."""
    return {kind: {name: optimizer.state[value][kind] for name, value in parameters.items()} for kind in MOMENTS}


def restore(optimizer: torch.optim.AdamW, parameters: dict[str, Tensor], saved: dict[str, dict[str, Tensor]], steps: int) -> None:
    """Puts saved moments and the step count back."""
    for name, value in parameters.items():
        state: dict[str, Any] = {kind: saved[kind][name] for kind in MOMENTS}
        optimizer.state[value] = {"step": torch.tensor(float(steps)), **state}
