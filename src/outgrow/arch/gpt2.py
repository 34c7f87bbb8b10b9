"""GPT-2: LayerNorm, learned positions, q, k, v in one matrix, all matrices stored inputs first."""

from outgrow.arch.spec import Arch, Space

GPT2 = Arch(
    family="gpt2",
    model_types=("gpt2",),
    spaces={
        "hidden": Space("n_embd", edit=("n_embd",), admits="LayerNorm"),
        "vocab": Space("vocab_size", admits="nothing"),
        "position": Space("n_positions", admits="nothing"),
        "kv": Space("n_head", edit=("n_head",)),
        "head": Space("hidden / n_head", admits="nothing"),
        "ffn": Space("n_inner or 4 * hidden", edit=("n_inner",)),
    },
    top={
        "transformer.wte.weight": "hidden <- vocab | stored vocab hidden",
        "transformer.wpe.weight": "hidden <- position | stored position hidden",
        "transformer.ln_f.weight": "gain hidden | before tied head",
        "transformer.ln_f.bias": "shift hidden | before tied head",
        "lm_head.weight": "vocab <- hidden | tied transformer.wte.weight",
    },
    layer={
        "ln_1.weight": "gain hidden",
        "ln_1.bias": "shift hidden",
        "attn.c_attn.weight": "(3 kv head) <- hidden | stored hidden (3 kv head)",
        "attn.c_attn.bias": "(3 kv head) <-",
        "attn.c_proj.weight": "hidden <- (kv head) | stored (kv head) hidden | ends branch",
        "attn.c_proj.bias": "hidden <- | ends branch",
        "ln_2.weight": "gain hidden",
        "ln_2.bias": "shift hidden",
        "mlp.c_fc.weight": "ffn <- hidden | stored hidden ffn",
        "mlp.c_fc.bias": "ffn <-",
        "mlp.c_proj.weight": "hidden <- ffn | stored ffn hidden | ends branch",
        "mlp.c_proj.bias": "hidden <- | ends branch",
    },
    layer_prefix="transformer.h.{}.",
    layer_count="n_layer",
    norm_eps="layer_norm_epsilon",
    requires={"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False},
    backbone_prefix="transformer.",
    buffers=("attn.bias", "attn.masked_bias"),
    defaults={"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "n_positions": 1024},
)
