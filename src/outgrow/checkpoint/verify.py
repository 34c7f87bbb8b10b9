"""Proves, a tensor at a time, that a grown checkpoint is what its stored plan makes of its source."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from outgrow.arch import FAMILIES
from outgrow.checkpoint.dcp import Blob, Chunked
from outgrow.checkpoint.grow import MAX_SHARD_BYTES, refuse_other_ties
from outgrow.checkpoint.grow_dcp import Distributed, distributed_layout
from outgrow.checkpoint.huggingface import Checkpoint, open_checkpoint
from outgrow.checkpoint.layout import Shard, bytes_of, moment_shards, raw, weight_shards
from outgrow.checkpoint.lineage import LINEAGE, read_lineage
from outgrow.checkpoint.optimizer_state import BEHIND_MASKS, CLOCK, stored_moments
from outgrow.checkpoint.safetensors_file import FLOATS, Stored
from outgrow.errors import OutgrowError
from outgrow.files import read_json
from outgrow.growth.apply import Policy
from outgrow.growth.plan import GrowthPlan


def verify(target: Path | Checkpoint, source: Path | Checkpoint) -> int:
    """Compares every byte of every tensor with what the plan makes anew; returns how many tensors were compared.

    Raises:
        OutgrowError: the first difference, named: a source that is another, a config, a tensor.
    """
    before = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    after = target if isinstance(target, Checkpoint) else open_checkpoint(target)
    receipt = read_lineage(after.directory)
    if receipt.plan is None:
        raise OutgrowError(f"'{after.directory}' has no plan in its '{LINEAGE}', so there is nothing to hold it against")
    plan = GrowthPlan.from_json(receipt.plan, (before.arch, after.arch, *FAMILIES))
    if plan.origin != before.config:
        raise OutgrowError(f"the config of '{before.directory}' is not the one that '{after.directory}' was grown from")
    if receipt.parents != before.hashes():
        raise OutgrowError(f"the weight files of '{before.directory}' are not those that '{after.directory}' was grown from: hashes differ")
    _same_config(after, plan)
    refuse_other_ties(after)
    dtype, policy = _dtype(after, before), cast("Policy", receipt.optimizer or "reset")
    if after.names:
        return _compare_distributed(distributed_layout(before, plan, after.names, policy, dtype), after.held)
    compared = 0
    for shard in weight_shards(before, plan, MAX_SHARD_BYTES, dtype):
        compared += _compare(shard, after.tensors)
    found = stored_moments(after.directory)
    if policy != "reset":
        if read_json(after.directory / CLOCK) != read_json(before.directory / CLOCK):
            raise OutgrowError(f"'{after.directory / CLOCK}' is not the source's")
        for shard in moment_shards(before, plan, policy):
            held = found.pop(shard.name.removesuffix(".safetensors"), {})
            if unknown := sorted(held.keys() - shard.entries.keys()):
                raise OutgrowError(f"'{unknown[0]}' in '{shard.name}' of '{after.directory}' is not made by the plan")
            compared += _compare(shard, held)
    others = (BEHIND_MASKS, CLOCK) if policy == "reset" else (BEHIND_MASKS,)
    if odd := [*sorted(found), *(name for name in others if (after.directory / name).exists())]:
        raise OutgrowError(f"'{odd[0]}' of '{after.directory}' is not made by the plan")
    return compared


def _dtype(after: Checkpoint, before: Checkpoint) -> str | None:
    """The one type that all weights were stored as, if growth was told one; None where each kept its own."""
    kinds = {stored.entry.dtype for stored in after.tensors.values()}
    own = {stored.entry.dtype for stored in before.tensors.values()}
    return kinds.pop() if len(kinds) == 1 and kinds != own and kinds <= set(FLOATS) else None


def _same_config(after: Checkpoint, plan: GrowthPlan) -> None:
    expected = json.loads(json.dumps(plan.target_config))
    for key in expected.keys() | after.config.keys():
        if key not in ("dtype", "torch_dtype") and expected.get(key) != after.config.get(key):
            raise OutgrowError(
                f"the config of '{after.directory}' says {key} = {after.config.get(key)!r}, and its plan {expected.get(key)!r}"
            )


def _compare_distributed(layout: Distributed, held: Mapping[str, Chunked | Blob]) -> int:
    for name in [*layout.kinds, *layout.blobs]:
        if name not in held:
            raise OutgrowError(f"'{name}' is missing, which the plan makes")
    if unknown := sorted(held.keys() - layout.kinds.keys() - layout.blobs.keys()):
        raise OutgrowError(f"'{unknown[0]}' is there, and neither the plan makes it nor the source holds it")
    for name, (dtype, shape) in layout.kinds.items():
        found = held[name]
        if isinstance(found, Blob) or (found.entry.dtype, found.entry.shape) != (dtype, shape):
            raise OutgrowError(f"'{name}' is not {dtype} {list(shape)} as the plan makes it")
        if bytes(raw(found.whole())) != bytes(raw(layout.make[name]())):
            raise OutgrowError(f"'{name}' of the target is not what the plan makes")
    for name, blob in layout.blobs.items():
        found = held[name]
        if not isinstance(found, Blob) or found.read() != blob.read():
            raise OutgrowError(f"'{name}' of the target is not what the source holds")
    return len(layout.kinds) + len(layout.blobs)


def _compare(shard: Shard, found: Mapping[str, Stored | Chunked]) -> int:
    for name, entry in shard.entries.items():
        stored = found.get(name)
        if not isinstance(stored, Stored) or (stored.entry.dtype, stored.entry.shape) != (entry.dtype, entry.shape):
            raise OutgrowError(f"'{name}' is missing, or is not {entry.dtype} {list(entry.shape)} as the plan makes it")
        if name in shard.copied:
            expected: Iterator[bytes] = shard.copied[name].blocks()
        else:
            expected = (bytes(bytes_of(shard.compute(name, rows), entry.dtype, name)) for rows in shard.grown.pieces(name))
        place = 0
        for block in expected:
            if block != _read(stored, place, len(block)):
                raise OutgrowError(f"'{name}' of the target is not what the plan makes: bytes differ after {place:,} of {entry.bytes:,}")
            place += len(block)
        if place != entry.bytes:
            raise OutgrowError(f"'{name}' of the target has {entry.bytes:,} bytes, and the plan makes {place:,} of them")
    return len(shard.entries)


def _read(stored: Stored, begin: int, count: int) -> bytes:
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.entry.begin + begin)
        return file.read(count)
