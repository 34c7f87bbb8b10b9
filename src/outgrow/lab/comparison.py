"""Growth against scratch: the runs that a comparison stands for, and what they show.

                 growth_tokens
    base    ------------|                                        constant rate
    target              '----+-------+-------.                   grown; warm-up; constant rate
                              \\       \\       \\                   annealed branches, one per budget
    scratch --------+-------+-------.                             constant rate
                     \\       \\       \\                            annealed branches, same budgets

Both trunks read the same tokens in the same order. A branch leaves its trunk at (1 - decay_share) of its budget with the
optimizer's state and decays linearly, so annealed loss is compared with annealed loss at several costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from outgrow.arch import arch_for
from outgrow.config import Settings
from outgrow.data.config import DataConfig
from outgrow.lab.ancestry import branch_of, run_of, whole_steps
from outgrow.models.build import ModelConfig
from outgrow.scaling.shapes import with_layers
from outgrow.training.config import EvaluateConfig, OptimizerConfig, RunConfig, ScheduleConfig, Start

Arm = Literal["scratch", "grown"]


class LearningRates(Settings):
    """The peak of each arm, found by the sweep that the comparison names."""

    base: float = Field(gt=0)
    target: float = Field(gt=0)
    scratch: float = Field(gt=0)


class Comparison(Settings):
    """A target model, how it is grown, and the budgets at which it meets the same model from scratch."""

    model: ModelConfig = Field(description="the target: keys of a Hugging Face config.json")
    data: DataConfig = DataConfig()  # type: ignore[call-arg]
    factor: int = Field(4, ge=2, description="growth factor g of G_stack; the base has 1/g of the layers")
    growth_tokens: int = Field(ge=1, description="tokens of the base, d")
    budgets: tuple[int, ...] = Field(min_length=1, description="tokens of each annealed model, its ancestors' included")
    decay_share: float = Field(0.2, gt=0, lt=1, description="share of a budget in which the learning rate falls")
    warmup_tokens: int = Field(ge=0, description="linear warm-up of scratch and base, and of the target after growth")
    batch_tokens: int = Field(4096, ge=1)
    learning_rates: LearningRates
    weight_decay: float = Field(0.1, ge=0)
    beta2: float = Field(0.95, ge=0, lt=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    validate_every: int = Field(200_000, ge=1)
    save_every: int = Field(1_000_000, ge=1)
    evaluate: EvaluateConfig | None = Field(None, description="tasks to run on the way, for the speed-up at equal accuracy")
    tuning: str | None = Field(None, description="file beside this one with what was tried to find its settings")

    @model_validator(mode="after")
    def _fits(self) -> Comparison:
        layers = arch_for(self.model).layers(self.model)
        if layers % self.factor:
            raise ValueError(f"the target's {layers} layers are not a multiple of the growth factor {self.factor}; change either")
        first = min(self._departure(budget) for budget in self.budgets)
        if self.growth_tokens >= first:
            raise ValueError(
                f"growth_tokens ({self.growth_tokens:,}) is not before the first decay, which starts at {first:,}; "
                "lower growth_tokens or raise the smallest budget"
            )
        return self

    def base_model(self) -> dict[str, Any]:
        """The target's config with 1/g of the layers."""
        return with_layers(self.model, arch_for(self.model).layers(self.model) // self.factor)

    def trunk(self, arm: Arm, seed: int) -> RunConfig:
        """The constant-rate run of an arm, long enough for its largest budget."""
        end = max(self._departure(budget) for budget in self.budgets)
        if arm == "scratch":
            return self._run("scratch", seed, self.learning_rates.scratch, end, model=self.model)
        base = self.base(seed)
        grown = Start(run=base, operator="stack", knobs={"factor": self.factor})
        keep = (base.tokens,)  # so that copies can be followed from the instant of growth
        return self._run("target", seed, self.learning_rates.target, end, start=grown, keep=keep)

    def base(self, seed: int) -> RunConfig:
        """The small model that is grown."""
        tokens = whole_steps(self.growth_tokens, self.batch_tokens)
        return self._run("base", seed, self.learning_rates.base, tokens, model=self.base_model())

    def branch(self, arm: Arm, seed: int, budget: int) -> RunConfig:
        """The annealed end of an arm at a budget."""
        trunk = self.trunk(arm, seed)
        departure, end = self._departure(budget), whole_steps(budget, self.batch_tokens)
        return branch_of(trunk, f"{arm}-annealed-{end}-seed{seed}", departure, end)

    def runs(self, seeds: tuple[int, ...]) -> Iterator[RunConfig]:
        """Every run whose result is read, seed by seed; their parents are implied."""
        for seed in seeds:
            for arm in ("grown", "scratch"):
                for budget in self.budgets:
                    yield self.branch(arm, seed, budget)

    def _run(self, name: str, seed: int, rate: float, tokens: int, **settings: Any) -> RunConfig:
        optimizer = OptimizerConfig(learning_rate=rate, weight_decay=self.weight_decay, beta2=self.beta2)  # type: ignore[call-arg]
        settings.setdefault("schedule", ScheduleConfig(warmup_tokens=self.warmup_tokens))  # type: ignore[call-arg]
        return run_of(self, name=f"{name}-seed{seed}", tokens=tokens, optimizer=optimizer, seed=seed, **settings)

    def _departure(self, budget: int) -> int:
        """The clock at which a budget's branch leaves its trunk."""
        return whole_steps(budget * (1 - self.decay_share), self.batch_tokens)
