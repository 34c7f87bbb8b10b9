"""Model families as data: which tensors a checkpoint holds, what each writes and reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from outgrow.arch.counts import Counts, flops_per_token, parameter_counts, positions, step_flops
from outgrow.arch.gemma import GEMMA2
from outgrow.arch.gpt2 import GPT2
from outgrow.arch.gpt_neox import GPT_NEOX
from outgrow.arch.llama import LLAMA
from outgrow.arch.mixtral import MIXTRAL
from outgrow.arch.olmo import OLMO2
from outgrow.arch.opt import OPT
from outgrow.arch.phi import PHI3
from outgrow.arch.qwen import QWEN2, QWEN3, QWEN3_MOE
from outgrow.arch.spec import Arch, Axis, Config, Space, Spec, Tensor, parse, size_of
from outgrow.errors import OutgrowError

FAMILIES: tuple[Arch, ...] = (LLAMA, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, OLMO2, GPT2, GPT_NEOX, OPT, PHI3, MIXTRAL)

__all__ = [
    "FAMILIES", "LLAMA", "Arch", "Axis", "Config", "Counts", "Space", "Spec", "Tensor",
    "arch_for", "flops_per_token", "parameter_counts", "parse", "positions", "size_of", "step_flops",
]  # fmt: skip


def arch_for(config: Config, families: Iterable[Arch] = FAMILIES) -> Arch:
    """The family that a config.json belongs to, by its `model_type`."""
    if not isinstance(config, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  callers are not all typed
        raise OutgrowError(f"a config is a mapping, such as model.config.to_dict(), not {type(config).__name__}")
    model_type = config.get("model_type")
    known: dict[str, Arch] = {}
    for arch in families:
        for name in arch.model_types:
            known.setdefault(name, arch)  # the first describes it: a user's own comes before the built-in ones
    if not isinstance(model_type, str):
        raise OutgrowError(f"the config has no 'model_type'; known architectures: {', '.join(known)}")
    if model_type not in known:
        raise OutgrowError(
            f"unknown architecture '{model_type}'; known: {', '.join(known)}; describe another in a file and give it with --family-file"
        )
    return known[model_type]
