"""A growth plan: frozen data that says how every tensor of the target is made, with no weights at hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from outgrow.arch import Arch, Config, Tensor, arch_for
from outgrow.errors import OutgrowError
from outgrow.spaces import Lift


@dataclass(frozen=True)
class Claims:
    """What an operator promises; the laws test it.

    Attributes:
        preserves: the grown model computes the old function, |delta logit| < 1e-10 in float64.
        trains: every tensor of every block gets a gradient within three steps.
    """

    preserves: bool
    trains: bool


@dataclass(frozen=True)
class Assignment:
    """One tensor of the target and the tensor of the source it is made from."""

    target: Tensor
    source: str


@dataclass(frozen=True)
class GrowthPlan:
    """How a target is made from a source.

    Attributes:
        operator: name of the operator that wrote the plan.
        knobs: its arguments.
        source_config: config.json of the source.
        layers: [target layers] source layer of each target layer.
        lifts: space -> `Lift`, for the spaces that grow.
        config: edits to config.json besides the layer count and the sizes of lifted spaces.
        claims: what the operator promises.
        citation: where the operator comes from.
    """

    operator: str
    knobs: Mapping[str, Any]
    source_config: Config
    layers: tuple[int, ...]
    claims: Claims
    citation: str
    lifts: Mapping[str, Lift] = field(default_factory=dict[str, Lift])
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        old = self.arch.layers(self.source_config)
        if not self.layers or not all(0 <= layer < old for layer in self.layers):
            raise OutgrowError(f"the layer list {list(self.layers)} must name layers 0 to {old - 1} of the source")
        for table in self.arch.layer_tables:
            entries = _entries(self.source_config, table)
            if entries is not None and len(entries) != old:
                raise OutgrowError(f"the config's '{table}' has {len(entries)} entries for {old} layers")
        for name, lift in self.lifts.items():
            self._check(name, lift)

    def _check(self, name: str, lift: Lift) -> None:
        spaces, sizes = self.arch.spaces, self.arch.sizes(self.source_config)
        if name not in spaces:
            raise OutgrowError(f"'{name}' is not a space of {self.arch.family}; its spaces: {', '.join(spaces)}")
        old, new = sizes[name], len(lift.source)
        if spaces[name].admits == "nothing":
            raise OutgrowError(
                f"cannot widen '{name}' {old} -> {new} in {self.arch.family}: no map of it keeps the old function; "
                "widen hidden, ffn, kv or group instead"
            )
        if lift.size != old:
            raise OutgrowError(f"the lift of '{name}' enlarges a space of {lift.size}, and the source has {old}")
        if spaces[name].admits == "isometry" and self.claims.preserves:
            tied_apart = bool(self.arch.aliases(self.source_config)) and not np.allclose(lift.write, lift.read)
            if tied_apart or not lift.fits_rms_norm():
                reason = "reads other than it writes, and the head is tied" if tied_apart else "does not fit RMSNorm"
                raise OutgrowError(
                    f"the plan claims to preserve the function, and its lift of '{name}' {old} -> {new} {reason}; "
                    "use an isometry, or claim preserves=False"
                )

    @property
    def arch(self) -> Arch:
        return arch_for(self.source_config)

    @property
    def target_config(self) -> dict[str, Any]:
        """config.json of the target: the source's, with the edits that growth makes and no others."""
        config = dict(self.source_config)
        config[self.arch.layer_count] = len(self.layers)
        for table in self.arch.layer_tables:
            if (entries := _entries(config, table)) is not None:
                config[table] = [entries[layer] for layer in self.layers]
        sizes = self.arch.sizes(self.source_config)
        for name, lift in self.lifts.items():
            if key := self.arch.spaces[name].edit:
                config[key] = len(lift.source)
            sizes[name] = len(lift.source)
            if self.arch.spaces[name].admits == "isometry" and (factor := float(lift.gain.max()) ** 2) != 1:
                config[self.arch.norm_eps] = self.arch.get(config, self.arch.norm_eps) * factor
        if "kv" in self.lifts or "group" in self.lifts:
            config["num_attention_heads"] = sizes["kv"] * sizes["group"]
        if self.lifts:  # sizes that the source left to be derived must stay what they were
            config["head_dim"] = sizes["head"]
        return {**config, **self.config}

    def assignments(self) -> Iterator[Assignment]:
        """Every tensor of the target, in the order of its arch table, with its source."""
        for tensor in self.arch.tensors(self.target_config):
            if tensor.layer is None:
                yield Assignment(tensor, tensor.name)
            else:
                yield Assignment(tensor, self.arch.layer_prefix.format(self.layers[tensor.layer]) + tensor.key)

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data; `from_json` reads it back."""
        return {
            "operator": self.operator,
            "knobs": dict(self.knobs),
            "source_config": dict(self.source_config),
            "layers": list(self.layers),
            "lifts": {name: _lift_as_json(lift) for name, lift in self.lifts.items()},
            "config": dict(self.config),
            "claims": {"preserves": self.claims.preserves, "trains": self.claims.trains},
            "citation": self.citation,
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> GrowthPlan:
        values = dict(content)
        values["layers"] = tuple(values["layers"])
        values["claims"] = Claims(**values["claims"])
        values["lifts"] = {name: _lift_from_json(lift) for name, lift in values["lifts"].items()}
        return GrowthPlan(**values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GrowthPlan) and json.dumps(self.as_json(), sort_keys=True) == json.dumps(other.as_json(), sort_keys=True)

    __hash__ = None  # type: ignore[assignment]


def _entries(config: Config, table: str) -> list[Any] | None:
    """A config's table of one entry a layer, if it has one."""
    value = config.get(table)
    return cast("list[Any]", value) if isinstance(value, list) else None


def _lift_as_json(lift: Lift) -> dict[str, Any]:
    return {key: getattr(lift, key) if key == "size" else getattr(lift, key).tolist() for key in Lift.__dataclass_fields__}


def _lift_from_json(content: Mapping[str, Any]) -> Lift:
    write, read, gain = (np.array(content[role], np.float64) for role in ("write", "read", "gain"))
    return Lift(content["size"], np.array(content["source"], np.int64), write, read, gain)
