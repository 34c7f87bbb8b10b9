"""Which file every tensor of a grown checkpoint goes to, and where in it: settled before the first byte is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from outgrow.checkpoint.huggingface import Checkpoint, shard_name, shards
from outgrow.checkpoint.optimizer_state import CLOCK, MOMENTS, grown_names, moment_file, stored_moments
from outgrow.checkpoint.safetensors_file import DTYPE_BYTES, FLOATS, Entry, Stored, widened, write_header
from outgrow.errors import OutgrowError
from outgrow.growth.apply import Grown, Policy
from outgrow.growth.plan import GrowthPlan
from outgrow.spaces import Rows

_KEPT = 2  # tensors in memory that lie in chunks: AKI makes one of two, some rows after others


@dataclass(frozen=True)
class Shard:
    """One output file, laid out before a byte is written.

    Attributes:
        name: of the file.
        header: its first bytes.
        entries: tensor name -> its type, shape and place in the file.
        copied: tensor name -> the stored tensor whose bytes it is, for those that are pure copies.
        grown: says in which pieces any other tensor is made.
        compute: (name, rows) -> those rows of it, as a torch tensor.
    """

    name: str
    header: bytes
    entries: Mapping[str, Entry]
    copied: Mapping[str, Stored]
    grown: Grown
    compute: Callable[[str, slice], Any]

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(entry.bytes for entry in self.entries.values())


def weight_shards(checkpoint: Checkpoint, plan: GrowthPlan, largest: int, dtype: str | None = None) -> list[Shard]:
    """The weight files. Within a file wider types come first, so that every tensor is aligned.

    Args:
        checkpoint: the source.
        plan: made for its config.
        largest: bytes of tensors in one file, at most.
        dtype: one of `FLOATS` for all tensors; each keeps its own if None.
    """
    grown = Grown(plan, reader(checkpoint.tensors))
    shapes = plan.grown_arch.shapes(plan.target_config)
    own = {name: checkpoint.tensors[grown.reference(name)].entry.dtype for name in grown.tensors}
    copied: dict[str, Stored] = {}
    for name in grown.tensors:
        source = grown.copied_from(name)
        stored = checkpoint.tensors[source] if source is not None and dtype in (None, own[name]) else None
        if stored and stored.entry.shape != shapes[name]:
            raise OutgrowError(f"'{name}' is {list(shapes[name])}, and '{source}', of which the plan makes it, {list(stored.entry.shape)}")
        if isinstance(stored, Stored):
            copied[name] = stored
        elif own[name] not in FLOATS:
            raise OutgrowError(f"'{name}' is stored as {own[name]}, in which growth cannot compute; save the model in bf16 first")

    files = shards({name: (dtype or own[name], shape) for name, shape in shapes.items()}, largest)
    laid_out: list[Shard] = []
    for number, tensors in enumerate(files):
        aligned = dict(sorted(tensors.items(), key=lambda item: -DTYPE_BYTES[item[1][0]]))
        header, entries = write_header(aligned)
        here = {name: copied[name] for name in entries if name in copied}
        laid_out.append(Shard(shard_name(number, len(files)), header, entries, here, grown, grown.weight))
    return laid_out


def moment_shards(checkpoint: Checkpoint, plan: GrowthPlan, policy: Policy) -> list[Shard]:
    """The files of the optimizer's state."""
    found = stored_moments(checkpoint.directory)
    if checkpoint.held:
        raise OutgrowError(
            f"the optimizer's state in '{checkpoint.directory}' goes into another distributed checkpoint, and not into a Hugging Face "
            "directory, whose clock it does not know; use --form dcp, or --optimizer reset"
        )
    if not found or not (checkpoint.directory / CLOCK).exists():
        raise OutgrowError(f"'{checkpoint.directory}' carries no optimizer state to {policy}; use --optimizer reset")
    shapes = plan.grown_arch.shapes(plan.target_config)
    files: list[Shard] = []
    for moment, stored in found.items():
        _same_shapes(checkpoint, stored)
        grown = Grown(plan, reader(stored))
        tensors = {name: (stored[grown.reference(name)].entry.dtype, shapes[name]) for name in grown_names(grown, stored)}

        def compute(name: str, rows: slice, grown: Grown = grown, moment: str = moment) -> Any:
            return grown.state(name, MOMENTS[moment], policy, rows)

        files.append(Shard(moment_file(Path(), moment).name, *write_header(tensors), {}, grown, compute))
    return files


def reader(tensors: Mapping[str, Any]) -> Callable[[str, Rows], Any]:
    """Reads rows of stored tensors for arithmetic. One that lies in chunks is loaded whole, and kept until two others are."""
    kept: dict[str, Any] = {}
    lock = Lock()

    def read(name: str, rows: Rows) -> Any:
        if isinstance(tensors[name], Stored):
            return tensors[name].read(rows)
        with lock:
            if name not in kept and len(kept) == _KEPT:
                del kept[next(iter(kept))]  # before another is loaded
            whole = kept.pop(name) if name in kept else tensors[name].whole()
            kept[name] = whole  # the last that was used
        return widened(whole[rows])

    return read


def bytes_of(tensor: Any, dtype: str, name: str) -> Any:
    """A computed torch tensor, cast once to the type it is stored as, as a buffer; refuses one that does not fit that type."""
    return raw(stored_as(tensor, dtype, name))


def stored_as(tensor: Any, dtype: str, name: str) -> Any:
    """A computed torch tensor, cast once to the type it is stored as; refuses one that does not fit that type."""
    import torch

    cast = tensor.to(getattr(torch, FLOATS[dtype]))
    # The least and the largest cost a fraction of a look at each number.
    if cast.dtype != tensor.dtype and not all(map(torch.isfinite, cast.aminmax())) and bool((cast.isinf() & tensor.isfinite()).any()):
        wider = "bfloat16 or float32" if dtype == "F16" else "float64"
        raise OutgrowError(f"'{name}' holds numbers that {FLOATS[dtype]} cannot; store it as {wider} with --dtype")
    return cast


def assembled(parts: Iterable[Any], dtype: str, shape: tuple[int, ...], name: str) -> Any:
    """Computed rows, one after another, as the torch tensor that is stored."""
    import torch

    whole = torch.empty(shape, dtype=getattr(torch, FLOATS[dtype]))
    begin = 0
    for part in parts:
        whole[begin : begin + len(part)] = stored_as(part, dtype, name)
        begin += len(part)
    return whole


def raw(tensor: Any) -> Any:
    """The bytes of a torch tensor, as a buffer."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _same_shapes(checkpoint: Checkpoint, stored: Mapping[str, Stored]) -> None:
    for name, one in stored.items():
        weight = checkpoint.tensors.get(name)
        if weight and weight.entry.shape != one.entry.shape:
            shapes = f"has shape {list(one.entry.shape)}, and the weight has {list(weight.entry.shape)}"
            raise OutgrowError(f"'{name}' in '{one.path}' {shapes}; use --optimizer reset")
        if one.entry.dtype not in FLOATS:
            raise OutgrowError(f"'{name}' in '{one.path}' is {one.entry.dtype}, and moments that grow are floats; use --optimizer reset")
