"""A study as data: arms that train one target in different ways, at a scale, from seeds; and the runs that stand for them.

           growths[0].at          growths[1].at
base ------------|------ ... -----------|---+-------+-------.      constant rate
                                             \\       \\       \\      annealed branches, one a budget
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from outgrow.arch import arch_for
from outgrow.config import Settings, load, parse, suggestion
from outgrow.data.config import DataConfig
from outgrow.errors import OutgrowError
from outgrow.extensions import own_code
from outgrow.growth.operators import calls_of, operator_of
from outgrow.lab.ancestry import branch_of, in_order, run_of, whole_steps
from outgrow.models.build import ModelConfig
from outgrow.scaling.shapes import with_layers
from outgrow.training.config import OptimizerConfig, RunConfig, ScheduleConfig, Start, first_token


class Scale(Settings):
    """A target, its text and its budgets: what all arms of a study share."""

    model: ModelConfig = Field(description="the target: keys of a Hugging Face config.json")
    data: DataConfig = DataConfig()  # type: ignore[call-arg]
    budgets: tuple[int, ...] = Field(min_length=1, description="tokens of each annealed model, its ancestors' included")
    growth: float = Field(gt=0, lt=1, description="share of the largest budget at which arms grow that do not say when")
    decay_share: float = Field(gt=0, lt=1, description="share of a budget in which the rate falls to zero")
    warmup_tokens: int = Field(ge=0)
    batch_tokens: int = Field(ge=1)
    micro_batch_tokens: int | None = None
    rates: tuple[float, ...] = Field(min_length=3, description="peak learning rates tried for every arm, rising")
    close: float = Field(0.01, ge=0, description="nats within which one seed does not tell rates apart, so that all seeds decide")
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = Field(0.1, ge=0)
    beta2: float = Field(0.95, ge=0, lt=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    validate_every: int = Field(200_000, ge=1)
    save_every: int = Field(1_000_000, ge=1)
    compile: bool = False
    says: str = Field("", description="what a reader should know of this scale")

    @model_validator(mode="after")
    def _rising(self) -> Scale:
        if list(self.rates) != sorted(set(self.rates)) or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError("rates and budgets must rise")
        return self


class Growth(Settings):
    """One growth of an arm."""

    grow: str = Field(description="operators; {num_hidden_layers} and other keys stand for the target's")
    at: float | None = Field(None, ge=0, lt=1, description="share of the arm's largest budget; the scale's growth if not given")
    rate: Literal["restart", "keep", "rewarm-new"] = "restart"
    optimizer: Literal["reset", "carry", "fresh-new"] = "reset"


class Arm(Settings):
    """One way to train a target. Whole numbers, such as sizes and batch_tokens, may be given as shares below 1 of what they would be."""

    says: str = ""
    base: dict[str, float] = Field(default_factory=dict, description="keys of the first model's config where they are not the target's")
    target: dict[str, float] = Field(default_factory=dict, description="keys of the target's config where they are not the scale's")
    growths: tuple[Growth, ...] = Field((), description="in order; shares are of the arm's largest budget")
    late: bool = Field(False, description="growths are at shares of each budget, not of the largest")
    budgets: tuple[float, ...] = Field((), description="budgets as shares of the scale's largest; the scale's if none are given")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings where they are not the scale's: decay_share, ...")
    against: str | None = Field(None, description="the arm it is compared with; 'scratch' if not given")
    paper: float | None = Field(None, description="what arXiv 2405.15319 found for it, in its own measure")
    along: float | None = Field(None, description="where it lies along the study's axis")

    @model_validator(mode="after")
    def _in_order(self) -> Arm:
        told = [growth.at for growth in self.growths if growth.at is not None]
        if told != sorted(set(told)):
            raise ValueError("growths must stand in the order of their 'at', each later than the one before")
        return self


class Study(Settings):
    """A question and the arms that answer it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    asks: str
    arms: dict[str, Arm] = Field(min_length=2)
    axis: str = Field("", description="what `along` of the arms measures")
    paper: str = Field("", description="what `paper` of the arms is")

    @model_validator(mode="after")
    def _compares(self) -> Study:
        for name, arm in self.arms.items():
            if self.against(name) not in self.arms:
                raise ValueError(
                    f"arm '{name}' is compared with '{self.against(name)}', which is no arm{suggestion(self.against(name), self.arms)}"
                )
            if not arm.growths and arm.base:
                raise ValueError(f"arm '{name}' begins as another model and never grows; give 'growths', or 'target' in place of 'base'")
            if shared := sorted({"model", "data", "budgets", "says"} & arm.settings.keys()):
                raise ValueError(f"arm '{name}' sets '{shared[0]}', which all arms share; use the arm's 'target' and 'budgets'")
        return self

    def against(self, name: str) -> str:
        return self.arms[name].against or "scratch"

    def compared_with(self, other: str) -> Study:
        """The same study, with every arm compared with one of them."""
        if other not in self.arms:
            raise OutgrowError(f"'{self.name}' has no arm '{other}'{suggestion(other, self.arms)}")
        return self.model_copy(update={"arms": {name: arm.model_copy(update={"against": other}) for name, arm in self.arms.items()}})


@dataclass(frozen=True)
class Trial:
    """An arm at one seed and one peak learning rate: its constant-rate trunks and its annealed branches, by budget."""

    arm: str
    seed: int
    rate: float
    trunks: dict[int, RunConfig]
    branches: dict[int, RunConfig]

    def runs(self) -> list[RunConfig]:
        """All runs with their ancestors, parents first, each told which checkpoints its children start from."""
        return in_order(self.branches.values())


def open_study(name: str, scale: str, folder: Path = Path("studies")) -> tuple[Study, Scale]:
    """Reads `studies/NAME.yaml` and `studies/scales/SCALE.yaml`; either may be a path instead."""

    def find(text: str, inside: Path) -> Path:
        path = Path(text)
        if path.suffix == ".yaml":
            return path
        known = [one.stem for one in sorted(inside.glob("*.yaml"))]
        if text not in known:
            raise OutgrowError(
                f"there is no '{text}' in '{inside}'{suggestion(text, known) if known else '; run this in a clone, or give a file'}"
            )
        return inside / f"{text}.yaml"

    return load(Study, find(name, folder)), load(Scale, find(scale, folder / "scales"))


def scale_of(arm: Arm, scale: Scale) -> Scale:
    """The scale as an arm has it."""
    return parse(Scale, _edited(scale.model_dump(), arm.settings, "scale"), where="an arm's settings") if arm.settings else scale


def target_of(arm: Arm, scale: Scale) -> dict[str, Any]:
    """The config of the model that an arm trains in the end."""
    return _model(scale.model, arm.target)


def trial(study: Study, scale: Scale, name: str, seed: int, rate: float) -> Trial:
    """The runs of an arm at a seed and a peak learning rate."""
    arm = study.arms[name]
    scale = scale_of(arm, scale)
    budgets = [whole_steps(budget, scale.batch_tokens) for budget in budgets_of(arm, scale)]
    trunks = {budget: _trunk(arm, scale, budget, budgets, _label(name, seed, rate), seed, rate) for budget in budgets}
    # Another study may have this trunk too, and leave it at other budgets of the scale.
    leaves = {_departure(whole_steps(budget, scale.batch_tokens), scale) for budget in scale.budgets}
    trunks = {
        budget: one.model_copy(update={"keep": tuple(sorted(at for at in leaves if first_token(one) <= at <= one.tokens))})
        for budget, one in trunks.items()
    }
    label = _label(name, seed, rate)
    branches = {
        budget: branch_of(trunk, f"{label}-annealed-{budget}", _departure(budget, scale), budget) for budget, trunk in trunks.items()
    }
    return Trial(name, seed, rate, trunks, branches)


def budgets_of(arm: Arm, scale: Scale) -> list[float]:
    """Tokens of an arm's annealed models."""
    return [share * max(scale.budgets) for share in sorted(arm.budgets)] if arm.budgets else list(scale.budgets)


def _trunk(arm: Arm, scale: Scale, budget: int, budgets: list[int], label: str, seed: int, rate: float) -> RunConfig:
    """The constant-rate run from which a budget's branch leaves; one for all budgets where growth does not depend on them."""
    target = target_of(arm, scale)
    model = _model(target, arm.base)
    ends = [budget] if arm.late else budgets
    warm = ScheduleConfig(warmup_tokens=scale.warmup_tokens)  # type: ignore[call-arg]
    clocks = [[_clock(growth, scale, one if arm.late else max(budgets)) for growth in arm.growths] for one in budgets]
    mine = clocks[budgets.index(budget)]
    last = max(_departure(one, scale) for one in ends)
    if mine and mine[-1] >= _departure(min(ends), scale):
        raise OutgrowError(
            f"{label}: it grows at {mine[-1]:,} tokens, and the rate of a budget of {min(ends):,} falls from "
            f"{_departure(min(ends), scale):,} on; grow earlier, or give the arm a smaller decay_share in its settings"
        )
    first_end = max(scale.batch_tokens, max(one[0] for one in clocks)) if mine else last
    run = _run(scale, f"{label}-base" if mine else f"{label}-trunk", seed, rate, first_end, model=model, schedule=warm)
    for number, (growth, clock) in enumerate(zip(arm.growths, mine, strict=True)):
        is_last = number == len(mine) - 1
        end = last if is_last else mine[number + 1]
        operator = _named(growth.grow, target)
        start = Start(
            run=run, tokens=clock, operator=operator, code=own_code(operator), optimizer=growth.optimizer,
            rewarm_tokens=(scale.warmup_tokens or None) if growth.rate == "rewarm-new" else None,
        )  # fmt: skip
        schedule = warm if growth.rate == "restart" else ScheduleConfig()  # type: ignore[call-arg]
        ending = (f"-trunk-{budget}" if arm.late else "-trunk") if is_last else f"-stage{number + 2}"
        run = _run(scale, label + ending, seed, rate, end, start=start, schedule=schedule)
    return run


def _run(scale: Scale, name: str, seed: int, rate: float, tokens: int, **begun: Any) -> RunConfig:
    optimizer = OptimizerConfig(learning_rate=rate, weight_decay=scale.weight_decay, beta2=scale.beta2, kind=scale.optimizer)  # type: ignore[call-arg]
    return run_of(scale, name=name, tokens=tokens, optimizer=optimizer, seed=seed, **begun)


def _label(name: str, seed: int, rate: float) -> str:
    return f"{name}-rate{rate:g}-seed{seed}"


def _model(config: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config with some keys changed, and its tables of layers cut to its depth."""
    edited = _edited(config, edits, "model")
    return with_layers(edited, arch_for(edited).layers(edited)) if edits else edited


def _named(operators: str, target: Mapping[str, Any]) -> str:
    """Operators with the target's keys in place of their names in braces."""
    try:
        named = operators.format(**target)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise OutgrowError(
            f"'{operators}' has braces around what is no key of the target ({error}); write one, such as {{num_hidden_layers}}"
        ) from None
    for name, _ in calls_of(named):
        operator_of(name)
    return named


def _edited(known: Mapping[str, Any], edits: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """Settings with some of them changed; a whole number by a share below 1 of it, or by another."""
    changed = dict(known)
    for key, value in edits.items():
        if key not in known:
            raise OutgrowError(f"the {whose} has no '{key}'{suggestion(key, known)}")
        if isinstance(known[key], int) and isinstance(value, (int, float)):
            whole = value * known[key] if 0 < value < 1 else value
            if abs(whole - round(whole)) > 1e-9:
                raise OutgrowError(
                    f"{value:g} of the {whose}'s {key} ({known[key]}) is {whole:g}, not a whole number; choose another share"
                )
            value = round(whole)
        changed[key] = value
    return changed


def _clock(growth: Growth, scale: Scale, budget: int) -> int:
    return round((scale.growth if growth.at is None else growth.at) * budget / scale.batch_tokens) * scale.batch_tokens


def _departure(budget: int, scale: Scale) -> int:
    return whole_steps((1 - scale.decay_share) * budget, scale.batch_tokens)
