"""Recipes small enough for a test, written as a user would write them."""

from __future__ import annotations

from pathlib import Path

TINY_COMPARISON = """\
model: {{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 4, num_attention_heads: 2,
         num_key_value_heads: 2, vocab_size: 300, max_position_embeddings: 16, initializer_range: 0.06}}
data: {{corpus: {corpus}, vocab: 300, context: 16, validation_share: 0.1, validation_tokens: 256}}
factor: 4
growth_tokens: 640
budgets: [1280, 2560]
decay_share: 0.25
warmup_tokens: 128
batch_tokens: 64
learning_rates: {{base: 0.01, target: 0.01, scratch: 0.01}}
validate_every: 320
"""
TINY_RUN = """\
name: tiny
model: {{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2,
         num_key_value_heads: 2, vocab_size: 300, max_position_embeddings: 16}}
data: {{corpus: {corpus}, vocab: 300, context: 16, validation_share: 0.1, validation_tokens: 256}}
tokens: {tokens}
batch_tokens: 64
optimizer: {{learning_rate: 0.01}}
"""


def write(path: Path, text: str, **values: object) -> Path:
    path.write_text(text.format(**values))
    return path
