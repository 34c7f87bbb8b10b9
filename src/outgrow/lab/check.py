"""Operators against families: what each claims, measured on tiny float64 models with transformers' own forward pass."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call

from outgrow.arch import FAMILIES, Arch, Config, arch_for
from outgrow.checkpoint.grow import grow_directory
from outgrow.checkpoint.huggingface import open_checkpoint
from outgrow.errors import OutgrowError
from outgrow.files import read_json
from outgrow.growth.fresh import masked
from outgrow.growth.laws import EXACT, alike, gradient_difference, logit_difference, untrained
from outgrow.growth.operators import OPERATORS, Operator, make_plan
from outgrow.growth.plan import GrowthPlan
from outgrow.lab.tiny import gradients_on_disk, in_modules, on_disk, read_tensors, write_tiny
from outgrow.models.exact import exact_logits, exact_model, float64
from outgrow.models.masks import make_masks

STEPS = 3


@dataclass(frozen=True)
class Verdict:
    """What was measured for one operator on one family.

    Attributes:
        operator, family: what was tried.
        plan: the plan; None where it was refused.
        refusal: why there is no plan; empty where there is one.
        logits: max |delta logit|.
        dead: what three steps did not change.
        gradients: max |dual lift of the source's gradients - the target's|, where the plan claims it; None elsewhere.
        alike: widened spaces whose copies are still equal after three steps.
    """

    operator: str
    family: str
    plan: GrowthPlan | None = None
    refusal: str = ""
    logits: float = 0.0
    dead: tuple[str, ...] = ()
    gradients: float | None = None
    alike: tuple[str, ...] = ()

    @property
    def broken(self) -> list[str]:
        """The claims that the measurement does not back."""
        if self.plan is None:
            return []
        claims, found = self.plan.claims, list[str]()
        if claims.preserves and self.logits > EXACT:
            found.append(f"claims to preserve, and logits differ by {self.logits:.1e}")
        if claims.trains and self.dead:
            found.append(f"claims to train, and three steps do not move {self.dead[0]} (and {len(self.dead) - 1} more)")
        if self.gradients is not None and self.gradients > EXACT:
            found.append(f"claims dual gradients, and they differ by {self.gradients:.1e}")
        if set(self.alike) != set(self.plan.alike):
            found.append(f"says that copies stay alike in {self.plan.alike}, and after three steps they are in {list(self.alike)}")
        return found


def check(
    operator: str,
    config: Config,
    knobs: Mapping[str, Any] | None = None,
    operators: Mapping[str, Operator] = OPERATORS,
    families: Iterable[Arch] = FAMILIES,
) -> Verdict:
    """Measures one operator on a model of random weights.

    Args:
        operator: its name.
        config: keys of a config.json of a tiny model that transformers knows.
        knobs: stand in for the ones that are tried by default.
        operators, families: what is known.
    """
    source = tiny_source(json.dumps(config, sort_keys=True))
    whole = read_json(source.directory / "config.json")
    arch = arch_for(whole, families)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "target"
        try:
            chosen = default_knobs(operator, arch, whole) if knobs is None else knobs
            plan = make_plan(operator, arch, whole, chosen, operators)
            grow_directory(open_checkpoint(source.directory, families), target, plan)
        except OutgrowError as error:
            return Verdict(operator, arch.family, refusal=str(error))
        grown = behaviour(target)
        before, after = three_steps(plan, target)
        return Verdict(
            operator,
            arch.family,
            plan,
            logits=logit_difference(source.behaviour.logits, grown.logits),
            dead=tuple(untrained(plan, before, after)),
            gradients=gradient_difference(plan, source.behaviour.gradients, grown.gradients) if plan.claims.dual else None,
            alike=tuple(alike(plan, after)),
        )


def cell(verdict: Verdict) -> str:
    """A verdict in a few characters; `LEGEND` says how to read it."""
    if verdict.plan is None:
        return "-"
    claims = verdict.plan.claims
    parts = [
        f"{verdict.logits:.0e}" if claims.preserves else f"changes {verdict.logits:.0e}",
        "trains" if claims.trains else "",
        "dual" if claims.dual else "",
        "alike" if verdict.alike else "",
    ]
    return " ".join(part for part in parts if part) + ("  BROKEN" if verdict.broken else "")


LEGEND = (
    "A number: the function is preserved, and this is the largest |delta logit| in float64 (claimed: below 1e-10). "
    "changes: the function is not preserved, by design, and logits move by so much. "
    "trains: everything new gets a gradient within three steps. "
    "dual: gradients, and so Adam's moments, of what was copied are the source's, moved by the dual lift, to 1e-10. "
    "alike: two copies of a neuron, channel, head or expert get the same gradient, so that training never parts them, and noise would. "
    "-: refused, with a sentence that says why. Masked operators are measured at mask 0, and trained while the masks open."
)


def markdown(rows: Mapping[str, Mapping[str, Verdict]]) -> str:
    """Operator -> family -> verdict, as the page docs/operators.md."""
    families = list(next(iter(rows.values())))
    lines = ["| operator | " + " | ".join(families) + " |", "|---" * (len(families) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(row[family]) for family in families) + " |" for name, row in rows.items()]
    cited = [f"- `{name}`: {_summary(name)} ({_citation(row.values())})" for name, row in rows.items()]
    command = "Generated by `outgrow check --markdown docs/operators.md`, on tiny models of random weights; do not edit."
    return "\n\n".join(["# Operators and families", command, LEGEND, "\n".join(lines), "## The operators", "\n".join(cited)]) + "\n"


def _summary(operator: str) -> str:
    return (OPERATORS[operator].__doc__ or "").strip().splitlines()[0] if operator in OPERATORS else "from a file"


def _citation(verdicts: Iterable[Verdict]) -> str:
    return next((verdict.plan.citation for verdict in verdicts if verdict.plan), "no plan")


def default_knobs(operator: str, arch: Arch, config: Config) -> dict[str, Any]:
    """Knobs that make an operator do its work on a tiny model of a family."""
    sizes, layers = arch.sizes(config), arch.layers(config)
    kv, group = sizes["kv"], sizes.get("group", 0)
    # hidden by 3/2; kv by 3/2 too where the family derives head_dim from both; evenly where heads are normed together.
    hidden, some = (sizes["hidden"] * 3 // 2, kv * 3 // 2) if kv % 2 == 0 else (sizes["hidden"] * 2, kv * 2)
    widths = {"hidden": hidden, "ffn": sizes["ffn"] + 13}
    odd = {**widths, "kv": some}
    if group:  # more heads a group, if transformers has a model of so many
        odd["group"] = next((more for more in range(group + 1, 2 * group + 1) if hidden % (some * more) == 0), group)
    even = {**widths, "kv": kv * 2} if hidden % (kv * 2 * max(group, 1)) == 0 else {"ffn": widths["ffn"], "kv": kv * 2}
    together = arch.spaces["kv"].admits == "even copies"
    empty_heads = widths if together else odd
    period = arch.pattern(config)
    known: dict[str, dict[str, Any]] = {
        "direct-width": even if together else odd, "fpi": {"hidden": sizes["hidden"] * 2, "ffn": sizes["ffn"] + 13, "kv": kv * 2},
        "aki": even if together else odd, "learn-width": odd, "zero-width": empty_heads, "random-width": empty_heads,
        "lemon": {**(even if together else odd), "layers": layers + period}, "msg": {**empty_heads, "layers": layers + period},
        "stack": {"factor": 2}, "arrange": {"layers": f"0-{layers - 1},0-{layers - 1}"},
        "mergekit": {"layers": f"0-{layers - 1},0-{layers - 1}"}, "solar": {"removed": 1},
        "llama-pro": {"blocks": 2 if layers % (2 * period) == 0 else max(layers // period, 1)},
        "expand": {"layers": layers * 2, "weights": "random"},
        "upcycle": {"experts": 4, "chosen": 2},
    }  # fmt: skip
    return known.get(operator, {})


def three_steps(plan: GrowthPlan, directory: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Parameters on disk of a grown checkpoint, before and after three steps of AdamW; masks open on the way."""
    model = exact_model(directory)
    parameters = dict(model.named_parameters())
    masks = make_masks(parameters, _masks_in_modules(plan, directory))
    before = on_disk(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    inputs = _tokens()
    for step in range(STEPS):
        optimizer.zero_grad()
        with float64():
            seen = masks.opened(parameters, (step + 1) / STEPS)
            logits = functional_call(model, seen, kwargs={"input_ids": inputs[:, :-1], "use_cache": False}, tie_weights=True).logits
        F.cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten()).backward()
        optimizer.step()
    return before, on_disk(model)


def _masks_in_modules(plan: GrowthPlan, directory: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The masks of a plan under the model's parameter names."""
    found = masked(plan)
    if not found:
        return {}
    zeros = {name: np.zeros_like(array) for name, array in read_tensors(directory).items()}
    where = in_modules({**zeros, **{name: mask.astype(np.float64) for name, (mask, _) in found.items()}}, directory)
    values = in_modules({**zeros, **{name: values() for name, (_, values) in found.items()}}, directory)
    return {name: (where[name] > 0, values[name]) for name in where if bool(where[name].any())}


@cache
def _tokens() -> torch.Tensor:
    return torch.randint(0, 50, (8, 25), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Behaviour:
    """What a checkpoint computes on a few tokens.

    Attributes:
        logits: [sequences, tokens, vocab] in float64.
        gradients: name on disk -> gradient of the mean next-token loss.
    """

    logits: np.ndarray
    gradients: dict[str, np.ndarray]


def behaviour(directory: Path) -> Behaviour:
    """Runs the model of a directory on a few tokens, forward and backward, in float64."""
    model, tokens = exact_model(directory), _tokens()
    logits = exact_logits(model, tokens)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return Behaviour(logits.detach().numpy(), gradients_on_disk(model))


@dataclass(frozen=True)
class _Source:
    """A tiny checkpoint that many operators are tried on."""

    folder: tempfile.TemporaryDirectory[str]
    directory: Path
    behaviour: Behaviour


@cache
def tiny_source(config: str) -> _Source:
    """A checkpoint of random weights of a config (JSON) and what it computes; raises whatever transformers raises."""
    folder = tempfile.TemporaryDirectory()
    directory = Path(folder.name) / "source"
    try:
        write_tiny(directory, json.loads(config))
        return _Source(folder, directory, behaviour(directory))
    except BaseException:
        folder.cleanup()
        raise
