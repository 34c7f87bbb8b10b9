"""Proves, a tensor at a time, that a grown checkpoint is what its stored plan makes of its source."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from outgrow.arch import FAMILIES, Arch
from outgrow.checkpoint.grow import MAX_SHARD_BYTES
from outgrow.checkpoint.huggingface import Checkpoint, Stored, open_checkpoint
from outgrow.checkpoint.layout import FLOATS, Shard, bytes_of, moment_shards, weight_shards
from outgrow.checkpoint.lineage import LINEAGE, read_lineage
from outgrow.checkpoint.optimizer_state import stored_moments
from outgrow.errors import OutgrowError
from outgrow.growth.plan import GrowthPlan

_BLOCK = 1 << 22


def verify(target: Path, source: Path, families: Iterable[Arch] = FAMILIES) -> int:
    """Compares every byte of every tensor with what the plan makes anew; returns how many tensors were compared.

    Raises:
        OutgrowError: the first difference, named: a source that is another, a config, a tensor.
    """
    families = tuple(families)
    before, after = open_checkpoint(source, families), open_checkpoint(target, families)
    receipt = read_lineage(target)
    if receipt.plan is None:
        raise OutgrowError(f"'{target}' has no plan in its '{LINEAGE}', so there is nothing to hold it against")
    plan = GrowthPlan.read(receipt.plan, before.arch)
    if plan.origin != before.config:
        raise OutgrowError(f"the config of '{source}' is not the one that '{target}' was grown from")
    if receipt.parents != before.hashes():
        raise OutgrowError(f"the weight files of '{source}' are not those that '{target}' was grown from: their hashes differ")
    _same_config(after, plan)
    compared = 0
    for shard in weight_shards(before, plan, MAX_SHARD_BYTES, _dtype(after, before, plan)):
        compared += _compare(shard, after.tensors)
    if receipt.optimizer in ("carry", "fresh-new"):
        found = stored_moments(target)
        for shard in moment_shards(before, plan, receipt.optimizer):
            compared += _compare(shard, found.get(shard.name.removesuffix(".safetensors"), {}))
    return compared


def _dtype(after: Checkpoint, before: Checkpoint, plan: GrowthPlan) -> str | None:
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


def _compare(shard: Shard, found: dict[str, Stored] | object) -> int:
    assert isinstance(found, dict)
    for name, entry in shard.entries.items():
        stored = found.get(name)
        if stored is None or (stored.entry.dtype, stored.entry.shape) != (entry.dtype, entry.shape):
            raise OutgrowError(f"'{name}' is missing, or is not {entry.dtype} {list(entry.shape)} as the plan makes it")
        if name in shard.copied:
            expected: Iterator[bytes] = _blocks(shard.copied[name])
        else:
            expected = (bytes(bytes_of(rows, entry.dtype)) for rows in shard.compute(name))
        place = 0
        for block in expected:
            if block != _read(stored, place, len(block)):
                raise OutgrowError(f"'{name}' of the target is not what the plan makes: bytes differ after {place:,} of {entry.bytes:,}")
            place += len(block)
    return len(shard.entries)


def _blocks(stored: Stored) -> Iterator[bytes]:
    for begin in range(0, stored.entry.bytes, _BLOCK):
        yield _read(stored, begin, min(_BLOCK, stored.entry.bytes - begin))


def _read(stored: Stored, begin: int, count: int) -> bytes:
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.entry.begin + begin)
        return file.read(count)
