"""`transformers` models from a config or a checkpoint directory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import AfterValidator
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from outgrow.arch import arch_for
from outgrow.config import hash_of, suggestion
from outgrow.errors import OutgrowError


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """The same keys of a config.json, if `transformers` can make a whole one, and the arch table has its sizes."""
    resolved(config)
    return config


ModelConfig = Annotated[dict[str, Any], AfterValidator(checked)]
_PUBLISHED = ("rope_theta", "rope_scaling", "torch_dtype")  # what files written before transformers 5 call other keys, which it reads
_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """The whole config.json of a model; refuses keys that its config class does not know.

    Defaults are filled in, but for the ids of tokens: those of a family are another tokenizer's, and a pad token is never trained.
    """
    arch = arch_for(config)
    model_type = config["model_type"]
    known = _known(model_type)
    for key in config:
        if key not in known:
            near = suggestion(key, known, "; see the model's page in transformers")
            raise OutgrowError(f"unknown key 'model.{key}' for a '{model_type}' model{near}")
    arch.layers(config)
    arch.sizes(config)
    try:
        whole = AutoConfig.for_model(**{**_TOKENS, **config}).to_dict()
    except Exception as error:
        raise _refusal(config, error) from None
    arch.sizes(whole)  # a default that is filled in need not fit what is given
    return whole


@cache
def _known(model_type: str) -> set[str]:
    """The keys that a config of a type may have."""
    kind = CONFIG_MAPPING[model_type]
    return {*kind().to_dict(), *kind.attribute_map, "head_dim", *_PUBLISHED}


def empty(config: Mapping[str, Any], buffers: bool = False) -> Any:
    """A model whose weights are yet to be set, on the meta device; `buffers` are in memory, where transformers' forward reads them."""
    try:
        with _parameters_on_meta() if buffers else torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    except Exception as error:
        raise _refusal(config, error) from None
    model.config.architectures = [type(model).__name__]
    return model


@contextmanager
def _parameters_on_meta() -> Generator[None, None, None]:
    """Whatever parameter a module is given inside goes to the meta device, before anything is drawn for it; buffers are made as ever."""
    register = torch.nn.Module.register_parameter

    def on_meta(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one that is there already may be tied to another, and stays itself
            param = torch.nn.Parameter(param.detach().to("meta"), param.requires_grad)
        register(self, name, param)

    torch.nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def materialise(model: Any, device: torch.device) -> None:
    """Gives what is on the meta device memory on another, its numbers yet to be set, and moves the rest there."""
    model._apply(lambda value: torch.empty_like(value, device=device) if value.is_meta else value.to(device))
    model.tie_weights()


def _refusal(config: Mapping[str, Any], error: Exception) -> OutgrowError:
    """What transformers says of a config; values that it does not check it stumbles over where it uses them, most of them texts."""
    usual = _texts(CONFIG_MAPPING[config["model_type"]]().to_dict())
    texts = [f"{key} '{value}'" for key, value in _texts(config).items() if usual.get(key) != value]
    used = "" if isinstance(error, (AssertionError, StrictDataclassError)) or not texts else f", with {', '.join(texts)}"
    return OutgrowError(f"transformers refuses the model: {' '.join(str(error).split()) or 'its sizes do not fit'}{used}")


def _texts(config: Mapping[str, Any]) -> dict[str, str]:
    """The values that are texts, those of tables in the config among them."""
    inside = (pair for table in config.values() if isinstance(table, Mapping) for pair in table.items())
    return {key: value for key, value in (*config.items(), *inside) if isinstance(value, str)}


def initial(config: Mapping[str, Any], seed: int) -> Callable[[str], torch.Tensor]:
    """Name -> random weights in fp32, each tensor drawn from the seed and its own name.

    Every matrix has the config's `initializer_range` as its standard deviation, and 1/sqrt(2 x layers) of it where it ends
    a residual branch (GPT-2); gains are one and biases zero.
    """
    arch = arch_for(config)
    tensors, shapes = {tensor.name: tensor for tensor in arch.tensors(config)}, arch.shapes(config)

    def draw(name: str) -> torch.Tensor:
        spec = tensors[name].spec
        generator = torch.Generator().manual_seed(int(hash_of([seed, name]), 16))
        mean, deviation = 1.0 if spec.is_gain and not spec.plus_one else 0.0, arch.deviation(spec, config)
        return torch.empty(shapes[name]).normal_(mean, deviation, generator=generator)

    return draw


def initialised(config: Mapping[str, Any], seed: int) -> Any:
    """A model with the weights of `initial`."""
    model = empty(config, buffers=True)
    materialise(model, torch.device("cpu"))
    draw = initial(config, seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(draw(name))
    return model


def loaded(directory: Path) -> Any:
    """The model of a checkpoint directory, in fp32 for training."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True, use_safetensors=True)
