"""What a run is: every setting that changes its result, its parents included."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from outgrow.checkpoint.lineage import read_lineage
from outgrow.config import Settings, later
from outgrow.data.config import DataConfig
from outgrow.models.build import ModelConfig


class OptimizerConfig(Settings):
    """AdamW (arXiv 1711.05101), or Muon on the matrices of blocks with AdamW on the rest; weight decay on matrices only.

    Muon's updates have the size of AdamW's (arXiv 2502.16982), so that one learning rate serves both.
    """

    learning_rate: float = Field(gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the whole gradient")
    kind: Literal["adamw", "muon"] = later("adamw", "muon: Muon on the matrices of blocks, AdamW on the rest")
    momentum: float = later(0.95, "Muon's", ge=0, lt=1)
    tuned_at: dict[str, PositiveInt] | None = later(
        None, "sizes of spaces, such as hidden and ffn, at which learning_rate was tuned: matrices take the share of it that muP says"
    )


class ScheduleConfig(Settings):
    """The learning rate over the tokens of this run, or from `begin` to `end`, as a share of its peak."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_tokens: int = Field(0, ge=0)
    decay_tokens: int = Field(0, ge=0, description="wsd: length of the linear decay at the end")
    final: float = Field(0.0, ge=0, le=1, description="share of the peak that the decay ends at")
    begin: int | None = later(None, "clock at which the schedule begins; the run's first token if not given", ge=0)
    end: int | None = later(None, "clock at which the decay ends; the run's last token if not given", ge=1)

    @model_validator(mode="after")
    def _decay_is_used(self) -> ScheduleConfig:
        if self.decay_tokens and self.kind != "wsd":
            raise ValueError(f"schedule.decay_tokens has no effect with schedule.kind '{self.kind}'; remove it or use 'wsd'")
        return self


class LearnConfig(Settings):
    """How the maps of G_learn are trained, with the base frozen, before they are fused (LiGO, arXiv 2303.00980)."""

    steps: int = Field(100, ge=1)
    batch_tokens: int = Field(4096, ge=1, description="tokens per step")
    learning_rate: float = Field(1e-3, gt=0)


class Start(Settings):
    """Where a run's first weights come from, if not from a seed: another run, or a Hugging Face directory.

    With `operator` they are grown first. The optimizer's state is reset, or carried: moved as the weights are in growth,
    by `fresh-new` only to what was there before.
    """

    run: RunConfig | None = None
    tokens: int | None = Field(default=None, ge=0, description="the parent's clock at which it is left; its end if not given")
    checkpoint: str | None = None
    operator: str | None = None
    knobs: dict[str, Any] = Field(default_factory=dict)
    optimizer: Literal["reset", "carry", "fresh-new"] = "reset"
    learn: LearnConfig | None = later(None, "how learn-depth and learn-width train their maps; 100 steps if not given")
    unmask_tokens: int | None = later(None, "tokens over which random-depth, random-width and msg open their masks", ge=1)

    rewarm_tokens: int | None = later(None, "tokens over which the learning rate of what growth made, and of nothing else, rises", ge=1)
    code: str | None = later(None, "a hash of the Python of operators of one's own; filled in where a recipe or study is read")

    @property
    def directory(self) -> Path:
        """Of `checkpoint`."""
        return Path(self.checkpoint or "")

    @model_validator(mode="after")
    def _one_source(self) -> Start:
        if (self.run is None) == (self.checkpoint is None):
            raise ValueError("start needs exactly one of 'run' and 'checkpoint'")
        if self.checkpoint and self.tokens is not None:
            raise ValueError("start.tokens chooses a point of start.run; a checkpoint has its own clock, so remove it")
        if self.knobs and not self.operator:
            raise ValueError("start.knobs has no effect without start.operator")
        if not self.operator and self.optimizer == "fresh-new":
            raise ValueError("start.optimizer 'fresh-new' has no effect without start.operator; use 'carry' or 'reset'")
        if self.rewarm_tokens and not self.operator:
            raise ValueError("start.rewarm_tokens has no effect without start.operator; remove it")
        if self.learn and not self.operator:
            raise ValueError("start.learn has no effect without start.operator; remove it")
        if self.unmask_tokens and not (self.operator or self.checkpoint):  # a directory may have been grown behind masks
            raise ValueError("start.unmask_tokens has no effect without start.operator; remove it")
        return self


class SpikeConfig(Settings):
    """What a run does when its training loss is not a number, or rises far above what it was."""

    action: Literal["stop", "roll back"] = Field("stop", description="'roll back': to the last checkpoint, and on with other data")
    above: float | None = Field(None, gt=0, description="nats over the mean of the last `window` steps; only NaN and infinity if not given")
    window: int = Field(50, ge=1, description="steps")
    times: int = Field(3, ge=1, description="how often to roll back before stopping")


class EvaluateConfig(Settings):
    """Tasks that are run on checkpoints while training goes on: before the first step of new or grown weights, at the end, and between."""

    tasks: str = Field("code", min_length=1, description="as --tasks of 'outgrow eval' takes it")
    every: int | None = Field(None, ge=1, description="tokens between evaluations")
    at: tuple[int, ...] = Field((), description="clocks at which to evaluate besides")
    limit: int | None = Field(None, ge=1, description="documents of each task, at most")
    batch_size: int = Field(8, ge=1, description="sequences at once")


class RunConfig(Settings):
    """One training run.

    Its identity is the hash of all of this but the name, how often it reports, evaluates and saves, and how it spends memory:
    micro_batch_tokens, compile and recompute change rounding alone, as the number of ranks does, so that a run may go on with others.
    """

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="a label; not part of the identity")
    model: ModelConfig | None = Field(None, description="keys of a Hugging Face config.json, 'model_type' among them")
    start: Start | None = None
    data: DataConfig = DataConfig()  # type: ignore[call-arg]
    tokens: int = Field(ge=1, description="clock at which the run ends, its ancestors' tokens included")
    batch_tokens: int = Field(4096, ge=1, description="tokens per optimizer step")
    micro_batch_tokens: int | None = Field(None, ge=1, description="tokens per forward pass, over all ranks; the whole batch if not given")
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()  # type: ignore[call-arg]
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = Field(0, ge=0)
    validate_every: int = Field(200_000, ge=1, description="tokens between validations")
    save_every: int = Field(1_000_000, ge=1, description="tokens between checkpoints to resume from")
    keep: tuple[int, ...] = Field((), description="clocks whose checkpoints are kept; the end is always kept")
    keep_last: int = Field(1, ge=1, description="how many of the newest checkpoints are kept besides")
    evaluate: EvaluateConfig | None = Field(
        None, description="tasks to run on the way; not part of the identity, since they change nothing"
    )
    spike: SpikeConfig = later(SpikeConfig(), "what to do about NaN and loss spikes")  # type: ignore[call-arg]
    compile: bool = later(False, "compile one block, and use it for all")
    recompute: bool = later(False, "activation checkpointing: compute each block again in the backward pass, for memory")

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if (self.model is None) == (self.start is None):
            raise ValueError("a run needs exactly one of 'model' (random weights) and 'start' (given weights)")
        context = self.data.context
        if self.batch_tokens % context:
            raise ValueError(f"batch_tokens ({self.batch_tokens}) is not a multiple of data.context ({context})")
        micro = self.micro_batch_tokens
        if micro and (micro % context or self.batch_tokens % micro):
            raise ValueError(f"micro_batch_tokens ({micro}) must be a multiple of data.context ({context}) that divides batch_tokens")
        if late := [clock for clock in self.keep if clock > self.tokens]:
            raise ValueError(f"keep names the clocks {late}, which lie beyond the run's end ({self.tokens}); remove them, or raise tokens")
        evaluated = self.evaluate.at if self.evaluate else ()
        off = [clock for clock in (*self.keep, *evaluated, self.tokens) if clock % self.batch_tokens]
        if off:
            raise ValueError(f"the clocks {off} are not multiples of batch_tokens ({self.batch_tokens}), where steps end")
        return self

    def identifying(self) -> dict[str, Any]:
        parts = super().identifying()
        for label in ("name", "validate_every", "save_every", "keep", "keep_last", "evaluate", "compile", "recompute"):
            parts.pop(label, None)
        parts["micro_batch_tokens"] = None  # runs were made before it was left out
        if self.start and self.start.run:
            parts["start"]["run"] = self.start.run.identity()
        return parts


def first_token(run: RunConfig) -> int:
    """The clock at which a run begins: where it leaves its parent, or 0."""
    if run.start is None:
        return 0
    if run.start.run is None:
        return read_lineage(run.start.directory).tokens
    return run.start.run.tokens if run.start.tokens is None else run.start.tokens


def unmasking(run: RunConfig, first: int) -> float:
    """Tokens over which the masks of a run that begins at a clock open: a tenth of its own if it does not say."""
    return (run.start.unmask_tokens if run.start else None) or (run.tokens - first) / 10
