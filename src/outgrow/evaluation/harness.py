"""lm-evaluation-harness on an opened model: tasks are loaded once, then each is run and its numbers read off."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import random
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from outgrow.config import suggestion
from outgrow.errors import OutgrowError, one_line
from outgrow.evaluation.local_tasks import files_hash, read_task
from outgrow.evaluation.model import Opened
from outgrow.evaluation.suite import FILE_ENDINGS, Code, Suite, TaskChoice, read_task_file

CONVERTED = "refs/convert/parquet"  # the hub's own conversion of a data set, a branch of it
SHOTS_SEED = 1234  # of the examples shown, the harness's own
RESAMPLES = 1000  # of the bootstrap, for the few metrics whose standard error has no formula
_RATIOS = ("word_perplexity", "byte_perplexity", "bits_per_byte")  # of sums over documents: (log-likelihood, words or bytes)
_PERPLEXITIES = ("word_perplexity", "byte_perplexity")


@dataclass(frozen=True)
class Loaded:
    """A task ready to be run, on any number of models.

    Attributes:
        choice: what was asked for.
        name: of the task or group in the harness.
        tasks: what the harness loaded, tasks and groups.
        data: a hash of its own files, for a task of files on this machine.
    """

    choice: TaskChoice
    name: str
    tasks: Any
    data: str | None


def require() -> None:
    """Refuses to begin without the harness."""
    if not find_spec("lm_eval"):
        raise OutgrowError("running tasks needs 'lm_eval', which is not installed; pip install 'outgrow[eval]'")


def version() -> str:
    """The harness's own, which decides what a task asks."""
    from importlib.metadata import version as installed

    return installed("lm_eval")


def load_tasks(suite: Suite, made: Path | None, trust_code: bool = False) -> list[Loaded]:
    """The tasks of a suite, their data sets opened; downloaded where that can be done.

    Args:
        suite: which.
        made: a directory that `local_tasks` wrote, where the tasks named `code_...` are found.
        trust_code: task files may run Python that lies beside them.

    Raises:
        OutgrowError: an unknown task, a data set that cannot be had, a task file with code in it.
    """
    require()
    files = [_file(choice, made) for choice in suite.tasks]
    with quiet():
        from lm_eval.tasks import TaskManager

        _bound_templates()
        manager = TaskManager(include_defaults=not all(files))  # reading the thousands that come with it takes ten seconds
        return [_load(manager, choice, file, trust_code) for choice, file in zip(suite.tasks, files, strict=True)]


def run_task(loaded: Loaded, opened: Opened, limit: int | None, batch_size: int) -> dict[str, Any]:
    """What a model gets: the metric that counts, its standard error, and every other number of the task.

    Returns:
        metric, value, stderr (None where there is none), samples, shots (a number, or task -> number where those of a group differ),
        prefix (the token before a text), all (metric -> value).
    """
    with quiet(), no_randomness_used():
        from jinja2 import TemplateError
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        language_model: Any = HFLM  # its decorators hide its arguments from type checkers
        lm = language_model(
            pretrained=opened.model, tokenizer=opened.tokenizer, backend="causal", batch_size=batch_size, max_length=opened.context,
            prefix_token_id=opened.prefix, add_bos_token=False if opened.trained else None,
        )  # fmt: skip
        for task in loaded.tasks["tasks"].values():
            own = task.get_config("num_fewshot") or 0
            task.set_config(key="num_fewshot", value=own if loaded.choice.shots is None else loaded.choice.shots)
            task.set_fewshot_seed(seed=SHOTS_SEED)
        try:
            found: Any = evaluate(lm=lm, task_dict=loaded.tasks, limit=limit, bootstrap_iters=RESAMPLES, log_samples=True)
        except TemplateError as error:
            raise OutgrowError(f"the task '{loaded.choice.name}' has a template that cannot be filled: {error}") from None
    assert found is not None
    numbers = {key.removesuffix(",none"): value for key, value in found["results"][loaded.name].items() if isinstance(value, (int, float))}
    samples = [sample for one in found.get("samples", {}).values() for sample in one]
    numbers |= _ratio_errors(samples, numbers)
    values = {key: float(value) for key, value in numbers.items() if "_stderr" not in key and key not in ("sample_len", "sample_count")}
    metric = metric_of(loaded.choice, values)
    error = numbers.get(error_of(metric))
    counted = found.get("n-samples", {})
    shots = {name: task.get_config("num_fewshot") for name, task in loaded.tasks["tasks"].items()}
    return {
        "metric": metric,
        "value": values[metric],
        "stderr": float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None,
        "samples": sum(one["effective"] for one in counted.values()),
        "shots": shots if len(set(shots.values())) > 1 else next(iter(shots.values())),
        "prefix": opened.tokenizer.convert_ids_to_tokens(opened.prefix),
        "all": {key: float(value) for key, value in numbers.items() if key not in ("sample_len", "sample_count")},
    }


def metric_of(choice: TaskChoice, values: Collection[str]) -> str:
    """The metric of a task that counts, among those that it has.

    Raises:
        OutgrowError: the task has not the one that is asked for.
    """
    wanted = choice.metric or next((name for name in ("acc", "exact_match", "word_perplexity") if name in values), next(iter(values), ""))
    for name in values:
        if name == wanted or name.startswith(f"{wanted},"):
            return name
    raise OutgrowError(f"the task '{choice.name}' has no metric '{wanted}'; it has {', '.join(values)}")


def error_of(metric: str) -> str:
    """The name of a metric's standard error."""
    name, comma, filtered = metric.partition(",")
    return f"{name}_stderr{comma}{filtered}"


def _ratio_errors(samples: Sequence[dict[str, Any]], numbers: dict[str, Any]) -> dict[str, float]:
    """Standard errors, over documents, of metrics that are f(sum of log-likelihoods / sum of words or bytes), by the delta method."""
    found: dict[str, float] = {}
    for name in _RATIOS:
        pairs = np.array([sample[name] for sample in samples if isinstance(sample.get(name), (tuple, list))], dtype=float)
        if name in numbers and len(pairs) > 1:
            error = ratio_error(-pairs[:, 0], pairs[:, 1])
            found[f"{name}_stderr"] = error * numbers[name] if name in _PERPLEXITIES else error / math.log(2)
    return found


def ratio_error(upper: Any, lower: Any) -> float:
    """The standard error of sum(upper) / sum(lower) over n independent pairs, to first order."""
    ratio, count = upper.sum() / lower.sum(), len(upper)
    return float(math.sqrt(((upper - ratio * lower) ** 2).sum() * count / (count - 1)) / lower.sum())


def _file(choice: TaskChoice, made: Path | None) -> Path | None:
    if choice.task.endswith(FILE_ENDINGS):
        return Path(choice.task)
    own = made / f"{choice.task}.yaml" if made else None
    return own if own and own.is_file() else None


def _load(manager: Any, choice: TaskChoice, file: Path | None, trust_code: bool) -> Loaded:
    spec: Any = choice.task
    files, code = list[Path](), None
    if file:
        if not file.is_file():
            raise OutgrowError(f"there is no task file '{file}'")
        spec, files = read_task(file)
        if isinstance(spec.get("task"), list):
            raise OutgrowError(f"'{file}' is a group, which the harness takes by name alone; write its tasks in a suite, under 'tasks'")
        code = next((one for one in files if one.suffix in FILE_ENDINGS and _runs_code(read_task_file(one))), None)
        if code and not trust_code:
            raise OutgrowError(
                f"'{code}' runs Python of its own (!function, class, unsafe_code or a metric that the harness does not have); read it, and "
                "allow it with --trust-code"
            )
        if code:
            files += sorted({python for one in files for python in one.parent.glob("*.py")})
    try:
        loaded = _loaded(manager, _with_functions(file, spec) if file and code else spec)
    except KeyError as error:
        if file:
            raise OutgrowError(f"the task file '{file}' cannot be loaded: its data has no {error}") from None
        if choice.task in manager.all_tasks:
            raise OutgrowError(f"the task '{choice.name}' cannot be loaded: {error}") from None
        near = suggestion(choice.task, manager.all_tasks, "; 'lm_eval ls tasks' prints all that there are")
        raise OutgrowError(f"there is no task '{choice.task}'{near}") from None
    except Exception as error:  # the hub's, the network's and the data set's own classes
        if file:
            why = "its data is empty" if isinstance(error, StopIteration) else one_line(error.__cause__ or error)
            raise OutgrowError(f"the task file '{file}' cannot be loaded: {why}") from None
        raise _no_data(manager, choice, error) from None
    groups, tasks = loaded["groups"], loaded["tasks"]
    if not groups and len(tasks) > 1:
        raise OutgrowError(f"'{choice.task}' is a tag of {len(tasks)} tasks ({', '.join(tasks)}); name those that are meant")
    return Loaded(choice, next(iter(groups or tasks)), loaded, files_hash(files) if file else None)


def _with_functions(file: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """A task file's settings as the harness reads them, with the functions that they name, but with the data where we found it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(file) | ({"dataset_kwargs": content["dataset_kwargs"]} if "dataset_kwargs" in content else {})


def _loaded(manager: Any, spec: Any) -> Any:
    """What the harness loads. A data set that is a script, which `datasets` runs no more, is read as the hub has converted it."""
    try:
        return manager.load([spec])
    except RuntimeError as error:
        entry = manager.task_index.get(spec) if isinstance(spec, str) else None
        if entry is None or "scripts are no longer supported" not in str(error):
            raise
    converted: dict[str, Any] = {"dataset_kwargs": {"revision": CONVERTED}}
    try:
        return manager.load([{"task": spec, **converted}])
    except ValueError:  # the conversion calls the only part of a data set 'default'
        return manager.load([{"task": spec, "dataset_name": "default", **converted}])


def _runs_code(settings: Any) -> bool:
    """Would the harness run Python that is not its own for these settings of a task?"""
    from lm_eval.api.metrics import mean  # noqa: F401  # fills the registry
    from lm_eval.api.registry import metric_registry

    if isinstance(settings, dict):
        unknown = isinstance(metric := settings.get("metric"), str) and metric not in metric_registry
        asked = "class" in settings or settings.get("unsafe_code") or settings.get("hf_evaluate")
        return bool(unknown or asked or any(_runs_code(value) for value in settings.values()))
    return isinstance(settings, Code) or (isinstance(settings, list) and any(map(_runs_code, settings)))


def _bound_templates() -> None:
    """Templates of tasks fill holes in text; the harness's own environment would let them reach Python."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        bound = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=utils.env.keep_trailing_newline)
        bound.filters.update(utils.env.filters)
        utils.env = bound


def _no_data(manager: Any, choice: TaskChoice, error: Exception) -> OutgrowError:
    said = re.search(r"'([\w.-]+/[\w.-]+)'", str(error))
    entry = manager.task_index.get(choice.task)
    name = (entry.cfg or {}).get("dataset_path") if entry else None
    name = name or (said[1] if said else None)
    reason = one_line(error)
    if not name:
        return OutgrowError(f"the task '{choice.name}' cannot be loaded: {reason}")
    return OutgrowError(
        f"the data set '{name}' of the task '{choice.name}' is not on this machine, and the hub does not give it ({reason}); run the same "
        "command once where there is a network, copy its HF_HOME here and set HF_HUB_OFFLINE=1 and HF_DATASETS_OFFLINE=1, or use --tasks "
        "code, which needs none"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The harness and what it imports speak to nobody; its progress bars only to a terminal."""
    names = ("lm_eval", "huggingface_hub", "datasets", "transformers", "httpx", "evaluate")
    levels = {name: logging.getLogger(name).level for name in names}
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a bootstrap forks
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def no_randomness_used() -> Iterator[None]:
    """Whatever is drawn or seeded inside, the generators of torch, numpy and Python stand afterwards where they stood."""
    state, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)
