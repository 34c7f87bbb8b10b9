"""AdamW with weight decay on matrices only, its state named as the parameters are named on disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from outgrow.arch import Arch, Config
from outgrow.errors import OutgrowError
from outgrow.training.config import AdamWConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps a parameter


def adamw(settings: AdamWConfig, parameters: dict[str, Tensor], arch: Arch, config: Config) -> torch.optim.AdamW:
    """AdamW over the parameters that ask for gradients; matrices decay, gains and biases do not."""
    decays = {tensor.name: tensor.spec.decays for tensor in arch.tensors(config) if parameters[tensor.name].requires_grad}
    groups: list[dict[str, Any]] = [
        {"params": [parameters[name] for name in decays if decays[name]], "weight_decay": settings.weight_decay},
        {"params": [parameters[name] for name in decays if not decays[name]], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True)


def moments(optimizer: torch.optim.AdamW, parameters: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """exp_avg and exp_avg_sq under the names of the parameters that are trained."""
    trained = {name: value for name, value in parameters.items() if value.requires_grad}
    return {kind: {name: optimizer.state[value][kind] for name, value in trained.items()} for kind in MOMENTS}


def restore(optimizer: torch.optim.AdamW, parameters: dict[str, Tensor], saved: dict[str, dict[str, Tensor]], steps: int) -> None:
    """Puts saved moments and the step count back."""
    for name, value in parameters.items():
        if not value.requires_grad:
            continue
        if name not in saved[MOMENTS[0]]:
            raise OutgrowError(f"the saved optimizer state has nothing for '{name}', which is trained; set start.optimizer to 'reset'")
        state: dict[str, Any] = {kind: saved[kind][name] for kind in MOMENTS}
        optimizer.state[value] = {"step": torch.tensor(float(steps)), **state}
