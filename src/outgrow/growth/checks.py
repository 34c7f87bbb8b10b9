"""What makes a growth plan whole: its lists, lifts, maps and edits fit its source, each other and what the families can say."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from outgrow.errors import OutgrowError
from outgrow.spaces import FRESH, AnyLift, Dense

if TYPE_CHECKING:
    from outgrow.growth.plan import GrowthPlan

MOST_EXPERTS = 10_000  # far beyond any model


def check_plan(plan: GrowthPlan) -> None:
    """Raises OutgrowError, in one sentence with the way out, where a plan contradicts itself, its source or what its families can say."""
    old = plan.arch.layers(plan.source_config)
    if not all(isinstance(layer, (int, np.integer)) for layer in cast("tuple[Any, ...]", plan.layers)):
        raise OutgrowError(f"the layer list {list(plan.layers)} must hold whole numbers")
    sources = plan.layers if old else [layer for layer in plan.layers if layer != FRESH]
    if not plan.layers or not all(FRESH <= layer < old for layer in sources):
        raise OutgrowError(f"the layer list {list(plan.layers)} must name layers 0 to {old - 1} of the source")
    if not all(math.isfinite(end) for end in plan.ends or ()):
        raise OutgrowError(f"the plan scales branches by {list(plan.ends or ())}, and must by finite numbers")
    if plan.ends and len(plan.ends) != len(plan.layers):
        raise OutgrowError(f"the plan scales the branches of {len(plan.ends)} layers, and the target has {len(plan.layers)}")
    for name, lift in plan.lifts.items():
        _check_lift(plan, name, lift)
    _check_pattern(plan, old)
    _check_bounds(plan)
    _check_maps(plan, old)
    _check_sizes(plan)
    _check_sources(plan)


def _check_lift(plan: GrowthPlan, name: str, lift: AnyLift) -> None:
    """A lift fits its space, and what reads the space admits it."""
    spaces, sizes, family = plan.arch.spaces, plan.arch.sizes(plan.source_config), plan.arch.family
    if name not in spaces:
        raise OutgrowError(f"'{name}' is not a space of {family}; its spaces: {', '.join(spaces)}")
    growth = f"'{name}' {sizes[name]} -> {lift.new} in {family}"
    admits = spaces[name].admits
    if admits == "nothing":
        reason = "no map of it keeps the old function" if name != "head" else (
            "RoPE frequencies and the attention's scale depend on it, so the old function is lost"
        )  # fmt: skip
        raise OutgrowError(f"cannot widen {growth}: {reason}; widen {', '.join(plan.widenable)} instead")
    if lift.size != sizes[name]:
        raise OutgrowError(f"the lift of '{name}' enlarges a space of {lift.size}, and the source has {sizes[name]}")
    if not plan.claims.preserves or isinstance(lift, Dense):
        return
    if (error := lift.identity_error()) > 1e-9:
        raise OutgrowError(
            f"the plan claims to preserve the function, and what reads {growth} would see the old values changed by {error:.2g} times; "
            "let the copies' shares of reading, times what they write, sum to one, or claim preserves=False"
        )
    exact = {"RMSNorm": lift.keeps_rms_norm(), "LayerNorm": lift.keeps_layer_norm()}.get(admits, True)
    if not exact:
        way_out = "an isometry, a tiling or a pad" if admits == "RMSNorm" else "even copies or new indices that hold the mean"
        raise OutgrowError(
            f"the plan claims to preserve the function, and its lift of {growth} does not fit {admits}; "
            f"use {way_out}, or claim preserves=False"
        )
    rho = lift.norm_factor() if admits in ("RMSNorm", "LayerNorm") else None
    if rho is not None and not np.allclose(lift.gain[lift.held], 1) and plan.arch.norm_eps is None:
        raise OutgrowError(f"the lift of {growth} needs another eps, which {family} shares or does not have; use lift.without_gain()")
    if admits == "even copies" and (lift.new % lift.size or not np.allclose(lift.write, 1)):
        raise OutgrowError(
            f"cannot widen {growth} exactly: it is normed or chosen as a whole, so only whole copies of it can; use an operator that "
            f"copies, such as direct-width, to a multiple of {lift.size}, or leave it as it is"
        )


def _check_pattern(plan: GrowthPlan, old: int) -> None:
    """Layer tables hold one entry a layer; layers of several kinds that no table tells apart keep taking turns as they did."""
    for key, entries in plan.arch.tables(plan.source_config).items():
        if len(entries) != old:
            raise OutgrowError(f"the config's '{key}' has {len(entries)} entries for {old} layers")
    kinds = plan.arch.kinds(plan.source_config)
    period = plan.arch.pattern(plan.source_config)
    if len(set(kinds)) < 2 or plan.has_layer_table:
        return
    # A fresh layer has no kind yet: it takes the one that is due.
    grown = [kinds[i % period] if layer == FRESH else kinds[layer] for i, layer in enumerate(plan.layers)]
    if any(kind != kinds[i % period] for i, kind in enumerate(grown)):
        raise OutgrowError(
            f"the layer list breaks the pattern in which {plan.arch.family}'s layers of {len(set(kinds))} kinds take turns; "
            f"repeat whole periods of {period} layers"
        )


def _check_bounds(plan: GrowthPlan) -> None:
    """A key that counts the first layers of a kind can say one run of them, and no other order; a table of all layers says any."""
    for key, switch in plan.arch.layer_bounds.items():
        bound = plan.source_config.get(key)
        if plan.source_config.get(switch) and isinstance(bound, int) and not plan.has_layer_table:
            inside = plan.first_layers(bound)
            if inside != sorted(inside, reverse=True):
                raise OutgrowError(
                    f"the layer list puts copies of the first {bound} layers behind others, which '{key}' of {plan.arch.family} cannot "
                    "say; say the kind of each layer in the config's 'layer_types'"
                )


def _check_maps(plan: GrowthPlan, old: int) -> None:
    """Learned maps make every layer of the target of those of the source, and are of modules that there are."""
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in plan.grown_arch.layer))
    if unknown := sorted(plan.depth_maps.keys() - set(modules)):
        known = ", ".join(modules)
        raise OutgrowError(f"'{unknown[0]}' of the depth maps is no module of {plan.grown_arch.family}; its modules: {known}")
    for module, weights in plan.depth_maps.items():
        if (shape := tuple(weights.shape)) != (len(plan.layers), old):
            raise OutgrowError(f"the depth map of '{module}' is {list(shape)}, and must be [{len(plan.layers)}, {old}]")


def _check_sizes(plan: GrowthPlan) -> None:
    """What the target's config says is what the plan grows: sizes that a config derives from others must not slip."""
    target = plan.target_config
    planned, told = plan.target_sizes, plan.grown_arch.sizes(target)
    for name, size in planned.items():
        if name in told and told[name] != size:
            head = " x ".join(n for n in ("kv", "group", "head") if n in planned)
            raise OutgrowError(
                f"{plan.arch.family} derives '{name}' from its other sizes, and it would go from {size} to {told[name]}; "
                f"grow hidden and kv by the same factor, so that hidden = {head}"
            )
    if (experts := max(sizes.get("expert", 0) for sizes in (planned, told))) > MOST_EXPERTS:
        raise OutgrowError(f"{experts:,} experts are more than {MOST_EXPERTS:,}; ask for fewer")
    if (layers := plan.grown_arch.layers(target)) != len(plan.layers):
        raise OutgrowError(f"the plan lists {len(plan.layers)} layers, and its config says {layers}; leave that to the list")
    heads, kind = told["kv"] * told.get("group", 1), target.get("model_type")
    rope: Any = target.get("rope_parameters") or target.get("rope_scaling")
    listed = isinstance(rope, dict) and any(isinstance(value, list) for value in cast("dict[str, Any]", rope).values())
    if kind in plan.grown_arch.listed_rope and listed and told["hidden"] // heads != told["head"]:
        raise OutgrowError(
            f"transformers refuses a {plan.arch.family} model with lists of RoPE factors whose hidden size ({told['hidden']}) is not "
            f"{heads} query heads x {told['head']}; grow hidden and kv by the same factor"
        )
    if kind in plan.grown_arch.whole_heads and told["hidden"] % heads and plan.lifts:
        raise OutgrowError(
            f"transformers refuses a {plan.arch.family} model whose hidden size ({told['hidden']}) is no multiple of its {heads} query "
            f"heads; choose hidden={-(-told['hidden'] // heads) * heads}, or other heads"
        )


def _check_sources(plan: GrowthPlan) -> None:
    """Whatever is not fresh is made of a tensor that the source has, of the shape that the lifts move; none is lost behind a tie."""
    target = plan.target_config
    if plan.grown_arch.is_tied(target) and not plan.arch.is_tied(plan.source_config):
        raise OutgrowError("the plan's edits to the config tie the output head, and the source's own would be lost; leave them out")
    if unknown := sorted(plan.keys.keys() - plan.grown_arch.top.keys() - plan.grown_arch.layer.keys()):
        raise OutgrowError(f"the plan says what makes '{unknown[0]}', which is no tensor of {plan.grown_arch.family}")
    one_layer = {plan.arch.layer_count: 1, plan.grown_arch.layer_count: 1}  # all are alike
    found = {tensor.key: tensor for tensor in plan.arch.tensors({**plan.source_config, **one_layer})}
    old = plan.arch.sizes(plan.source_config)
    sizes = {**plan.grown_arch.sizes(target), **old}
    for tensor in plan.grown_arch.tensors({**target, **one_layer}):
        key = plan.keys.get(tensor.key, tensor.key)
        if key is None or (tensor.layer is not None and set(plan.layers) == {FRESH}):
            continue
        shape, source = plan.grown_arch.shape(tensor.spec, sizes), found.get(key)
        if source is None or (source.layer is None) != (tensor.layer is None):
            raise OutgrowError(f"the plan makes '{tensor.key}' of '{key}', which the source does not have; name another, or null")
        if (other := plan.arch.shape(source.spec, old)) != shape:
            raise OutgrowError(f"the plan makes '{tensor.key}' {list(shape)} of '{key}' {list(other)}; name one of the same shape")
