"""Muon over matrices whose rows lie over the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from outgrow.checkpoint.ranks import rank, world


class ShardedMuon(torch.optim.Muon):
    """torch's Muon, with two exchanges a shape and step.

    Its own products over sharded matrices gather each of them fifteen times a step, and every rank computes them all. Here the matrices of
    a shape are dealt out: one exchange gives each rank the whole of its share, torch's Muon orthogonalises them there, and a second one
    takes every rank its rows of the changes.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient; `closure` is torch's, and is not used."""
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[DTensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike.setdefault(tuple(matrix.shape), []).append(matrix)
            for shape, matrices in alike.items():
                changes = _changes([self._update(matrix, group) for matrix in matrices], shape, group)
                for matrix, change in zip(matrices, changes, strict=True):
                    matrix.to_local().mul_(1 - group["lr"] * group["weight_decay"]).add_(change)

    def _update(self, matrix: DTensor, group: Mapping[str, Any]) -> Tensor:
        """This rank's rows of what is to be orthogonalised, in the type in which that begins; moves the momentum on."""
        assert isinstance(matrix.grad, DTensor)
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        momentum, gradient = state["momentum_buffer"].to_local(), matrix.grad.to_local()
        momentum.lerp_(gradient, 1 - group["momentum"])
        return (gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum).bfloat16()


def _changes(updates: Sequence[Tensor], shape: tuple[int, ...], group: Mapping[str, Any]) -> list[Tensor]:
    """[matrices] this rank's rows of each change, from its rows of the updates of matrices of one shape."""
    held = [len(part) for part in torch.empty(shape[0]).chunk(world())]
    held += [0] * (world() - len(held))  # rows on each rank, as FSDP deals them out
    dealt = [range(owner, len(updates), world()) for owner in range(world())]  # matrices of each rank
    order = [index for indices in dealt for index in indices]
    mine = len(dealt[rank()])
    here, there = [mine * rows for rows in held], [len(indices) * held[rank()] for indices in dealt]
    received = _exchanged(torch.cat([updates[index] for index in order]), there, here).split(here)
    whole = torch.cat([part.view(mine, rows, shape[1]) for part, rows in zip(received, held, strict=True)], dim=1)
    changes = torch.stack([_orthogonalised(matrix, group) for matrix in whole]) if mine else whole.float()
    received = _exchanged(torch.cat([part.flatten(0, 1) for part in changes.split(held, dim=1)]), here, there)
    found = dict(zip(order, received.view(len(updates), held[rank()], shape[1]), strict=True))
    return [found[index] for index in range(len(updates))]


def _orthogonalised(update: Tensor, group: Mapping[str, Any]) -> Tensor:
    """What torch's Muon adds to a whole matrix: here to zeros, of a gradient that is all of the momentum."""
    change = torch.zeros_like(update, dtype=torch.float32).requires_grad_()
    change.grad = update.float()
    settings = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    torch.optim.Muon([change], weight_decay=0.0, momentum=0.0, nesterov=False, **settings).step()
    return change.detach()


def _exchanged(sent: Tensor, to: list[int], of: list[int]) -> Tensor:
    """The rows that all ranks have sent to this one; `to` and `of` are numbers of rows for each rank."""
    received = sent.new_empty((sum(of), sent.shape[1]))
    distributed.all_to_all_single(received, sent, of, to)
    return received
