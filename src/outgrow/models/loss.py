"""Next-token cross-entropy in which the logits never exist whole: chunks of tokens, gradient with the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 512


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of softmax(h W^T), computing dh and dW while a chunk of logits is at hand.

    The gradients are exact for the mean loss and are scaled by whatever arrives from above.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, head_VH: Tensor, labels_T: Tensor, with_gradient: bool) -> Tensor:  # type: ignore[override]
        total = hidden_TH.shape[0]
        loss = torch.zeros((), dtype=torch.promote_types(hidden_TH.dtype, torch.float32), device=hidden_TH.device)
        gradient_hidden = torch.empty_like(hidden_TH) if with_gradient else None
        gradient_head = torch.zeros(head_VH.shape, dtype=loss.dtype, device=head_VH.device) if with_gradient else None
        for start in range(0, total, CHUNK_TOKENS):
            hidden, labels = hidden_TH[start : start + CHUNK_TOKENS], labels_T[start : start + CHUNK_TOKENS, None]
            logits = (hidden @ head_VH.T).to(loss.dtype)
            log_sum = logits.logsumexp(-1, keepdim=True)
            loss += (log_sum - logits.gather(1, labels)).sum()
            if gradient_hidden is not None and gradient_head is not None:
                errors = logits.sub_(log_sum).exp_().scatter_add_(1, labels, torch.full_like(log_sum, -1.0))
                errors = errors.div_(total).to(hidden.dtype)
                gradient_hidden[start : start + CHUNK_TOKENS] = errors @ head_VH
                gradient_head += errors.T @ hidden
        if gradient_hidden is not None and gradient_head is not None:
            ctx.save_for_backward(gradient_hidden, gradient_head.to(head_VH.dtype))
        return loss / total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, head = ctx.saved_tensors
        return hidden * gradients[0].to(hidden.dtype), head * gradients[0].to(head.dtype), None, None


def next_token_loss(hidden_BTH: Tensor, head_VH: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the labels [B, T] under hidden states [B, T, H] and an output head [V, H].

    Logits are computed in the dtype of the hidden states and reduced in fp32 (float64 for float64 inputs).
    """
    return _HeadLoss.apply(hidden_BTH.flatten(0, 1), head_VH, labels_BT.flatten(), torch.is_grad_enabled())  # type: ignore[return-value]
