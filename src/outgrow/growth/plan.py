"""A growth plan: frozen data that says how every tensor of the target is made, with no weights at hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from outgrow.arch import FAMILIES, Arch, Config, Tensor, arch_for
from outgrow.errors import OutgrowError
from outgrow.growth.as_json import array_from_json, array_to_json, checked_plan, lift_from_json, lift_to_json
from outgrow.growth.checks import check_plan
from outgrow.spaces import FRESH, AnyLift, Dense, Indices, Lift

Fill = Literal["zero", "quiet", "masked"]


@dataclass(frozen=True)
class Claims:
    """What an operator promises; the laws test it.

    Attributes:
        preserves: the grown model computes the old function, |delta logit| < 1e-10 in float64.
        trains: everything that growth made gets a gradient within three steps.
        dual: gradients of what was copied are the source's, moved by the dual lift.
    """

    preserves: bool
    trains: bool
    dual: bool = False

    def __and__(self, other: Claims) -> Claims:
        """What both promise."""
        return Claims(self.preserves and other.preserves, self.trains and other.trains, self.dual and other.dual)


@dataclass(frozen=True)
class GrowthPlan:
    """How a target is made from a source.

    Attributes:
        operator: name of the operator that wrote the plan.
        knobs: its arguments.
        arch: the family of the source.
        source_config: config.json of the source.
        layers: [target layers] source layer of each target layer, or FRESH.
        claims: what the operator promises, and all that are applied before it.
        citation: where the operator comes from.
        lifts: space -> lift, for the spaces that grow.
        ends: [target layers] factor on what ends a branch: 0 makes an identity block. Empty for all ones.
        depth_maps: module -> [target layers, source layers], learned: W'_l = sum_j D[l, j] W_j. Empty for copies.
        fill: what stands where nothing is copied. `zero`; `quiet`: random but in what writes the residual stream;
            `masked`: random behind outputs that a training run unmasks, and that are zero in a checkpoint.
        rewrites: name of a rewrite (`growth.rewrites`) -> its arguments.
        seed: of everything random, together with each tensor's name.
        target_arch: the family of the target, where it is another.
        keys: tensor key of the target -> that of the source, where they differ; None for what no tensor gives.
        config: edits to config.json besides those that follow from layers and lifts.
        trains_only_fresh: train only the layers that growth made (LLaMA Pro).
        flops: training FLOPs that making this plan has cost.
        after: the plan that is applied first; this one starts from its target.
    """

    operator: str
    knobs: Mapping[str, Any]
    arch: Arch
    source_config: Config
    layers: tuple[int, ...]
    claims: Claims
    citation: str
    lifts: Mapping[str, AnyLift] = field(default_factory=dict[str, AnyLift])
    ends: tuple[float, ...] = ()
    depth_maps: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fill: Fill = "zero"
    rewrites: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    seed: int = 0
    target_arch: Arch | None = None
    keys: Mapping[str, str | None] = field(default_factory=dict[str, "str | None"])
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    trains_only_fresh: bool = False
    flops: float = 0.0
    after: GrowthPlan | None = None

    def __post_init__(self) -> None:
        check_plan(self)

    @property
    def widenable(self) -> list[str]:
        """The spaces that may grow."""
        return [name for name, space in self.arch.spaces.items() if space.admits != "nothing"]

    @property
    def grown_arch(self) -> Arch:
        """The family of the target."""
        return self.target_arch or self.arch

    @property
    def target_sizes(self) -> dict[str, int]:
        """The size of every space of the source's family, grown."""
        sizes = self.arch.sizes(self.source_config)
        return {name: self.lifts[name].new if name in self.lifts else size for name, size in sizes.items()}

    @property
    def target_config(self) -> dict[str, Any]:
        """config.json of the target: the source's, with the edits that growth makes and no others."""
        config = dict(self.source_config)
        arch, old, new = self.arch, self.arch.sizes(self.source_config), self.target_sizes
        config[arch.layer_count] = len(self.layers)
        self._grow_tables(config)
        for name in self.lifts:
            for key in arch.spaces[name].scales:
                config[key] = arch.get(config, key) * new[name] // old[name]
        for key, spaces in arch.products.items():
            if any(space in self.lifts for space in spaces):
                config[key] = int(np.prod([new[space] for space in spaces]))
        for name, lift in self.lifts.items():
            _set_size(config, arch.spaces[name].edit, lift.new)
            if arch.spaces[name].admits in ("RMSNorm", "LayerNorm") and isinstance(lift, Lift) and arch.norm_eps:
                factor = float(lift.gain.max()) ** 2
                if factor != 1:
                    config[arch.norm_eps] = arch.get(config, arch.norm_eps) * factor
        if self.lifts:  # sizes that the source left to be derived must stay what they were
            try:
                derived = arch.sizes(config)
            except OutgrowError:  # nothing follows from these any more
                derived = dict[str, int]()
            for name, size in new.items():
                if derived.get(name) != size:
                    _set_size(config, arch.spaces[name].edit, size)
        return {**config, **self.config}

    @property
    def has_layer_table(self) -> bool:
        """Does the source's config say the kind of each layer? Then the target's can say any order."""
        return any(self.arch.tables(self.source_config).values())

    def _grow_tables(self, config: dict[str, Any]) -> None:
        period = self.arch.pattern(self.source_config)
        tables = self.arch.tables(config)
        for key in self.arch.layer_tables:
            if entries := tables.get(key):
                config[key] = [entries[i % period if layer == FRESH else layer] for i, layer in enumerate(self.layers)]
            else:  # none, or one of no layers: the family's own rule says it
                config.pop(key, None)
        for key in self.arch.layer_bounds:
            if isinstance(bound := config.get(key), int):
                inside = self.first_layers(bound)
                config[key] = max(bound, len(inside)) if all(inside) else inside.index(False)

    def first_layers(self, bound: int) -> list[bool]:
        """[target layers] is a layer made of one of the first `bound`? A fresh one is of the kind of the layer before it."""
        inside: list[bool] = []
        for layer in self.layers:
            inside.append(layer < bound if layer != FRESH else inside[-1] if inside else bound > 0)
        return inside

    def source_of(self, tensor: Tensor) -> str | None:
        """The tensor of the source that a tensor of the target is made from; None for a fresh one."""
        source = self._source(tensor)
        return source.name if source else None

    def first_source(self, tensor: Tensor) -> str | None:
        """The tensor of the very first source that a tensor of the target is made from; None for one that a stage made fresh."""
        source = self._source(tensor)
        return self.after.first_source(source) if self.after and source else source.name if source else None

    def _source(self, tensor: Tensor) -> Tensor | None:
        key = self.keys.get(tensor.key, tensor.key)
        layer = None if tensor.layer is None else self.layers[tensor.layer]
        if key is None or layer == FRESH:
            return None
        expert = tensor.expert
        if expert is not None and isinstance(lift := self.lifts.get("expert"), Lift):
            expert = int(lift.source[expert])
        return Tensor(self.arch.name(key, layer, expert), layer, key, tensor.spec, expert if "{expert}" in key else None)

    def factor(self, tensor: Tensor) -> float:
        """The factor on a tensor that ends a branch; 1 for any other."""
        return self.ends[tensor.layer] if self.ends and tensor.layer is not None and tensor.spec.ends_branch else 1.0

    def adds_nothing(self, layer: int | None) -> bool:
        """Is a target layer an identity block at first, its branches ending in zeros?"""
        return layer is not None and bool(self.ends) and self.ends[layer] == 0

    def is_new(self, tensor: Tensor) -> bool:
        """Did growth make this whole tensor: a layer, an expert, a router that was not there, or is not the first copy of one?"""
        if self.source_of(tensor) is None:
            return True
        layer = tensor.layer
        second_layer = layer is not None and (self.layers[layer] in self.layers[:layer] or self.adds_nothing(layer))
        lift = self.lifts.get("expert")
        upcycled = tensor.expert is not None and "expert" not in self.arch.spaces and tensor.expert > 0
        second_expert = tensor.expert is not None and isinstance(lift, Lift) and bool(lift.repeated[tensor.expert])
        return second_layer or second_expert or upcycled

    @property
    def new_tensors(self) -> list[str]:
        """The names of the tensors of the target that are new."""
        return [tensor.name for tensor in self.grown_arch.tensors(self.target_config) if self.is_new(tensor)]

    @property
    def is_untrained(self) -> bool:
        """Does a stage of this hold learned maps that nothing has trained yet?"""
        return any(stage._has_untrained_maps for stage in self.stages)

    @property
    def _has_untrained_maps(self) -> bool:
        return not self.flops and (bool(self.depth_maps) or any(isinstance(lift, Dense) for lift in self.lifts.values()))

    def refuse_untrained(self) -> None:
        """Says where learned maps, of this stage or one before it, are yet to be trained."""
        for stage in self.stages:
            if stage._has_untrained_maps:
                raise OutgrowError(
                    f"the maps of '{stage.operator}' are not trained yet; 'outgrow learn' writes a plan in which those of learn-depth and "
                    "learn-width are, and a plan of your own says by 'flops' what its maps have cost"
                )

    def then(self, after: GrowthPlan) -> GrowthPlan:
        """This plan, and after it another that was made for its target."""
        if after.after is not None:
            return self.then(after.after).then(replace(after, after=None))
        if self.fill == "masked":
            raise OutgrowError(f"'{self.operator}' is unmasked in training, so nothing can follow it in one plan; make it the last")
        if self.trains_only_fresh:
            raise OutgrowError(
                f"'{self.operator}' leaves only its new layers to training, so nothing can follow it in one plan; make it the last"
            )
        if after.source_config != self.target_config:
            raise OutgrowError(f"'{after.operator}' was planned for another config than what '{self.operator}' makes; plan it for that one")
        return replace(after, after=self, claims=self.claims & after.claims)

    @property
    def stages(self) -> list[GrowthPlan]:
        """The plans that are applied one after another, the first first."""
        return [*(self.after.stages if self.after else []), self]

    @property
    def copies(self) -> dict[str, list[int]]:
        """Space, `layer` among them -> [new] old index that each new one copies, through all stages; negative for none.

        Spaces that no stage grows by copying, and those that one mixes by a learned map, are left out.
        """
        found: dict[str, list[int]] = {}
        mixed: set[str] = set()
        for stage in self.stages:
            mixed |= {name for name, lift in stage.lifts.items() if isinstance(lift, Dense)} | ({"layer"} if stage.depth_maps else set())
            copied = {name: lift.source.tolist() for name, lift in stage.lifts.items() if isinstance(lift, Lift)}
            for space, sources in {"layer": list(stage.layers), **copied}.items():
                before = found.get(space) if space not in mixed else None
                found[space] = [before[old] if before and old >= 0 else old for old in sources]
        return {space: sources for space, sources in found.items() if space not in mixed and sources != list(range(len(sources)))}

    @property
    def alike(self) -> list[str]:
        """Widened spaces with indices that are equal and get equal gradients, so that training never parts them (`laws.alike`)."""
        return list(self.twins(parted=True))

    def twins(self, parted: bool = False) -> dict[str, Indices]:
        """Space -> [new] a number for each index, the same for those that all lifts write and read alike; spaces without such are left out.

        With `parted` also those whose equals something else tells apart.
        """
        found: dict[str, Indices] = {}
        for stage in self.stages:
            for space, lift in stage.lifts.items():
                found[space] = lift.twins(found.get(space, np.arange(lift.size)), stage.fill != "zero")
            for space in stage.parts if parted else ():
                found.pop(space, None)
        return {space: numbers for space, numbers in found.items() if len(np.unique(numbers)) < len(numbers)}

    @property
    def parts(self) -> set[str]:
        """Spaces whose equal indices this stage tells apart, by random numbers or another layer's in a tensor that has them on an axis."""
        if "noise" in self.rewrites:
            return set(self.grown_arch.spaces)
        found = set(self.lifts) if "above" in self.rewrites else set[str]()
        empty = {space for space, lift in self.lifts.items() if self.fill != "zero" and isinstance(lift, Lift) and not lift.held.all()}
        for tensor in (tensor for tensor in self.grown_arch.tensors(self.target_config) if tensor.spec.decays):
            spaces = {space for axis in tensor.spec.axes for space in axis.spaces} | (
                {"expert"} if tensor.expert is not None else set[str]()
            )
            if self.source_of(tensor) is None or self._has_unseen_noise(tensor):
                found |= spaces
            elif filled := empty & spaces:  # the random rows of a new index cross every other space
                found |= spaces if len(filled) > 1 else spaces - filled
        return found

    def _has_unseen_noise(self, tensor: Tensor) -> bool:
        """Does a tensor get noise that what reads a grown space, experts among them, does not see?"""
        reads = any(axis.role == "read" and axis.spaces & self.lifts.keys() for axis in tensor.spec.axes)
        return "projected noise" in self.rewrites and (reads or self.ends_copied_expert(tensor))

    def ends_copied_expert(self, tensor: Tensor) -> bool:
        """Is a tensor the last map of an expert, where experts are copied?"""
        return tensor.expert is not None and "expert" in self.lifts and tensor.spec.ends_branch

    @property
    def origin(self) -> Config:
        """config.json of the very first source."""
        return self.stages[0].source_config

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data, its default fields left out; `from_json` reads it back."""
        content: dict[str, Any] = {
            "operator": self.operator,
            "knobs": dict(self.knobs),
            "source_config": dict(self.source_config),
            "layers": [int(layer) for layer in self.layers],  # numpy's numbers too
            "claims": vars(self.claims),
            "citation": self.citation,
            "lifts": {name: lift_to_json(lift) for name, lift in self.lifts.items()},
            "ends": list(self.ends),
            "depth_maps": {module: array_to_json(matrix) for module, matrix in self.depth_maps.items()},
            "fill": self.fill,
            "rewrites": {name: dict(knobs) for name, knobs in self.rewrites.items()},
            "seed": self.seed,
            "target_family": self.target_arch.family if self.target_arch else None,
            "keys": dict(self.keys),
            "config": dict(self.config),
            "trains_only_fresh": self.trains_only_fresh,
            "flops": self.flops,
            "after": self.after.as_json() if self.after else None,
        }
        needed = ("operator", "knobs", "source_config", "layers", "claims", "citation")
        return {key: value for key, value in content.items() if key in needed or (value and value != "zero")}

    @staticmethod
    def from_json(content: Any, families: Iterable[Arch] = FAMILIES) -> GrowthPlan:
        """Reads a plan that `as_json` or a person wrote, and says what is wrong with it; `families` are those known, your own too."""
        values: dict[str, Any] = dict(checked_plan(content))
        family, before, known = values.pop("target_family", None), values.pop("after", None), tuple(families)
        target = next((arch for arch in known if arch.family == family), None)
        if family and target is None:
            raise OutgrowError(f"the plan makes a model of the family '{family}', which is not known; give it with --family-file")
        try:
            values["arch"], values["target_arch"] = arch_for(values["source_config"], known), target
            values["layers"], values["ends"] = tuple(values["layers"]), tuple(values.get("ends", ()))
            values["claims"] = Claims(**values["claims"])
            values["lifts"] = {name: lift_from_json(lift) for name, lift in values.get("lifts", {}).items()}
            values["depth_maps"] = {module: array_from_json(matrix) for module, matrix in values.get("depth_maps", {}).items()}
            plan = GrowthPlan(**values)
            return GrowthPlan.from_json(before, known).then(plan) if before else plan
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise OutgrowError(f"the plan is not one that outgrow wrote: {type(error).__name__} {error}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GrowthPlan) and json.dumps(self.as_json(), sort_keys=True) == json.dumps(other.as_json(), sort_keys=True)

    __hash__ = None  # type: ignore[assignment]


def connection_rate(layers: tuple[int, ...]) -> float:
    """Share of neighbours in a layer list that were neighbours in the source: mean over i of [list[i+1] == list[i] + 1]."""
    pairs = list(pairwise(layers))
    return sum(before != FRESH and after == before + 1 for before, after in pairs) / len(pairs) if pairs else 1.0


def _set_size(config: dict[str, Any], keys: tuple[str, ...], size: int) -> None:
    """Sets the keys of a size that stand in a config; the first of them if none does."""
    for key in [key for key in keys if key in config] or keys[:1]:
        config[key] = size
