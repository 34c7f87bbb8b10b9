"""Llama and what is stored like it: RMSNorm, RoPE, grouped-query attention, SwiGLU (arXiv 2302.13971, 2307.09288)."""

from outgrow.arch.spec import Arch, Space

HEADS = {"num_attention_heads": ("kv", "group")}
SPACES = {
    "hidden": Space("hidden_size", edit=("hidden_size",), admits="RMSNorm"),
    "vocab": Space("vocab_size", admits="nothing"),
    "kv": Space("num_key_value_heads or num_attention_heads", edit=("num_key_value_heads",)),
    "group": Space("num_attention_heads / kv"),
    "head": Space("head_dim or hidden / num_attention_heads", edit=("head_dim",), admits="nothing"),
    "ffn": Space("intermediate_size", edit=("intermediate_size",)),
}
TOP = {
    "model.embed_tokens.weight": "hidden <- vocab | stored vocab hidden",
    "model.norm.weight": "gain hidden | before tied head",
    "lm_head.weight": "vocab <- hidden | tied model.embed_tokens.weight",
}
ATTENTION = {
    "input_layernorm.weight": "gain hidden",
    "self_attn.q_proj.weight": "(kv group head) <- hidden",
    "self_attn.q_proj.bias": "(kv group head) <- | if attention_bias",
    "self_attn.k_proj.weight": "(kv head) <- hidden",
    "self_attn.k_proj.bias": "(kv head) <- | if attention_bias",
    "self_attn.v_proj.weight": "(kv head) <- hidden",
    "self_attn.v_proj.bias": "(kv head) <- | if attention_bias",
    "self_attn.o_proj.weight": "hidden <- (kv group head) | ends branch",
    "self_attn.o_proj.bias": "hidden <- | if attention_bias | ends branch",
    "post_attention_layernorm.weight": "gain hidden",
}
FEED_FORWARD = {
    "mlp.gate_proj.weight": "ffn <- hidden",
    "mlp.gate_proj.bias": "ffn <- | if mlp_bias",
    "mlp.up_proj.weight": "ffn <- hidden",
    "mlp.up_proj.bias": "ffn <- | if mlp_bias",
    "mlp.down_proj.weight": "hidden <- ffn | ends branch",
    "mlp.down_proj.bias": "hidden <- | if mlp_bias | ends branch",
}

LLAMA = Arch(
    family="llama",
    model_types=("llama", "mistral"),
    spaces=SPACES,
    top=TOP,
    layer={**ATTENTION, **FEED_FORWARD},
    products=HEADS,
    norm_eps="rms_norm_eps",
    whole_heads=("llama",),
    buffers=("self_attn.rotary_emb.inv_freq",),
    defaults={"tie_word_embeddings": False, "rms_norm_eps": 1e-6},
)
