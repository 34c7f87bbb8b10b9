"""Tiny random models and corpora; nothing here is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # a core a worker; one thread also makes runs repeat to the bit
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start

# Odd on purpose: grouped queries, head_dim apart from hidden / heads, nothing a multiple of anything.
ODD: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 53,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """A random transformers model of the odd shape, every tensor random (gains and biases too)."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **edits: Any) -> Any:
        generator = torch.Generator().manual_seed(seed)
        config = transformers.AutoConfig.for_model(**{**ODD, **edits})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for name, value in model.named_parameters():
                noise = torch.randn(value.shape, generator=generator, dtype=dtype) * 0.3
                value.copy_(1 + noise if "norm" in name else noise)
        return model

    return make


@pytest.fixture
def make_checkpoint(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Saves such a model with transformers' own writer."""

    def make(name: str = "source", shard: str = "5GB", **edits: Any) -> Path:
        directory = tmp_path / name
        make_model(**edits).save_pretrained(directory, max_shard_size=shard)
        return directory

    return make


def write_corpus(folder: Path) -> Path:
    """Fills a folder with distinct small texts."""
    folder.mkdir()
    for number in range(120):
        lines = [f"def function_{number}_{line}(value):\n    return value * {number} + {line}\n" for line in range(25)]
        (folder / f"module_{number:03d}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, ODD["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(3))
