"""A recipe on a cluster that SLURM manages, or on this machine as if it did, by `submitit`; requeued jobs go on where they stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from outgrow.errors import OutgrowError, one_line

CPUS = 8  # of each rank: training, autograd, communication, compilation and the writing of checkpoints
SAVING = 600  # seconds before a job's time is up in which it saves
_FOR_EVER = 10**9  # times that a job is queued again when it is out of time; submitit's own 3 would leave a long run half-way


@dataclass(frozen=True)
class Job:
    """What every rank of a job does: train the runs of a file. Called again after preemption, it is the same job and goes on."""

    recipe: Path
    changes: tuple[str, ...]
    runs: Path
    track: tuple[str, ...]
    operators: str | None

    def __call__(self) -> dict[str, float]:
        """Trains; returns run name -> held-out loss, on the first rank."""
        import submitit

        from outgrow.checkpoint.ranks import join_ranks
        from outgrow.extensions import use_operators
        from outgrow.lab.recipe import read_runs
        from outgrow.lab.watch import execute_all

        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        join_ranks()
        use_operators(self.operators)
        runs = read_runs(self.recipe, list(self.changes))
        results = execute_all(runs, self.runs, track=self.track)
        return {run.name: results[run.identity()].final_loss for run in runs if run.identity() in results}


@dataclass(frozen=True)
class Handed:
    """A job that was handed over, as a future of what it returns; its failure is told in a sentence."""

    job: Any
    logs: Path

    def done(self) -> bool:
        return self.job.done()

    def result(self) -> Any:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            return self.job.results()[0]
        except (FailedJobError, UncompletedJobError) as error:
            raise OutgrowError(f"job {self.job.job_id} failed: {_why(error)}; what its ranks printed is in '{self.logs}'") from None

    def cancel(self) -> None:
        """Does nothing to a job that has ended."""
        if not self.done():
            self.job.cancel()


def _why(error: Exception) -> str:
    """What went wrong in a job: the end of its traceback, which submitit puts between dashes before the places of the logs."""
    said = str(error).partition("You can check full logs")[0]
    return [line for line in said.splitlines() if line.strip(" -")][-1]


@dataclass(frozen=True)
class Again:
    """A call that submitit queues again when its job is preempted or runs out of time."""

    call: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def checkpoint(self, *arguments: Any) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, *arguments)


def submit_with(made: Any, logs: Path) -> Callable[..., Handed]:
    """What hands `(call, arguments...)` over to an executor, a job each."""
    return lambda call, *arguments: Handed(made.submit(Again(call), *arguments), logs)


def executor(cluster: str, logs: Path, nodes: int, ranks: int, hours: float, options: dict[str, Any]) -> Any:
    """What hands calls over: submitit's executor.

    Args:
        cluster: `slurm`, or `local` for processes of this machine.
        logs: folder for what the ranks print.
        nodes, ranks: nodes, and ranks on each; with GPUs, one a rank.
        hours: after which SLURM stops a job, and submitit queues it again.
        options: of SLURM, such as partition or account.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise OutgrowError("jobs are submitted by 'submitit', which is not installed; pip install 'outgrow[slurm]'") from None
    try:
        made = submitit.AutoExecutor(folder=logs, cluster=cluster, slurm_max_num_timeout=_FOR_EVER)
    except (RuntimeError, ValueError) as error:  # no such cluster, or none here
        raise OutgrowError(f"there is no cluster '{cluster}' here ({one_line(error)}); use --cluster local or slurm") from None
    shape = {"nodes": nodes, "tasks_per_node": ranks, "timeout_min": max(1, round(hours * 60))}
    if cluster == "slurm":
        own = {"cpus_per_task": CPUS, "signal_delay_s": SAVING, **options}
        shape |= {"gpus_per_node": ranks, **{f"slurm_{name}": value for name, value in own.items()}}
    elif torch.cuda.is_available():
        shape |= {"gpus_per_node": torch.cuda.device_count()}  # of which each rank takes its own
    try:
        made.update_parameters(**shape)
    except (TypeError, ValueError) as error:
        raise OutgrowError(f"{cluster} takes no job of {nodes} nodes with {ranks} ranks each ({one_line(error)})") from None
    return made
