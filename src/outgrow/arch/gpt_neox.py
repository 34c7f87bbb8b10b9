"""GPT-NeoX, which Pythia is: LayerNorm, parallel branches, q, k, v of each head side by side (arXiv 2204.06745, 2304.01373)."""

from outgrow.arch.spec import Arch, Space

GPT_NEOX = Arch(
    family="gpt_neox",
    model_types=("gpt_neox",),
    spaces={
        "hidden": Space("hidden_size", edit=("hidden_size",), admits="LayerNorm"),
        "vocab": Space("vocab_size", admits="nothing"),
        "kv": Space("num_attention_heads", edit=("num_attention_heads",)),
        "head": Space("hidden / num_attention_heads", admits="nothing"),
        "ffn": Space("intermediate_size", edit=("intermediate_size",)),
    },
    top={
        "gpt_neox.embed_in.weight": "hidden <- vocab | stored vocab hidden",
        "gpt_neox.final_layer_norm.weight": "gain hidden | before tied head",
        "gpt_neox.final_layer_norm.bias": "shift hidden | before tied head",
        "embed_out.weight": "vocab <- hidden | tied gpt_neox.embed_in.weight",
    },
    layer={
        "input_layernorm.weight": "gain hidden",
        "input_layernorm.bias": "shift hidden",
        "attention.query_key_value.weight": "(kv 3 head) <- hidden",
        "attention.query_key_value.bias": "(kv 3 head) <- | if attention_bias",
        "attention.dense.weight": "hidden <- (kv head) | ends branch",
        "attention.dense.bias": "hidden <- | if attention_bias | ends branch",
        "post_attention_layernorm.weight": "gain hidden",
        "post_attention_layernorm.bias": "shift hidden",
        "mlp.dense_h_to_4h.weight": "ffn <- hidden",
        "mlp.dense_h_to_4h.bias": "ffn <-",
        "mlp.dense_4h_to_h.weight": "hidden <- ffn | ends branch",
        "mlp.dense_4h_to_h.bias": "hidden <- | ends branch",
    },
    layer_prefix="gpt_neox.layers.{}.",
    norm_eps="layer_norm_eps",
    buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    defaults={"tie_word_embeddings": False, "layer_norm_eps": 1e-5, "attention_bias": True},
)
