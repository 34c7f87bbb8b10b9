"""Which tasks are run and what is read off them: presets that come with outgrow, task names, or a user's file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from outgrow.config import Settings, parse, read_yaml, suggestion
from outgrow.errors import OutgrowError, one_line

PRESETS = Path(str(resources.files("outgrow.evaluation"))) / "presets.yaml"
FILE_ENDINGS = (".yaml", ".yml")


class TaskChoice(Settings):
    """A task of lm-evaluation-harness, and the metric that counts."""

    task: str = Field(min_length=1, description="its name there, or the YAML file of a task, beside the suite's file")
    metric: str | None = Field(None, description="acc, acc_norm, word_perplexity, ...; the task's first if not given")
    shots: int | None = Field(None, ge=0, description="solved examples shown before each question; the task's own if not given")

    @property
    def name(self) -> str:
        """What the task is called in tables and averages."""
        return Path(self.task).stem if self.task.endswith(FILE_ENDINGS) else self.task


class Reference(Settings):
    """Somebody else's results, printed beside; nothing is worked out from them."""

    source: str
    rows: tuple[dict[str, str | float], ...] = Field(description="name, and the value of a task's metric or of an average")


class Suite(Settings):
    """Tasks that are run together, the averages over them, and results to print beside."""

    tasks: tuple[TaskChoice, ...] = Field(min_length=1)
    averages: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="name -> the tasks whose metric is averaged")
    reference: Reference | None = None

    @field_validator("tasks", mode="before")
    @classmethod
    def _names_alone(cls, tasks: Any) -> Any:
        return [{"task": one} if isinstance(one, str) else one for one in tasks] if isinstance(tasks, (list, tuple)) else tasks

    @model_validator(mode="after")
    def _averages_are_of_tasks(self) -> Suite:
        names = [task.name for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the task '{twice[0]}' is named twice; name it once")
        for average, parts in self.averages.items():
            if unknown := [part for part in parts if part not in names]:
                raise ValueError(f"averages.{average} names '{unknown[0]}', which is not among the tasks{suggestion(unknown[0], names)}")
        return self


def read_suite(text: str) -> Suite:
    """The suite that `--tasks` and `evaluate.tasks` name.

    Args:
        text: a preset (`paper8`, `paper-7b`, `code`), task names or task files with commas between, a suite's YAML file, or a directory
            with a `suite.yaml`, as 'outgrow data tasks' writes it.

    Raises:
        OutgrowError: there is no such file, or it is no suite.
    """
    if text in presets():
        return presets()[text]
    place = Path(text)
    if place.is_dir():
        place = place / "suite.yaml"
    alone = place.is_file() or "," not in text
    if (text.endswith(FILE_ENDINGS) and alone) or place.name == "suite.yaml":
        content = read_task_file(place)
        if not isinstance(content.get("task"), str) and "group" not in content:
            return _beside(parse(Suite, content, where=f"'{place}'"), place.parent)
    known = {task.task: task for suite in presets().values() for task in suite.tasks}
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise OutgrowError(f"--tasks takes {', '.join(presets())}, names with commas between, or a YAML file, not '{text}'")
    found: list[TaskChoice] = []
    averages: dict[str, tuple[str, ...]] = {}
    for name in names:  # a preset may stand among names
        part = presets().get(name) or Suite(tasks=(known.get(name) or TaskChoice(task=name, metric=None, shots=None),))
        found += [choice for choice in part.tasks if choice not in found]
        averages |= part.averages
    return parse(Suite, {"tasks": found, "averages": averages}, where=f"--tasks {text}")


def presets() -> Mapping[str, Suite]:
    """Name -> suite, of those that come with outgrow."""
    return {name: parse(Suite, content, where=f"'{PRESETS}'") for name, content in read_yaml(PRESETS).items()}


def read_task_file(path: Path) -> dict[str, Any]:
    """A YAML file of a task or suite; `!function` is read as its text, and nothing is called."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise OutgrowError(f"there is no file '{path}'") from None
    except UnicodeDecodeError:
        raise OutgrowError(f"'{path}' is not text; tasks and suites are YAML files") from None
    try:
        content = yaml.load(text, Loader=_Plain)
    except yaml.YAMLError as error:
        raise OutgrowError(f"'{path}' is not YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise OutgrowError(f"'{path}' is neither a suite, with 'tasks', nor a task of lm-evaluation-harness")
    return content


class Code(str):
    """The text of a `!function`, which names Python."""


class _Plain(yaml.SafeLoader):
    """Reads `!function` as its text."""


_Plain.add_constructor("!function", lambda loader, node: Code(node.value))


def needs_made(suite: Suite) -> bool:
    """Does a suite name tasks that are made of a corpus on this machine?"""
    own = {task.name for task in presets()["code"].tasks}
    return any(task.task in own for task in suite.tasks)


def _beside(suite: Suite, folder: Path) -> Suite:
    """A suite with its task files found beside its own file."""
    tasks = [
        task.model_copy(update={"task": str(folder / task.task)}) if task.task.endswith(FILE_ENDINGS) else task for task in suite.tasks
    ]
    return suite.model_copy(update={"tasks": tuple(tasks)})
