"""Many ranks: a model sharded by FSDP2, loaded and saved a shard at a time, and grown in depth where it lies.

A checkpoint is one set of safetensors files whatever the number of ranks: the header settles where every tensor lies, and each rank
reads and writes its own rows. So the layout does not depend on the ranks, any number of them resumes what any other saved, and `grow` and
`transformers` read it as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from outgrow.checkpoint.dcp import Chunked
from outgrow.checkpoint.layout import raw
from outgrow.checkpoint.ranks import leads, local_rank, rank, world
from outgrow.checkpoint.safetensors_file import TORCH_NAMES, Stored, write_header
from outgrow.files import write_at

_DTYPES = {getattr(torch, name): stored for stored, name in TORCH_NAMES.items()}


def device() -> torch.device:
    """Where this rank computes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())  # SLURM may show each process one


def product_dtype(precision: str) -> torch.dtype:
    """The type in which products are computed: fp32 for `bf16` too on a CPU without bf16 arithmetic, where that is 80 times faster."""
    known = torch.cpu.get_capabilities()
    native = known.get("avx512_bw") or any(has for name, has in known.items() if "bf16" in name)
    return torch.bfloat16 if precision == "bf16" and (device().type == "cuda" or native) else torch.float32


def shard(model: Any, blocks: Iterable[Any], gather: torch.dtype | None = None) -> None:
    """Shards a transformers model over all ranks, each block by itself; gradients are averaged in fp32.

    Args:
        model: of transformers.
        blocks: its blocks.
        gather: type in which parameters are sent and used; as they are stored if None.
    """
    mesh = init_device_mesh(device().type, (world(),))
    # The residual stream goes from block to block as it is, in fp32: the decoder casts what it multiplies.
    policy = MixedPrecisionPolicy(param_dtype=gather, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def local(value: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return value.to_local() if isinstance(value, DTensor) else value


def held_rows(value: Tensor) -> slice:
    """The rows of a tensor that this rank holds."""
    if not isinstance(value, DTensor):
        return slice(0, value.shape[0] if value.dim() else 1)
    shape, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return slice(offset[0], offset[0] + shape[0])


@torch.no_grad()
def fill(values: Mapping[str, Tensor], read: Callable[[str, slice], Tensor]) -> None:
    """Sets every tensor to what `read` gives of its name and of the rows that this rank holds."""
    for name, value in values.items():
        rows = held_rows(value)
        if rows.start < rows.stop:
            local(value).copy_(read(name, rows))


def like_parameter(value: Tensor, own: Tensor | None = None) -> Tensor:
    """A tensor that lies over the ranks as a parameter does, empty, or with this rank's part given."""
    made = torch.empty_like(value, requires_grad=False)
    if own is not None:
        local(made).copy_(own)
    return made


def from_files(stored: Mapping[str, Stored | Chunked]) -> Callable[[str, slice], Tensor]:
    """Reads rows of what lies on disk."""
    return lambda name, rows: stored[name].load(rows)


@dataclass(frozen=True)
class Part:
    """This rank's rows of a tensor, copied to memory.

    Attributes:
        shape: of the whole tensor.
        first: the first of the rows.
        own: the rows; none where another rank writes them.
    """

    shape: tuple[int, ...]
    first: int
    own: Tensor


def snapshot(values: Mapping[str, Tensor]) -> dict[str, Part]:
    """Copies of this rank's parts, so that training can go on while they are written."""
    return {name: _part(value.detach()) for name, value in values.items()}


def _part(value: Tensor) -> Part:
    own = local(value)
    writes = leads() or isinstance(value, DTensor)
    return Part(tuple(value.shape), held_rows(value).start, own.to("cpu", copy=True) if writes else own.new_empty(0))


def write_tensors(path: Path, values: Mapping[str, Part], group: Any = None) -> None:
    """Writes a safetensors file, each rank its own rows; every rank calls this with the same names, from `snapshot`."""
    header, entries = write_header({name: (_DTYPES[part.own.dtype], part.shape) for name, part in values.items()})
    if leads():
        with path.open("xb") as file:
            file.write(header)
            file.truncate(max((entry.end for entry in entries.values()), default=len(header)))
    wait(group)
    file = os.open(path, os.O_WRONLY)
    try:
        for name, part in values.items():
            data = memoryview(raw(part.own)).cast("B") if part.own.numel() else memoryview(b"")
            write_at(file, data, entries[name].begin + (part.first * (entries[name].bytes // part.shape[0]) if part.first else 0))
        os.fsync(file)
    finally:
        os.close(file)
    wait(group)


def wait(group: Any = None) -> None:
    """Until every rank is here."""
    if world() > 1:
        distributed.barrier(group)


def mean_and_any(value: float, flag: bool) -> tuple[float, bool]:
    """The mean of a number over the ranks, and whether any of them raises its flag."""
    if world() == 1:
        return value, flag
    both = torch.tensor([value / world(), float(flag)], dtype=torch.float64)
    distributed.all_reduce(both)
    return float(both[0]), bool(both[1])


def own_rows(count: int) -> slice:
    """Which sequences of a batch this rank computes."""
    return slice(rank() * count // world(), (rank() + 1) * count // world())
