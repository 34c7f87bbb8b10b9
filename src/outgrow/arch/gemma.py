"""Gemma 2: norms before and after each branch, gains stored without their one, embeddings times sqrt(hidden) (arXiv 2408.00118)."""

from dataclasses import replace

from outgrow.arch.llama import ATTENTION, FEED_FORWARD, LLAMA

_PROJECTIONS = {name: line.replace(" | ends branch", "") for name, line in ATTENTION.items() if "self_attn" in name}

GEMMA2 = replace(
    LLAMA,
    family="gemma2",
    model_types=("gemma2",),
    top={
        "model.embed_tokens.weight": "hidden <- vocab | stored vocab hidden | times sqrt hidden",
        "model.norm.weight": "gain hidden | plus one | before tied head",
        "lm_head.weight": "vocab <- hidden | tied model.embed_tokens.weight",
    },
    layer={
        "input_layernorm.weight": "gain hidden | plus one",
        **_PROJECTIONS,
        "post_attention_layernorm.weight": "gain hidden | plus one | ends branch",
        "pre_feedforward_layernorm.weight": "gain hidden | plus one",
        **{name: line.removesuffix(" | ends branch") for name, line in FEED_FORWARD.items() if name.endswith("weight")},
        "post_feedforward_layernorm.weight": "gain hidden | plus one | ends branch",
    },
    whole_heads=("gemma2",),
    period=2,  # sliding and full attention take turns
    defaults={"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "head_dim": 256},
)
