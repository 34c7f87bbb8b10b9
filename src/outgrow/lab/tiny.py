"""Tiny checkpoints of every family, with random weights: what laws are measured on. Nothing is downloaded."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

from outgrow.arch import Arch, Config, parameter_counts
from outgrow.checkpoint.huggingface import open_checkpoint
from outgrow.models.exact import exact_model

_LLAMA = {
    "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 10, "vocab_size": 53, "max_position_embeddings": 64, "rms_norm_eps": 1e-3,
}  # fmt: skip
MOST_PARAMETERS = 1 << 20  # of a model that is measured as it is
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
# Odd on purpose: grouped queries, head_dim apart from hidden / heads where the family allows it, an eps that shows.
TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA},
    "mistral": {"model_type": "mistral", **_LLAMA, "tie_word_embeddings": True, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **_LLAMA, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_LLAMA, "tie_word_embeddings": True},
    "qwen3_moe": {"model_type": "qwen3_moe", **_LLAMA, "moe_intermediate_size": 19, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"model_type": "gemma2", **_LLAMA, "query_pre_attn_scalar": 10, "sliding_window": 5},
    "olmo2": {"model_type": "olmo2", **_LLAMA},
    "gpt2": {"model_type": "gpt2", "n_embd": 24, "n_head": 2, "n_layer": 4, "n_inner": 37, "vocab_size": 53, "n_positions": 64,
             "layer_norm_epsilon": 1e-3},
    "gpt_neox": {"model_type": "gpt_neox", "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 37, "num_hidden_layers": 4,
                 "vocab_size": 53, "max_position_embeddings": 64, "layer_norm_eps": 1e-3},
    "opt": {"model_type": "opt", "hidden_size": 24, "word_embed_proj_dim": 24, "ffn_dim": 37, "num_attention_heads": 2,
            "num_hidden_layers": 4, "vocab_size": 53, "max_position_embeddings": 64},
    "phi3": {"model_type": "phi3", **_LLAMA},
    "mixtral": {"model_type": "mixtral", **_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def shrunk(arch: Arch, config: Config) -> dict[str, Any]:
    """A config of the same kind that float64 measures in seconds; the same one where it is small enough.

    Few heads, experts, neurons, words and whole periods of layers; head_dim stays, which much in a config follows.
    """
    if parameter_counts(arch, config).total <= MOST_PARAMETERS:
        return dict(config)
    sizes, period = arch.sizes(config), arch.pattern(config)
    layers = min(arch.layers(config), period * -(-4 // period))
    few = {"kv": 2, "group": 2, "ffn": 37, "vocab": 53, "expert": 4}
    wanted = {space: min(size, few[space]) for space, size in sizes.items() if space in few}
    made = {key: None if key.endswith("_token_id") else value for key, value in config.items()} | {arch.layer_count: layers}
    made |= {key: table[:layers] for key, table in arch.tables(config).items()}
    made |= {key: min(config[key], layers) for key in arch.layer_bounds if isinstance(config.get(key), int)}
    made |= {key: math.prod(wanted[space] for space in spaces) for key, spaces in arch.products.items()}
    made |= {key: min(arch.get(config, key), 2) for space in arch.spaces.values() for key in space.scales}
    heads = wanted["kv"] * wanted.pop("group", 1)
    for head in (8, sizes["head"]):  # the second where a config derives head_dim from hidden
        for space, size in {**wanted, "hidden": heads * head}.items():
            keys = arch.spaces[space].edit or (arch.spaces[space].size,)
            made |= {key: size for key in [key for key in keys if key in config] or keys[:1]}
        if arch.sizes(made)["head"] == sizes["head"]:
            break
    return made


def write_tiny(directory: Path, config: Config, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
    """Writes a checkpoint of random weights, gains and biases random too, with transformers' own writer."""
    whole = transformers.AutoConfig.for_model(**{**_TOKENS, **config})
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(whole, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            is_table = any(part in name for part in ("embed", "wte", "wpe"))  # large, so that tokens differ and no ReLU is always off
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64) * (1.5 if is_table else 0.2)
            is_gain = ("norm" in name or "ln_" in name) and name.endswith("weight") and config["model_type"] != "gemma2"
            value.copy_(1 + noise if is_gain else noise)
    model.save_pretrained(directory)


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Name on disk -> array, of a checkpoint directory."""
    return {name: array for path in open_checkpoint(directory).weight_files for name, array in load_file(path).items()}


def on_disk(model: Any) -> dict[str, np.ndarray]:
    """A model's parameters under the names and in the shapes that they have on disk."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return read_tensors(Path(folder))


def gradients_on_disk(model: Any) -> dict[str, np.ndarray]:
    """A model's gradients in the same way; the model's parameters are overwritten."""
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.zeros_like(value) if value.grad is None else value.grad)
    return on_disk(model)


def in_modules(tensors: Mapping[str, np.ndarray], directory: Path) -> dict[str, torch.Tensor]:
    """Arrays under the names on disk, as transformers loads them into the model of `directory`: under its parameters' names."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text((directory / "config.json").read_text())
        whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(whole, Path(folder) / "model.safetensors", {"format": "pt"})
        return {name: value.detach() for name, value in exact_model(Path(folder)).named_parameters()}
