"""Mixtral: Mistral with a mixture of experts in place of each feed-forward block (arXiv 2401.04088)."""

from dataclasses import replace

from outgrow.arch.llama import ATTENTION, LLAMA, SPACES
from outgrow.arch.spec import Space

MIXTRAL = replace(
    LLAMA,
    family="mixtral",
    model_types=("mixtral",),
    spaces={
        **SPACES,
        "expert": Space(
            "num_local_experts or num_experts", ("num_local_experts", "num_experts"), "even copies", scales=("num_experts_per_tok",)
        ),
    },
    layer={
        **{name: line for name, line in ATTENTION.items() if name.endswith("weight")},
        "block_sparse_moe.gate.weight": "expert <- hidden",
        "block_sparse_moe.experts.{expert}.w1.weight": "ffn <- hidden",
        "block_sparse_moe.experts.{expert}.w3.weight": "ffn <- hidden",
        "block_sparse_moe.experts.{expert}.w2.weight": "hidden <- ffn | ends branch",
    },
    defaults={"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2},
)
