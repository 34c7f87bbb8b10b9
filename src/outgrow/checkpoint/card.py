"""The model card of a grown checkpoint, README.md in the hub's format: what was grown from what, how, with which claims."""

from __future__ import annotations

import re
from typing import Any

import yaml

from outgrow.checkpoint.huggingface import Checkpoint
from outgrow.checkpoint.lineage import Lineage
from outgrow.growth.plan import GrowthPlan

CARD = "README.md"
_STAYS = ("license", "license_name", "license_link", "language", "base_model")
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def card_text(checkpoint: Checkpoint, plan: GrowthPlan, receipt: Lineage) -> str:
    """The page; the source's licence, language and base model stay if its own card names them."""
    name = checkpoint.title
    about = {"library_name": "transformers", **_kept(checkpoint), "tags": ["model-growth", "outgrow"]}
    front = ["---", yaml.safe_dump(about, sort_keys=False, allow_unicode=True).rstrip(), "---"]
    stages = [
        f"{number}. `{stage.operator}({', '.join(f'{key}={value!r}' for key, value in stage.knobs.items())})`, {stage.citation}: "
        f"{'the function is kept' if stage.claims.preserves else 'the function is no longer that of the source'}"
        for number, stage in enumerate(plan.stages, 1)
    ]
    before, after = plan.stages[0], plan.target_config
    sizes, grown = before.arch.sizes(before.source_config), plan.grown_arch.sizes(after)
    rows = [("layers", before.arch.layers(before.source_config), plan.grown_arch.layers(after))]
    rows += [(space, sizes[space], grown[space]) for space in sizes if space in grown]
    table = ["| | source | this model |", "|---|---|---|", *(f"| {row} | {old:,} | {new:,} |" for row, old, new in rows)]
    parents = [f"- `{file}`: sha256 `{digest}`" for file, digest in (receipt.parents or {}).items()]
    return "\n".join(
        [
            *front,
            "",
            f"# {name}, grown",
            "",
            f"This {plan.grown_arch.family} model was grown from `{name}` by outgrow in these steps:",
            "",
            *stages,
            "",
            _trained(plan, receipt),
            "",
            *table,
            "",
            _measured(receipt),
            "",
            "The source's weight files:",
            "",
            *parents,
            "",
            "`outgrow.json` holds the whole plan; `outgrow verify` proves it against the source.",
            "",
        ]
    )


def _kept(checkpoint: Checkpoint) -> dict[str, Any]:
    """What holds of the source's card for what is grown from it too; its base model is the source where that is on the hub."""
    path = checkpoint.directory / CARD
    try:
        found = _FRONT.match(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
        about = yaml.safe_load(found[1]) if found else {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError):  # ValueError: a day that no month has
        about = {}
    kept = {key: about[key] for key in _STAYS if isinstance(about, dict) and _is_text(about.get(key))}
    name, on_hub, _ = checkpoint.title.partition("@")
    return {**kept, "base_model": name} if on_hub else kept


def _is_text(value: Any) -> bool:
    """A text, or several, which is what these fields hold."""
    return bool(value) and all(isinstance(one, str) for one in (value if isinstance(value, list) else [value]))


def _trained(plan: GrowthPlan, receipt: Lineage) -> str:
    if plan.claims.preserves:
        begin = "It computes what the source computes, and is meant to be trained on."
    else:
        begin = "It does not compute what the source computes, and has to be trained on before it is of use."
    seen = f" The source had seen {receipt.tokens:,} training tokens." if receipt.tokens else ""
    return begin + seen


def _measured(receipt: Lineage) -> str:
    measured = receipt.measured or {}
    if "logit_difference" in measured:
        change, deviation = measured["logit_difference"], measured["logit_deviation"]
        where = f"Measured on {measured['tokens']} tokens"
        return f"{where}: logits differ from the source's by at most {change:.2g}, at a deviation of {deviation:.2g}."
    return "The logit difference from the source was not measured."
