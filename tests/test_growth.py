from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from outgrow.arch import LLAMA
from outgrow.errors import OutgrowError
from outgrow.growth.apply import grow, transport
from outgrow.growth.laws import gradients_follow, logit_difference, untrained
from outgrow.growth.operators import OPERATORS, make_plan, stack
from outgrow.growth.plan import Claims, GrowthPlan
from outgrow.models.decoder import Decoder
from outgrow.models.loss import next_token_loss
from outgrow.spaces import copies, isometry

from .conftest import ODD


def grown_model(plan, model):
    """The grown transformers model, in the dtype of its source."""
    config = transformers.AutoConfig.for_model(**plan.target_config)
    target = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    target.load_state_dict(dict(grow(plan, model.state_dict())), strict=not config.tie_word_embeddings)
    return target


@torch.no_grad()
def forward(model, tokens):
    return Decoder(model, torch.float64).logits(tokens)


def widening(config, **lifts):
    """A plan of lifts alone."""
    return GrowthPlan("lifts", {}, config, tuple(range(config["num_hidden_layers"])), Claims(True, True), "derived", lifts)


WIDENINGS = {
    # transformers wants hidden to be a multiple of the heads, whatever head_dim is
    "hidden by an odd ratio": {"hidden": isometry(24, 42)},
    "hidden doubled": {"hidden": isometry(24, 48)},
    "ffn": {"ffn": copies(37, 50)},
    "kv": {"kv": copies(2, 4)},
    "group": {"group": copies(3, 4)},
    "all at once": {"hidden": isometry(24, 32), "ffn": copies(37, 61), "kv": copies(2, 4), "group": copies(3, 4)},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", WIDENINGS)
def test_lifts_preserve_the_function(make_model, tokens, name, tied):
    model = make_model(dtype=torch.float64, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    target = grown_model(widening(model.config.to_dict(), **WIDENINGS[name]), model)
    assert logit_difference(forward(model, tokens), forward(target, tokens)) < 1e-10


def test_even_tiling_is_exact_unless_the_head_is_tied(make_model, tokens):
    """HyperCloning's case, arXiv 2409.12903; with a tied head the logits would double, and the plan says so."""
    model = make_model(dtype=torch.float64)
    target = grown_model(widening(model.config.to_dict(), hidden=copies(24, 48)), model)
    assert logit_difference(forward(model, tokens), forward(target, tokens)) < 1e-10
    assert target.config.rms_norm_eps == model.config.rms_norm_eps
    with pytest.raises(OutgrowError, match=r"'hidden' 24 -> 48 reads other than it writes, and the head is tied"):
        widening({**ODD, "tie_word_embeddings": True}, hidden=copies(24, 48))


@pytest.mark.parametrize("name", WIDENINGS)
def test_gradients_move_by_the_dual_lift(make_model, tokens, name):
    model = make_model(dtype=torch.float64)
    plan = widening(model.config.to_dict(), **WIDENINGS[name])
    target = grown_model(plan, model)

    def gradients(one):
        decoder = Decoder(one, torch.float64)
        next_token_loss(decoder.hidden_states(tokens[:, :-1]), decoder.head, tokens[:, 1:]).backward()
        return {key: value.grad for key, value in one.named_parameters()}

    assert gradients_follow(plan, gradients(model), gradients(target)) < 1e-10


def test_an_uneven_plain_copy_of_hidden_is_not_exact(make_model, tokens):
    """The measure can tell: arXiv 2405.15319 is right that uneven plain copies break RMSNorm."""
    model = make_model(dtype=torch.float64)
    with pytest.raises(OutgrowError, match=r"claims to preserve the function, and its lift of 'hidden' 24 -> 42"):
        widening(model.config.to_dict(), hidden=copies(24, 42))
    claims = Claims(preserves=False, trains=True)
    target = grown_model(GrowthPlan("lifts", {}, model.config.to_dict(), (0, 1, 2), claims, "", {"hidden": copies(24, 42)}), model)
    assert logit_difference(forward(model, tokens), forward(target, tokens)) > 1e-2


@pytest.mark.parametrize("edits", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("factor", [2, 4])
def test_stack_is_the_whole_block_list_repeated(make_model, edits, factor):
    """Against an index map written independently, over the raw tensors."""
    model = make_model(**edits)
    source = model.state_dict()
    if model.config.tie_word_embeddings:
        del source["lm_head.weight"]
    target = dict(grow(stack(model.config.to_dict(), factor), source))
    expected = {}
    for name, value in source.items():
        parts = name.split(".")
        if parts[1] != "layers":
            expected[name] = value
            continue
        for copy in range(factor):
            parts[2] = str(int(name.split(".")[2]) + copy * ODD["num_hidden_layers"])
            expected[".".join(parts)] = value
    assert target.keys() == expected.keys()
    assert all(torch.equal(target[name], expected[name]) for name in target)


def test_stack_claims_only_what_is_true(make_model, tokens):
    model = make_model(dtype=torch.float64)
    plan = stack(model.config.to_dict(), 2)
    target = grown_model(plan, model)
    assert not plan.claims.preserves
    assert logit_difference(forward(model, tokens), forward(target, tokens)) > 1e-2
    assert plan.claims.trains
    assert untrained(*three_steps(target, tokens)) == []


def three_steps(model, tokens):
    """Parameters before and after three steps of AdamW."""
    decoder = Decoder(model, torch.float64)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        next_token_loss(decoder.hidden_states(tokens[:, :-1]), decoder.head, tokens[:, 1:]).backward()
        optimizer.step()
    return before, {name: value.detach() for name, value in model.named_parameters()}


def test_dead_blocks_are_found(make_model, tokens):
    """Gate and up both zero never get a gradient: the trap of ffn-only zero growth."""
    model = make_model(dtype=torch.float64)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.zero_()
        model.model.layers[1].mlp.up_proj.weight.zero_()
    dead = untrained(*three_steps(model, tokens))
    assert dead == [
        f"model.layers.1.{name}.weight" for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")
    ]


def test_a_plan_survives_json():
    plan = widening(ODD | {"rms_norm_eps": 1e-6}, hidden=isometry(24, 31), kv=copies(2, 4))
    again = GrowthPlan.from_json(json.loads(json.dumps(plan.as_json())))
    assert again == plan
    assert again.target_config == plan.target_config
    assert again != replace(plan, layers=(0, 1))


def test_the_config_changes_only_where_growth_changes_it():
    config = {**ODD, "rms_norm_eps": 1e-5, "layer_types": ["full_attention", "sliding_attention", "full_attention"], "x_unknown": [1, 2]}
    grown = stack(config, 2).target_config
    assert grown["num_hidden_layers"] == 6
    assert grown["layer_types"] == config["layer_types"] * 2
    assert {k: v for k, v in grown.items() if k not in ("num_hidden_layers", "layer_types")} == {
        k: v for k, v in config.items() if k not in ("num_hidden_layers", "layer_types")
    }
    wide = widening(config, kv=copies(2, 4), hidden=isometry(24, 30)).target_config
    assert (wide["num_attention_heads"], wide["num_key_value_heads"], wide["hidden_size"]) == (12, 4, 30)


def test_transport_of_a_second_moment_is_the_square():
    spec = next(tensor.spec for tensor in LLAMA.tensors(ODD) if tensor.key == "mlp.down_proj.weight")
    sizes = LLAMA.sizes(ODD)
    lifts = {"hidden": isometry(24, 31), "ffn": copies(37, 50)}
    first = np.random.default_rng(0).normal(size=LLAMA.shape(spec, sizes))
    np.testing.assert_allclose(transport(spec, first**2, lifts, sizes, power=2), transport(spec, first, lifts, sizes) ** 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (0, 3)}, "must name layers 0 to 2"),
        ({"layers": ()}, "must name layers 0 to 2"),
        ({"lifts": {"head": copies(10, 20)}}, "cannot widen 'head' 10 -> 20 in llama"),
        ({"lifts": {"vocab": copies(53, 60)}}, "cannot widen 'vocab'"),
        ({"lifts": {"width": copies(2, 4)}}, "'width' is not a space of llama"),
        ({"lifts": {"ffn": copies(36, 40)}}, "enlarges a space of 36, and the source has 37"),
    ],
)
def test_a_wrong_plan_cannot_be_made(change, message):
    with pytest.raises(OutgrowError, match=message):
        replace(stack(ODD, 2), **change)


def test_a_layer_table_of_another_length_is_refused():
    with pytest.raises(OutgrowError, match="'layer_types' has 2 entries for 3 layers"):
        stack({**ODD, "layer_types": ["full_attention"] * 2}, 2)


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("stak", {}, "unknown operator 'stak'; known: stack"),
        ("stack", {"times": 2}, "has no knob 'times'; it has: factor"),
        ("stack", {"factor": 1}, "factor of at least 2, not 1"),
        ("stack", {"factor": 10**12}, r"more than 10,000; lower the factor"),
        ("stack", {"factor": "4"}, "must be of type int, not '4'"),
        ("stack", {"factor": 2.5}, "must be of type int, not 2.5"),
        ("stack", {"factor": True}, "must be of type int, not True"),
    ],
)
def test_wrong_knobs_are_refused(name, knobs, message):
    with pytest.raises(OutgrowError, match=message):
        make_plan(name, ODD, knobs)


def test_growing_from_an_incomplete_source_names_the_tensor():
    with pytest.raises(OutgrowError, match=r"no tensor 'model\.embed_tokens\.weight'"):
        dict(grow(stack(ODD, 2), {}))


def test_every_operator_cites_its_source():
    assert all("arXiv" in operator(ODD).citation for operator in OPERATORS.values())


def test_the_operator_of_the_design_page_works():
    """The page's ten lines, run as they stand there."""
    page = (Path(__file__).parents[1] / "docs" / "design.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    names = {"Config": dict, "GrowthPlan": GrowthPlan, "Claims": Claims, "arch_for": lambda config: LLAMA}
    exec(code, names)
    assert names["interpolate"](ODD).layers == (0, 0, 1, 1, 2, 2)
