"""The grammar in which an architecture is written down: one line per tensor on disk, "writes <- reads".

    self_attn.q_proj.weight:  (kv group head) <- hidden        a matrix; its first stored axis is kv x group x head
    self_attn.q_proj.bias:    (kv group head) <- | if attention_bias
    self_attn.qkv_proj.weight: (kv group head) + (kv head) + (kv head) <- hidden     blocks one after another on one axis
    query_key_value.weight:   (kv 3 head) <- hidden            a number is an axis of that size which never grows
    input_layernorm.weight:   gain hidden                      a normalisation gain; its bias is `shift hidden`
    embed_tokens.weight:      hidden <- vocab | stored vocab hidden
    lm_head.weight:           vocab <- hidden | tied model.embed_tokens.weight
    mlp.experts.{expert}.up_proj.weight:  ffn <- hidden        one tensor per expert
    self_attn.o_proj.weight:  hidden <- (kv group head) | ends branch

Axes are stored in the order written, writes first, unless `stored` says otherwise. Options after "|":
`if KEY` (present when the config's KEY is true), `tied NAME` (absent, and equal to NAME, when embeddings are tied),
`stored AXES`, `ends branch` (the last map before the residual sum), `plus one` (a gain stored without its one),
`times sqrt SPACE` (the model multiplies the tensor by sqrt of that size), `before tied head` (the norm a tied head reads).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from outgrow.errors import OutgrowError
from outgrow.spaces import Role

Config = Mapping[str, Any]
# What reads a space, and so which lifts keep the function: a norm over it, nothing that mixes it, heads normed together, or all.
Admits = Literal["RMSNorm", "LayerNorm", "copies", "even copies", "nothing"]


@dataclass(frozen=True)
class Space:
    """A space: its size as an expression over config keys and earlier spaces, and the lifts its operations admit.

    Attributes:
        size: alternatives by "or", each a product, quotient or sum such as "num_attention_heads / kv".
        edit: config keys that hold the size, the one to set if none stands there first.
        admits: what reads the space.
        scales: config keys that grow by the same factor, such as the number of experts a token is sent to.
    """

    size: str
    edit: tuple[str, ...] = ()
    admits: Admits = "copies"
    scales: tuple[str, ...] = ()


@dataclass(frozen=True)
class Axis:
    """One stored axis of a tensor: blocks one after another, each the spaces flattened into it, outermost first; and their role."""

    blocks: tuple[tuple[str, ...], ...]
    role: Role

    @property
    def spaces(self) -> set[str]:
        return {space for block in self.blocks for space in block}

    def indices(self, chosen: Mapping[str, NDArray[np.int64]], sizes: Mapping[str, int]) -> NDArray[np.int64]:
        """Positions along this axis when each space named is read in another order; `sizes` are those of all spaces."""
        begin, found = 0, list[NDArray[np.int64]]()
        for block in self.blocks:
            place = np.zeros(1, np.int64)
            for space in block:
                size = size_of(space, sizes)
                place = np.ravel(place[:, None] * size + chosen.get(space, np.arange(size))[None, :])
            found.append(begin + place)
            begin += math.prod(size_of(space, sizes) for space in block)
        return np.concatenate(found)


@dataclass(frozen=True)
class Spec:
    """What one tensor writes and reads, parsed."""

    axes: tuple[Axis, ...]
    condition: str | None = None
    tied: str | None = None
    ends_branch: bool = False
    plus_one: bool = False
    times_sqrt: str | None = None
    before_tied_head: bool = False

    @property
    def is_gain(self) -> bool:
        return all(axis.role == "gain" for axis in self.axes)

    @property
    def is_bias(self) -> bool:
        return len(self.axes) == 1 and self.axes[0].role == "write"

    @property
    def multiplies(self) -> bool:
        """Takes part in a matrix product: it reads a space, and not by looking rows up in a table."""
        return any(axis.role == "read" and not axis.spaces & {"vocab", "position"} for axis in self.axes)

    @property
    def decays(self) -> bool:
        """Is a matrix, and so takes weight decay; gains and biases do not."""
        return len(self.axes) > 1

    def writes(self, space: str) -> bool:
        return any(axis.role == "write" and space in axis.spaces for axis in self.axes)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a concrete checkpoint: its name on disk, layer (None outside the blocks), key, spec and expert (None if none)."""

    name: str
    layer: int | None
    key: str
    spec: Spec
    expert: int | None = None

    @property
    def is_inner_matrix(self) -> bool:
        """Is a matrix inside a block, which Muon takes: no embedding, head, gain or bias."""
        return self.layer is not None and len(self.spec.axes) == 2


@dataclass(frozen=True)
class Arch:
    """A model family as data.

    Attributes:
        family: the name users see.
        model_types: values of `model_type` in config.json that this table describes.
        spaces: name -> `Space`, in an order where each may use the ones before it.
        top: tensor name -> spec, outside the blocks.
        layer: tensor name inside a block -> spec; `{expert}` stands for the number of an expert.
        layer_prefix: name of block i, with `{}` for i.
        layer_count: config key with the number of blocks.
        layer_tables: config keys that hold one entry per block.
        layer_bounds: config key that counts the first blocks of a kind, where no table says it -> the key that switches it on.
        period: blocks alternate with this period where no table in the config says so.
        products: config key -> the spaces whose product it holds.
        norm_eps: config key of the epsilon of the norms over the residual space; None if there is none or other norms share it.
        init: config key of the standard deviation of fresh weights.
        requires: config key -> the only value that this table describes, where the file does not leave it out.
        whole_heads: values of `model_type` whose models transformers refuses where hidden is no multiple of the query heads.
        listed_rope: values of `model_type` whose RoPE factors transformers counts by hidden / query heads, whatever the head's size.
        backbone_prefix: what names lack in files that were saved without the output head.
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
    layer_bounds: Mapping[str, str] = field(default_factory=dict[str, str])
    period: int = 1
    products: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    norm_eps: str | None = None
    init: str = "initializer_range"
    requires: Mapping[str, Any] = field(default_factory=dict[str, Any])
    whole_heads: tuple[str, ...] = ()
    listed_rope: tuple[str, ...] = ()
    backbone_prefix: str = ""
    buffers: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def get(self, config: Config, key: str) -> Any:
        """A config value; where the file leaves it out, the family's default; None where there is none."""
        value = config.get(key)
        return self.defaults.get(key) if value is None else value

    def layers(self, config: Config) -> int:
        """The number of blocks."""
        value = config.get(self.layer_count)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise OutgrowError(f"the config's '{self.layer_count}' must be a whole number of at least 0, not {value!r}")
        return value

    def tables(self, config: Config) -> dict[str, list[Any]]:
        """The tables of one entry a block that a config holds, by their keys."""
        return {key: cast("list[Any]", config[key]) for key in self.layer_tables if isinstance(config.get(key), list)}

    def kinds(self, config: Config) -> list[Any]:
        """[layers] the kind of each block, such as sliding or full attention."""
        for table, entries in self.tables(config).items():
            if not all(isinstance(entry, (str, int)) for entry in entries):
                raise OutgrowError(f"the config's '{table}' must name the kind of each layer, not {str(entries)[:80]}")
            return entries
        return [layer % self.period for layer in range(self.layers(config))]

    def pattern(self, config: Config) -> int:
        """The number of layers after which their kinds repeat; 1 where all are alike."""
        kinds = self.kinds(config)
        count = len(kinds)
        return next((p for p in range(1, count) if all(kinds[i] == kinds[i % p] for i in range(count))), max(count, 1))

    @property
    def residual(self) -> list[str]:
        """The spaces of the residual stream: those that norms read."""
        return [name for name, space in self.spaces.items() if space.admits in ("RMSNorm", "LayerNorm")]

    def sizes(self, config: Config) -> dict[str, int]:
        """The size of every space; refuses configs that this table does not describe."""
        for key, value in self.requires.items():
            if config.get(key, value) not in (value, None):
                raise OutgrowError(f"'{key}' = {config[key]!r} is not described for {self.family}; only {value!r} is")
        for key in (self.norm_eps, self.init):
            value = self.get(config, key) if key else None
            if value is not None and not (type(value) in (int, float) and 0 <= value < math.inf):
                raise OutgrowError(f"the config's '{key}' must be a finite number of at least 0, not {value!r}")
        sizes: dict[str, int] = {}
        for name, space in self.spaces.items():
            sizes[name] = self._evaluate(name, space.size, {**config, **sizes})
            for key in (key for key in space.scales if self.get(config, key) is not None):
                self._evaluate(key, key, config)
        if any("{expert}" in key for key in self.layer):
            self._evaluate("experts of a token", "num_experts_per_tok", config)
        return sizes

    def _evaluate(self, name: str, expression: str, values: Mapping[str, Any]) -> int:
        for operations in _alternatives(expression):
            numbers = [int(key) if key.isdigit() else self.get(values, key) for _, key in operations]
            if any(number is None for number in numbers):
                continue
            size = 1
            for (sign, key), number in zip(operations, numbers, strict=True):
                if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                    raise OutgrowError(f"the config's '{key}' must be a whole number of at least 1, not {number!r}")
                if sign == "/" and size % number:
                    raise OutgrowError(f"the config's '{operations[0][1]}' ({size}) is not a multiple of '{key}' ({number})")
                size = size * number if sign == "*" else size + number if sign == "+" else size // number
            return size
        raise OutgrowError(f"the config says nothing about the size of '{name}': it needs {expression}")

    def name(self, key: str, layer: int | None, expert: int | None = None) -> str:
        """The name on disk of a tensor."""
        prefix = "" if layer is None else self.layer_prefix.format(layer)
        return prefix + (key if expert is None else key.replace("{expert}", str(expert)))

    def tensors(self, config: Config) -> Iterator[Tensor]:
        """Every tensor of the checkpoint on disk, top ones first, then block by block."""
        for key, text in self.top.items():
            spec = parse(text)
            if self._stored(spec, config):
                yield Tensor(key, None, key, spec)
        block = [(key, spec) for key, spec in ((k, parse(t)) for k, t in self.layer.items()) if self._stored(spec, config)]
        experts: list[int | None] = list(range(self.sizes(config).get("expert", 0)))
        for layer in range(self.layers(config)):
            for key, spec in block:
                for expert in experts if "{expert}" in key else [None]:
                    yield Tensor(self.name(key, layer, expert), layer, key, spec, expert)

    def _stored(self, spec: Spec, config: Config) -> bool:
        if spec.condition and not self.get(config, spec.condition):
            return False
        return not (spec.tied and self.is_tied(config))

    def is_tied(self, config: Config) -> bool:
        """Does the output head share the embedding's weights?"""
        return bool(self.get(config, "tie_word_embeddings"))

    def aliases(self, config: Config) -> dict[str, str]:
        """Tied names that may stand in a file all the same, with the name they equal."""
        if not self.is_tied(config):
            return {}
        return {key: spec.tied for key, spec in ((k, parse(t)) for k, t in self.top.items()) if spec.tied}

    def shape(self, spec: Spec, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The stored shape of a tensor."""
        return tuple(sum(math.prod(size_of(s, sizes) for s in block) for block in axis.blocks) for axis in spec.axes)

    def shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Name on disk -> shape, for the whole checkpoint."""
        sizes = self.sizes(config)
        return {tensor.name: self.shape(tensor.spec, sizes) for tensor in self.tensors(config)}

    def deviation(self, spec: Spec, config: Config) -> float:
        """Standard deviation of fresh weights: the config's for matrices, 1/sqrt(2 x layers) of it where a branch ends (GPT-2)."""
        if not spec.decays:
            return 0.0
        deviation = float(self.get(config, self.init) or 0.02)
        return deviation * (2 * max(self.layers(config), 1)) ** -0.5 if spec.ends_branch else deviation


def size_of(space: str, sizes: Mapping[str, int]) -> int:
    """The size of a space, or of a number that stands in its place."""
    return int(space) if space.isdigit() else sizes[space]


@cache
def _alternatives(expression: str) -> tuple[tuple[tuple[str, str], ...], ...]:
    """What a size is by each of its alternatives: (sign, config key or number), one after another."""
    found: list[tuple[tuple[str, str], ...]] = []
    for alternative in expression.split(" or "):
        first, *rest = re.split(r" ([/*+]) ", alternative)
        found.append((("*", first), *zip(rest[::2], rest[1::2], strict=True)))
    return tuple(found)


@cache
def parse(text: str) -> Spec:
    """Parses one line of the grammar above."""
    body, *options = (part.strip() for part in text.split("|"))
    found: dict[str, Any] = {}
    stored = None
    for option in options:
        word, _, rest = option.partition(" ")
        if word == "if":
            found["condition"] = rest
        elif word == "tied":
            found["tied"] = rest
        elif word == "stored":
            stored = rest
        elif option.startswith("times sqrt "):
            found["times_sqrt"] = option.removeprefix("times sqrt ")
        elif option in ("ends branch", "plus one", "before tied head"):
            found[option.replace(" ", "_")] = True
        else:
            known = "if, tied, stored, ends branch, plus one, times sqrt, before tied head"
            raise OutgrowError(f"unknown option '{option}' in the architecture line '{text}'; known: {known}")
    word, _, rest = body.partition(" ")
    if word in ("gain", "shift"):
        axes = _axes(rest, cast("Role", word))
    else:
        writes, arrow, reads = body.partition("<-")
        if not arrow:
            raise OutgrowError(f"the architecture line '{text}' needs 'writes <- reads', 'gain SPACE' or 'shift SPACE'")
        axes = _axes(writes, "write") + _axes(reads, "read")
    if stored:
        order = [axis.blocks for axis in _axes(stored, "write")]
        if sorted(order) != sorted(axis.blocks for axis in axes):
            raise OutgrowError(f"'stored {stored}' does not name the axes of the architecture line '{text}'")
        axes = tuple(sorted(axes, key=lambda axis: order.index(axis.blocks)))
    return Spec(axes, **found)


def _axes(text: str, role: Role) -> tuple[Axis, ...]:
    """`(a b) + c d` is two axes: one of the blocks (a b) and c, and one of d."""
    axes: list[Axis] = []
    joined = False
    for part in re.findall(r"\([^)]*\)|\S+", text):
        if part == "+":
            joined = True
            continue
        block = tuple(part.strip("()").split())
        if joined and axes:
            axes[-1] = Axis((*axes[-1].blocks, block), role)
        else:
            axes.append(Axis((block,), role))
        joined = False
    return tuple(axes)
