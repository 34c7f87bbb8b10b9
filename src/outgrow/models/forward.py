"""The forward pass that trains a model: ours where there is one, and transformers' own for every other family."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from outgrow.arch import LLAMA, arch_for
from outgrow.models.decoder import Decoder, is_computed
from outgrow.models.loss import next_token_loss


class ModelForward:
    """transformers' own forward pass, without dropout, as `Decoder` offers its own; products in `dtype` by autocast.

    Args:
        model: of transformers.
        dtype: of products.
        compile: compile every block; blocks of a shape share what is compiled.
        recompute: keep no activations inside blocks for the backward pass; compute them again.
    """

    def __init__(self, model: Any, dtype: torch.dtype, compile: bool = False, recompute: bool = False) -> None:
        self.model, self.dtype = model, dtype
        self._forward = model.forward
        self._parameters: Mapping[str, Tensor] | None = None
        head = model.get_output_embeddings()
        self._head_name = next(name for name, value in model.named_parameters(remove_duplicate=False) if value is head.weight)
        # What comes after the head (Gemma 2 caps logits) needs them whole; elsewhere the loss makes them, some at a time.
        self._caps = getattr(model.config, "final_logit_softcapping", None)
        if not self._caps:
            head.forward = lambda hidden: hidden
        _drop_nothing(model)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for block in blocks_of(model) if compile else []:
            block.compile()

    def over(self, parameters: Mapping[str, Tensor]) -> ModelForward:
        """The same forward pass over other parameters under the same names."""
        other = copy.copy(self)
        other._parameters = dict(parameters)
        return other

    def through(self, model: Any) -> ModelForward:
        """The same forward pass by calls of the model's own modules, which is what this one is."""
        return self

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        found = self._run(tokens_BT)
        return found if self._caps else F.linear(found.to(self.dtype), self._head().to(self.dtype))

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the labels."""
        found = self._run(tokens_BT)
        if not self._caps:
            return next_token_loss(found.to(self.dtype), self._head().to(self.dtype), labels_BT)
        return F.cross_entropy(found.flatten(0, 1).to(torch.promote_types(found.dtype, torch.float32)), labels_BT.flatten())

    def _run(self, tokens_BT: Tensor) -> Tensor:
        """What the output head reads [B, T, H]; the logits where they are capped."""
        with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            if self._parameters is None:
                return self._forward(tokens_BT, use_cache=False).logits
            return functional_call(self.model, dict(self._parameters), (tokens_BT,), {"use_cache": False}).logits

    def _head(self) -> Tensor:
        """The output head [V, H]."""
        return (self._parameters or dict(self.model.named_parameters(remove_duplicate=False)))[self._head_name]


def forward_of(model: Any, dtype: torch.dtype, compile: bool = False, recompute: bool = False) -> Decoder | ModelForward:
    """The forward pass of a model: transformers' also for a Llama with sliding windows, dropout or a RoPE that the decoder lacks."""
    is_ours = arch_for(model.config.to_dict()) is LLAMA and is_computed(model.config)
    return (Decoder if is_ours else ModelForward)(model, dtype, compile, recompute)


def blocks_of(model: Any) -> list[Any]:
    """The modules of the blocks, in order."""
    return list(model.get_submodule(arch_for(model.config.to_dict()).layer_prefix.partition(".{}")[0]))


def _drop_nothing(model: Any) -> None:
    """Dropout is switched off: a run must go on bit for bit, and pre-training reads its text once."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), (int, float)):
                setattr(module, name, 0.0)
