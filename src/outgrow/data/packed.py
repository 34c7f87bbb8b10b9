"""A corpus packed into tokens on disk, and batches that are a pure function of (seed, tokens seen)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from outgrow.data import tokenizer as bpe
from outgrow.data.config import DataConfig
from outgrow.data.corpus import Document, content_hash, documents, split
from outgrow.errors import OutgrowError
from outgrow.files import new_directory, read_json, write_json

Tokens = NDArray[np.integer]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Packed:
    """A packed corpus.

    Attributes:
        directory: where it lies, tokenizer beside it.
        training: [tokens] training tokens, memory-mapped.
        validation: [tokens] held-out tokens, memory-mapped.
        bytes_per_token: UTF-8 bytes of held-out text per held-out token, for bits per byte.
        corpus_hash: hash of every text of the corpus.
    """

    directory: Path
    training: Tokens
    validation: Tokens
    bytes_per_token: float
    corpus_hash: str

    @property
    def tokenizer_files(self) -> list[Path]:
        return [self.directory / name for name in TOKENIZER_FILES]


def prepare(config: DataConfig, cache: Path) -> Packed:
    """Packs a corpus under `cache`, or finds it there: same text, vocabulary and held-out share, same place."""
    found = documents(config.corpus)
    corpus_hash = content_hash(found)
    directory = cache / f"{corpus_hash[:10]}-{config.vocab}-{config.validation_share:g}"
    if not (directory / "manifest.json").exists():
        _pack(found, corpus_hash, config, directory)
    return open_packed(directory)


def open_packed(directory: Path) -> Packed:
    """Opens a packed corpus that `prepare` wrote."""
    manifest = read_json(directory / "manifest.json")
    training, validation = (np.load(directory / f"{part}.npy", mmap_mode="r") for part in ("training", "validation"))
    return Packed(directory, training, validation, manifest["bytes_per_token"], manifest["corpus_hash"])


def _pack(found: list[Document], corpus_hash: str, config: DataConfig, directory: Path) -> None:
    training, validation = split(found, config.validation_share)
    if not training or not validation:
        raise OutgrowError(
            f"the corpus '{config.corpus}' has {len(found)} documents, too few to hold out a share of "
            f"{config.validation_share:g}; give more documents or a larger data.validation_share"
        )
    tokenizer = bpe.train((document.text for document in training), config.vocab)
    if tokenizer.get_vocab_size() < config.vocab:
        raise OutgrowError(
            f"the corpus '{config.corpus}' is too small for a vocabulary of {config.vocab}: it gave "
            f"{tokenizer.get_vocab_size()}; set data.vocab to that, or give more text"
        )
    with new_directory(directory) as temporary:
        packed = {name: _encode(tokenizer, part) for name, part in (("training", training), ("validation", validation))}
        for name, tokens in packed.items():
            np.save(temporary / f"{name}.npy", tokens)
        bpe.save(tokenizer, temporary)
        held_out_bytes = sum(len(document.text.encode()) for document in validation)
        manifest = {
            "corpus": config.corpus,
            "corpus_hash": corpus_hash,
            "vocab": config.vocab,
            "documents": {"training": len(training), "validation": len(validation)},
            "tokens": {name: len(tokens) for name, tokens in packed.items()},
            "bytes_per_token": held_out_bytes / len(packed["validation"]),
            "validation_documents": [document.name for document in validation],
        }
        write_json(temporary / "manifest.json", manifest)


def _encode(tokenizer: Tokenizer, part: list[Document]) -> Tokens:
    """All documents as one row of tokens, each followed by the end-of-text token."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    end = np.array([tokenizer.token_to_id(bpe.END_OF_TEXT)], dtype)
    rows: list[Tokens] = []
    for start in range(0, len(part), 256):
        for encoded in tokenizer.encode_batch_fast([document.text for document in part[start : start + 256]]):
            rows += [np.array(encoded.ids, dtype), end]
    return np.concatenate(rows)


@dataclass(frozen=True)
class Batches:
    """Training sequences of `context` + 1 tokens, in an order that depends on the seed and the epoch alone.

    The clock is tokens seen: whoever asks for the batch at a clock gets the same one, whatever ran before.
    """

    tokens: Tokens
    context: int
    seed: int

    @property
    def sequences_per_epoch(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def at(self, tokens_seen: int, count: int) -> NDArray[np.int64]:
        """The next `count` sequences at clock `tokens_seen`: [count, context + 1]."""
        first = tokens_seen // self.context
        rows = [self._sequence(index) for index in range(first, first + count)]
        return np.stack(rows)

    def _sequence(self, index: int) -> NDArray[np.int64]:
        epoch, place = divmod(index, self.sequences_per_epoch)
        start = int(_order(self.seed, epoch, self.sequences_per_epoch)[place]) * self.context
        return self.tokens[start : start + self.context + 1].astype(np.int64)


def validation_batches(packed: Packed, config: DataConfig, sequences: int) -> Iterator[NDArray[np.int64]]:
    """The held-out sequences in file order, always the same ones: [<= sequences, context + 1] each."""
    total = min(config.validation_tokens, len(packed.validation) - 1) // config.context
    for first in range(0, total, sequences):
        starts = range(first * config.context, min(first + sequences, total) * config.context, config.context)
        yield np.stack([packed.validation[start : start + config.context + 1] for start in starts]).astype(np.int64)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, sequences: int) -> NDArray[np.int64]:
    """The permutation of one epoch; a batch at most spans two."""
    return np.random.default_rng([seed, epoch]).permutation(sequences)
