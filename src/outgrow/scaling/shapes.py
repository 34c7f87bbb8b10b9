"""The shape of a target model for a parameter count, and the bases that it grows from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from outgrow.arch import Arch, Config, arch_for, parameter_counts
from outgrow.errors import OutgrowError

# Name -> layers, hidden, ffn, heads, key-value heads: the paper's targets (arXiv 2405.15319).
PAPER_SHAPES = {
    0.41e9: (24, 1024, 2816, 16, 16),
    1.1e9: (24, 2048, 5632, 32, 32),
    3e9: (32, 2560, 7040, 20, 4),
    7e9: (32, 4096, 11008, 32, 8),
}
FACTORS = (4, 3, 2, 5, 6, 8)  # in the order in which they are advised: 2 to 4 were best in the paper, 4 its advice


def target_config(params: float, vocab: int = 32_000, context: int = 2048) -> dict[str, Any]:
    """A Llama config of about `params` parameters: the paper's where it has one, else the nearest with the paper's proportions.

    Layers are a multiple of 4, so that a base of a quarter of them can be stacked; heads divide hidden, key-value heads divide heads.
    """
    for known, shape in PAPER_SHAPES.items():
        if abs(params / known - 1) < 0.03:
            return _llama(shape, vocab, context)
    count, found = min(_candidates(vocab, context), key=lambda candidate: _distance(*candidate, params))
    if not 0.8 < count / params < 1.25:
        small = f", {2 * vocab * found['hidden_size']:.3g} of them in embedding and head: ask for a smaller --vocab, another size"
        large = f", {found['num_hidden_layers']} layers of {found['hidden_size']:,}: ask for another size"
        raise OutgrowError(
            f"no shape has {params:.3g} parameters with a vocabulary of {vocab:,}; the nearest has {count:.3g}"
            f"{small if count > params else large}, or give your own with --target"
        )
    return found


def growth_factors(arch: Arch, config: Config) -> list[int]:
    """Growth factors g that divide a target's layers into equal copies of whole patterns, the most advised first.

    Those that leave a base of one layer come last: such bases lost to scratch in the paper.
    """
    layers, period = arch.layers(config), arch.pattern(config)
    found = [factor for factor in FACTORS if layers % factor == 0 and (layers // factor) % period == 0]
    return sorted(found, key=lambda factor: layers // factor == period)


def with_layers(config: Config, layers: int) -> dict[str, Any]:
    """The same model with its first `layers` blocks alone."""
    arch = arch_for(config)
    tables = {key: table[:layers] for key, table in arch.tables(config).items()}
    return {**config, **tables, arch.layer_count: layers}


def _candidates(vocab: int, context: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(parameters, config); every block of a shape has the same number of parameters, so two counts say all."""
    for hidden in (*range(64, 512, 64), *range(512, 2048, 128), *range(2048, 16_385, 512)):
        head = 128 if hidden > 2048 else 64 if hidden >= 256 else 32
        heads = hidden // head
        kv = heads if hidden <= 2048 else 8 if heads % 8 == 0 else 4
        one, two = (_llama((layers, hidden, hidden * 11 // 4, heads, kv), vocab, context) for layers in (1, 2))  # the paper's ffn is 2.75 x
        first, block = _count(one), _count(two) - _count(one)
        for layers in range(4, 129, 4):
            yield first + (layers - 1) * block, {**one, "num_hidden_layers": layers}


def _distance(count: int, config: Mapping[str, Any], params: float) -> float:
    """How far a config is from a size, and, for a fifth of that, from the paper's ratio of width to depth at that size."""
    sizes = sorted(PAPER_SHAPES)
    aspects = [PAPER_SHAPES[size][1] / PAPER_SHAPES[size][0] for size in sizes]
    slope = math.log(aspects[-1] / aspects[0]) / math.log(sizes[-1] / sizes[0])
    ideal = aspects[0] * max(1.0, params / sizes[0]) ** slope
    aspect = config["hidden_size"] / config["num_hidden_layers"]
    return abs(math.log(count / params)) + 0.2 * abs(math.log(aspect / ideal))


def _count(config: Config) -> int:
    return parameter_counts(arch_for(config), config).total


def _llama(shape: tuple[int, int, int, int, int], vocab: int, context: int) -> dict[str, Any]:
    layers, hidden, ffn, heads, kv = shape
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocab, "max_position_embeddings": context, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }  # fmt: skip
