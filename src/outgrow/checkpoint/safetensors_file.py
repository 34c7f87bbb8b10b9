"""Safetensors headers, read with suspicion and written before any tensor, so that copies are byte ranges.

The file: 8 bytes little-endian header length, the header (JSON), then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outgrow.errors import OutgrowError
from outgrow.files import DuplicateKeyError, refuse_special, without_duplicates
from outgrow.growth.rows import pieces
from outgrow.spaces import Rows

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
# dtype on disk -> its name in torch and in config.json; growth computes in the first four
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
FLOATS = {name: TORCH_NAMES[name] for name in ("F64", "F32", "F16", "BF16")}
LARGEST_HEADER = 100_000_000
BLOCK = 1 << 22  # bytes that are compared at a time
MOST_AXES = 64  # of a tensor; torch knows no more


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: its type, shape, and the bytes it occupies, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: its file, where it lies there, and its name there."""

    path: Path
    entry: Entry
    name: str

    @property
    def files(self) -> set[Path]:
        return {self.path}

    def load(self, rows: Rows = slice(None)) -> Any:
        """The tensor, or some of its rows, as a torch tensor of its own type; read and not mapped, which is slow on network disks."""
        import torch

        shape, dtype = self.entry.shape, getattr(torch, TORCH_NAMES[self.entry.dtype])
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)[rows]
        wanted = np.arange(shape[0] if shape else 1)[rows]
        row_bytes = self.entry.bytes // (shape[0] if shape else 1)
        data = bytearray(len(wanted) * row_bytes)
        view = memoryview(data)
        with self.path.open("rb", buffering=0) as file:
            for run in np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1):
                file.seek(self.entry.begin + int(run[0]) * row_bytes)
                end = len(view) - len(run) * row_bytes
                while len(view) > end:
                    count = file.readinto(view[: len(view) - end])
                    if not count:
                        raise OutgrowError(f"'{self.path}' became shorter while it was read")
                    view = view[count:]
        return torch.frombuffer(data, dtype=dtype).reshape(len(wanted), *shape[1:]) if shape else torch.frombuffer(data, dtype=dtype)[0]

    def same_bytes(self, other: Stored) -> bool:
        """Does another stored tensor hold the same?"""
        if (self.entry.dtype, self.entry.shape) != (other.entry.dtype, other.entry.shape):
            return False
        return all(mine == theirs for mine, theirs in zip(self.blocks(), other.blocks(), strict=True))

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, some MiB at a time."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.entry.begin)
            left = self.entry.bytes
            while left:
                block = file.read(min(left, BLOCK))
                if not block:
                    raise OutgrowError(f"'{self.path}' became shorter while it was read")
                left -= len(block)
                yield block

    def read(self, rows: Rows = slice(None)) -> Any:
        """The tensor, or some of its rows, in fp32 for arithmetic (float64 if it is float64), and never whole in both types at once."""
        if not math.prod(self.entry.shape) or not self.entry.shape:
            return widened(self.load(rows))
        wanted = np.arange(self.entry.shape[0])[rows]
        first, *others = pieces((len(wanted), *self.entry.shape[1:]))
        part = widened(self.load(wanted[first]))
        if not others:
            return part
        whole = part.new_empty((len(wanted), *self.entry.shape[1:]))
        whole[first] = part
        for some in others:
            whole[some] = widened(self.load(wanted[some]))
        return whole


def entry_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor occupies."""
    return DTYPE_BYTES[dtype] * math.prod(shape)


def read_header(path: Path) -> dict[str, Entry]:
    """Name -> entry of every tensor of a file; refuses a header that does not describe the file exactly."""
    header, start, size = _header(path)
    comments = header.get("__metadata__", {})
    if not isinstance(comments, dict) or not all(isinstance(value, str) for value in comments.values()):
        raise OutgrowError(f"the header of '{path}' has comments ('__metadata__') that are no text")
    entries = {name: _entry(path, name, value, start) for name, value in header.items() if name != "__metadata__"}
    _cover(path, entries, start, size)
    return entries


def read_comments(path: Path) -> dict[str, Any]:
    """What a file's header says beside its tensors."""
    comments = _header(path)[0].get("__metadata__")
    return comments if isinstance(comments, dict) else {}


def stored_in(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file."""
    return {name: Stored(path, entry, name) for name, entry in read_header(path).items()}


def widened(tensor: Any) -> Any:
    """A torch tensor in the type that growth computes in."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def write_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, Entry]]:
    """The header bytes of a file that will hold `tensors` (name -> dtype, shape) in this order, and where each will lie."""
    offset = 0
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape) in tensors.items():
        end = offset + entry_bytes(dtype, shape)
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    entries = {
        name: Entry(value["dtype"], tuple(value["shape"]), start + value["data_offsets"][0], start + value["data_offsets"][1])
        for name, value in described.items()
        if name != "__metadata__"
    }
    return struct.pack("<Q", len(text)) + text, entries


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """A file's header, where its tensors begin, and its size."""
    refuse_special(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, LARGEST_HEADER):
                raise OutgrowError(f"'{path}' is truncated or not safetensors: its {size} bytes cannot hold the header it announces")
            text = file.read(length)
    except FileNotFoundError:
        raise OutgrowError(f"there is no file '{path}'") from None
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except DuplicateKeyError as error:
        raise OutgrowError(f"the header of '{path}' names '{error}' twice") from None
    except (ValueError, RecursionError) as error:  # ValueError: malformed, not UTF-8, or a number of thousands of digits
        raise OutgrowError(f"the header of '{path}' is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise OutgrowError(f"the header of '{path}' must be a JSON object of tensors")
    return header, 8 + length, size


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    where = f"tensor '{name}' of '{path}'"
    described: dict[str, Any] = value if isinstance(value, dict) else {}
    dtype: Any = described.get("dtype")
    shape: Any = described.get("shape")
    offsets: Any = described.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise OutgrowError(f"{where} has the unknown dtype {dtype!r}; known: {', '.join(DTYPE_BYTES)}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise OutgrowError(f"{where} needs a shape and two data offsets of whole numbers")
    if len(shape) > MOST_AXES or offsets[1] - offsets[0] != entry_bytes(dtype, shape):
        raise OutgrowError(f"{where} has shape {str(shape)[:200]} of {dtype}, which does not fill its bytes {offsets[0]} to {offsets[1]}")
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value)


def _cover(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Every byte of the file belongs to exactly one tensor."""
    place = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > size:
            raise OutgrowError(f"'{path}' is truncated: tensor '{name}' ends at byte {entry.end}, and the file has {size}")
        if entry.begin != place:
            raise OutgrowError(f"tensor '{name}' of '{path}' overlaps another or leaves a gap at byte {min(place, entry.begin)}")
        place = entry.end
    if place != size:
        raise OutgrowError(f"'{path}' has {size - place} bytes after its last tensor")
