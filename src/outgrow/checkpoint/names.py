"""What the tensors of a distributed checkpoint are called: as in transformers behind some prefix, or as in torchtitan's Llama."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from outgrow.arch import Arch, Config
from outgrow.checkpoint.dcp import Blob, Chunked
from outgrow.checkpoint.optimizer_state import MOMENTS
from outgrow.errors import OutgrowError

# transformers' names -> torchtitan's, for what stands once and for what stands in each of "model.layers.N." and "layers.N."
TORCHTITAN = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
}
_LAYER = re.compile(r"model\.(layers\.\d+\.)(.*)")
_PER_PARAMETER = re.compile(r"(.*?(?:state|param_groups)\.)(.+)\.([^.]+)")
_ROTATED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")


@dataclass(frozen=True)
class Names:
    """How transformers' names become those of a distributed checkpoint.

    Attributes:
        prefix: stands before every name of the model.
        torchtitan: are the names torchtitan's, and with them its order of the rows of q and k, in which rotary pairs stand side by
            side where transformers keeps them half a head apart?
        head: size of a head.
    """

    prefix: str = ""
    torchtitan: bool = False
    head: int = 2

    def on_disk(self, name: str) -> str:
        """The name there."""
        if not self.torchtitan:
            return self.prefix + name
        layer = _LAYER.fullmatch(name)
        prefix, key = (layer[1], layer[2]) if layer else ("", name)
        if key not in TORCHTITAN:
            raise OutgrowError(f"torchtitan's Llama has no tensor like '{name}'; keep transformers' names")
        return self.prefix + prefix + TORCHTITAN[key]

    def rows_from(self, name: str) -> Callable[[Any], Any]:
        """What makes transformers' order of rows of a tensor, or of its moments, of the order there."""
        return self._turned(name, (-1, self.head // 2, 2))

    def rows_to(self, name: str) -> Callable[[Any], Any]:
        """What makes the order there."""
        return self._turned(name, (-1, 2, self.head // 2))

    def tensors(self, held: Mapping[str, Chunked | Blob], arch: Arch, config: Config) -> dict[str, Chunked]:
        """The model's tensors by transformers' names; what stands under one of its modules and is unknown keeps its own name."""
        found: dict[str, Chunked] = {}
        known = {self.on_disk(name): name for name in (*arch.shapes(config), *arch.aliases(config))}
        modules = tuple({self.prefix + key.removeprefix(self.prefix).partition(".")[0] + "." for key in known})
        for key, one in held.items():
            name = known.get(key)
            if isinstance(one, Chunked) and (name or key.startswith(modules)):
                found[name or key] = replace(one, turned=self.rows_from(name)) if name else one
        return found

    def per_parameter(self, held: Mapping[str, Chunked | Blob], names: Iterable[str]) -> dict[str, dict[tuple[str, str], Chunked | Blob]]:
        """transformers' name -> (what stands before it, the field) -> the optimizer's state and settings for that parameter."""
        known = {self.on_disk(name): name for name in names}
        found: dict[str, dict[tuple[str, str], Chunked | Blob]] = {}
        for key, one in held.items():
            parts = _PER_PARAMETER.fullmatch(key)
            if parts and parts[2] in known:
                name = known[parts[2]]
                turned = replace(one, turned=self.rows_from(name)) if isinstance(one, Chunked) and parts[3] in MOMENTS else one
                found.setdefault(name, {})[parts[1], parts[3]] = turned
        return found

    def _turned(self, name: str, shape: tuple[int, int, int]) -> Callable[[Any], Any]:
        if not (self.torchtitan and name.endswith(_ROTATED)):
            return lambda tensor: tensor
        return lambda tensor: tensor.reshape(*shape, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def names_of(held: Mapping[str, Chunked | Blob], arch: Arch, config: Config) -> Names:
    """What a checkpoint calls its tensors; transformers' own names where no way of naming finds them all."""
    expected = list(arch.shapes(config))
    ways = [Names()]
    if set(_keys(expected)) <= TORCHTITAN.keys():
        ways.append(Names(torchtitan=True, head=arch.sizes(config)["head"]))
    for way in ways:
        first = way.on_disk(expected[0])
        for prefix in sorted({key.removesuffix(first) for key in held if key.endswith(first)}, key=len):
            names = replace(way, prefix=prefix)
            if all(names.on_disk(name) in held for name in expected):
                return names
    return Names()


def torchtitan_names(arch: Arch, config: Config) -> Names:
    """torchtitan's names for a model; refuses one that is not like its Llama."""
    names = Names(torchtitan=True, head=arch.sizes(config)["head"])
    for name in arch.shapes(config):
        names.on_disk(name)
    return names


def _keys(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        layer = _LAYER.fullmatch(name)
        yield layer[2] if layer else name
