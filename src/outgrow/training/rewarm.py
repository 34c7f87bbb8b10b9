"""Re-warming what growth made: its updates begin at nothing and grow, while what was there before keeps its learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from outgrow.growth.apply import Grown
from outgrow.growth.plan import GrowthPlan
from outgrow.training.distributed import held_rows, local


@dataclass
class Rewarm:
    """The new entries of a grown model, and how far their learning rate has risen.

    An update is linear in the learning rate, so that a share of the rate is a share of the step.

    Attributes:
        new: name -> 1 where growth made an entry, 0 elsewhere; [this rank's rows of the parameter], or one number for all of it.
        first: clock at which the rise begins.
        tokens: that it takes.
    """

    new: Mapping[str, Tensor]
    first: int
    tokens: int
    _before: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def share(self, clock: int) -> float:
        """The share of the learning rate that new entries take in the step that ends at a clock."""
        return min(1.0, (clock - self.first) / self.tokens)

    def hold(self, parameters: Mapping[str, Tensor]) -> None:
        """Keeps what the step is about to change."""
        self._before = {name: local(parameters[name].detach()).clone() for name in self.new if name in parameters}

    @torch.no_grad()
    def shorten(self, parameters: Mapping[str, Tensor], share: float) -> None:
        """Leaves new entries a share of the step."""
        for name, before in self._before.items():
            own = local(parameters[name])
            own.sub_((own - before) * (self.new[name] * (1 - share)))
        self._before = {}


def rewarm_of(plan: GrowthPlan, parameters: Mapping[str, Tensor], first: int, tokens: int) -> Rewarm:
    """The new entries that a plan made: copies count as new, the first of each does not."""
    shapes = plan.stages[0].arch.shapes(plan.origin)
    grown = Grown(plan, lambda name, rows: np.broadcast_to(np.float32(1), shapes[name]))
    new: dict[str, Tensor] = {}
    for name in parameters:
        fresh = grown.state(name, "gradient", "fresh-new") == 0
        if fresh.all():
            new[name] = torch.tensor(1.0)
        elif fresh.any():
            new[name] = torch.from_numpy(fresh[held_rows(parameters[name])].astype(np.float32)).to(parameters[name].device)
    return Rewarm(new, first, tokens)
