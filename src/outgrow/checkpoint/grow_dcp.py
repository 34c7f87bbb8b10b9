"""A grown checkpoint in DCP's form: made a tensor at a time, by as many ranks as `torchrun` starts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from outgrow.checkpoint.dcp import Blob, Chunked, write_dcp
from outgrow.checkpoint.huggingface import Checkpoint
from outgrow.checkpoint.layout import assembled, reader, stored_as
from outgrow.checkpoint.names import Names
from outgrow.checkpoint.optimizer_state import MOMENTS, stored_moments
from outgrow.checkpoint.safetensors_file import FLOATS, entry_bytes
from outgrow.errors import OutgrowError
from outgrow.growth.apply import Grown, Policy
from outgrow.growth.plan import GrowthPlan

_LIST = re.compile(r"param_groups\.\d+\.params$")


@dataclass
class Distributed:
    """What a grown distributed checkpoint will hold, settled before the first byte.

    Attributes:
        kinds: name -> (dtype as safetensors names it, shape) of every tensor.
        make: name -> what makes it.
        blobs: name -> bytes that are moved as they are.
    """

    kinds: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict[str, "tuple[str, tuple[int, ...]]"])
    make: dict[str, Callable[[], Any]] = field(default_factory=dict[str, "Callable[[], Any]"])
    blobs: dict[str, Blob] = field(default_factory=dict[str, Blob])

    @property
    def bytes(self) -> int:
        return sum(entry_bytes(*kind) for kind in self.kinds.values()) + sum(blob.length for blob in self.blobs.values())

    def add(self, name: str, one: Chunked | Blob) -> None:
        """Something that stays as it is."""
        if isinstance(one, Blob):
            self.blobs[name] = one
        else:
            self.kinds[name] = one.entry.dtype, one.entry.shape
            self.make[name] = one.whole

    def write(self, directory: Path) -> None:
        """Writes it."""
        write_dcp(directory, self.kinds, lambda name: self.make[name](), self.blobs)


def distributed_layout(checkpoint: Checkpoint, plan: GrowthPlan, names: Names, policy: Policy, dtype: str | None = None) -> Distributed:
    """Weights under `names`, and with them, unless they are reset, the optimizer's state and whatever else the source holds."""
    found = Distributed()
    shapes = plan.grown_arch.shapes(plan.target_config)
    grown = Grown(plan, reader(checkpoint.tensors))
    for name, shape in shapes.items():
        own = checkpoint.tensors[grown.reference(name)].entry.dtype
        if own not in FLOATS:
            raise OutgrowError(f"'{name}' is stored as {own}, in which growth cannot compute; save the model in bf16 first")
        found.kinds[names.on_disk(name)] = dtype or own, shape
        found.make[names.on_disk(name)] = _weight(checkpoint, grown, name, names.rows_to(name), dtype or own)
    # torch's state_dict names both of what is tied, and its reader wants all that a model names.
    for alias, name in plan.grown_arch.aliases(plan.target_config).items():
        found.kinds[names.on_disk(alias)] = found.kinds[names.on_disk(name)]
        found.make[names.on_disk(alias)] = found.make[names.on_disk(name)]
    if policy != "reset":
        _add_state(found, checkpoint, plan, names, policy)
    return found


def _add_state(found: Distributed, checkpoint: Checkpoint, plan: GrowthPlan, names: Names, policy: Policy) -> None:
    """The optimizer's state and settings, which stand under the names of parameters, and all else as it is."""
    old = checkpoint.names or names
    # Under {"model": ..., "optimizer": ...} the model's names have a prefix, and those inside the optimizer have none.
    ways = old, replace(old, prefix="")
    of_parameters, old_inside = next(
        ((inner, way) for way in ways if (inner := way.per_parameter(checkpoint.held, checkpoint.tensors))), ({}, old)
    )
    inside = names if old_inside is old else replace(names, prefix="")
    if len(lists := [key for key in checkpoint.held if _LIST.search(key)]) > 1:
        raise OutgrowError(
            f"'{lists[0]}' and {len(lists) - 1} more are lists of parameters, in which new layers have no place; save the optimizer with "
            "StateDictOptions(flatten_optimizer_state_dict=True), or use --optimizer reset"
        )
    if not any(field in MOMENTS for fields in of_parameters.values() for _, field in fields):
        if stored_moments(checkpoint.directory):
            raise OutgrowError(
                f"the optimizer's state in '{checkpoint.directory}' goes into a Hugging Face directory, and not into a distributed "
                "checkpoint, which would need its settings too; use --optimizer reset, or leave --form out"
            )
        raise OutgrowError(f"'{checkpoint.directory}' carries no optimizer state to {policy}; use --optimizer reset")
    shapes = plan.grown_arch.shapes(plan.target_config)
    for before, moment in sorted({key for fields in of_parameters.values() for key in fields}):
        stored = {name: fields[before, moment] for name, fields in of_parameters.items() if (before, moment) in fields}
        grown = Grown(plan, reader(stored))
        for name in grown.tensors:
            one = stored.get(grown.reference(name))
            key = f"{before}{inside.on_disk(name)}.{moment}"
            if one is not None and (moment not in MOMENTS or isinstance(one, Blob)):
                _refuse_entries(key, one)
                found.add(key, one)
            elif one is not None:
                found.kinds[key] = one.entry.dtype, shapes[name]  # type: ignore[union-attr]
                found.make[key] = _moment(grown, name, moment, policy, names.rows_to(name), one.entry.dtype)  # type: ignore[union-attr]
    bare = replace(old, prefix="")
    taken = {old.on_disk(name) for name in (*checkpoint.tensors, *plan.arch.aliases(plan.origin))}
    taken |= {f"{key[0]}{old_inside.on_disk(name)}.{key[1]}" for name, fields in of_parameters.items() for key in fields}
    for key in checkpoint.held.keys() - taken:
        if any(key.endswith(f".{bare.on_disk(name)}") for name in plan.arch.top):  # an average of all weights, say
            _refuse_entries(key, checkpoint.held[key])
        found.add(key, checkpoint.held[key])


def _refuse_entries(key: str, one: Chunked | Blob) -> None:
    """What has an entry for every entry of a parameter would keep its old shape, unless a law says how it grows."""
    if isinstance(one, Chunked) and math.prod(one.entry.shape) > 1:
        raise OutgrowError(
            f"no law says how '{key}' {list(one.entry.shape)} grows; of an optimizer's state {', '.join(MOMENTS)} do, so use --optimizer "
            "reset, or leave it out of the checkpoint"
        )


def _weight(checkpoint: Checkpoint, grown: Grown, name: str, turned: Callable[[Any], Any], dtype: str) -> Callable[[], Any]:
    def make() -> Any:
        source = grown.copied_from(name)
        if source is not None:
            return stored_as(turned(checkpoint.tensors[source].load()), dtype, name).contiguous()
        parts = (grown.weight(name, rows) for rows in grown.pieces(name))
        return turned(assembled(parts, dtype, grown.shape(name), name)).contiguous()

    return make


def _moment(grown: Grown, name: str, moment: str, policy: Policy, turned: Callable[[Any], Any], dtype: str) -> Callable[[], Any]:
    def make() -> Any:
        parts = (grown.state(name, MOMENTS[moment], policy, rows) for rows in grown.pieces(name))
        return turned(assembled(parts, dtype, grown.shape(name), name)).contiguous()

    return make
