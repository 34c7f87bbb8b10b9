"""Phi-3: Llama with q, k, v in one matrix and gate, up in another (arXiv 2404.14219)."""

from dataclasses import replace

from outgrow.arch.llama import LLAMA

PHI3 = replace(
    LLAMA,
    family="phi3",
    model_types=("phi3",),
    layer={
        "input_layernorm.weight": "gain hidden",
        "self_attn.qkv_proj.weight": "(kv group head) + (kv head) + (kv head) <- hidden",
        "self_attn.o_proj.weight": "hidden <- (kv group head) | ends branch",
        "post_attention_layernorm.weight": "gain hidden",
        "mlp.gate_up_proj.weight": "(2 ffn) <- hidden",
        "mlp.down_proj.weight": "hidden <- ffn | ends branch",
    },
    listed_rope=("phi3",),
    defaults={"tie_word_embeddings": False, "rms_norm_eps": 1e-5},
)
