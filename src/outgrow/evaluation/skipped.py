"""What each layer adds: held-out loss with the layer left out, its input handed on as its output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from outgrow.data.corpus import Document, held_out
from outgrow.errors import OutgrowError
from outgrow.evaluation.loss import mean_loss
from outgrow.evaluation.model import Opened
from outgrow.models.forward import blocks_of


def skipped_losses(opened: Opened, documents: Sequence[Document], batch_size: int = 8) -> tuple[float, list[float]]:
    """(loss, [layers] loss without the layer minus loss), nats a token."""
    whole = mean_loss(opened, documents, batch_size)
    found: list[float] = []
    for block in blocks_of(opened.model):
        with _skipping(block):
            found.append(mean_loss(opened, documents, batch_size) - whole)
    return whole, found


def first_held_out(sources: Sequence[str], count: int, validation_share: float) -> list[Document]:
    """The first held-out documents of a corpus."""
    found = list(islice(held_out(sources, validation_share), count))
    if not found:
        raise OutgrowError(f"no document of {', '.join(sources)} is held out; give more text, or a larger --validation-share")
    return found


@contextmanager
def _skipping(block: Any) -> Iterator[None]:
    """The block gives what it is given."""

    def hand_on(module: Any, given: tuple[Any, ...], named: dict[str, Any], made: Any) -> Any:
        states = given[0] if given else named["hidden_states"]
        return (states, *made[1:]) if isinstance(made, tuple) else states

    hook = block.register_forward_hook(hand_on, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
