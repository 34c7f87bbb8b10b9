"""The Llama forward pass as one readable function over named parameters; equal to transformers' (tests/test_models.py).

Shapes: B sequences, T tokens, H hidden, N query heads, K key-value heads, D head_dim, F ffn, V vocab.

It exists because it is faster on a CPU than the module it reads its parameters from (benchmarks/training_step.md): fused
q/k/v and gate/up products, and attention as plain batched products, which beat the fused CPU kernel in bf16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from outgrow.models.loss import next_token_loss


@dataclass(frozen=True)
class Rotary:
    """Rotary position tables, [T, D/2] each (arXiv 2104.09864)."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x_BNTD: Tensor) -> Tensor:
        first, second = x_BNTD.chunk(2, -1)
        return torch.cat([first * self.cos - second * self.sin, second * self.cos + first * self.sin], -1)


Block = Callable[[Tensor, Rotary, Tensor | None], Tensor]  # residual stream [B, T, H], rotary tables, mask [T, T] -> residual stream


class Decoder:
    """Runs a `transformers` Llama on its own parameters; products in `dtype`, the residual stream in fp32 or as stored, if wider.

    Args:
        model: of transformers, whose parameters are used; one whose config `is_computed`.
        dtype: of products.
        compile: compile the function of a block, once for all blocks of a shape.
        recompute: keep no activations inside blocks for the backward pass; compute them again.
    """

    def __init__(self, model: Any, dtype: torch.dtype, compile: bool = False, recompute: bool = False) -> None:
        config = model.config
        assert is_computed(config)
        self.dtype = dtype
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.eps = config.rms_norm_eps
        self.is_tied, self.layers = config.tie_word_embeddings, config.num_hidden_layers
        # Made anew, in float32: a float64 model still rotates by the frequencies that transformers computes.
        self.inverse_frequency: Tensor = type(model.model.rotary_emb)(config).inv_freq.detach().float()
        if compile:  # a graph for each width and shape of a batch; a run that grows in width has several
            torch._dynamo.config.recompile_limit = 64
        self.compiles, self.recompute, self.joins = compile, recompute, True
        self.block = self._callable()
        self._hold(dict(model.named_parameters()))

    def over(self, parameters: Mapping[str, Tensor]) -> Decoder:
        """The same forward pass over other parameters under the same names, such as ones that are computed."""
        other = copy.copy(self)
        other._hold(parameters)
        return other

    def through(self, model: Any) -> Decoder:
        """The same forward pass by calls of the model's own modules, so that whatever hooks them, such as FSDP, sees it."""
        other = copy.copy(self)
        other.joins = False  # a joined matrix is a copy that lives until the backward pass, and FSDP lets go of matrices before that
        other.block = other._callable()
        for layer in model.model.layers:
            layer.forward = partial(other._run_module, layer)
        other.top = lambda: dict(model.named_parameters())
        other.blocks = list(model.model.layers)
        return other

    def _callable(self) -> Callable[..., Tensor]:
        return torch.compile(self._block, dynamic=False) if self.compiles else self._block

    def _hold(self, parameters: Mapping[str, Tensor]) -> None:
        self.top: Callable[[], Mapping[str, Tensor]] = lambda: parameters
        self.blocks: list[Block] = [partial(self.block, _of_block(parameters, index)) for index in range(self.layers)]

    def _run_module(self, layer: Any, x_BTH: Tensor, rotary: Rotary, future_TT: Tensor | None) -> Tensor:
        return self.block(dict(layer.named_parameters()), x_BTH, rotary, future_TT)

    def hidden_states(self, tokens_BT: Tensor) -> Tensor:
        """Final normalised hidden states [B, T, H]: what the output head reads, in `dtype`."""
        length = tokens_BT.shape[1]
        rotary = self._rotary(length, tokens_BT.device)
        future = None
        if self.dtype == torch.bfloat16 and not tokens_BT.is_cuda:  # where fused kernels, which need no mask, lose
            future = torch.full((length, length), float("-inf"), dtype=self.dtype, device=tokens_BT.device).triu(1)
        top = self.top()
        embedding = top["model.embed_tokens.weight"]
        x_BTH = F.embedding(tokens_BT, embedding).to(torch.promote_types(embedding.dtype, torch.float32))
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_BTH = checkpoint(block, x_BTH, rotary, future, use_reentrant=False, preserve_rng_state=False)  # type: ignore[assignment]
            else:
                x_BTH = block(x_BTH, rotary, future)
        return self._norm(x_BTH, top["model.norm.weight"])

    def loss(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the labels."""
        return next_token_loss(self.hidden_states(tokens_BT), self.head, labels_BT)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V]; training never holds them whole, see `models.loss`."""
        return F.linear(self.hidden_states(tokens_BT), self.head)

    @property
    def head(self) -> Tensor:
        """The output head [V, H], in `dtype`."""
        return self.top()["model.embed_tokens.weight" if self.is_tied else "lm_head.weight"].to(self.dtype)

    def _block(self, block: Mapping[str, Tensor], x_BTH: Tensor, rotary: Rotary, future_TT: Tensor | None) -> Tensor:
        x_BTH = x_BTH + self._attention(block, self._norm(x_BTH, block["input_layernorm.weight"]), rotary, future_TT)
        return x_BTH + self._feed_forward(block, self._norm(x_BTH, block["post_attention_layernorm.weight"]))

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), gain.to(x.dtype), self.eps).to(self.dtype)

    def _attention(self, block: Mapping[str, Tensor], x_BTH: Tensor, rotary: Rotary, future_TT: Tensor | None) -> Tensor:
        batch, length, _ = x_BTH.shape
        N, K = self.heads, self.kv
        qkv = self._linear(block, x_BTH, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        qkv = qkv.view(batch, length, N + 2 * K, -1).transpose(1, 2)
        rotated = rotary.rotate(qkv[:, : N + K])
        if future_TT is None:
            grouped = rotated[:, :N], rotated[:, N:], qkv[:, N + K :]
            mixed = F.scaled_dot_product_attention(*grouped, is_causal=True, enable_gqa=N != K)
            return self._linear(block, mixed.transpose(1, 2).reshape(batch, length, -1), "self_attn.o_proj")
        # Query head n belongs to key-value head n // (N / K): fold the group into the time axis.
        q = rotated[:, :N].reshape(batch * K, (N // K) * length, -1)
        k = rotated[:, N:].reshape(batch * K, length, -1)
        v = qkv[:, N + K :].reshape(batch * K, length, -1)
        mask = future_TT.repeat(N // K, 1).expand(batch * K, -1, -1)
        weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5).softmax(-1)
        mixed = (weights @ v).view(batch, N, length, -1).transpose(1, 2).reshape(batch, length, -1)
        return self._linear(block, mixed, "self_attn.o_proj")

    def _feed_forward(self, block: Mapping[str, Tensor], x_BTH: Tensor) -> Tensor:
        gate, up = self._linear(block, x_BTH, "mlp.gate_proj", "mlp.up_proj").chunk(2, -1)
        return self._linear(block, F.silu(gate) * up, "mlp.down_proj")

    def _linear(self, block: Mapping[str, Tensor], x: Tensor, *names: str) -> Tensor:
        """The concatenated outputs of several projections of one input, as one product where their matrices may be joined."""
        if len(names) > 1 and not self.joins:
            return torch.cat([self._linear(block, x, name) for name in names], -1)
        weights, biases = ([block[f"{n}.{kind}"] for n in names if f"{n}.{kind}" in block] for kind in ("weight", "bias"))
        return F.linear(x, _joined(weights).to(self.dtype), _joined(biases).to(self.dtype) if biases else None)

    def _rotary(self, length: int, device: torch.device) -> Rotary:
        self.inverse_frequency = self.inverse_frequency.to(device)
        angle = torch.arange(length, device=device).float()[:, None] * self.inverse_frequency
        return Rotary(angle.cos().to(self.dtype), angle.sin().to(self.dtype))


def is_computed(config: Any) -> bool:
    """Does this forward pass compute all that the config of a Llama says?"""
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    extras = getattr(config, "sliding_window", None) or getattr(config, "attention_dropout", 0)
    return config.hidden_act == "silu" and rope in ("default", "llama3", "linear") and not extras


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _of_block(parameters: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{index}."
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
