"""Texts out of files and hub data sets, one at a time, each with how many bytes of its file were read to find it."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from outgrow.errors import OutgrowError, one_line

Texts = Iterator[tuple[str | None, int]]
_DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".lzma": lzma.LZMAFile,
    ".zst": lambda file: _zstandard(file),
    ".zstd": lambda file: _zstandard(file),
}
_AT_ONCE = 1 << 17  # compressed bytes
_UNREAD = {".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".lz4", ".br", ".arrow", ".feather", ".orc", ".avro"}


def reader(path: Path) -> Callable[[Path, str], Texts]:
    """What reads a file of this name: records from .jsonl, from .parquet and from compressed .jsonl or .json, whole text from any other."""
    form = _form(path)
    if form == ".jsonl" or (form == ".json" and path.suffix.lower() in _DECOMPRESSORS):  # all one object a line, as published
        return lines
    return parquet if form == ".parquet" else whole


def is_read(path: Path) -> bool:
    """False for the archives and tables that no reader here opens."""
    return _form(path) not in _UNREAD


def _form(path: Path) -> str:
    """The ending of a file's name, in small letters; of a compressed one, the ending before that."""
    return (Path(path.stem) if path.suffix.lower() in _DECOMPRESSORS else path).suffix.lower()


def whole(path: Path, text_key: str) -> Texts:
    """The file as one text; None where it is not UTF-8 (a few test files of the standard library are not, on purpose)."""
    try:
        with path.open("rb") as file, _decompressed(path, file, newline=None) as opened:
            text = opened.read()
    except UnicodeDecodeError:
        text = None
    except OutgrowError:
        raise
    except Exception as error:
        raise OutgrowError(f"'{path}' cannot be read ({one_line(error)}); get the file again") from None
    yield text, path.stat().st_size


def lines(path: Path, text_key: str) -> Texts:
    """The texts of a file with one JSON object a line, plain or compressed."""
    number = 0
    try:
        with path.open("rb") as file, _decompressed(path, file, newline="\n") as text:
            for number, line in enumerate(text, 1):
                if line.strip():
                    yield _text(json.loads(line), text_key, f"'{path}', line {number},"), file.tell()
    except json.JSONDecodeError as error:
        raise OutgrowError(f"'{path}', line {number}, is not JSON ({error.msg}, column {error.colno}); mend or remove the line") from None
    except OutgrowError:
        raise
    except Exception as error:  # a damaged file: each compression and UTF-8 have their own words for it
        reason = one_line(error)
        raise OutgrowError(f"'{path}' cannot be read after line {number} ({reason}); get the file again") from None


def parquet(path: Path, text_key: str) -> Texts:
    """The texts of one column of a parquet file."""
    arrow, arrow_parquet = _module("pyarrow", path), _module("pyarrow.parquet", path)
    try:
        with arrow_parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                raise OutgrowError(f"'{path}' has no column '{text_key}'; it has {', '.join(names)}: name one with --text-key")
            size, rows, done = path.stat().st_size, max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(columns=[text_key]):
                for record in batch.to_pylist():
                    done += 1
                    yield _text(record, text_key, f"'{path}', row {done},"), size * done // rows
    except arrow.ArrowInvalid as error:
        raise OutgrowError(f"'{path}' is not a whole parquet file ({str(error).splitlines()[0]}); get the file again") from None


def hub(name: str, text_key: str) -> Texts:
    """The texts of a hub data set's training split, streamed; `owner/name` or `owner/name:config`."""
    datasets = _module("datasets", name)
    path, _, config = name.partition(":")
    done = 0
    try:
        for number, record in enumerate(datasets.load_dataset(path, config or None, split="train", streaming=True), 1):
            text = _text(record, text_key, f"'{name}', record {number},")
            done += len(text)
            yield text, done
    except OutgrowError:
        raise
    except Exception as error:  # what fails is the network's, the hub's or the data set's own, each with its own classes
        reason = one_line(error)
        raise OutgrowError(
            f"the hub data set '{name}' cannot be read ({reason}); check its name and the network, or give local files"
        ) from None


def _decompressed(path: Path, file: Any, newline: str | None) -> Any:
    """An open file as text."""
    opened = _DECOMPRESSORS.get(path.suffix.lower(), lambda file: file)(file)
    return io.TextIOWrapper(opened, encoding="utf-8", newline=newline)


def _zstandard(file: Any) -> Any:
    return io.BufferedReader(_Frames(file, _module("zstandard", file.name).ZstdDecompressor()))


class _Frames(io.RawIOBase):
    """The frames of a .zst file one after another; the library's own reader ends in the middle of one without a word."""

    def __init__(self, file: Any, decompressor: Any) -> None:
        self._file, self._decompressor = file, decompressor
        self._frame: Any = None
        self._compressed, self._text = b"", memoryview(b"")  # whose parts are no copies

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._compressed = self._compressed or self._file.read(_AT_ONCE)
            if not self._compressed:
                if self._frame:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._text = memoryview(self._frame.decompress(self._compressed))
            self._compressed, self._frame = (self._frame.unused_data, None) if self._frame.eof else (b"", self._frame)
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        return count


def _text(record: Any, key: str, where: str) -> str:
    """The text of a record; empty where it is null. Halves of surrogate pairs, which are no text, become question marks."""
    if not isinstance(record, dict):
        raise OutgrowError(f"{where} is not an object with a '{key}'")
    if key not in record:
        raise OutgrowError(f"{where} has no '{key}'; it has {', '.join(map(str, record)) or 'no keys'}: name one with --text-key")
    text = record[key]
    if text is not None and not isinstance(text, str):
        raise OutgrowError(f"{where} has a '{key}' that is not text but {type(text).__name__}; name another with --text-key")
    return (text or "").encode("utf-8", "replace").decode("utf-8")


def _module(name: str, what: object) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise OutgrowError(f"reading '{what}' needs '{name}', which is not installed; pip install 'outgrow[data]'") from None
