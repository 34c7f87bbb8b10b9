"""Executes runs and the runs they start from; a finished run is found, never run twice."""

from __future__ import annotations

import errno
import fcntl
import platform
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from outgrow.checkpoint.grow import grow_directory, refuse_hidden
from outgrow.checkpoint.huggingface import open_checkpoint
from outgrow.checkpoint.lineage import read_lineage
from outgrow.checkpoint.ranks import agreed, leads, world
from outgrow.data.config import DataConfig
from outgrow.data.packed import Packed, prepare
from outgrow.errors import OutgrowError
from outgrow.files import read_json, write_json
from outgrow.growth.plan import GrowthPlan
from outgrow.lab.ancestry import learning_of, lineage, plan_of
from outgrow.lab.evaluating import evaluator
from outgrow.lab.refusals import told_problems
from outgrow.lab.runs import ENVIRONMENT, GROWN, SETTINGS, finished, place, require_text
from outgrow.training.config import LearnConfig, RunConfig, first_token
from outgrow.training.distributed import product_dtype, wait
from outgrow.training.loop import Observer, train
from outgrow.training.maps import learn_maps
from outgrow.training.origin import Origin, already_grown, can_grow_in_place, grown_in_place
from outgrow.training.record import FINISHED, checkpoint_at, latest_checkpoint
from outgrow.training.run import Run


def execute(run: RunConfig, root: Path, observer: Observer, live: list[Run] | None = None, patient: bool = False) -> None:
    """Brings a run to its end, from wherever it is; its parents must be finished. Under `torchrun` every rank calls this.

    Args:
        run: it.
        root: where runs are kept.
        observer: told its rows.
        live: holds the run that was trained last, if it is still in memory, and then this one. If that was the parent and it grows in
            depth only, it grows where it lies.
        patient: wait for another process that is at this run, rather than refuse.
    """
    before = live.pop() if live else None
    directory = place(run, root)
    with _alone(run, root, patient) if leads() else nullcontext():
        if leads():
            _refuse_other_start(run, directory)
        if agreed(finished(run, root)):
            return
        evaluate = evaluator(run, root)
        if leads():
            packed = prepare(run.data, root / "data")
            require_text([place(one, root) for one in lineage(run)], packed.corpus_hash)
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / SETTINGS, run.model_dump(mode="json"))
            write_json(directory / ENVIRONMENT, environment(packed, run))
        wait()
        packed = prepare(run.data, root / "data", verify=False)
        begun = [_in_place(run, directory, before) or _start(run, root)]
        before = None  # its memory is the next one's, once it is grown
        trained = train(run, directory, packed, begun.pop(), observer, evaluate)
        if live is not None:
            live.append(trained)


@contextmanager
def _alone(run: RunConfig, root: Path, patient: bool) -> Generator[None, None, None]:
    """Holds a run's lock, which a killed process leaves; two that trained one run would cut each other's records."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{run.identity()}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))
        except BlockingIOError:
            raise OutgrowError(f"another process is training '{run.name}' in '{root}'; wait for it, or use another --runs") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # a file system without locks
                raise
        yield


def refuse_early(runs: Sequence[RunConfig], root: Path) -> None:
    """Tells all that is wrong with runs that are yet to be trained, before the first of them is; their text must be packed."""
    wrong: list[str] = []
    meant = {run.identity() for run in runs}
    for run in runs:
        if finished(run, root):
            continue
        try:
            _refuse_other_settings(run, root, meant)
            _refuse_unkept(run, root)
            wrong += told_problems([run], world(), prepare(run.data, root / "data", verify=False))
        except OutgrowError as error:
            wrong.append(str(error))
    if wrong:
        raise OutgrowError("; ".join(dict.fromkeys(wrong)))


def _refuse_other_settings(run: RunConfig, root: Path, meant: set[str]) -> None:
    """A run that was left half-way, has this one's name and is none of those that are meant, was likely meant to be this."""
    for other in sorted(root.glob(f"{run.name}-*/{SETTINGS}")):
        name, _, identity = other.parent.name.rpartition("-")
        if name != run.name or identity in meant or (other.parent / FINISHED).exists() or not latest_checkpoint(other.parent):
            continue
        changed = differences(read_json(other), run.model_dump(mode="json"))
        raise OutgrowError(
            f"'{other.parent}' was left half-way with other settings: {'; '.join(changed)}; give them back to go on, give the run another "
            "name to train both, or remove that directory"
        )


def _refuse_unkept(run: RunConfig, root: Path) -> None:
    """A parent that has passed the clock at which it is left must have kept a checkpoint there."""
    parent = run.start.run if run.start else None
    if parent is None:
        return
    directory, clock = place(parent, root), first_token(run)
    latest = latest_checkpoint(directory)
    passed = finished(parent, root) or (latest is not None and int(latest.name) >= clock)
    if passed and not checkpoint_at(directory, clock).is_dir():
        raise OutgrowError(
            f"'{parent.name}' kept no checkpoint at {clock:,} tokens; remove '{directory}' and run it again, or start from its end"
        )


def _refuse_other_start(run: RunConfig, directory: Path) -> None:
    """A run that began with a checkpoint goes on, and counts as done, for that one alone: its path may hold another by now."""
    known = read_json(directory / ENVIRONMENT).get("start") if (directory / ENVIRONMENT).exists() else None
    source = Path(run.start.checkpoint) if run.start and run.start.checkpoint else None
    if known and source and source.is_dir() and open_checkpoint(source).fingerprint() != known:
        raise OutgrowError(
            f"'{source}' is not the checkpoint that '{directory}' began with; give that back, or remove '{directory}' to train anew"
        )


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """Where two settings differ, as `a.b: x -> y`."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [line for key in keys for line in differences(before.get(key), after.get(key), f"{name}.{key}" if name else str(key))]
    return [] if before == after else [f"{name}: {before} -> {after}"]


def _in_place(run: RunConfig, directory: Path, before: Run | None) -> Origin | None:
    """The parent grown where it lies, if it is still in memory at the right clock and its plan allows that."""
    start = run.start
    if not (before and start and start.run and start.operator) or agreed(latest_checkpoint(directory)):
        return None
    if before.config.identity() != start.run.identity() or before.clock.tokens != first_token(run):
        return None
    plan = plan_of(start, read_json(checkpoint_at(before.directory, before.clock.tokens) / "config.json"))
    if plan.is_untrained or not can_grow_in_place(plan, start.optimizer):
        return None
    return grown_in_place(before.parameters, before.optimizer, before.clock, before.config.identity(), plan)


def environment(packed: Packed, run: RunConfig) -> dict[str, str | int]:
    """What a result depends on besides its settings: the text, the checkpoint it starts from, and the machine."""
    import torch
    import transformers

    return {
        "corpus_hash": packed.corpus_hash,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "products": str(product_dtype(run.precision)).removeprefix("torch."),
        **({"start": open_checkpoint(Path(run.start.checkpoint)).fingerprint()} if run.start and run.start.checkpoint else {}),
    }


def learned_plan(
    plan: GrowthPlan, source: Path, data: DataConfig, settings: LearnConfig, seed: int, root: Path, begin: int = 0
) -> GrowthPlan:  # fmt: skip
    """A plan with its maps trained on a corpus, from the clock `begin` on."""
    if not plan.is_untrained:
        raise OutgrowError(f"'{plan.operator}' has no maps to learn; learn-depth and learn-width have")
    packed = prepare(data, root / "data")
    _same_tokenizer(source, packed)
    return learn_maps(plan, source, packed, settings, data.context, seed, begin)


def _start(run: RunConfig, root: Path) -> Path | Origin | None:
    """The directory whose weights a run begins with, grown if it asks for growth; where it has a checkpoint of its own, their receipt."""
    if run.start is None:
        return None
    if run.start.run:
        _refuse_unkept(run, root)
        source = checkpoint_at(place(run.start.run, root), first_token(run))
    else:
        source = run.start.directory
        _same_tokenizer(source, prepare(run.data, root / "data"))
    if run.start.operator is None:
        refuse_hidden(source)
        return source
    grown = place(run, root) / GROWN
    plan = plan_of(run.start, read_json(source / "config.json"))
    if agreed(latest_checkpoint(place(run, root))) and not agreed(grown.is_dir()) and can_grow_in_place(plan, run.start.optimizer):
        return already_grown(plan, read_lineage(source))
    if leads() and not grown.is_dir():
        if plan.is_untrained:
            plan = learned_plan(plan, source, run.data, learning_of(run), run.seed, root, first_token(run))
        grow_directory(source, grown, plan, optimizer=run.start.optimizer)
    wait()
    return grown


def _same_tokenizer(source: Path, packed: Packed) -> None:
    """Refuses to train a checkpoint on tokens that mean something else to it."""
    theirs = source / "tokenizer.json"
    if not theirs.exists() or theirs.read_bytes() != packed.tokenizer_files[0].read_bytes():
        raise OutgrowError(f"'{source}' has another tokenizer than this corpus packed with data.vocab; train on text packed as its own was")
