"""Documents to packed tokens on disk: in bounded memory, and going on from where a killed process left off."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from outgrow.data import tokenizer as bpe
from outgrow.data.config import VALIDATION_SHARE
from outgrow.data.corpus import Document, content_hash, distinct, is_held_out, read, size, split
from outgrow.data.tokens import Row, append, close, sha256, shard_name
from outgrow.errors import OutgrowError
from outgrow.files import flush, read_json, write_json

MANIFEST, PROGRESS = "manifest.json", "progress.json"
PARTS = ("training", "validation")
SHARD_TOKENS = 2**27
BATCH_CHARACTERS = 4_000_000  # of text that is tokenized and saved at a time
TRAINING_CHARACTERS = 1_000_000_000  # of text that a vocabulary is trained on, at most
Progress = Callable[[int, int | None], object]


def _tell_nobody(done: int, total: int | None) -> None:
    pass


@dataclass
class State:
    """How far a corpus is packed; written after every batch, behind the tokens that it counts."""

    settings: dict[str, Any]
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    held_out_bytes: int = 0
    trail: str = ""  # a hash over the documents so far, in order


@dataclass(frozen=True)
class Batch:
    """Some documents, and the trail behind the last of them."""

    documents: list[Document]
    trail: str


def prepare_sources(
    sources: Sequence[str],
    target: Path,
    tokenizer: str | None = None,
    vocab: int | None = None,
    validation_share: float = VALIDATION_SHARE,
    text_key: str = "text",
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress = _tell_nobody,
) -> None:
    """Packs the distinct documents of sources into a directory, or goes on where that was interrupted.

    Args:
        sources: see `outgrow.data.corpus.read`.
        target: the directory to write; until it is whole, the work lies beside it, in `NAME.unfinished`.
        tokenizer: a tokenizer.json, a directory with one, or a hub id.
        vocab: size of the byte-level BPE to train in place of a given tokenizer, on equal shares of the sources' training documents.
        validation_share: share of documents held out.
        text_key: where the text is in records.
        shard_tokens: tokens per file.
        progress: told (bytes read, bytes in all or None).
    """
    if (tokenizer is None) == (vocab is None):
        raise OutgrowError("give either --tokenizer, one that exists, or --vocab, the size of one to train")
    if within := [source for source in sources if Path(source).resolve() in target.resolve().parents]:
        raise OutgrowError(f"'{target}' lies in the source '{within[0]}', which would hold what is written there; choose another place")
    settings = {"sources": list(sources), "text_key": text_key, "validation_share": validation_share, "shard_tokens": shard_tokens}
    if vocab is not None:
        texts = (document for source in sources for document in _beginning(read([source], text_key), TRAINING_CHARACTERS // len(sources)))
        write_tokenizer = train_on(texts, vocab, validation_share)
        settings["vocab"] = vocab
    else:
        given = bpe.locate(tokenizer or "")
        write_tokenizer = partial(bpe.copy, given)
        settings["tokenizer"] = sha256(given)
    skipped: list[str] = []
    pack(target, lambda: read(sources, text_key, skipped), write_tokenizer, settings, skipped, size(sources), progress)


def train_on(found: Iterable[Document], vocab: int, validation_share: float) -> Callable[[Path], None]:
    """What trains a BPE on the training documents among `found` and writes its files into a directory."""

    def write(directory: Path) -> None:
        texts = (document.text for document in distinct(found, set()) if not is_held_out(document, validation_share))
        bpe.save(bpe.train(texts, vocab), directory)

    return write


def pack(
    target: Path,
    found: Callable[[], Iterable[Document]],
    write_tokenizer: Callable[[Path], None],
    settings: dict[str, Any],
    skipped: Sequence[str] = (),
    total_bytes: int | None = None,
    progress: Progress = _tell_nobody,
) -> None:
    """Packs documents into `target`, which appears once it is whole; the same settings find it, others are refused.

    Args:
        target: the directory to write.
        found: reads the documents from the first on, the same ones each time it is called.
        write_tokenizer: writes the tokenizer's files into a directory.
        settings: all that the result depends on besides the text; validation_share and shard_tokens among them.
        skipped: files that `found` left out, by the time all is read; for the manifest.
        total_bytes: for `progress`.
        progress: told (bytes read, bytes in all or None).
    """
    target = target.resolve()
    with _workplace(target, settings) as directory:
        if directory:
            _make(directory, found, write_tokenizer, settings, skipped, lambda done: progress(done, total_bytes))
            directory.rename(target)
            flush(target.parent)
    (target / PROGRESS).unlink(missing_ok=True)


def _make(
    directory: Path,
    found: Callable[[], Iterable[Document]],
    write_tokenizer: Callable[[Path], None],
    settings: dict[str, Any],
    skipped: Sequence[str],
    told: Callable[[int], object],
) -> None:
    """Fills the directory from wherever it is."""
    if (directory / MANIFEST).exists():
        return
    if not (directory / PROGRESS).exists():
        write_tokenizer(directory)
        bpe.open_encoder(directory)
        write_json(directory / PROGRESS, asdict(State(settings)))
    state = State(**read_json(directory / PROGRESS))
    seen: set[bytes] = set()
    _fill(directory, state, distinct(found(), seen), told)
    _finish(directory, state, content_hash(seen), skipped)


def _fill(directory: Path, state: State, found: Iterable[Document], told: Callable[[int], object]) -> None:
    """Appends the tokens of all documents that are not packed yet, saving the state after every batch."""
    encoder, settings = bpe.open_encoder(directory), state.settings

    def encoded(batch: Batch) -> tuple[Batch, list[tuple[str, list[Document], Row]]]:
        sides = zip(PARTS, split(batch.documents, settings["validation_share"]), strict=True)
        return batch, [(part, side, encoder.row([document.text for document in side])) for part, side in sides]

    for batch, sides in _one_ahead(encoded, _batches(found, state, directory)):
        for part, side, row in sides:
            if side:
                begin, size = state.tokens[part], settings["shard_tokens"]
                append(directory, part, begin, row, size)
                state.tokens[part] += len(row)
                state.documents[part] += len(side)
                for shard in range(begin // size, (state.tokens[part] - 1) // size + 1):
                    flush(directory / shard_name(part, shard))
        flush(directory)
        state.held_out_bytes += sum(len(document.text.encode()) for document in sides[1][1])
        state.trail = batch.trail
        write_json(directory / PROGRESS, asdict(state))
        told(batch.documents[-1].position)


def _finish(directory: Path, state: State, corpus_hash: str, skipped: Sequence[str]) -> None:
    """Closes the shards and writes the manifest."""
    settings = state.settings
    if not all(state.documents.values()):
        (directory / PROGRESS).unlink()
        raise too_few(sum(state.documents.values()), settings["validation_share"])
    encoder = bpe.open_encoder(directory)
    shards = {part: close(directory, part, state.tokens[part], settings["shard_tokens"], encoder.dtype) for part in PARTS}
    manifest = {
        "settings": settings,
        "corpus_hash": corpus_hash,
        "vocab": encoder.vocab,
        "tokenizer_hash": sha256(directory / "tokenizer.json"),
        "documents": state.documents,
        "skipped": list(skipped),
        "tokens": state.tokens,
        "bytes_per_token": state.held_out_bytes / state.tokens["validation"],
        "shards": shards,
    }
    for path in directory.iterdir():
        flush(path)
    write_json(directory / MANIFEST, manifest)


def too_few(documents: int, validation_share: float) -> OutgrowError:
    """What is said where one side of the split is empty."""
    return OutgrowError(
        f"the corpus has {documents} documents, too few to hold out a share of {validation_share:g}; "
        "give more documents or a larger validation share"
    )


def _batches(found: Iterable[Document], state: State, directory: Path) -> Iterator[Batch]:
    """The documents behind those that are packed, some megabytes at a time; those before must be the same as when they were packed."""
    packed, number = sum(state.documents.values()), 0
    documents: list[Document] = []
    trail, characters = "", 0
    changed = OutgrowError(f"the text is not the one that '{directory}' was begun with; give that text back, or remove the directory")
    for number, document in enumerate(found, 1):
        trail = hashlib.sha256(trail.encode() + document.digest).hexdigest()
        if number == packed and trail != state.trail:
            raise changed
        if number > packed:
            documents.append(document)
            characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield Batch(documents, trail)
            documents, characters = [], 0
    if number < packed:
        raise changed
    if documents:
        yield Batch(documents, trail)


def _one_ahead(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`function` of each item, computed in a thread while the next item is read."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            ahead = pool.submit(function, item)
            if waiting:
                yield waiting.result()
            waiting = ahead
        if waiting:
            yield waiting.result()


def _beginning(found: Iterable[Document], characters: int) -> Iterator[Document]:
    for document in found:
        if characters <= 0:
            return
        characters -= len(document.text)
        yield document


@contextmanager
def _workplace(target: Path, settings: dict[str, Any]) -> Iterator[Path | None]:
    """Yields the directory where `target` is in the making, for this process alone; None where it is made already.

    Without saved progress nothing of it stays.
    """
    if _is_made(target, settings):
        yield None
        return
    directory = target.with_name(f"{target.name}.unfinished")
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_made(target, settings):  # by the process that held the lock
            yield None
            return
        directory.mkdir(exist_ok=True)
        if (directory / PROGRESS).exists():
            _same_settings(directory, read_json(directory / PROGRESS)["settings"], settings)
        yield directory
    finally:
        os.close(lock)
        if directory.exists() and not (directory / PROGRESS).exists():
            shutil.rmtree(directory)


def _is_made(target: Path, settings: dict[str, Any]) -> bool:
    if not target.exists():
        return False
    if not (target / MANIFEST).exists():
        raise OutgrowError(f"'{target}' exists already and is no packed corpus; remove it or choose another place")
    _same_settings(target, read_json(target / MANIFEST).get("settings", {}), settings)
    return True


def _same_settings(place: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    different = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    if different:
        said = "; ".join(f"{name} {_short(there.get(name))} there, {_short(here.get(name))} here" for name in different)
        raise OutgrowError(f"'{place}' was packed with other settings ({said}); give those, or choose another place")


def _short(value: Any) -> str:
    return "not given" if value is None else ", ".join(value) if isinstance(value, list) else str(value)[:40]
