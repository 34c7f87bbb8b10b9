"""Held-out loss of a checkpoint on any text, document by document, in memory that does not grow with the text.

Every token of a document is predicted once: the first from the token that stands before a text, the others from as many tokens of the
document as a window of the model's context holds. This is how lm-evaluation-harness counts too, so both give the same bits per byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from outgrow.data.config import VALIDATION_SHARE
from outgrow.data.corpus import Document, held_out, read
from outgrow.errors import OutgrowError
from outgrow.evaluation.model import Opened

IGNORED = -100  # the label of padding


class Sums:
    """What is kept of the documents of a source: sums, so that a million documents take as much room as one.

    The standard error of a ratio of sums, sum(nats) / sum(tokens), is over documents and to first order (the delta method).
    """

    def __init__(self) -> None:
        self.documents = 0
        self._sums = np.zeros(3)  # of nats, tokens and bytes
        self._products = np.zeros((3, 3))

    def add(self, nats: float, tokens: int, bytes_: int) -> None:
        """One document."""
        one = np.array([nats, tokens, bytes_])
        self.documents, self._sums, self._products = self.documents + 1, self._sums + one, self._products + np.outer(one, one)

    def row(self) -> dict[str, Any]:
        """documents, tokens, bytes, loss in nats per token, bits per byte, and their standard errors (None for one document)."""
        (loss, loss_error), (per_byte, per_byte_error) = self._per(1), self._per(2)
        _, tokens, size = self._sums.tolist()
        return {
            "documents": self.documents,
            "tokens": int(tokens),
            "bytes": int(size),
            "loss": loss,
            "loss_stderr": loss_error,
            "bits_per_byte": per_byte / math.log(2),
            "bits_per_byte_stderr": _bits(per_byte_error),
        }

    def _per(self, of: int) -> tuple[float, float | None]:
        """Nats for each of what stands there, and the standard error of that."""
        lower = float(self._sums[of])
        ratio = float(self._sums[0]) / lower
        if self.documents < 2:
            return ratio, None
        squares = float(self._products[0, 0] - 2 * ratio * self._products[0, of] + ratio**2 * self._products[of, of])
        return ratio, math.sqrt(max(0.0, squares) * self.documents / (self.documents - 1)) / lower


def corpus_loss(
    opened: Opened,
    sources: Sequence[str],
    validation_share: float | None = VALIDATION_SHARE,
    text_key: str = "text",
    documents: int | None = None,
    by_file: bool = False,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Source -> its row of `Sums.row`; with several sources or files also `all`.

    Args:
        opened: the model.
        sources: see `outgrow.data.corpus.read`.
        validation_share: the share of documents that is held out, as in training, and that alone is read; None reads every document.
        text_key: where the text is in records.
        documents: of each source, at most.
        by_file: one row a file, and not one a source.
        batch_size: windows at once.

    Raises:
        OutgrowError: a source that cannot be read, or of which nothing is held out.
    """
    found: dict[str, Sums] = {}
    whole = Sums()
    for source in sources:
        texts = read([source], text_key) if validation_share is None else held_out([source], validation_share, text_key)
        before = whole.documents
        for document, nats, tokens in _scored(opened, islice(texts, documents), batch_size):
            size = len(document.text.encode())
            for sums in (whole, found.setdefault(f"{source}: {document.name}" if by_file else source, Sums())):
                sums.add(nats, tokens, size)
        if whole.documents == before:
            raise OutgrowError(f"no document of '{source}' is held out; give a larger --validation-share, or read all with --all")
    rows = {name: sums.row() for name, sums in found.items()}
    if "all" in rows and len(rows) > 1:
        raise OutgrowError("a source is called 'all', as the sum of all is; write it './all'")
    return rows if len(rows) == 1 else rows | {"all": whole.row()}


def mean_loss(opened: Opened, documents: Iterable[Document], batch_size: int = 8) -> float:
    """Nats a token over documents."""
    scored = [(nats, tokens) for _, nats, tokens in _scored(opened, documents, batch_size)]
    return sum(nats for nats, _ in scored) / sum(tokens for _, tokens in scored)


@torch.no_grad()
def _scored(opened: Opened, documents: Iterable[Document], batch_size: int) -> Iterator[tuple[Document, float, int]]:
    """(document, nats, tokens) of each, in order; windows of neighbouring documents share a batch."""
    waiting: list[tuple[Document, int, list[float], int]] = []  # document, windows, nats of those that are done, tokens
    batch: list[tuple[list[int], list[int]]] = []
    owners: list[list[float]] = []

    def run() -> None:
        for nats, owner in zip(_nats(opened, batch), owners, strict=True):
            owner.append(nats)
        batch.clear()
        owners.clear()

    for document in documents:
        encoded = opened.tokenizer(document.text, add_special_tokens=False, split_special_tokens=True, truncation=False, verbose=False)
        tokens = encoded["input_ids"]
        if not tokens:
            continue
        done: list[float] = []
        pieces = list(windows(tokens, opened.prefix, opened.context))
        waiting.append((document, len(pieces), done, len(tokens)))
        for piece in pieces:
            batch.append(piece)
            owners.append(done)
            if len(batch) == batch_size:
                run()
        while waiting and len(waiting[0][2]) == waiting[0][1]:
            first = waiting.pop(0)
            yield first[0], sum(first[2]), first[3]
    if batch:
        run()
    for first in waiting:
        yield first[0], sum(first[2]), first[3]


def windows(tokens: list[int], prefix: int, context: int) -> Iterator[tuple[list[int], list[int]]]:
    """(inputs, labels) of at most `context` tokens each that predict every token once; the last reaches back as far as it may."""
    row = [prefix, *tokens]
    for start in range(0, len(tokens), context):
        end = min(start + context, len(tokens))
        begin = max(0, end - context)
        yield row[begin:end], [IGNORED] * (start - begin) + tokens[start:end]


def _nats(opened: Opened, batch: list[tuple[list[int], list[int]]]) -> list[float]:
    """The summed cross-entropy of each window, in float32 from the model's logits."""
    longest = max(len(labels) for _, labels in batch)
    inputs_BT = torch.tensor([[*inputs, *[opened.prefix] * (longest - len(inputs))] for inputs, _ in batch])
    labels_BT = torch.tensor([[*labels, *[IGNORED] * (longest - len(labels))] for _, labels in batch])
    logits_BTV = opened.model(input_ids=inputs_BT.to(opened.device), use_cache=False).logits
    labels_BT = labels_BT.to(opened.device)
    losses = [
        F.cross_entropy(row.float(), labels, reduction="sum", ignore_index=IGNORED)
        for row, labels in zip(logits_BTV, labels_BT, strict=True)
    ]
    return torch.stack(losses).tolist()


def _bits(nats: float | None) -> float | None:
    return None if nats is None else nats / math.log(2)
