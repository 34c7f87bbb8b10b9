"""Ways to spend a budget on a target model, side by side: scratch, G_stack, late expansion, gradual stacking; and what each rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from outgrow.arch import Config, arch_for, parameter_counts, step_flops
from outgrow.errors import OutgrowError
from outgrow.scaling.growth import FACTOR, WHY_NO_FACTOR_LAW, Mixing, growth_timing, stage_tokens
from outgrow.scaling.shapes import FACTORS, growth_factors, with_layers

# Parameters, tokens, speed-up in %: G_stack with g = 4 against scratch, un-annealed, one seed (arXiv 2405.15319).
PAPER_SPEED_UPS = (
    (0.41e9, 400e9, 53.1), (0.41e9, 700e9, 31.0), (1.1e9, 100e9, 49.1), (3e9, 180e9, 48.6), (3e9, 240e9, 54.5),
    (7e9, 160e9, 40.8), (7e9, 220e9, 55.3), (7e9, 280e9, 53.8), (7e9, 300e9, 54.6),
)  # fmt: skip
PAPER_RATES = ((0.41e9, 6e-4), (1.1e9, 3e-4), (3e9, 1.6e-4), (7e9, 1e-4))  # parameters, peak learning rate
LARGEST_BASE = 1.75e9  # parameters of the largest base that the paper trains so
LARGEST_RATE, BASE_RATE = 3e-3, 1e-3  # the paper's released script trains bases at 1e-3
PAPER_WARMUP_STEPS = 3000
LATE_SHARE, LATE_DECAY = 0.8, 0.1  # of the run: where late expansion grows if nothing puts it earlier, and the rate's decay
LATE_RUNS = ((0.124e9, None), (7e9, None))  # of zero/one-layer expansion (arXiv 2511.04981)


@dataclass(frozen=True)
class Evidence:
    """What a strategy rests on.

    Attributes:
        source: whose runs.
        says: their finding in a clause.
        runs: (parameters, tokens per parameter) of each; None where the tokens are not known.
    """

    source: str
    says: str
    runs: tuple[tuple[float, float | None], ...]

    def distance(self, params: float, tokens: float) -> list[str]:
        """How far outside of its runs one is, in clauses; none inside.

        Tokens per parameter are held against the runs of the sizes just below and above, not against those of all sizes.
        """
        if not self.runs:
            return ["what sizes it covers is not known"]
        sizes = sorted({size for size, _ in self.runs})
        near = {max([size for size in sizes if size <= params * 1.03], default=sizes[0]),
                min([size for size in sizes if size >= params / 1.03], default=sizes[-1])}  # fmt: skip
        ratios = [ratio for size, ratio in self.runs if size in near and ratio is not None]
        unknown = ["how many tokens per parameter it covers is not known"]
        return [
            *_outside("parameters", params, sizes[0], sizes[-1]),
            *(_outside("tokens per parameter", tokens / params, min(ratios), max(ratios), " at such sizes") if ratios else unknown),
        ]


def _outside(what: str, value: float, low: float, high: float, where: str = "") -> list[str]:
    if value > high * 1.03:
        return [f"you have {value / high:,.1f} times the most {what} it has seen{where} ({high:.3g})"]
    if value < low / 1.03:
        return [f"you have 1/{low / value:,.1f} of the least {what} it has seen{where} ({low:.3g})"]
    return []


@dataclass(frozen=True)
class Expected:
    """A speed-up that may be hoped for, at equal loss, or, where nobody has measured that, at equal tokens.

    `low` and `high` are as `kind` says, None where no spread is known.
    """

    speed_up: float
    low: float | None
    high: float | None
    source: str
    kind: str
    at_equal_loss: bool = True

    @property
    def saving(self) -> float:
        return self.speed_up / (1 + self.speed_up)


@dataclass(frozen=True)
class Phase:
    """A stage: so many layers for so many tokens, grown into by `grow`."""

    layers: int
    tokens: int
    learning_rate: float
    grow: str | None = None
    rate: Literal["restart", "keep"] = "restart"


@dataclass(frozen=True)
class Strategy:
    """One way to train the target.

    Attributes:
        name, summary: for people.
        phases: in order; the last has the target's layers.
        schedule: of the learning rate, as recipes have it.
        optimizer: its kind.
        flops: of each phase, in training FLOPs.
        expected: the speed-up at equal loss; None for scratch and where nobody has measured one.
        evidence, warnings: what it rests on, and what speaks against it.
    """

    name: str
    summary: str
    phases: tuple[Phase, ...]
    schedule: Mapping[str, Any]
    optimizer: Literal["adamw", "muon"]
    flops: tuple[float, ...]
    expected: Expected | None
    evidence: tuple[Evidence, ...]
    warnings: tuple[str, ...] = ()

    @property
    def growth_tokens(self) -> int | None:
        """Tokens before the last growth."""
        return sum(phase.tokens for phase in self.phases[:-1]) or None


@dataclass(frozen=True)
class Budget:
    """The problem: a target, the tokens it may read, the batch and the text's context.

    Attributes:
        size: the target's parameters as laws and tables are read with: the number it goes by, since the paper's "7B" counts 5.93B.
    """

    config: Config
    tokens: int
    batch_tokens: int
    context: int
    size: float

    @property
    def params(self) -> int:
        return parameter_counts(arch_for(self.config), self.config).total

    @property
    def layers(self) -> int:
        return arch_for(self.config).layers(self.config)

    def flops(self, layers: int, tokens: int, optimizer: str) -> float:
        """Training FLOPs of so many of the target's layers on so many tokens."""
        config = with_layers(self.config, layers)
        return tokens / self.batch_tokens * step_flops(arch_for(config), config, self.context, self.batch_tokens, optimizer)

    def whole(self, tokens: float) -> int:
        """Tokens in whole batches, at least one."""
        return max(1, round(tokens / self.batch_tokens)) * self.batch_tokens


def budget_of(config: Config, tokens: float, context: int, size: float | None = None, batch_tokens: int | None = None) -> Budget:
    """A budget; `size` is the parameters counted if not given.

    The batch is the paper's 2,097,152 tokens if not given, or for short runs the power of two that makes 4,000 steps or more.
    """
    if not (math.isfinite(tokens) and tokens >= 100 * context):
        raise OutgrowError(f"{tokens:g} tokens are too few to plan a run of; a hundred sequences of {context:,} tokens are the least")
    steps_4000 = 2 ** max(0, math.floor(math.log2(tokens / 4000 / context)))
    batch = batch_tokens or context * min(steps_4000, max(1, 2**21 // context))
    if batch % context or batch > tokens / 10:
        raise OutgrowError(
            f"a batch of {batch:,} tokens must be a multiple of the context ({context:,}) and at most a tenth of {tokens:g} tokens"
        )
    counted = parameter_counts(arch_for(config), config).total
    return Budget(config, round(tokens / batch) * batch, batch, context, size or counted)


def strategies(
    budget: Budget, factor: int | None = None, pilot: tuple[Expected, Evidence] | None = None, mixing: Mixing | None = None
) -> list[Strategy]:  # fmt: skip
    """Scratch, G_stack, late expansion and gradual stacking for one budget.

    Args:
        budget: the target and its tokens.
        factor: g of G_stack; 4 if it divides the target's layers, else the nearest advised.
        pilot: the speed-up of G_stack that the user's own runs show, in place of the paper's, and what runs they are.
        mixing: whether and when the late expansions of the user's pilot met the fixed-size loss.
    """
    arch = arch_for(budget.config)
    factors = growth_factors(arch, budget.config)
    if factor is not None and factor not in factors:
        known = f"it divides by {', '.join(map(str, sorted(factors)))}" if factors else "no factor of 2 to 8 does"
        raise OutgrowError(f"a base cannot be grown x{factor} to {budget.layers} layers; {known}")
    if not factors:
        period = arch.pattern(budget.config)
        patterns = f" in whole patterns of {period}" if period > 1 else ""
        raise OutgrowError(
            f"no base divides a target of {budget.layers} layers{patterns}: none of g = {', '.join(map(str, sorted(FACTORS)))} does; "
            f"take a target of {-(-budget.layers // (4 * period)) * 4 * period} layers"
        )
    chosen = factor or factors[0]
    return [_scratch(budget), _stacked(budget, chosen, pilot), _late(budget, mixing), _gradual(budget, chosen)]


def learning_rate(params: float) -> float:
    """The paper's peak for a size: 6e-4 at 410M to 1e-4 at 7B, log-linear between and beyond, at most 3e-3."""
    (first, low), (last, high) = PAPER_RATES[0], PAPER_RATES[-1]
    for (a, rate_a), (b, rate_b) in pairwise(PAPER_RATES):
        if a <= params <= b:
            first, low, last, high = a, rate_a, b, rate_b
    slope = math.log(high / low) / math.log(last / first)
    return float(f"{min(LARGEST_RATE, low * (params / first) ** slope):.2g}")


def expected_from_paper(params: float, tokens: float) -> Expected:
    """The paper's speed-up of G_stack for the size nearest in log parameters, linear in log tokens; low and high span its whole table."""
    nearest = min({row[0] for row in PAPER_SPEED_UPS}, key=lambda size: abs(math.log(size / params)))
    rows = [(math.log(row_tokens), speed_up / 100) for size, row_tokens, speed_up in PAPER_SPEED_UPS if size == nearest]
    clocks, speed_ups = zip(*rows, strict=True)
    value = float(np.interp(math.log(tokens), clocks, speed_ups))
    spread = [row[2] / 100 for row in PAPER_SPEED_UPS]
    return Expected(
        value, min(spread), max(spread), f"the paper's {nearest / 1e9:g}B runs (arXiv:2405.15319)",
        "range of the paper's table: one seed, un-annealed",
    )  # fmt: skip


def _scratch(budget: Budget) -> Strategy:
    phases = (Phase(budget.layers, budget.tokens, learning_rate(budget.size)),)
    return _strategy(
        budget, "scratch", "the target alone, its rate decayed over the last fifth: a decayed baseline is worth as much as growth can be",
        phases, _wsd(budget, 0.2), "adamw", None, (),
    )  # fmt: skip


def growth_share(budget: Budget) -> float:
    """When G_stack grows, as a share of the run, by the paper's law within its bounds."""
    return growth_timing(budget.size, budget.tokens).tokens / budget.tokens


def advised_factor(budget: Budget) -> int:
    """g of G_stack for a target: 4 if it divides its layers, else the nearest advised."""
    return next(iter(growth_factors(arch_for(budget.config), budget.config)), FACTOR)


def _rate_warnings(budget: Budget, base_params: float) -> list[str]:
    """Where the learning rates are read beyond what the paper has tried."""
    low, high = PAPER_RATES[0][0], PAPER_RATES[-1][0]
    found = list[str]()
    if not low / 1.03 <= budget.size <= high * 1.03:
        found.append(f"learning rates are the paper's of {low:.2g} to {high:.2g} parameters, carried on to {budget.size:.3g}: sweep them")
    if base_params > LARGEST_BASE * 1.03:
        found.append(
            f"the base has {base_params:.3g} parameters, and the paper's largest that trains at {BASE_RATE:g} has {LARGEST_BASE:.3g}"
        )
    return found


def _stacked(budget: Budget, factor: int, pilot: tuple[Expected, Evidence] | None) -> Strategy:
    timing = growth_timing(budget.size, budget.tokens)
    base = min(budget.whole(timing.tokens), budget.tokens - budget.batch_tokens)
    rate = learning_rate(budget.size)
    phases = (
        Phase(budget.layers // factor, base, max(BASE_RATE, rate)),
        Phase(budget.layers, budget.tokens - base, rate, f"stack(factor={factor})"),
    )
    schedule = {"kind": "cosine", "warmup_tokens": _warmup(budget, base), "final": 0.1}
    evidence = (
        *([pilot[1]] if pilot else []),
        Evidence(
            "Du et al. (arXiv:2405.15319)", "31% to 55% faster at 410M to 7B, un-annealed, one seed",
            tuple((size, tokens / size) for size, tokens, _ in PAPER_SPEED_UPS),
        ),
        Evidence(
            "outgrow's nano runs", "+46.6% un-annealed, +19.3% (13.2% to 25.5%) annealed, 5 seeds", ((3.2e5, 5.0), (3.2e5, 6.9)),
        ),
    )  # fmt: skip
    base_config = with_layers(budget.config, budget.layers // factor)
    doubts = [
        *_rate_warnings(budget, parameter_counts(arch_for(base_config), base_config).total),
        "against annealed baselines stacking's gain vanished on BERT and T5 (arXiv:2307.06440); nobody has shown it annealed at this scale",
        *(["only g near 2 is reliable according to arXiv:2605.13405"] if factor > 2 else []),
        *(["gains fade beyond 20 tokens per parameter according to arXiv:2605.13405"] if budget.tokens > 20 * budget.size else []),
    ]
    return _strategy(
        budget, "g-stack", f"the paper's setting: a base of 1/{factor} of the layers, stacked once, rate restarted", phases,
        schedule, "adamw",
        pilot[0] if pilot else expected_from_paper(budget.size, budget.tokens), evidence, (*timing.warnings, *doubts, WHY_NO_FACTOR_LAW),
    )  # fmt: skip


def _late(budget: Budget, mixing: Mixing | None) -> Strategy:
    tokens = mixing.tokens if mixing and mixing.met == mixing.tried else None
    # A mixing time is read at full rate, so it has to fit in before the decay.
    latest = 1.0 if tokens is None else 1 - LATE_DECAY - tokens / budget.tokens
    share = min(LATE_SHARE, latest)
    if share <= 0.05:
        raise OutgrowError(f"the pilot's mixing time of {tokens:.3g} tokens leaves nothing of {budget.tokens:.3g} tokens for a base")
    base = budget.whole(share * budget.tokens)
    rate = learning_rate(budget.size)
    first = arch_for(budget.config).pattern(budget.config)  # one layer, or one of each kind where kinds take turns
    phases = (Phase(first, base, rate), Phase(budget.layers, budget.tokens - base, rate, f"expand(layers={budget.layers})", "keep"))
    whole = budget.flops(budget.layers, budget.tokens, "muon")
    speed_up = whole / sum(budget.flops(phase.layers, phase.tokens, "muon") for phase in phases) - 1
    expected = Expected(
        speed_up, None, None, "FLOPs counted here, output head included; the claim is of arXiv:2511.04981",
        "at equal tokens and a loss that is said to be 0.2% (7B) to 0.5% (124M) worse; no spread is published", at_equal_loss=False,
    )  # fmt: skip
    instant = f"{share:.0%} of the run"
    if tokens is not None:
        instant += ", where your pilot's mixing time puts it" if share == latest else ", which leaves more than your pilot's mixing time"
    doubt = "measure the mixing time on a small pilot (--pilot) before you trust the growth instant"
    if mixing:
        doubt = f"of the {mixing.tried} late expansions of your pilot {mixing.met} came down to scratch's loss: grow earlier than those"
    return _strategy(
        budget, "late", f"{first} layer{'s' if first > 1 else ''} until {instant}, then all at once; the rate goes on", phases,
        _wsd(budget, LATE_DECAY), "muon", expected,
        (Evidence("zero/one-layer expansion (arXiv:2511.04981)", "about 80% saved for a loss 0.2% to 0.5% worse", LATE_RUNS),),
        (*_rate_warnings(budget, 0.0), "no code or seeds are published",
         "it grows before the decay of the rate: growing inside it loses (arXiv:2510.08008)",
         *([doubt] if tokens is None else [])),
    )  # fmt: skip


def _gradual(budget: Budget, factor: int) -> Strategy:
    rate = learning_rate(budget.size)
    doublings = [2] * int(math.log2(factor)) if factor & (factor - 1) == 0 else [factor]
    layers = [budget.layers // math.prod(doublings[number:]) for number in range(len(doublings) + 1)]
    tokens = stage_tokens(budget.tokens, len(layers), 1.0, budget.batch_tokens)
    phases = [Phase(layers[0], tokens[0], rate)]
    hops = zip(layers[1:], tokens[1:], doublings, strict=True)
    phases += [Phase(count, part, rate, f"stack(factor={by})", "keep") for count, part, by in hops]
    return _strategy(
        budget, "gradual", "several hops, stage lengths by Prop-1; the rate goes on", tuple(phases), _wsd(budget, 0.1), "adamw", None,
        (Evidence("MIDAS and gradual stacking (arXiv:2409.19044)", "stage lengths in proportion to i^alpha", ()),),
        ("one hop beat gradual growth by 2.4 points on average in Du et al. (arXiv:2405.15319)",
         "no equal-loss figure that counts everything is published; the FLOPs are at equal tokens"),
    )  # fmt: skip


def _strategy(
    budget: Budget, name: str, summary: str, phases: Sequence[Phase], schedule: Mapping[str, Any], optimizer: Literal["adamw", "muon"],
    expected: Expected | None, evidence: tuple[Evidence, ...], warnings: tuple[str, ...] = (),
) -> Strategy:  # fmt: skip
    flops = tuple(budget.flops(phase.layers, phase.tokens, optimizer) for phase in phases)
    return Strategy(name, summary, tuple(phases), schedule, optimizer, flops, expected, evidence, warnings)


def _warmup(budget: Budget, shortest: int) -> int:
    """The paper's 3,000 steps, at most 2% of the run and a quarter of its shortest stage."""
    return budget.whole(min(PAPER_WARMUP_STEPS * budget.batch_tokens, 0.02 * budget.tokens, shortest / 4))


def _wsd(budget: Budget, decay_share: float) -> dict[str, Any]:
    return {"kind": "wsd", "warmup_tokens": _warmup(budget, budget.tokens), "decay_tokens": budget.whole(decay_share * budget.tokens)}
