"""From one checkpoint directory to another, as a plan says: headers first, copies as byte ranges."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Event
from typing import Any, Literal, get_args

from outgrow.checkpoint.card import CARD, card_text
from outgrow.checkpoint.dcp import METADATA, Chunked
from outgrow.checkpoint.grow_dcp import Distributed, distributed_layout
from outgrow.checkpoint.huggingface import CONFIG, INDEX, SINGLE, Checkpoint, index_text, open_checkpoint
from outgrow.checkpoint.layout import Shard, moment_shards, raw, weight_shards
from outgrow.checkpoint.lineage import LINEAGE, Lineage, read_lineage
from outgrow.checkpoint.names import Names, torchtitan_names
from outgrow.checkpoint.optimizer_state import BEHIND_MASKS, CLOCK
from outgrow.checkpoint.ranks import agreed, leads, telling
from outgrow.checkpoint.safetensors_file import FLOATS, Stored
from outgrow.checkpoint.writing import Progress, write_shards
from outgrow.errors import OutgrowError
from outgrow.files import new_directory, without_links, write_json
from outgrow.growth.apply import Policy
from outgrow.growth.as_json import checked_plan
from outgrow.growth.plan import GrowthPlan

MAX_SHARD_BYTES = 5_000_000_000
Form = Literal["huggingface", "dcp", "torchtitan"]
Measure = Callable[[Checkpoint, Path, GrowthPlan], dict[str, Any]]


def grow_directory(
    source: Path | Checkpoint,
    target: Path,
    plan: GrowthPlan,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    optimizer: Policy = "reset",
    dtype: str | None = None,
    overwrite: bool = False,
    form: Form = "huggingface",
    progress: Progress = lambda done, total: None,
    measure: Measure | None = None,
) -> None:
    """Writes the grown checkpoint; `target` appears whole or not at all, and `source` is only read.

    Args:
        source: a Hugging Face directory, a safetensors file with its config.json beside it, or an opened checkpoint.
        target: a directory that does not exist yet.
        plan: made for the source's config.
        max_shard_bytes: largest bytes of tensors in one file.
        optimizer: what becomes of the optimizer's state beside the source's weights.
        dtype: torch's name of a float type for all weights; each keeps its own if None.
        overwrite: put the new directory in the place of one that stands there.
        form: `dcp` writes a distributed checkpoint under the source's names, `torchtitan` under torchtitan's. In a process group
            every rank calls this, and writes its share.
        progress: told (bytes written, bytes in all), from several threads, one at a time.
        measure: what to measure on (opened source, grown directory, plan) before the receipt is written into it.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    layout, weights = settle(checkpoint, plan, max_shard_bytes, optimizer, dtype, form)
    if isinstance(layout, Distributed) and not leads():
        place = agreed(None)
        return layout.write(place) if place else None
    # A Hugging Face directory is written by whoever calls this, alone, in a group of ranks too.
    talk = telling() if isinstance(layout, Distributed) else nullcontext(lambda place: None)
    with talk as tell, _explained(target):
        refuse_place(checkpoint, target, layout, overwrite)
        before = read_lineage(checkpoint.directory)
        with new_directory(target, overwrite) as temporary, _hashing(checkpoint) as hashes:
            _write_side(temporary, checkpoint, plan, weights, dtype)
            if isinstance(layout, Distributed):
                tell(temporary)
                layout.write(temporary)
            else:
                write_shards(temporary, layout, progress)
                if optimizer != "reset":
                    shutil.copyfile(checkpoint.directory / CLOCK, temporary / CLOCK)
            measured = measure(checkpoint, temporary, plan) if measure else None
            receipt = _receipt(checkpoint, before, plan, optimizer, measured, hashes.result())
            write_json(temporary / LINEAGE, receipt.as_json())
            (temporary / CARD).write_text(card_text(checkpoint, plan, receipt), encoding="utf-8", errors="backslashreplace")


def settle(
    checkpoint: Checkpoint,
    plan: GrowthPlan,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    optimizer: Policy = "reset",
    dtype: str | None = None,
    form: Form = "huggingface",
) -> tuple[list[Shard] | Distributed, list[Shard]]:
    """Everything that will be written, and of it the weight files; refuses what cannot be made, before a byte is written."""
    if plan.origin != checkpoint.config:
        raise OutgrowError(f"the plan was made for another config than that of '{checkpoint.directory}'; make it from this one")
    for name, value, known in (("form", form, get_args(Form)), ("optimizer", optimizer, get_args(Policy))):
        if value not in known:
            raise OutgrowError(f"{name} takes {', '.join(known)}, not '{value}'")
    if max_shard_bytes < 1:
        raise OutgrowError(f"a weight file must hold at least a byte, not {max_shard_bytes:,}")
    _refuse_unreadable(plan)
    refuse_other_ties(checkpoint)
    refuse_unfinished(checkpoint.directory)
    if form == "huggingface":
        weights = weight_shards(checkpoint, plan, max_shard_bytes, _stored_as(dtype))
        return weights + (moment_shards(checkpoint, plan, optimizer) if optimizer != "reset" else []), weights
    names = torchtitan_names(plan.grown_arch, plan.target_config) if form == "torchtitan" else checkpoint.names or Names()
    return distributed_layout(checkpoint, plan, names, optimizer, _stored_as(dtype)), []


def refuse_place(checkpoint: Checkpoint, target: Path, layout: list[Shard] | Distributed, overwrite: bool) -> None:
    """Refuses a target that stands there, that lies where it must not, or whose disk has no room."""
    _refuse_standing(checkpoint, target, overwrite)
    if not checkpoint.file and checkpoint.directory.resolve() in without_links(target).parents:
        raise OutgrowError(f"'{target}' lies inside the source, which is only read; choose another place")
    _enough_room(target, layout.bytes if isinstance(layout, Distributed) else sum(shard.bytes for shard in layout))


@contextmanager
def _hashing(checkpoint: Checkpoint) -> Generator[Future[dict[str, str]], None, None]:
    """The hashes of the source, which is read while it is being copied and so in memory; given up where the growth fails."""
    stopped = Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(checkpoint.hashes, stopped)
        finally:
            stopped.set()


@contextmanager
def _explained(target: Path) -> Generator[None, None, None]:
    """A disk that fills up while writing is told by the name of what was being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OutgrowError(
            f"'{target}' could not be written ({error.strerror}), and nothing is left of it; make room or choose another place"
        ) from None


def _refuse_unreadable(plan: GrowthPlan) -> None:
    """What is grown holds its plan, and must be able to be verified by it."""
    try:
        checked_plan(json.loads(json.dumps(plan.as_json())))
    except (TypeError, ValueError) as error:
        raise OutgrowError(f"'{plan.operator}' cannot be carried out, since its receipt could not be read again: {error}") from None


def refuse_other_ties(checkpoint: Checkpoint) -> None:
    """A tied tensor that stands in the files all the same must be what it is tied to, or something would be lost."""
    for alias, name in checkpoint.arch.aliases(checkpoint.config).items():
        if alias in checkpoint.tied and not _same(checkpoint.tied[alias], checkpoint.tensors[name]):
            raise OutgrowError(
                f"'{alias}' of '{checkpoint.directory}' is not '{name}', to which its config.json ties it; set tie_word_embeddings to false"
            )


def refuse_hidden(directory: Path) -> None:
    """What a run still trains behind masks is not in the weights that its checkpoint shows."""
    if (directory / BEHIND_MASKS).exists():
        raise OutgrowError(f"'{directory}' has masks that are not open yet, and what is behind them would be lost; take a later checkpoint")


def refuse_unfinished(directory: Path) -> None:
    """What lies behind masks, and which layers alone are to be trained, would be forgotten where anything else is made of a directory."""
    refuse_hidden(directory)
    plan = read_lineage(directory).plan or {}
    if plan.get("fill") == "masked" or plan.get("trains_only_fresh"):
        raise OutgrowError(
            f"'{directory}' was grown by '{plan.get('operator')}', which only training finishes, so nothing can follow before; train it "
            "first, or grow what it was grown from"
        )


def _same(one: Stored | Chunked, other: Stored | Chunked) -> bool:
    """Do two tensors hold the same bytes? Those that lie in chunks are loaded."""
    if isinstance(one, Stored) and isinstance(other, Stored):
        return one.same_bytes(other)
    kinds = ((each.entry.dtype, each.entry.shape) for each in (one, other))
    return next(kinds) == next(kinds) and raw(one.load()) == raw(other.load())


def _stored_as(dtype: str | None) -> str | None:
    """A torch dtype's name on disk."""
    names = {name: stored for stored, name in FLOATS.items()}
    if dtype is not None and dtype not in names:
        raise OutgrowError(f"weights can be stored as {', '.join(names)}, not '{dtype}'")
    return None if dtype is None else names[dtype]


def _refuse_standing(checkpoint: Checkpoint, target: Path, overwrite: bool) -> None:
    """A target that stands there already is replaced only if asked for, if it is a checkpoint, and never if it holds the source."""
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise OutgrowError(f"'{target}' exists already; remove it, choose another place, or use --overwrite")
    held = checkpoint.directory.resolve()
    if not target.is_symlink() and target.resolve() in (held, *held.parents):
        raise OutgrowError(f"'{target}' holds the source, which is never overwritten; choose another place")
    if target.is_symlink() or not target.is_dir() or (any(target.iterdir()) and not _is_checkpoint(target)):
        raise OutgrowError(f"'{target}' is not a checkpoint directory, so it is not overwritten; choose another place")
    if (target / ".git").exists():
        raise OutgrowError(f"'{target}' is a git repository, whose history would be lost, so it is not overwritten; choose another place")


def _is_checkpoint(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (LINEAGE, SINGLE, INDEX, METADATA))


def _write_side(temporary: Path, checkpoint: Checkpoint, plan: GrowthPlan, weights: list[Shard], dtype: str | None) -> None:
    """Config, index, tokenizer and the rest."""
    config = plan.target_config
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if len(weights) > 1:
        weight_map = {name: shard.name for shard in weights for name in shard.entries}
        total = sum(entry.bytes for shard in weights for entry in shard.entries.values())
        (temporary / INDEX).write_text(index_text(weight_map, total), encoding="utf-8")
    for path in checkpoint.side_files():
        place = temporary / path.relative_to(checkpoint.directory)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)


def _receipt(
    checkpoint: Checkpoint, before: Lineage, plan: GrowthPlan, optimizer: Policy, measured: dict[str, Any] | None, hashes: dict[str, str]
) -> Lineage:  # fmt: skip
    """What `outgrow.json` of the grown directory says."""
    spent = sum(stage.flops for stage in plan.stages)
    return Lineage(
        before.tokens,
        before.flops + spent,
        plan=plan.as_json(),
        source=checkpoint.title,
        optimizer=optimizer,
        measured=measured,
        trains=plan.new_tensors if plan.trains_only_fresh else None,
        parents=hashes,
        parent=before.as_json(),
        skipped=before.skipped,
        copies=plan.copies or None,
    )


def _enough_room(target: Path, needed: int) -> None:
    """Refuses to begin what cannot be finished."""
    place = without_links(target).parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutgrowError(f"'{target}' needs {needed:,} bytes, and its disk has {free:,} free; make room or choose another place")
    if not os.access(place, os.W_OK):
        raise OutgrowError(f"'{place}' cannot be written to; choose another place for '{target.name}'")
