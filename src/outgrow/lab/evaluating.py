"""Evaluation on the way: what a run's settings ask for, as a function of a checkpoint directory that the training loop calls."""

from __future__ import annotations

from pathlib import Path

from outgrow.arch import positions
from outgrow.checkpoint.huggingface import CONFIG
from outgrow.checkpoint.ranks import leads
from outgrow.errors import OutgrowError
from outgrow.files import read_json
from outgrow.training.config import RunConfig
from outgrow.training.distributed import device
from outgrow.training.loop import Evaluate
from outgrow.training.record import EVALUATED, Row

ERROR = "_stderr"
_FALLING = ("perplexity", "bits_per_byte", "brier_score", "ter")  # metrics that are better when they are lower, by how their names end


def evaluator(run: RunConfig, root: Path) -> Evaluate | None:
    """What runs the tasks of `run.evaluate` on a checkpoint and gives the fields of its row; None where it asks for none.

    Tasks and their data are loaded here, so that what is missing is said before anything is trained.

    Raises:
        OutgrowError: an unknown task, a data set that cannot be had, no harness.
    """
    settings = run.evaluate
    if settings is None:
        return None
    if not leads():
        return lambda directory: {}  # the first rank evaluates
    from outgrow.evaluation import harness, results
    from outgrow.evaluation.local_tasks import made_tasks
    from outgrow.evaluation.suite import needs_made, read_suite

    harness.require()
    suite = read_suite(settings.tasks)
    made = None
    if needs_made(suite):
        if run.data.sources:
            raise OutgrowError(
                f"evaluate.tasks '{settings.tasks}' is made of held-out documents, and data.sources holds tokens alone; make the tasks of "
                "the same text with 'outgrow data tasks', and name their directory in evaluate.tasks"
            )
        made = made_tasks(root / "data", [run.data.corpus], validation_share=run.data.validation_share)
    loaded = harness.load_tasks(suite, made)

    def evaluate(directory: Path) -> Row:
        most = positions(read_json(directory / CONFIG))
        context = run.data.context if most is None or run.data.context <= most else None
        dtype = "bfloat16" if run.precision == "bf16" and device().type == "cuda" else "auto"  # as it is trained
        found = results.evaluate(directory, suite, loaded, settings.limit, settings.batch_size, context=context, dtype=dtype)
        return {name: value for task, result in found.items() for name, value in fields(task, result).items()}

    return evaluate


def fields(task: str, result: Row) -> Row:
    """The fields of one result: eval/TASK/METRIC and its _stderr; of an average, eval/NAME."""
    name = f"{EVALUATED}{task}" if result["metric"] == "mean" else f"{EVALUATED}{task}/{result['metric']}"
    error = {} if result["stderr"] is None else {f"{name}{ERROR}": result["stderr"]}
    return {name: result["value"], **error}


def falls(field: str) -> bool:
    """Is a field better when it is lower?"""
    metric = field.rpartition("/")[2]
    return any(metric == one or metric.endswith(f"_{one}") for one in _FALLING)


def shown(field: str, value: float, error: float | None = None) -> str:
    """A field's value as people read it: accuracies in percent, with the standard error where there is one."""
    factor, digits = (1, 3) if falls(field) else (100, 1)
    return f"{factor * value:.{digits}f}" + ("" if error is None else f" ± {factor * error:.{digits}f}")
