"""Packed corpora that are ready to read, and batches that are a pure function of (seed, tokens seen)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outgrow.config import hash_of
from outgrow.data.config import DataConfig
from outgrow.data.corpus import EMBEDDED, content_hash, documents, split
from outgrow.data.packing import MANIFEST, PARTS, SHARD_TOKENS, pack, too_few, train_on
from outgrow.data.tokenizer import TOKENIZER_FILES
from outgrow.data.tokens import Mixture, Row, Tokens, open_tokens, sha256
from outgrow.errors import OutgrowError
from outgrow.files import read_json


@dataclass(frozen=True)
class Packed:
    """A packed corpus, or a mixture of several.

    Attributes:
        directory: where it lies, tokenizer beside it; of a mixture, the first one's.
        training: [tokens] training tokens, memory-mapped.
        validation: [tokens] held-out tokens, memory-mapped.
        bytes_per_token: UTF-8 bytes of held-out text per held-out token, for bits per byte.
        corpus_hash: hash of every text of the corpus; of prepared directories, of every packed token and each share.
        vocab: entries that a model's vocabulary needs, at least.
    """

    directory: Path
    training: Tokens | Mixture
    validation: Tokens | Mixture
    bytes_per_token: float
    corpus_hash: str
    vocab: int

    @property
    def tokenizer_files(self) -> list[Path]:
        return [self.directory / name for name in TOKENIZER_FILES]


def prepare(config: DataConfig, cache: Path, verify: bool = True) -> Packed:
    """Opens prepared directories; or packs a corpus under `cache`, or finds it there: same text, vocabulary and share, same place."""
    if config.sources:
        return _mixed(config, verify)
    skipped: list[str] = []
    found = documents(config.corpus, skipped)
    corpus_hash = content_hash(document.digest for document in found)
    directory = cache / f"packed-{corpus_hash[:10]}-{config.vocab}-{config.validation_share:g}"
    settings = {"corpus": corpus_hash, "vocab": config.vocab, "validation_share": config.validation_share, "shard_tokens": SHARD_TOKENS}
    try:
        if not all(split(found, config.validation_share)):
            raise too_few(len(found), config.validation_share)
        pack(directory, lambda: found, train_on(found, config.vocab, config.validation_share), settings, skipped)
    except OutgrowError as error:
        raise OutgrowError(f"data.corpus '{config.corpus}': {error}") from None
    return open_packed(directory, verify)


def open_packed(directory: Path, verify: bool = True) -> Packed:
    """Opens a packed corpus.

    Args:
        directory: what 'outgrow data prepare' or `prepare` wrote.
        verify: read all of it once and compare with its manifest's hashes, and not only the lengths.
    """
    if not (directory / MANIFEST).exists():
        raise OutgrowError(f"'{directory}' holds no packed corpus; 'outgrow data prepare SOURCE --output {directory}' writes one")
    manifest = read_json(directory / MANIFEST)
    try:
        training, validation = (open_tokens(directory, manifest["shards"][part], verify) for part in PARTS)
        return Packed(directory, training, validation, manifest["bytes_per_token"], manifest["corpus_hash"], manifest["vocab"])
    except (KeyError, TypeError) as error:
        raise OutgrowError(f"'{directory / MANIFEST}' is not the manifest of a packed corpus ({error}); prepare the data again") from None


def _mixed(config: DataConfig, verify: bool) -> Packed:
    """The prepared directories of a config as one corpus."""
    parts = [open_packed(Path(source.path), verify) for source in config.sources]
    manifests = [read_json(part.directory / MANIFEST) for part in parts]
    tokenizers = [sha256(part.tokenizer_files[0]) for part in parts]
    held_out = [manifest.get("settings", {}).get("validation_share") for manifest in manifests]
    for part, tokenizer, share in zip(parts, tokenizers, held_out, strict=True):
        places = f"'{parts[0].directory}' and '{part.directory}'"
        if tokenizer != tokenizers[0]:
            raise OutgrowError(f"{places} were packed with different tokenizers; prepare both with the same --tokenizer")
        if share != held_out[0]:
            raise OutgrowError(
                f"{places} hold out different shares ({held_out[0]} and {share}), so one may train on what the other holds out; "
                "prepare both with the same --validation-share"
            )
    weights = [Fraction(repr(source.weight)) for source in config.sources]
    shares = tuple(weight / sum(weights) for weight in weights)
    contents = [[manifest["shards"], str(share)] for manifest, share in zip(manifests, shares, strict=True)]
    single = len(parts) == 1
    return replace(
        parts[0],
        training=parts[0].training if single else Mixture(tuple(part.training for part in parts), shares),  # type: ignore[arg-type]
        validation=parts[0].validation if single else Mixture(tuple(part.validation for part in parts), shares),  # type: ignore[arg-type]
        bytes_per_token=sum(float(share) * part.bytes_per_token for part, share in zip(parts, shares, strict=True)),
        corpus_hash=hash_of(contents),
    )


@dataclass(frozen=True)
class Batches:
    """Training sequences of `context` + 1 tokens, in an order that depends on the seed and the epoch alone.

    The clock is tokens seen: whoever asks for the batch at a clock gets the same one, whatever ran before, on however many ranks.
    A mixture gives its sources' sequences in turn, so that any stretch of them holds each source in its share, to about one
    sequence; each source is read in its own order and from end to end before any of it is read again.
    """

    tokens: Tokens | Mixture | Row
    context: int
    seed: int

    @property
    def sequences_per_epoch(self) -> int:
        """How many sequences there are until one of the sources has been read to its end."""
        return min(int(count / share) for count, share in zip(self._sequences, self._shares, strict=True))

    def at(self, tokens_seen: int, count: int, part: slice = slice(None)) -> NDArray[np.int64]:
        """The next `count` sequences at clock `tokens_seen`: [count, context + 1].

        With `part` only those, such as the ones that are a rank's own.
        """
        first = tokens_seen // self.context
        return np.stack([self._sequence(index) for index in range(first, first + count)[part]])

    def epochs(self, tokens_seen: int) -> tuple[float, ...]:
        """How often each source has been read at a clock."""
        index, read = tokens_seen // self.context, []
        for (share, rest), sequences in zip(self._ladder, self._sequences, strict=True):
            before = -(-index * share // rest)
            read.append(before / sequences)
            index -= before
        return tuple(read)

    def _sequence(self, index: int) -> NDArray[np.int64]:
        source, turn = self._turn(index)
        epoch, place = divmod(turn, self._sequences[source])
        start = int(self._order(source, epoch)[place]) * self.context
        return self._sources[source][start : start + self.context + 1].astype(np.int64)

    def _turn(self, index: int) -> tuple[int, int]:
        """(source, how many of its sequences came before) of a sequence.

        The first source has ceil(index x share) of the sequences before `index`; what it leaves is dealt to the others likewise.
        """
        for source, (share, rest) in enumerate(self._ladder):
            before = -(-index * share // rest)
            if -(-(index + 1) * share // rest) > before:
                return source, before
            index -= before
        raise AssertionError("the last source takes all that is left")

    def _order(self, source: int, epoch: int) -> NDArray[np.int64]:
        """The permutation of one epoch of a source. The newest of each source is kept."""
        kept = self._orders.get(source)
        if kept is None or kept[0] != epoch:
            order = np.random.default_rng([self.seed, epoch, source]).permutation(self._sequences[source])
            kept = self._orders[source] = (epoch, order)
        return kept[1]

    @cached_property
    def _orders(self) -> dict[int, tuple[int, NDArray[np.int64]]]:
        return {}

    @cached_property
    def _sources(self) -> tuple[Tokens | Row, ...]:
        return self.tokens.parts if isinstance(self.tokens, Mixture) else (self.tokens,)

    @cached_property
    def _shares(self) -> tuple[Fraction, ...]:
        return self.tokens.shares if isinstance(self.tokens, Mixture) else (Fraction(1),)

    @cached_property
    def _ladder(self) -> list[tuple[int, int]]:
        """Each source's share of what those before it leave, as a fraction of whole numbers."""
        left = [share / sum(self._shares[source:]) for source, share in enumerate(self._shares)]
        return [(share.numerator, share.denominator) for share in left]

    @cached_property
    def _sequences(self) -> tuple[int, ...]:
        return tuple((len(source) - 1) // self.context for source in self._sources)


def validation_batches(packed: Packed, config: DataConfig, sequences: int) -> Iterator[NDArray[np.int64]]:
    """Held-out sequences in file order, always the same ones: [<= sequences, context + 1] each.

    Each source gives its share, one at least, spread evenly over all that it holds out; the embedded corpus gives its first ones, as in
    the committed records.
    """
    first_ones = config.corpus == EMBEDDED and not config.sources
    held_out = Batches(packed.validation, config.context, seed=0)
    total = min(config.validation_tokens // config.context, held_out.sequences_per_epoch)
    wanted: list[tuple[Tokens | Row, int]] = []
    for tokens, share, available in zip(held_out._sources, held_out._shares, held_out._sequences, strict=True):
        count = min(total, max(1, int(total * share)))
        wanted += [(tokens, number * (count if first_ones else available) // count * config.context) for number in range(count)]
    for first in range(0, len(wanted), sequences):
        rows = [tokens[start : start + config.context + 1] for tokens, start in wanted[first : first + sequences]]
        yield np.stack(rows).astype(np.int64)
