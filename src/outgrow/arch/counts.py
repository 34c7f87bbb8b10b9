"""Parameters and FLOPs, read off the architecture table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from outgrow.arch.spec import Arch, Config


@dataclass(frozen=True)
class Counts:
    """Parameter counts of a model.

    Attributes:
        total: every parameter, a tied head counted once.
        embedding: the input embedding, learned positions, and the head where it is not tied.
        head: entries of the output head, tied or not: they multiply.
        matmul: parameters that take part in a matrix product for a token: the head among them, of the experts those it is sent to.
    """

    total: int
    embedding: int
    head: int
    matmul: int

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding


def positions(config: Config) -> int | None:
    """Tokens that a model takes at once, as its config says; None where it does not."""
    keys = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    return next((value for key in keys if type(value := config.get(key)) is int and value > 0), None)


def parameter_counts(arch: Arch, config: Config) -> Counts:
    """Counts the parameters of a config without building anything."""
    sizes = arch.sizes(config)
    total = embedding = matmul = head = 0
    for tensor in arch.tensors(config):
        entries = math.prod(arch.shape(tensor.spec, sizes))
        total += entries
        is_table = any(axis.spaces & {"vocab", "position"} for axis in tensor.spec.axes)
        embedding += entries if is_table else 0
        head += entries if is_table and tensor.spec.multiplies else 0
        sent_to = tensor.expert is None or tensor.expert < arch.get(config, "num_experts_per_tok")
        matmul += entries if tensor.spec.multiplies and sent_to else 0
    tied_head = sizes["vocab"] * sizes["hidden"] * len(arch.aliases(config))
    return Counts(total, embedding, head + tied_head, matmul + tied_head)


def flops_per_token(arch: Arch, config: Config, context: int) -> int:
    """Training FLOPs per token: 6 x matmul parameters + 12 x layers x (heads x head_dim) x context.

    Forward and backward, attention without causal halving, as torchtitan and nanochat count. The embedding look-up is
    free, the output head is not.
    """
    sizes = arch.sizes(config)
    attention = 12 * arch.layers(config) * sizes["kv"] * sizes.get("group", 1) * sizes["head"] * context
    return 6 * parameter_counts(arch, config).matmul + attention


def step_flops(arch: Arch, config: Config, context: int, batch_tokens: int, optimizer: str) -> int:
    """Training FLOPs of a step: its tokens', and under `muon` the products that make its updates orthogonal.

    Those are five Newton-Schulz iterations X <- aX + (bA + cAA)X with A = XX', so 4 m^2 n + 2 m^3 each for a matrix of m rows and n >= m
    columns (Jordan 2024, as in torch.optim.Muon), however many tokens the step has. What is done entry by entry, all of AdamW, is free.
    """
    sizes = arch.sizes(config)
    matrices = (sorted(arch.shape(tensor.spec, sizes)) for tensor in arch.tensors(config) if tensor.is_inner_matrix)
    updates = sum(5 * (4 * m * m * n + 2 * m**3) for m, n in matrices) if optimizer == "muon" else 0
    return flops_per_token(arch, config, context) * batch_tokens + updates
