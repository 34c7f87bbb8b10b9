"""Results of checkpoints: each task's in a file beside the weights, found again for the same weights and settings; tables of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from outgrow.checkpoint.lineage import read_lineage
from outgrow.config import hash_of
from outgrow.errors import OutgrowError
from outgrow.evaluation import harness
from outgrow.evaluation.harness import Loaded
from outgrow.evaluation.model import Opened, is_trained, open_model, tokenizer_hash, weights_hash
from outgrow.evaluation.suite import Suite, TaskChoice
from outgrow.files import read_json, write_json

FOLDER = "evaluation"  # beside the weights
Result = dict[str, Any]
Results = dict[str, Result]


def evaluate(
    directory: Path,
    suite: Suite,
    tasks: Sequence[Loaded],
    limit: int | None = None,
    batch_size: int = 8,
    tokenizer: str | None = None,
    context: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    told: Callable[[str], object] = lambda line: None,
) -> Results:
    """Task -> result of a checkpoint directory, averages among them under their own names.

    A result that is there for the same weights, trained by outgrow or not, tokenizer, task, shots, limit, context, dtype and harness is
    read; another is worked out, and kept in `evaluation/` beside the weights as soon as its task is done.

    Args:
        directory: the checkpoint.
        suite, tasks: what is asked; the tasks as `harness.load_tasks` loads them.
        limit: documents of each task, at most; all if not given.
        batch_size: sequences at once; it changes results by rounding alone.
        tokenizer, context, device, dtype: see `model.open_model`.
        told: a line for people before each task that is run.

    Raises:
        OutgrowError: a checkpoint that cannot be opened.
    """
    weights = weights_hash(directory)
    words = {"tokenizer": tokenizer_hash(directory, tokenizer), "trained": is_trained(directory)}
    common = {"weights": weights, **words, "limit": limit, "context": context, "dtype": dtype}
    opened: Opened | None = None
    results: Results = {}
    for loaded in tasks:
        choice = loaded.choice
        asked = {**common, "task": choice.name, "shots": choice.shots, "data": loaded.data, "lm_eval": harness.version()}
        path = directory / FOLDER / f"{choice.name}-{hash_of(asked)}.json"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            if not os.access(path.parent, os.W_OK):
                raise OutgrowError(f"'{path.parent}' cannot be written to, and results are kept there; evaluate a copy of the checkpoint")
            opened = opened or open_model(directory, tokenizer, context, device, dtype)
            told(f"{directory}: {choice.name}")
            found = harness.run_task(loaded, opened, limit, batch_size)
            lineage = read_lineage(directory)
            write_json(path, {**found, "settings": asked, "trained_tokens": lineage.tokens, "trained_flops": lineage.flops})
        results[choice.name] = _read(path, choice)
    return results | averages(suite, results)


def averages(suite: Suite, results: Results) -> Results:
    """The plain means that a suite asks for, of one kind of metric; their standard errors are of independent tasks."""
    found: Results = {}
    for name, tasks in suite.averages.items():
        parts = [results[task] for task in tasks if task in results]
        kinds = {"mean" if _is_share(part["metric"]) else f"mean_{part['metric']}" for part in parts}
        if len(parts) == len(tasks) and len(kinds) == 1:
            errors = [part["stderr"] for part in parts]
            error = None if None in errors else math.sqrt(sum(one**2 for one in errors)) / len(errors)
            value = sum(part["value"] for part in parts) / len(parts)
            found[name] = {"metric": kinds.pop(), "value": value, "stderr": error}
    return found


def table(suite: Suite, columns: dict[str, Results]) -> list[list[str]]:
    """Rows of text, a heading first: a task or average and its metric, then each checkpoint's value with its standard error."""
    names = [*(task.name for task in suite.tasks), *suite.averages]
    rows = [["task", "metric", *columns]]
    for name in names:
        found = [results.get(name) for results in columns.values()]
        metric = next((one["metric"] for one in found if one), "")
        rows.append([name, metric, *(_cell(one) for one in found)])
    return rows


def reference_table(suite: Suite) -> list[list[str]]:
    """The rows that a suite prints beside, a heading first; empty where it has none."""
    if suite.reference is None:
        return []
    keys = list(dict.fromkeys(key for row in suite.reference.rows for key in row if key != "name"))
    shown = [[str(row["name"]), *(_number(row.get(key)) for key in keys)] for row in suite.reference.rows]
    return [["reference", *keys], *shown]


def _read(path: Path, choice: TaskChoice) -> Result:
    """A stored result, with the metric that is asked for in front: the file may have been written for another of the same task."""
    result = read_json(path)
    metric = harness.metric_of(choice, [name for name in result["all"] if "_stderr" not in name])
    if metric == result["metric"]:
        return result
    return {**result, "metric": metric, "value": result["all"][metric], "stderr": result["all"].get(harness.error_of(metric))}


def _cell(result: Result | None) -> str:
    if result is None:
        return "-"
    value, error = result["value"], result["stderr"]
    share = _is_share(result["metric"])
    shown = f"{100 * value:.2f}" if share else f"{value:.4g}"
    return shown if error is None else f"{shown} ± {100 * error:.2f}" if share else f"{shown} ± {error:.2g}"


def _number(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.2f}" if isinstance(value, float) and value < 1 else f"{value}"


def _is_share(metric: str) -> bool:
    return metric == "mean" or metric.startswith(("acc", "exact_match"))
