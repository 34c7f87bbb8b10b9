"""Runs what a study still lacks, several at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from outgrow.arch import Config, arch_for
from outgrow.data.packed import Packed, prepare
from outgrow.errors import DivergedError, Interrupted, OutgrowError
from outgrow.extensions import use_operators
from outgrow.files import read_json
from outgrow.lab.ancestry import model_of, own_flops
from outgrow.lab.execute import execute
from outgrow.lab.records import Record, Records, diverged_record, record_of
from outgrow.lab.refusals import told_problems
from outgrow.lab.runs import ENVIRONMENT, finished, place, read_result
from outgrow.lab.stopping import on_stop
from outgrow.lab.study import Scale, Study, scale_of, target_of, trial
from outgrow.lab.sweep import wanted
from outgrow.training.config import RunConfig

_busy = Lock()  # held by a worker while it trains


def run_study(
    study: Study, scale: Scale, seeds: int, root: Path, records: Records, jobs: int, threads: int, tell: Callable[[str], None],
    submit: Callable[..., Any] | None = None, operators: str | None = None,
) -> None:  # fmt: skip
    """Trains what is lacking; killed, the same call goes on.

    Args:
        study, scale, seeds: what.
        root: where runs, checkpoints and packed text lie.
        records: takes a line for every run that ends.
        jobs: runs at a time.
        threads: of each.
        tell: told what ends.
        submit: hands `(train_one, run, root, operators)` to something else than processes of this machine, and returns a future.
        operators: a file with operators of one's own, which is in use here already.
    """
    commit = _commit()
    packed = prepare(scale.data, root / "data")
    records.require_text(packed.corpus_hash, f"'{study.name}' would be trained on")
    refuse_arms(study, scale, packed)
    with _handed_over(submit) if submit else _workers(jobs, threads) as start:
        going: dict[Future[str], RunConfig] = {}
        while True:
            runs = _left(study, scale, seeds, records, root)
            if not runs and not going:
                return
            busy = {run.identity() for run in going.values()}
            for run in runs:
                if len(going) >= jobs:
                    break
                parent = run.start.run if run.start else None
                if run.identity() not in busy and (parent is None or finished(parent, root)):
                    going[start(run, root, operators)] = run
            if not going:
                raise OutgrowError(f"'{runs[0].name}' waits for a run that is not there; remove '{place(runs[0], root)}' and start again")
            for future in _first(going):
                run = going.pop(future)
                record = _ended(run, root, future.result(), commit)
                records.add(record)
                rest = records.seconds(sum(own_flops(one) for one in _left(study, scale, seeds, records, root)))
                says = (
                    f"diverged: {record.diverged}"
                    if record.diverged
                    else f"held-out loss {record.final_loss:.4f} at {record.flops:.3e} FLOPs"
                )
                tell(f"{run.name}: {says}" + ("" if rest is None else f"; about {rest / jobs / 60:.0f} min left"))


def _left(study: Study, scale: Scale, seeds: int, records: Records, root: Path) -> list[RunConfig]:
    """The runs that are to be trained next, those among them whose checkpoints are gone though their records are there."""
    return [run for run in wanted(study, scale, seeds, records) if not (run.identity() in records and finished(run, root))]


def refuse_arms(study: Study, scale: Scale, packed: Packed | None = None) -> None:
    """Tells all that is wrong with a study's arms before the first is trained: what no run could do, an end that is not the target."""
    wrong: list[str] = []
    for name, arm in study.arms.items():
        own = scale_of(arm, scale)
        try:
            one = trial(study, scale, name, 0, own.rates[0])
            target, made = (_sizes(config) for config in (target_of(arm, own), model_of(next(iter(one.branches.values())))))
            other = [space for space, size in target.items() if made.get(space) != size]
            found = [f"it ends with {made.get(space)} of '{space}', and its target has {target[space]}" for space in other]
            found += told_problems(one.runs(), 1, packed)
        except OutgrowError as error:
            found = [str(error)]
        wrong += [f"arm '{name}': {problem}" for problem in dict.fromkeys(found)]
    if wrong:
        raise OutgrowError(f"the study '{study.name}' cannot be trained: " + "; ".join(wrong))


def _sizes(config: Config) -> dict[str, int]:
    arch = arch_for(config)
    return {"layer": arch.layers(config), **arch.sizes(config)}


def train_one(run: RunConfig, root: Path, operators: str | None) -> str:
    """Trains one run whose parent is there; returns why it diverged, or nothing. Runs in a process of its own."""
    use_operators(operators)
    stop = _Stop()
    with _busy, on_stop(stop.ask):
        try:
            execute(run, root, stop, patient=True)  # a worker that outlived its killed parent may still be at it
        except DivergedError as error:
            return str(error)
    return ""


class _Stop:
    """An observer that reports nothing, and stops the run once it is asked to."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, number: int) -> None:
        self.asked = True

    def row(self, row: Any) -> None:
        pass

    def stop(self) -> bool:
        return self.asked


@contextmanager
def _workers(jobs: int, threads: int) -> Iterator[Callable[..., Any]]:
    """What starts a run in a process of this machine and returns its future; stopped, all save first."""
    context = get_context("spawn")  # what forks from a process that asked CUDA anything cannot use it
    numbers = context.SimpleQueue()
    for number in range(jobs):
        numbers.put(number)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_single, initargs=(threads, numbers)) as pool:
        try:
            yield lambda *what: pool.submit(train_one, *what)
        except (KeyboardInterrupt, BrokenProcessPool, Interrupted) as error:
            for worker in active_children():
                worker.terminate()  # SIGTERM: it saves, and stops
            pool.shutdown(wait=True, cancel_futures=True)
            why = "stopped"
            if isinstance(error, BrokenProcessPool):
                why = "a run's process was killed, as a system short of memory does; --jobs says how many there are at once"
            raise Interrupted(f"{why}; what was trained is kept, and the same command goes on") from None


@contextmanager
def _handed_over(submit: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Jobs elsewhere: where this process is stopped they are cancelled, and where one fails the others end first; none is left behind."""
    handed: list[Any] = []

    def start(*what: Any) -> Any:
        handed.append(submit(train_one, *what))
        return handed[-1]

    try:
        yield start
    except KeyboardInterrupt:
        for one in handed:
            one.cancel()
        raise Interrupted("stopped, and the jobs are cancelled; the same command goes on from their last checkpoints") from None
    except OutgrowError:
        while not all(one.done() for one in handed):
            time.sleep(2)
        raise


def _single(threads: int, numbers: SimpleQueue[int]) -> None:
    """Prepares a worker: one of several on this machine, each with an accelerator of its own where there are as many."""
    import torch
    import transformers

    os.environ["LOCAL_RANK"] = str(numbers.get())
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()


def _end_with_parent() -> None:
    """A worker whose parent was killed saves what it is at, and ends; by itself it would wait for work for ever."""
    parent = parent_process()
    assert parent
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    with _busy:
        os._exit(1)


def _first(going: dict[Future[str], RunConfig]) -> list[Future[str]]:
    """The futures that are done, once one is; those of a cluster are asked now and then."""
    if all(isinstance(future, Future) for future in going):
        return list(wait(going, return_when="FIRST_COMPLETED").done)
    while not (found := [future for future in going if future.done()]):
        time.sleep(2)
    return found


def _ended(run: RunConfig, root: Path, why: str, commit: str) -> Record:
    if why:
        return diverged_record(run, {**read_json(place(run, root) / ENVIRONMENT), "commit": commit}, why)
    return record_of(read_result(run, root), commit)


def _commit() -> str:
    """The commit of a checkout that this runs from; empty elsewhere."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
