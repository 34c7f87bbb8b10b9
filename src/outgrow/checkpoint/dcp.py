"""PyTorch distributed checkpoints (DCP): read a chunk at a time, with suspicion; written a tensor at a time, by any number of ranks.

Two forms hold the same: `.metadata` (a pickle) with `*.distcp` files, as torchtitan writes them, and safetensors files of chunks.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from outgrow.checkpoint.safetensors_file import TORCH_NAMES, Entry, Stored, entry_bytes, read_comments, stored_in, widened
from outgrow.errors import OutgrowError
from outgrow.spaces import Rows

METADATA = ".metadata"
SHARDING = "DCP_SHARDING_INFO"  # where a safetensors file of chunks says which part of each tensor it holds
# All that a metadata file of torch's own may name, beside dtypes and paths; none of these does anything but hold values.
_PLAIN = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
}  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor: the box it fills, and what loads it as a torch tensor."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    path: Path
    load: Callable[[], Any]


@dataclass(frozen=True)
class Chunked:
    """A tensor that lies on disk in one or more chunks.

    Attributes:
        name: there.
        entry: its type and shape; it has no one place.
        chunks: what fills it.
        turned: what is done to the whole tensor once it is loaded.
    """

    name: str
    entry: Entry
    chunks: tuple[Chunk, ...]
    turned: Callable[[Any], Any] = lambda tensor: tensor

    @property
    def files(self) -> set[Path]:
        return {chunk.path for chunk in self.chunks}

    def whole(self) -> Any:
        """The tensor as it was saved."""
        import torch

        if len(self.chunks) == 1:
            return self.turned(self.chunks[0].load())
        tensor = torch.empty(self.entry.shape, dtype=getattr(torch, TORCH_NAMES[self.entry.dtype]))
        for chunk in self.chunks:
            tensor[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.shape, strict=True))] = chunk.load()
        return self.turned(tensor)

    def load(self, rows: Rows = slice(None)) -> Any:
        """The tensor, or some of its rows, as a torch tensor of its own type."""
        return self.whole()[rows]

    def read(self) -> Any:
        """The tensor in fp32 for arithmetic (float64 if it is float64)."""
        return widened(self.load())


@dataclass(frozen=True)
class Blob:
    """What a checkpoint holds beside tensors: bytes that are moved and never opened."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytes:
        return _bytes(self.path, self.offset, self.length)


def is_dcp(directory: Path) -> bool:
    """Does a directory hold a distributed checkpoint, in either form?"""
    return (directory / METADATA).is_file() or any(SHARDING in read_comments(path) for path in directory.glob("shard-*.safetensors"))


def read_dcp(directory: Path, trust_pickle: bool = False) -> dict[str, Chunked | Blob]:
    """Name -> tensor or bytes, for all that a distributed checkpoint holds.

    Args:
        directory: of the checkpoint.
        trust_pickle: open `.metadata`, which is a pickle, with a reader that knows DCP's own classes and nothing else.
    """
    if not (directory / METADATA).is_file():
        return dict(_from_safetensors(sorted(directory.glob("shard-*.safetensors"))))
    if not trust_pickle:
        raise OutgrowError(
            f"'{directory / METADATA}' is a pickle, which is not opened unasked; use --trust-pickle to read it with a reader that "
            "admits DCP's own classes alone"
        )
    return dict(_from_pickle(directory))


def write_dcp(
    directory: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], make: Callable[[str], Any], blobs: Mapping[str, Blob]
) -> None:
    """Writes `.metadata` and `.distcp` files with one tensor in memory at a time. Under `torchrun` every rank makes and writes its share.

    Args:
        directory: that exists and holds no other.
        tensors: name -> (dtype as safetensors names it, shape), of every tensor.
        make: gives one of them as a torch tensor.
        blobs: name -> bytes, written as they are.
    """
    import torch
    from torch import distributed
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.checkpoint.storage import WriteResult

    class Planner(DefaultSavePlanner):
        """Makes a tensor when it is to be written."""

        def resolve_data(self, write_item: WriteItem) -> Any:
            name = write_item.index.fqn
            return io.BytesIO(blobs[name].read()) if write_item.type == WriteItemType.BYTE_IO else make(name)

    class Writer(FileSystemWriter):
        """Writes a tensor and lets go of it; torch's own holds them all until the file is closed."""

        def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
            results: list[WriteResult] = []
            name = f"{plan.storage_data.prefix}0.distcp"
            with (directory / name).open("wb") as file:
                for item in plan.items:
                    begin, data = file.tell(), planner.resolve_data(item)
                    if isinstance(data, io.BytesIO):
                        file.write(data.getbuffer())
                    else:
                        torch.save(data, file)
                    del data  # before the next is made
                    length = file.tell() - begin
                    results.append(WriteResult(item.index, length, _StorageInfo(name, begin, length)))
                file.flush()
                os.fsync(file.fileno())
            done = torch.futures.Future[list[WriteResult]]()
            done.set_result(results)
            return done

    many = distributed.is_initialized()
    share = slice(distributed.get_rank(), None, distributed.get_world_size()) if many else slice(None)
    state: dict[str, Any] = {
        name: torch.empty(shape, dtype=getattr(torch, TORCH_NAMES[dtype]), device="meta")
        for name, (dtype, shape) in itertools.islice(tensors.items(), share.start, None, share.step)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # says that there is one process
        try:
            save({**state, **blobs}, storage_writer=Writer(directory), planner=Planner(), no_dist=not many)
        except CheckpointException as error:  # it holds what went wrong on every rank
            first = next(iter(error.failures.values()))
            raise (first[0] if isinstance(first, tuple) else first) from None


def _from_safetensors(files: Iterable[Path]) -> Iterator[tuple[str, Chunked]]:
    parts: dict[str, list[tuple[tuple[int, ...], Stored]]] = {}
    for path in files:
        try:
            offsets = {name: tuple(map(index, one["saved_offsets"])) for name, one in json.loads(read_comments(path)[SHARDING]).items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise OutgrowError(f"the header of '{path}' does not say which part of each tensor it holds") from None
        for name, stored in stored_in(path).items():
            if len(at := offsets.get(name, ())) != len(stored.entry.shape):
                raise OutgrowError(f"the header of '{path}' places a part of '{name}' on {len(at)} axes of {len(stored.entry.shape)}")
            parts.setdefault(name, []).append((at, stored))
    for name, found in parts.items():
        dtype = found[0][1].entry.dtype
        shape = tuple(map(max, zip(*(_ends(at, stored.entry.shape) for at, stored in found), strict=True))) if found[0][0] else ()
        chunks = [Chunk(at, stored.entry.shape, stored.path, stored.load) for at, stored in found]
        yield name, _chunked(name, dtype, shape, chunks)


def _from_pickle(directory: Path) -> Iterator[tuple[str, Chunked | Blob]]:
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    path = directory / METADATA
    metadata = _unpickled(path)
    dtypes = {f"torch.{name}": stored for stored, name in TORCH_NAMES.items()}
    try:
        for name, kind in metadata.state_dict_metadata.items():
            if not isinstance(kind, TensorStorageMetadata):
                yield name, Blob(*_place(directory, metadata.storage_data[MetadataIndex(name)]))
                continue
            dtype = str(kind.properties.dtype)
            chunks = [
                _chunk(
                    directory, name, dtype, tuple(one.offsets), tuple(one.sizes), metadata.storage_data[MetadataIndex(name, one.offsets)]
                )
                for one in kind.chunks
            ]
            yield name, _chunked(name, dtypes[dtype], tuple(kind.size), chunks)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OutgrowError(f"'{path}' does not describe a distributed checkpoint: {type(error).__name__} {error}") from None


def _unpickled(path: Path) -> Any:
    """What DCP's metadata file holds, if it names nothing but DCP's own classes."""
    import torch

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if name in _PLAIN.get(module, ()):
                return super().find_class(module, name)
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            if module.startswith("pathlib") and name.endswith("Path"):
                return lambda *parts: "/".join(map(str, parts))
            raise OutgrowError(f"'{path}' names '{module}.{name}', which is none of DCP's own classes; it is not opened")

    try:
        with path.open("rb") as file:
            return Reader(file).load()
    except OutgrowError:
        raise
    except Exception as error:  # a malformed pickle raises what it likes
        raise OutgrowError(f"'{path}' cannot be read: {type(error).__name__} {error}") from None


def _place(directory: Path, info: Any) -> tuple[Path, int, int]:
    """Where something lies, within the files of this directory."""
    name, offset, length = info.relative_path, info.offset, info.length
    path = directory / str(name)
    if not isinstance(name, str) or Path(name).name != name or not path.is_file():
        raise OutgrowError(f"'{directory / METADATA}' names the file '{name}', which is not in its directory")
    if getattr(info, "transform_descriptors", None):
        raise OutgrowError(f"'{path}' was compressed when it was saved, which is not read; save it without extensions")
    size = path.stat().st_size
    if not (isinstance(offset, int) and isinstance(length, int) and 0 <= offset <= offset + length <= size):
        raise OutgrowError(f"'{directory / METADATA}' points beyond the {size:,} bytes of '{path.name}'")
    return path, offset, length


def _chunk(directory: Path, name: str, dtype: str, offsets: tuple[int, ...], shape: tuple[int, ...], info: Any) -> Chunk:
    path, offset, length = _place(directory, info)

    def load() -> Any:
        import torch

        try:
            tensor = torch.load(io.BytesIO(_bytes(path, offset, length)), map_location="cpu", weights_only=True)
        except Exception as error:  # a broken archive raises what it likes
            raise OutgrowError(f"the part of '{name}' in '{path}' cannot be read: {str(error).splitlines()[0][:200]}") from None
        if not isinstance(tensor, torch.Tensor) or (tuple(tensor.shape), str(tensor.dtype)) != (shape, dtype):
            raise OutgrowError(f"the part of '{name}' in '{path}' is not {dtype} {list(shape)}, as '{METADATA}' says")
        return tensor

    return Chunk(offsets, shape, path, load)


def _chunked(name: str, dtype: str, shape: tuple[int, ...], chunks: list[Chunk]) -> Chunked:
    """A tensor whose chunks fill it, each place once."""
    whole = math.prod(shape)
    inside = all(
        len(chunk.offsets) == len(chunk.shape) == len(shape)
        and all(0 <= at <= at + size <= end for at, size, end in zip(chunk.offsets, chunk.shape, shape, strict=True))
        for chunk in chunks
    )
    if not inside or sum(math.prod(chunk.shape) for chunk in chunks) != whole or _overlap(chunks):
        raise OutgrowError(f"the {len(chunks)} parts of '{name}' do not fill its shape {list(shape)} without overlapping")
    return Chunked(name, Entry(dtype, shape, 0, entry_bytes(dtype, shape)), tuple(chunks))


def _overlap(chunks: list[Chunk]) -> bool:
    """Do two boxes share a place? Sorted by their first axis, only neighbours that meet there are compared."""
    boxes = sorted((chunk for chunk in chunks if math.prod(chunk.shape)), key=lambda chunk: chunk.offsets)
    for number, one in enumerate(boxes):
        for other in itertools.islice(boxes, number + 1, None):
            if one.shape and other.offsets[0] >= one.offsets[0] + one.shape[0]:
                break
            if all(a < d and c < b for a, b, c, d in zip(one.offsets, _ends(one.offsets, one.shape), other.offsets,
                                                        _ends(other.offsets, other.shape), strict=True)):  # fmt: skip
                return True
    return False


def _ends(offsets: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(at + size for at, size in zip(offsets, shape, strict=True))


def _bytes(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)
