"""Runs under the eyes of a person: progress bars with the time left, Ctrl-C that saves."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from outgrow.checkpoint.ranks import agreed, leads
from outgrow.data.packed import prepare
from outgrow.lab.ancestry import flops_before, in_order, own_flops
from outgrow.lab.execute import execute, refuse_early
from outgrow.lab.runs import Result, clock_of, finished, flops_done, place, read_result
from outgrow.lab.stopping import on_stop
from outgrow.lab.track import Tracker, trackers
from outgrow.training.config import RunConfig
from outgrow.training.distributed import wait
from outgrow.training.record import Row
from outgrow.training.run import Run


class TimeLeft(ProgressColumn):
    """Time left at the mean speed so far, counted in FLOPs: a small base's tokens are cheaper than a target's."""

    def render(self, task: Task) -> Text:
        found, began = task.fields["found"], task.fields["began"]
        if task.total is None or task.completed <= found:
            return Text("done" if task.finished else "-:-- left")
        speed = (task.completed - found) / (time.monotonic() - began)
        left = int((task.total - task.completed) / speed)
        return Text(f"{left // 60}:{left % 60:02d} left")


@dataclass
class Watch:
    """Tells the bar what a run reports, and the run whether Ctrl-C was pressed.

    `done` is the FLOPs of all runs when this one was begun or resumed, `clock` those that its own record counted then.
    """

    progress: Progress
    task: TaskID
    done: float
    name: str = ""
    clock: float = 0.0
    stopping: bool = False
    trackers: Sequence[Tracker] = ()

    def row(self, row: Row) -> None:
        for tracker in self.trackers:
            tracker(row)
        if "loss" in row:
            text = f"{self.name}: {row['tokens']:,} tokens, loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s"
            self.progress.update(self.task, completed=self.done + row["flops"] - self.clock, description=text)

    def stop(self) -> bool:
        return self.stopping

    def ask(self, number: int) -> None:
        """Asked once, the run saves and stops; by Ctrl-C again, at once. SIGTERM comes twice under torchrun, which sends on its own."""
        if self.stopping:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.stopping = True
        self.progress.console.print("stopping after this step and saving; press Ctrl-C again to stop at once")


def execute_all(
    wanted: Iterable[RunConfig], root: Path, console: Console | None = None, track: Iterable[str] = ()
) -> dict[str, Result]:  # fmt: skip
    """Executes runs and their ancestors, parents first, with one bar for all; returns identity -> result, on the rank that leads."""
    console = console or Console(stderr=True)
    transformers.utils.logging.disable_progress_bar()  # one bar is enough
    runs = in_order(wanted)
    lacking = {run.identity() for run in runs if not agreed(finished(run, root))}
    for data in {run.data.model_dump_json(): run.data for run in runs if run.identity() in lacking}.values():
        if leads():
            with console.status("packing the corpus"):
                prepare(data, root / "data")
        wait()
    refuse_early(runs, root)
    costs = {run.identity(): own_flops(run) for run in runs}
    found = sum(flops_done(run, root) for run in runs)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeLeft())
    results: dict[str, Result] = {}
    with Progress(*columns, console=console, transient=True, disable=not leads()) as progress:
        task = progress.add_task("", total=sum(costs.values()), completed=int(found), found=found, began=time.monotonic())
        watch = Watch(progress, task, done=found)
        with on_stop(watch.ask):
            live: list[Run] = []
            for number, run in enumerate(runs):
                fresh, already = run.identity() in lacking, flops_done(run, root)
                watch.name = f"{number + 1}/{len(runs)} {run.name}"
                watch.clock = flops_before(run) + already
                watch.trackers = trackers(track, run, place(run, root), clock_of(run, root)) if fresh and leads() else ()
                execute(run, root, watch, live)
                watch.done += costs[run.identity()] - already
                if not leads():
                    continue
                result = results[run.identity()] = read_result(run, root)
                if fresh:
                    progress.console.print(f"{run.name}: held-out loss {result.final_loss:.4f} at {result.flops:.3e} FLOPs")
    return results
