"""Masks of G_random and MSG: new outputs are blended in from what preserves the function, without touching a model's code.

A branch end is linear, so masking its output is scaling its weights: parameters theta are trained, and the model runs on
theta (1 - m + c m) + (1 - c) m s, where m marks masked entries, s is what preserves (zero, mostly), and c goes from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Masks:
    """The masked entries of a model's parameters.

    Attributes:
        where: parameter name -> [shape of the parameter] 1 where masked, 0 elsewhere.
        preserving: parameter name -> [shape of the parameter] the values at c = 0, where masked.
    """

    where: Mapping[str, Tensor]
    preserving: Mapping[str, Tensor]

    def opened(self, parameters: Mapping[str, Tensor], share: float | Tensor) -> dict[str, Tensor]:
        """The parameters that the model runs on at c = `share`; those without a mask are passed on as they are."""
        seen = dict(parameters)
        for name, where in self.where.items():
            closed = where * (1 - share)
            seen[name] = parameters[name] * (1 - closed) + self.preserving[name] * closed
        return seen

    def through(self, gradients: Mapping[str, Tensor], share: float) -> None:
        """Gradients of what the model runs on become, in place, those of what is trained."""
        for name, gradient in gradients.items():
            gradient.mul_(1 - self.where[name] * (1 - share))


def make_masks(parameters: Mapping[str, Tensor], masked: Mapping[str, tuple[Tensor, Tensor]]) -> Masks:
    """Reads what preserves off the parameters of a grown checkpoint, and puts the random values in its place.

    Args:
        parameters: name -> parameter; changed in place.
        masked: name -> (where it is masked, the values behind the mask), from `growth.fresh.masked`.
    """
    where = {name: mask.to(parameters[name]) for name, (mask, _) in masked.items()}
    preserving = {name: parameters[name].detach().clone() for name in masked}
    with torch.no_grad():
        for name, (_, values) in masked.items():
            parameters[name].copy_(torch.where(where[name] != 0, values.to(parameters[name]), parameters[name]))
    return Masks(where, preserving)
