"""A `transformers` model in true float64: the places where it computes in float32 whatever its weights are go to float64 too."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM


class _Double(TorchFunctionMode):
    """Reads float32 as float64 wherever torch is asked for it by name (RMSNorm, softmax, routers)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        return func(*args, **{name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()})


@contextmanager
def float64() -> Generator[None, None, None]:
    """Everything computed inside is float64."""
    with _Double():
        yield


def exact_model(directory: Path) -> Any:
    """The model of a directory, in float64, its attention and experts computed plainly, without dropout."""
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float64,
        local_files_only=True,
        use_safetensors=True,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return model.eval()


def exact_logits(model: Any, tokens_BT: Tensor) -> Tensor:
    """Logits [B, T, V] in float64."""
    with float64():
        return model(input_ids=tokens_BT, use_cache=False).logits
