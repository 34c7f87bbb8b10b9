"""What a comparison found, read from the files of its runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from outgrow.arch import Counts, arch_for, flops_per_token, parameter_counts
from outgrow.files import read_json
from outgrow.lab.ancestry import in_order, lineage, model_of, own_flops
from outgrow.lab.comparison import Arm, Comparison
from outgrow.lab.evaluating import ERROR, falls
from outgrow.lab.runs import ENVIRONMENT, Result, place, read_result, require_text
from outgrow.lab.speedup import Curve, SpeedUp, equal_accuracy, equal_loss
from outgrow.training.config import RunConfig
from outgrow.training.record import EVALUATED, Row

ARMS: tuple[Arm, Arm] = ("scratch", "grown")


@dataclass(frozen=True)
class Outcome:
    """A finished comparison: its comparison, its seeds, and every run by identity."""

    comparison: Comparison
    seeds: tuple[int, ...]
    results: dict[str, Result]
    environment: dict[str, Any]

    def result(self, run: RunConfig) -> Result:
        return self.results[run.identity()]

    def annealed(self, arm: Arm, seed: int) -> Curve:
        """(FLOPs, held-out loss) at the end of each annealed branch."""
        branches = (self.result(self.comparison.branch(arm, seed, budget)) for budget in sorted(self.comparison.budgets))
        return [(branch.flops, branch.final_loss) for branch in branches]

    def constant(self, arm: Arm, seed: int) -> Curve:
        """(FLOPs, held-out loss) along the constant-rate runs of an arm, the base's part included."""
        return [point for run in lineage(self.comparison.trunk(arm, seed)) for point in self.result(run).curve]

    def speed_ups(self, kind: str) -> list[SpeedUp | None]:
        """One per seed; `kind` is "annealed" or "constant"."""
        curves = self.annealed if kind == "annealed" else self.trained
        return [equal_loss(curves("scratch", seed), curves("grown", seed)) for seed in self.seeds]

    def trained(self, arm: Arm, seed: int) -> Curve:
        """The constant-rate curve of the trunk alone: the model that is compared, not the base before it."""
        return self.result(self.comparison.trunk(arm, seed)).curve

    def runs(self) -> Iterator[Result]:
        yield from self.results.values()

    def evaluated(self) -> list[str]:
        """The fields of evaluations that every run has, such as eval/code_bracket/acc; their standard errors are not among them."""
        rows = [{name for row in result.evaluations for name in row} for result in self.runs()]
        first = next((row for result in self.runs() for row in result.evaluations), {})
        everywhere = set.intersection(*rows) if rows else set()
        return [name for name in first if name.startswith(EVALUATED) and not name.endswith(ERROR) and name in everywhere]

    def on_task(self, kind: str, arm: Arm, seed: int, field: str) -> Curve:
        """(FLOPs, a field of evaluations) of an arm: at the end of each annealed branch, or along the trunk of the compared model."""
        if kind == "annealed":
            rows = [self._branch(arm, seed, budget).evaluations[-1] for budget in sorted(self.comparison.budgets)]
        else:
            rows = self.result(self.comparison.trunk(arm, seed)).evaluations
        return [(row["flops"], row[field]) for row in rows if row["flops"]]

    def task_speed_ups(self, kind: str, field: str) -> list[SpeedUp | None]:
        """One per seed, at equal accuracy, or at equal perplexity or bits per byte."""
        measure = equal_loss if falls(field) else equal_accuracy
        curves = ((self.on_task(kind, "scratch", seed, field), self.on_task(kind, "grown", seed, field)) for seed in self.seeds)
        return [measure(scratch, grown) for scratch, grown in curves]

    def instants(self, seed: int) -> dict[str, Row]:
        """What is compared on tasks -> its evaluation: the base, the model grown of it before a step, both models at their ends."""
        trunks = {arm: self.result(self.comparison.trunk(arm, seed)).evaluations for arm in ARMS}
        last = max(self.comparison.budgets)
        return {
            "base": self.result(self.comparison.base(seed)).evaluations[-1],
            "grown, before a step": trunks["grown"][0],
            "target, constant rate": trunks["grown"][-1],
            "target, annealed": self._branch("grown", seed, last).evaluations[-1],
            "scratch, constant rate": trunks["scratch"][-1],
            "scratch, annealed": self._branch("scratch", seed, last).evaluations[-1],
        }

    def _branch(self, arm: Arm, seed: int, budget: int) -> Result:
        return self.result(self.comparison.branch(arm, seed, budget))


def read_outcome(comparison: Comparison, seeds: tuple[int, ...], root: Path) -> Outcome:
    """Reads every run of a comparison; refuses when one is not finished."""
    ordered = in_order(comparison.runs(seeds))
    results = {run.identity(): read_result(run, root) for run in ordered}
    environment = read_json(place(ordered[0], root) / ENVIRONMENT)
    require_text((result.directory for result in results.values()), environment["corpus_hash"])
    return Outcome(comparison, seeds, results, environment)


@dataclass(frozen=True)
class Cost:
    """One run as a row of the report's table."""

    result: Result
    layers: int
    counts: Counts
    head_share: float
    tokens_per_parameter: float
    own_flops: float
    tokens_per_second: float
    seconds: float


def cost(result: Result) -> Cost:
    """What a run was and what it took. Tokens per second is the median over its steps, validation not counted."""
    run, config = result.config, model_of(result.config)
    arch = arch_for(config)
    counts = parameter_counts(arch, config)
    speeds = [step["tokens_per_second"] for step in result.steps]
    return Cost(
        result=result,
        layers=arch.layers(config),
        counts=counts,
        head_share=6 * counts.head / flops_per_token(arch, config, run.data.context),
        tokens_per_parameter=run.tokens / counts.non_embedding,
        own_flops=own_flops(run),
        tokens_per_second=median(speeds),
        seconds=sum(run.batch_tokens / speed for speed in speeds),
    )
