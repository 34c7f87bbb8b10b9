"""The Python API: growing from directory to directory, and growing arrays in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from outgrow.arch import FAMILIES, Arch, Config, arch_for
from outgrow.checkpoint.grow import MAX_SHARD_BYTES, Form, Measure, grow_directory
from outgrow.checkpoint.hub import local
from outgrow.checkpoint.huggingface import open_checkpoint
from outgrow.checkpoint.verify import verify as verified
from outgrow.errors import OutgrowError
from outgrow.growth.apply import Grown, Policy, rows_of
from outgrow.growth.apply import grow as grow_arrays
from outgrow.growth.operators import OPERATORS, Operator, make_plan
from outgrow.growth.plan import GrowthPlan


def plan(
    config: Config,
    operator: str = "stack",
    knobs: Mapping[str, Any] | None = None,
    *,
    operators: Mapping[str, Operator] = OPERATORS,
    families: Iterable[Arch] = FAMILIES,
) -> GrowthPlan:
    """The growth plan of an operator for a model's config.json.

    Args:
        config: the config, as a mapping; `model.config.to_dict()` is one.
        operator: a name, or several with their knobs: `"stack(factor=2), direct-width(hidden=2048)"`.
        knobs: those of a single operator that is named without any.
        operators, families: what is known, your own among it.

    Raises:
        OutgrowError: a knob, a size or a layer list that the operator or the family does not admit.
    """
    return make_plan(operator, arch_for(config, families), config, knobs, operators)


def grow(
    source: str | Path,
    target: str | Path,
    operator: str | GrowthPlan = "stack",
    knobs: Mapping[str, Any] | None = None,
    *,
    optimizer: Policy = "reset",
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    form: Form = "huggingface",
    trust_pickle: bool = False,
    config: str | Path | None = None,
    measure: Measure | None = None,
    operators: Mapping[str, Operator] = OPERATORS,
    families: Iterable[Arch] = FAMILIES,
) -> GrowthPlan:
    """Grows a checkpoint from one directory to another at disk speed, in bounded memory; returns the plan.

    Args:
        source: a Hugging Face directory, a safetensors file with its config.json beside it, a distributed checkpoint (DCP) or a
            hub id. Only read.
        target: the directory to write; it appears whole or not at all.
        operator, knobs: as for `plan`, or a plan.
        optimizer: what becomes of optimizer state beside the weights: `reset` leaves it behind, `carry` moves it as gradients move,
            `fresh-new` gives it to what was there before and not to copies.
        dtype: torch's name of a float type for all weights; each keeps its own if None.
        max_shard_bytes: largest bytes of tensors in one file.
        overwrite: replace a checkpoint that stands at `target`.
        form: `dcp` or `torchtitan` writes a distributed checkpoint instead, with every rank of a process group calling this.
        trust_pickle: open the metadata of a distributed checkpoint, a pickle, with a reader that admits DCP's own classes alone.
        config: the config.json of a source that has none beside it.
        measure: such as `outgrow.models.measure.measured`, which puts the logit difference into the receipt; nothing is measured if None.
        operators, families: what is known, your own among it.

    Raises:
        OutgrowError: one sentence that names the thing and the way out; nothing is left at `target`.
    """
    found = open_checkpoint(local(str(source)), families, trust_pickle, Path(config) if config else None)
    made = operator if isinstance(operator, GrowthPlan) else make_plan(operator, found.arch, found.config, knobs, operators)
    made.refuse_untrained()
    grow_directory(found, Path(target), made, max_shard_bytes, optimizer, dtype, overwrite, form, measure=measure)
    return made


def verify(
    target: str | Path,
    source: str | Path,
    *,
    trust_pickle: bool = False,
    config: str | Path | None = None,
    families: Iterable[Arch] = FAMILIES,
) -> int:
    """Proves that every byte of a grown checkpoint is what its stored plan makes of its source; returns how many tensors were compared.

    Args:
        target: a directory that `grow` wrote.
        source, trust_pickle, config, families: as for `grow`.

    Raises:
        OutgrowError: the first difference, named: a source that is another, a config, a tensor.
    """
    families = tuple(families)
    before = open_checkpoint(local(str(source)), families, trust_pickle, Path(config) if config else None)
    return verified(open_checkpoint(Path(target), families, trust_pickle), before)


def grow_state(growth: GrowthPlan, weights: Mapping[str, Any]) -> dict[str, Any]:
    """The grown weights, name -> array, from those of the source: numpy arrays or torch tensors, computed in their own dtype.

    Names and shapes are those on disk. A pure copy is the source's own array, not a clone.
    """
    _refuse_shards(growth, weights)
    return dict(grow_arrays(growth, weights))


def grow_moments(growth: GrowthPlan, moments: Mapping[str, Any], *, squares: bool = False, policy: Policy = "carry") -> dict[str, Any]:
    """Grown optimizer moments, name -> array: first moments or momentum, or second moments with `squares`.

    Each has memory of its own, since optimizers change moments in place.

    Args:
        growth: the plan.
        moments: of the source's parameters, by their names on disk, in their shapes.
        squares: they are Adam's second moments.
        policy: `carry`, or `fresh-new`, which gives them to what was there before and not to copies.

    Raises:
        OutgrowError: a parameter without a moment, or a plan through which no law moves them.
    """
    _refuse_shards(growth, moments)
    grown = Grown(growth, rows_of(moments))
    states = ((name, grown.state(name, "square" if squares else "gradient", policy)) for name in grown.tensors)
    return {name: state.clone() if hasattr(state, "clone") else state.copy() for name, state in states}


def _refuse_shards(growth: GrowthPlan, arrays: Mapping[str, Any]) -> None:
    """Whole layers of sharded tensors are copied and scaled as they are; wider ones, and noise, are made of whole tensors."""
    sharded = next((name for name, value in arrays.items() if hasattr(value, "full_tensor")), None)
    if sharded and any(stage.lifts or stage.rewrites for stage in growth.stages):
        raise OutgrowError(
            f"'{sharded}' is sharded over ranks, and '{growth.operator}' is made of whole tensors; gather them with full_tensor(), or grow "
            "the checkpoint on disk"
        )
