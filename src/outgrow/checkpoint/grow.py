"""From one checkpoint directory to another, as a plan says: headers first, copies as byte ranges."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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
from outgrow.checkpoint.safetensors_file import DTYPE_BYTES, Entry, write_header
from outgrow.errors import OutgrowError
from outgrow.files import new_directory, write_json
from outgrow.growth.apply import is_lifted, transport
from outgrow.growth.plan import Assignment, GrowthPlan

MAX_SHARD_BYTES = 5_000_000_000
_BLOCK = 1 << 23


@dataclass(frozen=True)
class Shard:
    """One output file, laid out before a byte is written: its name, its header, where each tensor goes."""

    name: str
    header: bytes
    entries: Mapping[str, Entry]

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(entry.bytes for entry in self.entries.values())


def grow_directory(
    source: Path,
    target: Path,
    plan: GrowthPlan,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the grown checkpoint; `target` appears whole or not at all, and `source` is only read.

    Args:
        source: a Hugging Face directory.
        target: a directory that does not exist yet.
        plan: made for the source's config.
        max_shard_bytes: largest bytes of tensors in one file.
        progress: told (bytes written, bytes in all) after each tensor.
    """
    checkpoint = open_checkpoint(source)
    if plan.source_config != checkpoint.config:
        raise OutgrowError(f"the plan was made for another config than that of '{source}'; make it from this one")
    assignments = {assignment.target.name: assignment for assignment in plan.assignments()}
    layout = _layout(checkpoint, plan, max_shard_bytes)
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
                    _write(file, checkpoint, plan, assignments[name], entry)
                    done += entry.bytes
                    progress(done, total)
        _write_side(temporary, checkpoint, plan, layout)


def _layout(checkpoint: Checkpoint, plan: GrowthPlan, largest: int) -> list[Shard]:
    """The output files. Within a file wider types come first, so that every tensor is aligned."""
    shapes = plan.arch.shapes(plan.target_config)
    dtypes = {a.target.name: checkpoint.tensors[a.source].entry.dtype for a in plan.assignments()}
    files = shards({name: (dtypes[name], shape) for name, shape in shapes.items()}, largest)
    laid_out: list[Shard] = []
    for number, tensors in enumerate(files):
        aligned = dict(sorted(tensors.items(), key=lambda item: -DTYPE_BYTES[item[1][0]]))
        laid_out.append(Shard(shard_name(number, len(files)), *write_header(aligned)))
    return laid_out


def _write(file: BinaryIO, checkpoint: Checkpoint, plan: GrowthPlan, assignment: Assignment, entry: Entry) -> None:
    stored = checkpoint.tensors[assignment.source]
    if is_lifted(assignment.target.spec, plan.lifts):
        file.write(_grown_bytes(stored, plan, assignment))
    else:
        _copy_range(stored, file)
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


def _grown_bytes(stored: Stored, plan: GrowthPlan, assignment: Assignment) -> bytes:
    """A tensor that needs arithmetic: computed in fp32 (float64 for float64), cast once to the source's dtype."""
    import torch
    from safetensors import safe_open

    with safe_open(stored.path, framework="pt") as file:
        tensor = file.get_tensor(assignment.source)
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    grown = transport(assignment.target.spec, wide, plan.lifts, plan.arch.sizes(plan.source_config))
    return grown.to(tensor.dtype).contiguous().view(torch.uint8).numpy().tobytes()


def _write_side(temporary: Path, checkpoint: Checkpoint, plan: GrowthPlan, layout: list[Shard]) -> None:
    """Config, index, tokenizer and the rest, and the receipt."""
    (temporary / CONFIG).write_text(json.dumps(plan.target_config, indent=2) + "\n", encoding="utf-8")
    if len(layout) > 1:
        weight_map = {name: shard.name for shard in layout for name in shard.entries}
        total = sum(entry.bytes for shard in layout for entry in shard.entries.values())
        (temporary / INDEX).write_text(index_text(weight_map, total), encoding="utf-8")
    for path in checkpoint.side_files():
        shutil.copyfile(path, temporary / path.name)
    before = read_lineage(checkpoint.directory)
    receipt = Lineage(before.tokens, before.flops, plan=plan.as_json(), parents=checkpoint.hashes(), parent=before.as_json())
    write_json(temporary / LINEAGE, receipt.as_json())


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
