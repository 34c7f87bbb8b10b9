"""`transformers` models from a config or a checkpoint directory."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import AfterValidator
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from outgrow.arch import LLAMA, arch_for
from outgrow.config import hash_of, suggestion
from outgrow.errors import OutgrowError
from outgrow.files import read_json


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """The same keys of a config.json, if training computes it, `transformers` can make a whole one, and the arch table has its sizes."""
    refuse_families(config)
    resolved(config)
    return config


ModelConfig = Annotated[dict[str, Any], AfterValidator(checked)]


def refuse_families(config: Mapping[str, Any]) -> None:
    """Training has a forward pass of its own, which knows some families only; growing knows them all."""
    if arch_for(config) is not LLAMA:
        raise OutgrowError(f"training computes llama and mistral so far, and the model is a '{config['model_type']}'")


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """The whole config.json of a model, defaults filled in; refuses keys that its config class does not know."""
    arch = arch_for(config)
    model_type = config["model_type"]
    known = set(CONFIG_MAPPING[model_type]().to_dict()) | {"head_dim", "rope_theta"}
    for key in config:
        if key not in known:
            raise OutgrowError(f"unknown key 'model.{key}' for a '{model_type}' model{_nearest(key, known)}")
    arch.layers(config)
    arch.sizes(config)
    try:
        return AutoConfig.for_model(**config).to_dict()
    except StrictDataclassError as error:
        raise OutgrowError(f"transformers refuses the model: {' '.join(str(error).split())}") from None


def initialised(config: Mapping[str, Any], seed: int) -> Any:
    """A model with random weights in fp32, each tensor drawn from the seed and its own name.

    Every matrix has the config's `initializer_range` as its standard deviation, and 1/sqrt(2 x layers) of it where it ends
    a residual branch (GPT-2); gains are one and biases zero.
    """
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    arch = arch_for(config)
    parameters = dict(model.named_parameters())
    for tensor in arch.tensors(config):
        deviation = arch.deviation(tensor.spec, config)
        generator = torch.Generator().manual_seed(int(hash_of([seed, tensor.name]), 16))
        with torch.no_grad():
            parameters[tensor.name].normal_(1.0 if tensor.spec.is_gain else 0.0, deviation, generator=generator)
    return model


def loaded(directory: Path) -> Any:
    """The model of a checkpoint directory, in fp32 for training."""
    refuse_families(read_json(directory / "config.json"))
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)


def _nearest(key: str, known: set[str]) -> str:
    return suggestion(key, known) if difflib.get_close_matches(key, known, n=1) else "; see the model's page in transformers"
