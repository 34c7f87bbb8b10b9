"""Model families as data: which tensors a checkpoint holds, what each writes and reads."""

from __future__ import annotations

from outgrow.arch.counts import Counts, flops_per_token, parameter_counts
from outgrow.arch.llama import LLAMA
from outgrow.arch.spec import Arch, Axis, Config, Space, Spec, Tensor, parse
from outgrow.errors import OutgrowError

FAMILIES: tuple[Arch, ...] = (LLAMA,)

__all__ = [
    "FAMILIES", "LLAMA", "Arch", "Axis", "Config", "Counts", "Space", "Spec", "Tensor",
    "arch_for", "flops_per_token", "parameter_counts", "parse",
]  # fmt: skip


def arch_for(config: Config) -> Arch:
    """The family that a config.json belongs to, by its `model_type`."""
    model_type = config.get("model_type")
    known = {name: arch for arch in FAMILIES for name in arch.model_types}
    if not isinstance(model_type, str):
        raise OutgrowError(f"the config has no 'model_type'; known architectures: {', '.join(known)}")
    if model_type not in known:
        raise OutgrowError(f"unknown architecture '{model_type}'; known: {', '.join(known)}")
    return known[model_type]
