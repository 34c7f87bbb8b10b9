"""A recipe: the stages of one run, each trained for so many tokens and grown into the next, with annealed branches off the trunk.

Stages and branches become `RunConfig`s that start from one another, so that everything known of runs holds for them: identity,
resuming, lineage, FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from outgrow.config import Settings, parse, read_yaml, suggestion, told
from outgrow.data.config import DataConfig
from outgrow.errors import OutgrowError, one_line
from outgrow.extensions import own_code
from outgrow.lab.ancestry import branch_of, run_of
from outgrow.models.build import ModelConfig
from outgrow.training.config import EvaluateConfig, LearnConfig, OptimizerConfig, RunConfig, ScheduleConfig, SpikeConfig, Start
from outgrow.training.schedule import share_of_peak


class Stage(Settings):
    """A part of the run: grown first, unless it is the first, then trained."""

    tokens: int = Field(ge=1, description="trained in this stage")
    grow: str | None = Field(None, description="growth operators, such as 'stack(factor=4)'")
    learning_rate: float | None = Field(None, gt=0, description="peak of this stage; optimizer.learning_rate if not given")
    rate: Literal["restart", "keep", "rewarm-new"] = Field(
        "restart",
        description="the learning rate at growth: its schedule begins anew with its warm-up, as in the paper; or goes on; or goes on and "
        "rises from zero for what is new",
    )
    optimizer: Literal["reset", "carry", "fresh-new"] = Field("reset", description="the optimizer's state at growth")
    learn: LearnConfig | None = Field(None, description="how learn-depth and learn-width train their maps; 100 steps if not given")
    unmask_tokens: int | None = Field(None, ge=1, description="tokens over which masks open; a tenth of the stage if not given")


class Branch(Settings):
    """A short decayed run off the trunk, so that annealed loss can be read where the trunk's rate is still high."""

    at: int = Field(ge=1, description="clock at which it leaves the trunk")
    tokens: int = Field(ge=1, description="of linear decay to zero")


class Recipe(Settings):
    """Stages of one run. Tokens are counted over all stages; a grown model reads on where its base stopped."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    model: ModelConfig = Field(description="of the first stage: keys of a Hugging Face config.json")
    data: DataConfig = DataConfig()  # type: ignore[call-arg]
    stages: tuple[Stage, ...] = Field(min_length=1)
    branches: tuple[Branch, ...] = ()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()  # type: ignore[call-arg]
    batch_tokens: int = Field(4096, ge=1)
    micro_batch_tokens: int | None = Field(None, ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = Field(0, ge=0)
    validate_every: int = Field(200_000, ge=1)
    save_every: int = Field(1_000_000, ge=1)
    keep_last: int = Field(1, ge=1)
    evaluate: EvaluateConfig | None = None
    spike: SpikeConfig = SpikeConfig()  # type: ignore[call-arg]
    compile: bool = False
    recompute: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if wrong := list(self._problems()):
            raise ValueError("; ".join(wrong))
        return self

    def _problems(self) -> Iterator[str]:
        """What does not go together, a sentence each."""
        if self.stages[0].grow:
            yield "the first stage grows nothing, since nothing is there yet; leave its 'grow' out"
        for name in sorted(Stage.model_fields.keys() - {"tokens", "grow", "learning_rate"}):
            if getattr(self.stages[0], name) != Stage.model_fields[name].default:
                yield f"stages.0.{name} has no effect, since the first stage grows nothing; remove it"
        for number, stage in enumerate(self.stages, 1):
            if number > 1 and not stage.grow:
                yield f"stage {number} says nothing about how it grows; give 'grow', or add its tokens to the stage before"
            if stage.tokens % self.batch_tokens:
                yield f"stage {number} of {stage.tokens:,} tokens is no multiple of batch_tokens ({self.batch_tokens:,})"
            if number > 1 and stage.rate == "rewarm-new" and not self.schedule.warmup_tokens:
                yield f"stage {number} warms up what is new, and schedule.warmup_tokens is 0; give it, or let 'rate' be 'keep'"
        if self.schedule.begin is not None:
            yield "schedule.begin has no meaning in a recipe, whose stages say by 'rate' where the schedule begins; remove it"
        for branch in self.branches:
            if branch.at % self.batch_tokens or branch.tokens % self.batch_tokens or branch.at > self.tokens:
                yield (
                    f"a branch of {branch.tokens:,} tokens at {branch.at:,} must have multiples of batch_tokens ({self.batch_tokens:,}) "
                    f"and leave the trunk before its end ({self.tokens:,})"
                )
            elif reason := self._unready(branch):
                yield f"a branch leaves the trunk at {branch.at:,} tokens, where {reason}; branches leave it at its full rate"

    def _unready(self, branch: Branch) -> str:
        """Why the trunk has not its full rate where a branch leaves it; empty where it has."""
        stages = zip(self.stages, self._begins(), strict=True)
        stage, begun = next((stage, begun) for stage, begun in stages if branch.at <= begun + stage.tokens)
        share = share_of_peak(self._schedule(begun), branch.at, 0, begun, self.tokens)
        if share < 1:
            return f"its learning rate is {share:.3g} of its peak"
        if stage.rate == "rewarm-new" and stage.grow and branch.at < begun + self.schedule.warmup_tokens:
            return "what is new still warms up"
        return ""

    @property
    def tokens(self) -> int:
        """Of all stages."""
        return sum(stage.tokens for stage in self.stages)

    def trunk(self) -> list[RunConfig]:
        """One run a stage, each starting from the one before."""
        runs: list[RunConfig] = []
        for number, (stage, begin) in enumerate(zip(self.stages, self._begins(), strict=True), 1):
            begun: dict[str, Any] = {"start": self._growth(runs[-1], stage)} if runs else {"model": self.model}
            name = self.name if len(self.stages) == 1 else f"{self.name}-stage{number}"
            runs.append(self._run(name, begin + stage.tokens, stage, self._schedule(begin), **begun))
        return runs

    def _begins(self) -> list[int]:
        """The clock at which each stage begins."""
        return list(accumulate((stage.tokens for stage in self.stages[:-1]), initial=0))

    def runs(self) -> list[RunConfig]:
        """The trunk's stages and the branches."""
        trunk = self.trunk()
        return [*trunk, *(self._branch(trunk, branch) for branch in self.branches)]

    def _branch(self, trunk: list[RunConfig], branch: Branch) -> RunConfig:
        run = next(run for run in trunk if branch.at <= run.tokens)
        end = branch.at + branch.tokens
        return branch_of(run, f"{self.name}-annealed-{end}", branch.at, end)

    def _growth(self, before: RunConfig, stage: Stage) -> Start:
        warm = self.schedule.warmup_tokens if stage.rate == "rewarm-new" else 0
        return Start(
            run=before, operator=stage.grow, optimizer=stage.optimizer, rewarm_tokens=warm or None, learn=stage.learn,
            unmask_tokens=stage.unmask_tokens, code=own_code(stage.grow) if stage.grow else None,
        )  # fmt: skip

    def _schedule(self, begin: int) -> ScheduleConfig:
        """The whole recipe's schedule as the stage that begins at a clock sees it.

        It begins with the last stage that restarted it, or the first, and ends with the recipe. Where `schedule.end` says how far off its
        end lies, a restart moves that too.
        """
        restarts = [at for at, one in zip(self._begins(), self.stages, strict=True) if at <= begin and (at == 0 or one.rate == "restart")]
        began, length = restarts[-1], self.schedule.end
        end = began + length if length else self.tokens
        return self.schedule.model_copy(update={"end": end, "begin": None if began == begin else began})

    def _run(self, name: str, tokens: int, stage: Stage, schedule: ScheduleConfig, **begun: Any) -> RunConfig:
        rate = stage.learning_rate or self.optimizer.learning_rate
        optimizer = self.optimizer.model_copy(update={"learning_rate": rate})
        return run_of(self, name=name, tokens=tokens, optimizer=optimizer, schedule=schedule, **begun)


SHIPPED = Path(str(resources.files("outgrow.lab"))) / "recipes"


def read_runs(path: Path, changes: list[str]) -> list[RunConfig]:
    """The runs of a file: a recipe of stages, or one run.

    Args:
        path: YAML, or the name of a recipe that comes with outgrow, such as `7b-grown`.
        changes: `a.b=value` settings that stand in for the file's, such as `optimizer.learning_rate=0.001` or `stages.1.tokens=4096`.
    """
    path = find_recipe(path)
    content = read_yaml(path)
    for change in changes:
        content = changed(content, change)
    if "stages" in content:
        recipe = parse(Recipe, content, where=f"'{path}'")
        with told(RunConfig, f"'{path}'"):
            runs = recipe.runs()
    else:
        runs = [parse(RunConfig, _with_code(content), where=f"'{path}'")]
    end = max(run.tokens for run in runs)
    if late := [clock for run in runs if run.evaluate for clock in run.evaluate.at if clock > end]:
        raise OutgrowError(f"'{path}': evaluate.at names {late[0]:,} tokens, which lie beyond the end ({end:,}); remove it")
    return runs


def _with_code(content: Any) -> Any:
    """The settings of a run with the hash of the Python of its operators, and of its ancestors'."""
    start = content.get("start") if isinstance(content, dict) else None
    if not isinstance(start, dict):
        return content
    operator = start.get("operator")
    code = {"code": own_code(operator)} if isinstance(operator, str) else {}
    return {**content, "start": {**start, **code, **({"run": _with_code(start["run"])} if "run" in start else {})}}


def find_recipe(path: Path) -> Path:
    """A file, or the one of a recipe's name that comes with outgrow; a path from anywhere."""
    shipped = SHIPPED / f"{path}.yaml"
    if shipped.is_file() and not path.is_file():
        return shipped
    if not path.exists() and path.name == str(path) and not path.suffix:  # a name, and not a path
        names = sorted(one.stem for one in SHIPPED.glob("*.yaml") if "stages" in one.read_text(encoding="utf-8"))
        raise OutgrowError(f"there is no file '{path}', and no recipe of that name comes with outgrow" + suggestion(str(path), names))
    return path.absolute()


def changed(content: Any, change: str) -> Any:
    """Settings with one of them set, `a.b=value`, the value as YAML has it."""
    name, equals, text = change.partition("=")
    if not equals or not name:
        raise OutgrowError(f"--set takes NAME=VALUE, such as optimizer.learning_rate=0.001, not '{change}'")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise OutgrowError(f"--set {name}: '{text}' is not YAML: {one_line(error)}") from None
    return _with(content, name.split("."), value, name)


def _with(content: Any, path: list[str], value: Any, name: str) -> Any:
    if not path:
        return value
    head, *rest = path
    if isinstance(content, list):
        if not head.isdigit() or int(head) >= len(content):
            raise OutgrowError(f"--set {name}: '{head}' is not one of the {len(content)} entries, counted from 0")
        return [_with(one, rest, value, name) if place == int(head) else one for place, one in enumerate(content)]
    if content is not None and not isinstance(content, Mapping):
        raise OutgrowError(f"--set {name}: there is nothing under '{content}'")
    known = dict(content or {})
    return {**known, head: _with(known.get(head), rest, value, name)}
