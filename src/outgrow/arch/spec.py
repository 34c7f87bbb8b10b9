"""The grammar in which an architecture is written down: one line per tensor on disk, "writes <- reads".

    self_attn.q_proj.weight:  (kv group head) <- hidden        a matrix; its first stored axis is kv x group x head
    self_attn.q_proj.bias:    (kv group head) <- | if attention_bias
    input_layernorm.weight:   gain hidden                      a normalisation gain
    embed_tokens.weight:      hidden <- vocab | stored vocab hidden
    lm_head.weight:           vocab <- hidden | tied model.embed_tokens.weight
    self_attn.o_proj.weight:  hidden <- (kv group head) | ends branch

Axes are stored in the order written, writes first, unless `stored` says otherwise. Options after "|":
`if KEY` (present when the config's KEY is true), `tied NAME` (absent, and equal to NAME, when embeddings are tied),
`stored AXES`, `ends branch` (the last map before the residual sum).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from outgrow.errors import OutgrowError
from outgrow.spaces import Role

Config = Mapping[str, Any]
Admits = Literal["isometry", "copies", "nothing"]  # isometry: a residual space that RMSNorm reads


@dataclass(frozen=True)
class Space:
    """A space: its size as an expression over config keys and earlier spaces, and the lifts its operations admit.

    `edit` is the config key that changes when the space grows; None when no key names it.
    """

    size: str
    edit: str | None = None
    admits: Admits = "copies"


@dataclass(frozen=True)
class Axis:
    """One stored axis of a tensor: the spaces flattened into it, outermost first, and the role they play."""

    spaces: tuple[str, ...]
    role: Role


@dataclass(frozen=True)
class Spec:
    """What one tensor writes and reads, parsed."""

    axes: tuple[Axis, ...]
    condition: str | None = None
    tied: str | None = None
    ends_branch: bool = False

    @property
    def is_gain(self) -> bool:
        return all(axis.role == "gain" for axis in self.axes)

    @property
    def multiplies(self) -> bool:
        """Takes part in a matrix product: it reads a space, and not by looking rows up in the vocabulary."""
        return any(axis.role == "read" and axis.spaces != ("vocab",) for axis in self.axes)

    @property
    def decays(self) -> bool:
        """Is a matrix, and so takes weight decay; gains and biases do not."""
        return len(self.axes) > 1


@dataclass(frozen=True)
class Tensor:
    """A tensor of a concrete checkpoint: its name on disk, its layer (None outside the blocks), role name and spec."""

    name: str
    layer: int | None
    key: str
    spec: Spec


@dataclass(frozen=True)
class Arch:
    """A model family as data.

    Attributes:
        family: the name users see.
        model_types: values of `model_type` in config.json that this table describes.
        spaces: name -> `Space`, in an order where each may use the ones before it.
        top: tensor name -> spec, outside the blocks.
        layer: tensor name inside a block -> spec.
        layer_prefix: name of block i, with `{}` for i.
        layer_count: config key with the number of blocks.
        layer_tables: config keys that hold one entry per block.
        norm_eps: config key of the epsilon of the norms over the residual space; it grows as their gain squared.
        buffers: tensors inside a block that old files carry and that nothing reads; they are dropped.
        defaults: config key -> value where the file leaves it out.
    """

    family: str
    model_types: tuple[str, ...]
    spaces: Mapping[str, Space]
    top: Mapping[str, str]
    layer: Mapping[str, str]
    layer_prefix: str = "model.layers.{}."
    layer_count: str = "num_hidden_layers"
    layer_tables: tuple[str, ...] = ("layer_types",)
    norm_eps: str = "rms_norm_eps"
    buffers: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def get(self, config: Config, key: str) -> Any:
        """A config value; where the file leaves it out, the family's default; None where there is none."""
        value = config.get(key)
        return self.defaults.get(key) if value is None else value

    def layers(self, config: Config) -> int:
        """The number of blocks."""
        value = config.get(self.layer_count)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OutgrowError(f"the config's '{self.layer_count}' must be a whole number of at least 1, not {value!r}")
        return value

    def sizes(self, config: Config) -> dict[str, int]:
        """The size of every space; refuses configs in which a size is missing or does not divide."""
        sizes: dict[str, int] = {}
        for name, space in self.spaces.items():
            sizes[name] = self._evaluate(name, space.size, {**config, **sizes})
        return sizes

    def _evaluate(self, name: str, expression: str, values: Mapping[str, Any]) -> int:
        for alternative in expression.split(" or "):
            keys = alternative.split(" / ")
            numbers = [self.get(values, key) for key in keys]
            if any(number is None for number in numbers):
                continue
            for key, number in zip(keys, numbers, strict=True):
                if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                    raise OutgrowError(f"the config's '{key}' must be a whole number of at least 1, not {number!r}")
            value = numbers[0]
            for key, number in zip(keys[1:], numbers[1:], strict=True):
                if value % number:
                    raise OutgrowError(f"the config's '{keys[0]}' ({value}) is not a multiple of '{key}' ({number})")
                value //= number
            return value
        raise OutgrowError(f"the config says nothing about the size of '{name}': it needs {expression}")

    def tensors(self, config: Config) -> Iterator[Tensor]:
        """Every tensor of the checkpoint on disk, top ones first, then block by block."""
        for key, text in self.top.items():
            spec = parse(text)
            if self._stored(spec, config):
                yield Tensor(key, None, key, spec)
        block = [(key, spec) for key, spec in ((k, parse(t)) for k, t in self.layer.items()) if self._stored(spec, config)]
        for index in range(self.layers(config)):
            prefix = self.layer_prefix.format(index)
            for key, spec in block:
                yield Tensor(prefix + key, index, key, spec)

    def _stored(self, spec: Spec, config: Config) -> bool:
        if spec.condition and not self.get(config, spec.condition):
            return False
        return not (spec.tied and self.get(config, "tie_word_embeddings"))

    def aliases(self, config: Config) -> dict[str, str]:
        """Tied names that may stand in a file all the same, with the name they equal."""
        if not self.get(config, "tie_word_embeddings"):
            return {}
        return {key: spec.tied for key, spec in ((k, parse(t)) for k, t in self.top.items()) if spec.tied}

    def shape(self, spec: Spec, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The stored shape of a tensor."""
        return tuple(math.prod(sizes[s] for s in axis.spaces) for axis in spec.axes)

    def shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Name on disk -> shape, for the whole checkpoint."""
        sizes = self.sizes(config)
        return {tensor.name: self.shape(tensor.spec, sizes) for tensor in self.tensors(config)}


@cache
def parse(text: str) -> Spec:
    """Parses one line of the grammar above."""
    body, *options = (part.strip() for part in text.split("|"))
    condition = tied = stored = None
    ends_branch = False
    for option in options:
        word, _, rest = option.partition(" ")
        if word == "if":
            condition = rest
        elif word == "tied":
            tied = rest
        elif word == "stored":
            stored = rest
        elif option == "ends branch":
            ends_branch = True
        else:
            raise OutgrowError(f"unknown option '{option}' in the architecture line '{text}'; known: if, tied, stored, ends branch")
    if body.startswith("gain "):
        axes = _axes(body.removeprefix("gain "), "gain")
    else:
        writes, arrow, reads = body.partition("<-")
        if not arrow:
            raise OutgrowError(f"the architecture line '{text}' needs 'writes <- reads' or 'gain SPACE'")
        axes = _axes(writes, "write") + _axes(reads, "read")
    if stored:
        order = [axis.spaces for axis in _axes(stored, "write")]
        if sorted(order) != sorted(axis.spaces for axis in axes):
            raise OutgrowError(f"'stored {stored}' does not name the axes of the architecture line '{text}'")
        axes = tuple(sorted(axes, key=lambda axis: order.index(axis.spaces)))
    return Spec(axes, condition, tied, ends_branch)


def _axes(text: str, role: Role) -> tuple[Axis, ...]:
    return tuple(Axis(tuple(part.strip("()").split()), role) for part in re.findall(r"\([^)]*\)|\S+", text))
