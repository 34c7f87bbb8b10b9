"""Packed tokens on disk: numpy files of a fixed number of tokens each, read as if they were one row."""

from __future__ import annotations

from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outgrow.errors import OutgrowError, one_line
from outgrow.files import file_hash, read_json, write_json

Row = NDArray[np.integer[Any]]
VERIFIED = "verified.json"
HEADER = 128  # bytes before the tokens of a shard: numpy's header, whatever the length says


@dataclass(frozen=True)
class Tokens:
    """[tokens] over several shards, memory-mapped; `tokens[start:stop]` copies what is asked for."""

    shards: tuple[Row, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(shard) for shard in self.shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, wanted: slice) -> Row:
        start, stop, step = wanted.indices(len(self))
        assert step == 1, "tokens are read in order"
        pieces: list[Row] = []
        number = bisect_right(self._ends, start)
        while start < stop:
            end = self._ends[number]
            first = end - len(self.shards[number])
            pieces.append(self.shards[number][start - first : min(stop, end) - first])
            start, number = end, number + 1
        return np.concatenate(pieces) if pieces else self.shards[0][:0].copy()


@dataclass(frozen=True)
class Mixture:
    """Several rows of tokens and the share of the sequences that each gives; the shares sum to one, exactly."""

    parts: tuple[Tokens, ...]
    shares: tuple[Fraction, ...]


def append(directory: Path, part: str, before: int, row: Row, shard_tokens: int) -> None:
    """Writes tokens behind the first `before` ones of a part. Whatever lay behind those is overwritten, so a killed writer does no harm."""
    while len(row):
        number, offset = divmod(before, shard_tokens)
        piece = row[: shard_tokens - offset]
        path = directory / shard_name(part, number)
        with path.open("r+b" if offset else "wb") as file:
            file.seek(HEADER + offset * row.itemsize)
            file.write(piece.tobytes())
        before, row = before + len(piece), row[len(piece) :]


def close(directory: Path, part: str, total: int, shard_tokens: int, dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    """Gives the shards of a part their headers and exact lengths; returns name, tokens and hash of each, for the manifest."""
    entries: list[dict[str, Any]] = []
    for number, first in enumerate(range(0, total, shard_tokens)):
        name, tokens = shard_name(part, number), min(shard_tokens, total - first)
        with (directory / name).open("r+b") as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (tokens,)}
            np.lib.format.write_array_header_1_0(file, header)
            assert file.tell() == HEADER, "numpy pads its headers to a multiple of 64 bytes"
            file.truncate(HEADER + tokens * dtype.itemsize)
        entries.append({"file": name, "tokens": tokens, "sha256": sha256(directory / name)})
    return entries


def open_tokens(directory: Path, entries: list[dict[str, Any]], verify: bool) -> Tokens:
    """Opens the shards that a manifest lists; with `verify` reads them once, as many at a time as there are cores.

    Raises:
        OutgrowError: a shard is missing, is cut or holds other bytes than the manifest says.
    """
    shards = tuple(_open(directory / entry["file"], entry["tokens"]) for entry in entries)
    if verify:
        known = _verified(directory)
        unread = [entry for entry in entries if known.get(entry["file"]) != [entry["sha256"], *_state(directory / entry["file"])]]
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda entry: sha256(directory / entry["file"]), unread))
        for entry, digest in zip(unread, found, strict=True):
            if digest != entry["sha256"]:
                raise _damaged(directory / entry["file"], "its bytes are not those that the manifest says")
            known[entry["file"]] = [digest, *_state(directory / entry["file"])]
        if unread:
            with suppress(OSError):  # a directory that cannot be written is read anew each time
                write_json(directory / VERIFIED, known)
    return Tokens(shards)


def _verified(directory: Path) -> dict[str, list[Any]]:
    """File -> hash, size and time of the last change of the shards whose bytes were read and found right: a corpus may be terabytes."""
    try:
        known = read_json(directory / VERIFIED)
    except OutgrowError:
        return {}
    return known if isinstance(known, dict) else {}


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def shard_name(part: str, number: int) -> str:
    """The file of a shard, such as training-00000.npy."""
    return f"{part}-{number:05d}.npy"


def sha256(path: Path) -> str:
    """The hash of a file; one that has not changed since is not read again."""
    state = path.stat()
    return _sha256(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, changed: int) -> str:
    return file_hash(path)


def _open(path: Path, tokens: int) -> Row:
    try:
        shard = np.load(path, mmap_mode="r").view(np.ndarray)
    except FileNotFoundError:
        raise _damaged(path, "it is missing") from None
    except (ValueError, EOFError, OSError) as error:
        raise _damaged(path, one_line(error)) from None
    if shard.shape != (tokens,):
        raise _damaged(path, f"it has {shard.size:,} tokens and the manifest says {tokens:,}")
    return shard


def _damaged(path: Path, reason: str) -> OutgrowError:
    return OutgrowError(f"the shard '{path}' is damaged: {reason}; remove its directory and prepare the data again")
