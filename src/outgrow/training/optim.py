"""AdamW and Muon over named parameters, their state named as the parameters are named on disk."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from outgrow.arch import Arch, Config, Spec, size_of
from outgrow.errors import OutgrowError
from outgrow.training.config import OptimizerConfig
from outgrow.training.sharded_muon import ShardedMuon

KEPT = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}  # what each keeps a parameter


class Optimizer:
    """The optimizers of a run: every trained parameter has one, and a share of the learning rate.

    Args:
        settings: of the run.
        parameters: name -> parameter; those that ask for gradients are trained.
        arch, config: of the model.
    """

    def __init__(self, settings: OptimizerConfig, parameters: Mapping[str, Tensor], arch: Arch, config: Config) -> None:
        self.parameters = {name: value for name, value in parameters.items() if value.requires_grad}
        self.kinds: dict[str, str] = {}
        groups: dict[tuple[str, bool, float], list[Tensor]] = {}
        sizes, tuned_at = arch.sizes(config), settings.tuned_at or {}
        for tensor in arch.tensors(config):
            if tensor.name not in self.parameters:
                continue
            kind = self.kinds[tensor.name] = "muon" if settings.kind == "muon" and tensor.is_inner_matrix else "adamw"
            share = _share(kind, tensor.spec, sizes, tuned_at)
            groups.setdefault((kind, tensor.spec.decays, share), []).append(self.parameters[tensor.name])
        self.torch: dict[str, torch.optim.Optimizer] = {}
        for kind in sorted(set(self.kinds.values())):
            own = [
                {"params": members, "weight_decay": settings.weight_decay if decays else 0.0, "share": share}
                for (other, decays, share), members in groups.items()
                if other == kind
            ]
            self.torch[kind] = _made(kind, own, settings)

    def step(self, rate: float) -> None:
        """One update at a learning rate, after which no gradient is left."""
        for optimizer in self.torch.values():
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            optimizer.step()
            optimizer.zero_grad()

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Moment -> name of each parameter that has it -> its value; zero before the first step."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in self.parameters.items():
            kind = self.kinds[name]
            for moment in KEPT[kind]:
                state = self.torch[kind].state.get(value, {})
                found.setdefault(moment, {})[name] = state[moment] if moment in state else torch.zeros_like(value, requires_grad=False)
        return found

    def restore(self, saved: Mapping[str, Mapping[str, Tensor]], steps: int, fresh: Collection[str] = ()) -> None:
        """Puts saved moments and the step count back.

        Of `fresh` parameters, those that growth made, copies among them, momentum may be missing, where the source has no matrix to be
        like; it begins at zero.
        """
        for name, value in self.parameters.items():
            kind = self.kinds[name]
            if any(name not in saved.get(moment, {}) for moment in KEPT[kind]):
                if kind == "muon" and name in fresh:
                    continue
                raise OutgrowError(f"the saved optimizer state has nothing for '{name}' under {kind}; set start.optimizer to 'reset'")
            state: dict[str, Any] = {moment: saved[moment][name] for moment in KEPT[kind]}
            # Fused AdamW wants its step count where the parameters are.
            self.torch[kind].state[value] = {"step": torch.tensor(float(steps), device=value.device), **state} if kind == "adamw" else state


def _made(kind: str, groups: list[dict[str, Any]], settings: OptimizerConfig) -> torch.optim.Optimizer:
    rate, betas = settings.learning_rate, (settings.beta1, settings.beta2)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
    is_sharded = any(isinstance(value, DTensor) for group in groups for value in group["params"])
    muon = ShardedMuon if is_sharded else torch.optim.Muon
    return muon(groups, lr=rate, momentum=settings.momentum, adjust_lr_fn="match_rms_adamw")


def _share(kind: str, spec: Spec, sizes: Mapping[str, int], tuned_at: Mapping[str, int]) -> float:
    """The share of the learning rate with which a step changes a matrix's outputs as much as at the sizes the rate was tuned at (muP)."""
    return _change(kind, spec, {**sizes, **tuned_at}) / _change(kind, spec, sizes) if spec.decays else 1.0


def _change(kind: str, spec: Spec, sizes: Mapping[str, int]) -> float:
    """By how much a step at learning rate 1 changes the outputs of a matrix, up to a constant; embeddings read one entry.

    Adam's entries are of one size and add up over the fan-in (arXiv 2203.03466, table 3). An update of spectral norm s changes outputs by
    s sqrt(in / out) (arXiv 2310.17813), and Muon's, with entries as large as Adam's, has s = sqrt(max(in, out)) (arXiv 2502.16982): the
    square root of the width, where all sizes grow alike.
    """
    fans = {
        axis.role: sum(math.prod(size_of(space, sizes) for space in block if space != "vocab") for block in axis.blocks)
        for axis in spec.axes
    }
    fan_in, fan_out = fans["read"], fans["write"]
    return fan_in if kind == "adamw" else math.sqrt(fan_in * max(fan_in, fan_out) / fan_out)
