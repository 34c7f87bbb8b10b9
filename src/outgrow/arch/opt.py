"""OPT: LayerNorm, learned positions, biases, and the plain (d, 4d) -> ReLU -> (4d, d) feed-forward block (arXiv 2205.01068)."""

from outgrow.arch.spec import Arch, Space

_ENDS = ("self_attn.out_proj", "fc2")
_MAPS = {
    "self_attn.q_proj": "(kv head) <- hidden",
    "self_attn.k_proj": "(kv head) <- hidden",
    "self_attn.v_proj": "(kv head) <- hidden",
    "self_attn.out_proj": "hidden <- (kv head)",
    "fc1": "ffn <- hidden",
    "fc2": "hidden <- ffn",
}

# The eps of its norms is not in the config, so growth must leave it alone.
OPT = Arch(
    family="opt",
    model_types=("opt",),
    spaces={
        "hidden": Space("hidden_size", edit=("hidden_size", "word_embed_proj_dim"), admits="LayerNorm"),
        "vocab": Space("vocab_size", admits="nothing"),
        "position": Space("max_position_embeddings + 2", admits="nothing"),
        "kv": Space("num_attention_heads", edit=("num_attention_heads",)),
        "head": Space("hidden / num_attention_heads", admits="nothing"),
        "ffn": Space("ffn_dim", edit=("ffn_dim",)),
    },
    top={
        "model.decoder.embed_tokens.weight": "hidden <- vocab | stored vocab hidden",
        "model.decoder.embed_positions.weight": "hidden <- position | stored position hidden",
        "model.decoder.final_layer_norm.weight": "gain hidden | before tied head",
        "model.decoder.final_layer_norm.bias": "shift hidden | before tied head",
        "lm_head.weight": "vocab <- hidden | tied model.decoder.embed_tokens.weight",
    },
    layer={
        "self_attn_layer_norm.weight": "gain hidden",
        "self_attn_layer_norm.bias": "shift hidden",
        **{f"{name}.weight": line + (" | ends branch" if name in _ENDS else "") for name, line in _MAPS.items()},
        **{
            f"{name}.bias": f"{line.split('<-')[0]}<- | if enable_bias" + (" | ends branch" if name in _ENDS else "")
            for name, line in _MAPS.items()
        },
        "final_layer_norm.weight": "gain hidden",
        "final_layer_norm.bias": "shift hidden",
    },
    layer_prefix="model.decoder.layers.{}.",
    init="init_std",
    requires={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
    backbone_prefix="model.",
    defaults={"tie_word_embeddings": True, "enable_bias": True},
)
