"""`outgrow.json`: where a checkpoint directory comes from, and what it has cost so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outgrow.errors import OutgrowError
from outgrow.files import read_json

LINEAGE = "outgrow.json"
_TYPES: dict[str, Any] = {
    "tokens": int, "flops": (int, float), "run": str, "source": str, "plan": dict, "optimizer": str, "measured": dict, "trains": list,
    "parents": dict, "parent": dict, "skipped": int, "copies": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Lineage:
    """The receipt of a directory.

    Attributes:
        tokens: training tokens that led here.
        flops: training FLOPs that led here.
        run: identity of the training run that wrote it, if one did.
        source: what it was grown from: an id on the hub with its revision, or the name of a directory.
        plan: the growth plan that made it, if one did.
        optimizer: what became of the optimizer's state in growth.
        measured: what was measured on the grown model, its logit difference from the source among it.
        trains: names of the tensors that training may change, if not all.
        parents: file name -> sha256 of every weight file it was grown from.
        parent: the lineage of the directory it was grown from.
        skipped: tokens of data that its runs left out, before a loss spike.
        copies: space, `layer` among them -> old index that each new one copied at the last growth, negative for none.
    """

    tokens: int = 0
    flops: float = 0.0
    run: str | None = None
    source: str | None = None
    plan: dict[str, Any] | None = None
    optimizer: str | None = None
    measured: dict[str, Any] | None = None
    trains: list[str] | None = None
    parents: dict[str, str] | None = None
    parent: dict[str, Any] | None = None
    skipped: int | None = None
    copies: dict[str, list[int]] | None = None

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def read_lineage(directory: Path) -> Lineage:
    """The receipt of a directory; an empty one for a directory that outgrow did not write."""
    if not (directory / LINEAGE).exists():
        return Lineage()
    content = read_json(directory / LINEAGE)
    known = {key: value for key, value in content.items() if key in _TYPES} if isinstance(content, dict) else {}
    if not isinstance(content, dict) or not all(isinstance(value, _TYPES[key]) for key, value in known.items()):
        raise OutgrowError(f"'{directory / LINEAGE}' is not a receipt that outgrow wrote; remove it to treat the directory as foreign")
    return Lineage(**known)
