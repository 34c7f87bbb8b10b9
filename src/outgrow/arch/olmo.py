"""OLMo 2: norms after each branch only, and over all queries and all keys together (arXiv 2501.00656)."""

from dataclasses import replace

from outgrow.arch.llama import ATTENTION, FEED_FORWARD, LLAMA, SPACES
from outgrow.arch.spec import Space

# Queries and keys are normed over all heads at once, with the eps of the residual norms: heads grow by even copies, eps stays.
OLMO2 = replace(
    LLAMA,
    family="olmo2",
    model_types=("olmo2",),
    spaces={
        **SPACES,
        "kv": Space("num_key_value_heads or num_attention_heads", ("num_key_value_heads",), "even copies"),
        "group": Space("num_attention_heads / kv", admits="even copies"),
    },
    layer={
        **{name: line.replace(" | ends branch", "") for name, line in ATTENTION.items() if "self_attn" in name},
        "self_attn.q_norm.weight": "gain (kv group head)",
        "self_attn.k_norm.weight": "gain (kv head)",
        "post_attention_layernorm.weight": "gain hidden | ends branch",
        **{name: line.replace(" | ends branch", "") for name, line in FEED_FORWARD.items() if name.endswith("weight")},
        "post_feedforward_layernorm.weight": "gain hidden | ends branch",
    },
    norm_eps=None,
    defaults={"tie_word_embeddings": False, "rms_norm_eps": 1e-5},
)
