"""From one checkpoint directory to another, as a plan says: headers first, copies as byte ranges."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from outgrow.arch import FAMILIES, Arch
from outgrow.checkpoint.huggingface import (
    CONFIG,
    INDEX,
    Checkpoint,
    Stored,
    index_text,
    open_checkpoint,
    shard_name,
    shards,
)
from outgrow.checkpoint.lineage import LINEAGE, Lineage, read_lineage
from outgrow.checkpoint.optimizer_state import CLOCK, MOMENTS, grown_names, moment_file, stored_moments
from outgrow.checkpoint.safetensors_file import DTYPE_BYTES, Entry, write_header
from outgrow.errors import OutgrowError
from outgrow.files import new_directory, write_json
from outgrow.growth.apply import Grown, Policy
from outgrow.growth.plan import GrowthPlan

MAX_SHARD_BYTES = 5_000_000_000
_BLOCK = 1 << 23
_ARITHMETIC = {"F64", "F32", "F16", "BF16"}
Measure = Callable[[Path, Path, GrowthPlan], dict[str, Any]]


@dataclass(frozen=True)
class Shard:
    """One output file, laid out before a byte is written: its name, its header, where each tensor goes, and what makes it.

    Attributes:
        make: name -> the stored tensor to copy, or the grown one as a torch tensor.
    """

    name: str
    header: bytes
    entries: Mapping[str, Entry]
    make: Callable[[str], Any]

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(entry.bytes for entry in self.entries.values())


def grow_directory(
    source: Path,
    target: Path,
    plan: GrowthPlan,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    optimizer: Policy = "reset",
    progress: Callable[[int, int], None] = lambda done, total: None,
    measure: Measure | None = None,
    families: Iterable[Arch] = FAMILIES,
) -> None:
    """Writes the grown checkpoint; `target` appears whole or not at all, and `source` is only read.

    Args:
        source: a Hugging Face directory.
        target: a directory that does not exist yet.
        plan: made for the source's config.
        max_shard_bytes: largest bytes of tensors in one file.
        optimizer: what becomes of the optimizer's state beside the source's weights.
        progress: told (bytes written, bytes in all) after each tensor.
        measure: what to measure on (source, grown directory, plan) before the receipt is written into it.
        families: the architectures that may be read.
    """
    checkpoint = open_checkpoint(source, families)
    if plan.origin != checkpoint.config:
        raise OutgrowError(f"the plan was made for another config than that of '{source}'; make it from this one")
    layout = _weights(checkpoint, plan, max_shard_bytes)
    weights = list(layout)
    if optimizer != "reset":
        layout += _moments(source, plan, optimizer)
    total = sum(shard.bytes for shard in layout)
    if target.exists():
        raise OutgrowError(f"'{target}' exists already; remove it or choose another place")
    _enough_room(target, total)
    with new_directory(target) as temporary:
        done = 0
        for shard in layout:
            with (temporary / shard.name).open("wb") as file:
                file.write(shard.header)
                for name, entry in shard.entries.items():
                    _write(file, shard.make(name), entry)
                    done += entry.bytes
                    progress(done, total)
        if optimizer != "reset":
            shutil.copyfile(source / CLOCK, temporary / CLOCK)
        _write_side(temporary, checkpoint, plan, weights)
        measured = measure(source, temporary, plan) if measure else None
        write_json(temporary / LINEAGE, _receipt(checkpoint, plan, optimizer, measured).as_json())


def _weights(checkpoint: Checkpoint, plan: GrowthPlan, largest: int) -> list[Shard]:
    """The weight files. Within a file wider types come first, so that every tensor is aligned."""
    grown = Grown(plan, lambda name: checkpoint.tensors[name].read())
    shapes = plan.grown_arch.shapes(plan.target_config)
    dtypes = {name: checkpoint.tensors[grown.reference(name)].entry.dtype for name in grown.tensors}
    for name, dtype in dtypes.items():
        if dtype not in _ARITHMETIC and grown.copied_from(name) is None:
            raise OutgrowError(f"'{name}' is stored as {dtype}, in which growth cannot compute; save the model in bf16 first")

    def make(name: str) -> Any:
        source = grown.copied_from(name)
        return checkpoint.tensors[source] if source else grown.weight(name)

    files = shards({name: (dtypes[name], shape) for name, shape in shapes.items()}, largest)
    laid_out: list[Shard] = []
    for number, tensors in enumerate(files):
        aligned = dict(sorted(tensors.items(), key=lambda item: -DTYPE_BYTES[item[1][0]]))
        laid_out.append(Shard(shard_name(number, len(files)), *write_header(aligned), make))
    return laid_out


def _moments(source: Path, plan: GrowthPlan, policy: Policy) -> list[Shard]:
    """The files of the optimizer's state."""
    found = stored_moments(source)
    if not found or not (source / CLOCK).exists():
        raise OutgrowError(f"'{source}' carries no optimizer state to {policy}; use --optimizer reset")
    shapes = plan.grown_arch.shapes(plan.target_config)
    files: list[Shard] = []
    weights = open_checkpoint(source).tensors
    for moment, stored in found.items():
        for name, one in stored.items():
            if name in weights and weights[name].entry.shape != one.entry.shape:
                shapes_differ = f"has shape {list(one.entry.shape)}, and the weight has {list(weights[name].entry.shape)}"
                raise OutgrowError(f"'{name}' in '{one.path}' {shapes_differ}; use --optimizer reset")
        grown = Grown(plan, lambda name, stored=stored: stored[name].read())
        names = grown_names(grown, stored)
        tensors = {name: (stored[grown.reference(name)].entry.dtype, shapes[name]) for name in names}

        def make(name: str, grown: Grown = grown, moment: str = moment) -> Any:
            return grown.state(name, MOMENTS[moment], policy)

        files.append(Shard(moment_file(source, moment).name, *write_header(tensors), make))
    return files


def _write(file: BinaryIO, made: Any, entry: Entry) -> None:
    if isinstance(made, Stored):
        _copy_range(made, file)
    else:
        file.write(_bytes_of(made, entry.dtype))
    assert file.tell() == entry.end


def _copy_range(stored: Stored, file: BinaryIO) -> None:
    """Appends a tensor's bytes; they are never decoded."""
    with stored.path.open("rb", buffering=0) as source:
        source.seek(stored.entry.begin)
        left = stored.entry.bytes
        while left:
            block = source.read(min(left, _BLOCK))
            if not block:
                raise OutgrowError(f"'{stored.path}' became shorter while it was read")
            file.write(block)
            left -= len(block)


def _bytes_of(tensor: Any, dtype: str) -> bytes:
    """A computed torch tensor, cast once to the type it is stored as."""
    import torch

    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return tensor.to(kinds[dtype]).contiguous().view(torch.uint8).numpy().tobytes()


def _write_side(temporary: Path, checkpoint: Checkpoint, plan: GrowthPlan, weights: list[Shard]) -> None:
    """Config, index, tokenizer and the rest."""
    (temporary / CONFIG).write_text(json.dumps(plan.target_config, indent=2) + "\n", encoding="utf-8")
    if len(weights) > 1:
        weight_map = {name: shard.name for shard in weights for name in shard.entries}
        total = sum(entry.bytes for shard in weights for entry in shard.entries.values())
        (temporary / INDEX).write_text(index_text(weight_map, total), encoding="utf-8")
    for path in checkpoint.side_files():
        shutil.copyfile(path, temporary / path.name)


def _receipt(checkpoint: Checkpoint, plan: GrowthPlan, optimizer: Policy, measured: dict[str, Any] | None) -> Lineage:
    """What `outgrow.json` of the grown directory says."""
    before = read_lineage(checkpoint.directory)
    spent = sum(stage.flops for stage in plan.stages)
    fresh = [tensor.name for tensor in plan.grown_arch.tensors(plan.target_config) if plan.is_fresh(tensor)]
    return Lineage(
        before.tokens,
        before.flops + spent,
        plan=plan.as_json(),
        optimizer=optimizer,
        measured=measured,
        trains=fresh if plan.trains_only_fresh else None,
        parents=checkpoint.hashes(),
        parent=before.as_json(),
    )


def _enough_room(target: Path, needed: int) -> None:
    """Refuses to begin what cannot be finished."""
    place = target.absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutgrowError(f"'{target}' needs {needed:,} bytes, and its disk has {free:,} free; make room or choose another place")
    if not os.access(place, os.W_OK):
        raise OutgrowError(f"'{place}' cannot be written to; choose another place for '{target.name}'")
