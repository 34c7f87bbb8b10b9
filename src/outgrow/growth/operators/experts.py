"""Mixtures of experts: from a dense model (sparse upcycling, arXiv 2212.05055), and from fewer experts to more."""

from __future__ import annotations

from typing import cast

from outgrow.arch import Arch, Config, arch_for
from outgrow.errors import OutgrowError
from outgrow.growth.operators.parts import as_they_are, parting
from outgrow.growth.plan import Claims, GrowthPlan
from outgrow.spaces import copies

# Dense family -> the family it becomes: tensor keys of the target and those of the source, and config keys.
_TARGETS = {
    "llama": ("mixtral", {"block_sparse_moe.experts.{expert}.w1": "mlp.gate_proj", "block_sparse_moe.experts.{expert}.w3": "mlp.up_proj",
                          "block_sparse_moe.experts.{expert}.w2": "mlp.down_proj", "block_sparse_moe.gate": None}),
    "qwen3": ("qwen3_moe", {"mlp.experts.{expert}.gate_proj": "mlp.gate_proj", "mlp.experts.{expert}.up_proj": "mlp.up_proj",
                            "mlp.experts.{expert}.down_proj": "mlp.down_proj", "mlp.gate": None}),
}  # fmt: skip


def upcycle(arch: Arch, config: Config, experts: int = 8, chosen: int = 2, seed: int = 0) -> GrowthPlan:
    """Turns each feed-forward block into `experts` copies of it, of which a random router sends every token to `chosen`.

    Exact, because the weights of the chosen experts sum to one. Llama and Mistral become Mixtral, Qwen3 becomes Qwen3-MoE.
    """
    if arch.family not in _TARGETS:
        raise OutgrowError(f"{arch.family} has no family of experts to become; these have: {', '.join(_TARGETS)}")
    if not 1 <= chosen <= experts or experts < 2:
        raise OutgrowError(f"upcycle sends a token to 1 to {experts} of at least 2 experts, not to {chosen}")
    windows = any(config.get(switch) for switch in arch.layer_bounds.values())
    if "sliding_attention" in arch.kinds(config) or (windows and not any(arch.tables(config).values())):
        raise OutgrowError(f"{_TARGETS[arch.family][0]} has layers of one kind, and some of the source's attend to a sliding window")
    biased = [key for key in ("attention_bias", "mlp_bias") if arch.family == "llama" and arch.get(config, key)]
    if biased:
        raise OutgrowError(f"the target family has no biases, and the source's '{biased[0]}' is true; upcycle cannot keep them")
    family, modules = _TARGETS[arch.family]
    keys = {f"{target}.weight": f"{source}.weight" if source else None for target, source in modules.items()}
    target = arch_for({"model_type": family})
    edits = {
        "model_type": family, "architectures": ["MixtralForCausalLM" if family == "mixtral" else "Qwen3MoeForCausalLM"],
        target.spaces["expert"].edit[0]: experts, "num_experts_per_tok": chosen,
    }  # fmt: skip
    edits |= _said(arch, config)
    if family == "qwen3_moe":
        edits |= {"use_sliding_window": False} if windows else {}  # Qwen3-MoE gives every layer the window
        edits |= {
            "moe_intermediate_size": arch.sizes(config)["ffn"],
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return GrowthPlan(
        "upcycle", {"experts": experts, "chosen": chosen, "seed": seed}, arch, config, as_they_are(arch, config),
        Claims(preserves=True, trains=True), "arXiv:2212.05055", target_arch=target, keys=keys, config=edits, seed=seed,
    )  # fmt: skip


def _said(arch: Arch, config: Config) -> dict[str, object]:
    """What the source leaves to its family's defaults, said, since the target's family has others."""
    sizes = arch.sizes(config)
    defaults: dict[str, object] = {"rms_norm_eps": arch.get(config, "rms_norm_eps"), "num_key_value_heads": sizes["kv"]}
    if arch.family == "qwen3":
        defaults["head_dim"] = sizes["head"]
    if config.get("model_type") == "mistral":
        defaults["sliding_window"] = 4096
    said = {key: value for key, value in defaults.items() if key not in config}
    told = config.get("rope_parameters")
    rope = cast("dict[str, object]", told) if isinstance(told, dict) else {}
    if config.get("rope_theta") is None and rope.get("rope_theta") is None:
        said |= {"rope_parameters": {**rope, "rope_theta": 10000.0}} if rope else {"rope_theta": 10000.0}
    return said


def more_experts(arch: Arch, config: Config, factor: int = 2, noise: float = 0.0, seed: int = 0) -> GrowthPlan:
    """Copies every expert `factor` times and sends a token to `factor` times as many. Exact: all copies of an expert are chosen.

    `noise` is a share of noise on the copies' last maps that adds up to nothing, so that they part ways; without it they never do.
    """
    if "expert" not in arch.spaces:
        raise OutgrowError(f"{arch.family} has no experts; use upcycle first")
    if factor < 2:
        raise OutgrowError(f"more-experts needs a factor of at least 2, not {factor}")
    count = arch.sizes(config)["expert"]
    return GrowthPlan(
        "more-experts", {"factor": factor} | ({"noise": noise, "seed": seed} if noise else {}), arch, config, as_they_are(arch, config),
        Claims(preserves=True, trains=True, dual=not noise), "arXiv:2212.05055", lifts={"expert": copies(count, count * factor)},
        rewrites=parting(noise), seed=seed,
    )  # fmt: skip
