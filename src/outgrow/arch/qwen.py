"""Qwen2 (biases on q, k, v; arXiv 2407.10671), Qwen3 and Qwen3-MoE (norms over each head's queries and keys; arXiv 2505.09388)."""

from dataclasses import replace

from outgrow.arch.llama import ATTENTION, FEED_FORWARD, LLAMA, SPACES
from outgrow.arch.spec import Space

QWEN2 = replace(
    LLAMA,
    family="qwen2",
    model_types=("qwen2",),
    layer={
        **{name: line.split(" | if")[0] for name, line in ATTENTION.items() if name != "self_attn.o_proj.bias"},
        **{name: line for name, line in FEED_FORWARD.items() if name.endswith("weight")},
    },
    layer_bounds={"max_window_layers": "use_sliding_window"},
)

# The norms of queries and keys share the eps of the residual norms, so growth must leave it alone.
QWEN3 = replace(
    LLAMA,
    family="qwen3",
    model_types=("qwen3",),
    layer={
        **ATTENTION,
        "self_attn.q_norm.weight": "gain head",
        "self_attn.k_norm.weight": "gain head",
        **{name: line for name, line in FEED_FORWARD.items() if name.endswith("weight")},
    },
    layer_bounds={"max_window_layers": "use_sliding_window"},
    norm_eps=None,
)

QWEN3_MOE = replace(
    QWEN3,
    family="qwen3_moe",
    model_types=("qwen3_moe",),
    spaces={
        **SPACES,
        "ffn": Space("moe_intermediate_size", edit=("moe_intermediate_size",)),
        "expert": Space(
            "num_experts or num_local_experts", ("num_experts", "num_local_experts"), "even copies", scales=("num_experts_per_tok",)
        ),
    },
    layer={
        **ATTENTION,
        "self_attn.q_norm.weight": "gain head",
        "self_attn.k_norm.weight": "gain head",
        "mlp.gate.weight": "expert <- hidden",
        "mlp.experts.{expert}.gate_proj.weight": "ffn <- hidden",
        "mlp.experts.{expert}.up_proj.weight": "ffn <- hidden",
        "mlp.experts.{expert}.down_proj.weight": "hidden <- ffn | ends branch",
    },
    requires={"decoder_sparse_step": 1, "mlp_only_layers": []},
    defaults={**LLAMA.defaults, "num_experts_per_tok": 8},
)
