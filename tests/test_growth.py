from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from outgrow.arch import FAMILIES, LLAMA, arch_for
from outgrow.checkpoint.describe import plan_lines
from outgrow.errors import OutgrowError
from outgrow.growth.apply import Grown, grow, rows_of
from outgrow.growth.fresh import masked, normal
from outgrow.growth.operators import OPERATORS, make_plan
from outgrow.growth.operators.arrange import layer_list
from outgrow.growth.plan import Claims, GrowthPlan, connection_rate
from outgrow.growth.transport import transport
from outgrow.lab.check import default_knobs
from outgrow.lab.tiny import TINY
from outgrow.spaces import Lift, copies, isometry, mean, pad

from .conftest import ODD


def source_of(config, seed=0):
    """Random numpy tensors under the names and in the shapes of a config."""
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape) for name, shape in arch_for(config).shapes(config).items()}


def planned(text, config=ODD, **knobs):
    return make_plan(text, arch_for(config), config, knobs)


def lifted(config, **lifts):
    """A plan of lifts alone, which claims to preserve."""
    claims = Claims(preserves=True, trains=True)
    arch = arch_for(config)
    return GrowthPlan("lifts", {}, arch, config, tuple(range(arch.layers(config))), claims, "derived", lifts)


DEPTH = {
    "stack(factor=2)": [0, 1, 2, 3, 0, 1, 2, 3],
    "stack(factor=4)": [0, 1, 2, 3] * 4,
    "interpolate(factor=2, block=1)": [0, 0, 1, 1, 2, 2, 3, 3],
    "interpolate(factor=3, block=1, protect=1)": [0, 1, 1, 1, 2, 2, 2, 3],
    "interpolate(factor=2, block=2)": [0, 1, 0, 1, 2, 3, 2, 3],
    "gradual(block=1)": [0, 1, 2, 3, 3],
    "gradual(block=2)": [0, 1, 2, 3, 2, 3],
    "midas(block=2)": [0, 1, 0, 1, 2, 3],
    "midas(block=1)": [0, 1, 1, 2, 3],
    "solar(removed=1)": [0, 1, 2, 1, 2, 3],
    "arrange(layers='0-3,1-2,3')": [0, 1, 2, 3, 1, 2, 3],
    "arrange(layers='1-23*2-4')": [0, 1, 2, 1, 2, 3],
    "arrange(layers='1234*2')": [0, 1, 2, 3, 0, 1, 2, 3],
    "expand(layers=7)": [0, 1, 2, 3, 0, 1, 2],
}


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("text", DEPTH)
def test_depth_plans_are_an_index_map_over_the_raw_tensors(text, family):
    """Against a map written independently: the number after the layers' prefix is replaced, nothing else."""
    config = TINY[family]
    if family == "gemma2" and [layer % 2 for layer in DEPTH[text]] != [place % 2 for place in range(len(DEPTH[text]))]:
        with pytest.raises(OutgrowError, match="breaks the pattern"):
            planned(text, config)
        return
    source = source_of(config)
    marker = {"gpt2": ".h.", "opt": "decoder.layers."}.get(family, "layers.")
    expected = {}
    for name, value in source.items():
        before, found, after = name.partition(marker)
        if not found:
            expected[name] = value
            continue
        layer, _, rest = after.partition(".")
        for place, wanted in enumerate(DEPTH[text]):
            if int(layer) == wanted:
                expected[f"{before}{marker}{place}.{rest}"] = value
    target = dict(grow(planned(text, config), source))
    assert target.keys() == expected.keys()
    assert all(target[name] is expected[name] for name in target)


def test_the_papers_examples():
    assert layer_list("123456*4") == tuple(range(6)) * 4
    assert layer_list("12-3456*5-56") == (0, 1, *[2, 3, 4, 5] * 5, 4, 5)
    assert layer_list("0-5,0-5,2-5") == (*range(6), *range(6), *range(2, 6))
    assert layer_list("3") == (3,)
    thirty_two = {**ODD, "num_hidden_layers": 32}
    assert len(planned("solar", thirty_two).layers) == 48
    assert connection_rate(layer_list("123456*4")) == pytest.approx(20 / 23)
    assert connection_rate((0, 0, 1, 1)) == pytest.approx(1 / 3)
    assert connection_rate((2,)) == 1


@pytest.mark.parametrize("text", ["", "0-", "5-0", "0-5;2", "12-34x5", "0-99999", "1*99999", "012*2", "a"])
def test_a_layer_list_that_cannot_be_read_is_refused(text):
    with pytest.raises(OutgrowError, match="layer list|more than"):
        layer_list(text)


def test_even_tiling_is_the_direct_tiling_of_the_weights():
    """HyperCloning by 2, against reshapes written out by hand; bit by bit, since factors are powers of two."""
    source = {name: value.astype(np.float32) for name, value in source_of(ODD).items()}
    target = dict(grow(planned("hypercloning", factor=2), source))
    kv, group, head, hidden, ffn = 2, 3, 10, 24, 37
    for name, value in source.items():
        kind = name.split(".")[-2]
        expected = {
            "embed_tokens": lambda w: np.tile(w, (1, 2)),
            "lm_head": lambda w: np.tile(w, (1, 2)) / 2,
            "q_proj": lambda w: np.tile(w.reshape(kv, group, head, hidden), (2, 1, 1, 2)).reshape(-1, 2 * hidden) / 2,
            "k_proj": lambda w: np.tile(w.reshape(kv, head, hidden), (2, 1, 2)).reshape(-1, 2 * hidden) / 2,
            "v_proj": lambda w: np.tile(w.reshape(kv, head, hidden), (2, 1, 2)).reshape(-1, 2 * hidden) / 2,
            "o_proj": lambda w: np.tile(w.reshape(hidden, kv, group, head), (2, 2, 1, 1)).reshape(2 * hidden, -1) / 2,
            "gate_proj": lambda w: np.tile(w, (2, 2)) / 2,
            "up_proj": lambda w: np.tile(w, (2, 2)) / 2,
            "down_proj": lambda w: np.tile(w, (2, 2)) / 2,
        }.get(kind, lambda w: np.tile(w, 2))(value)
        np.testing.assert_array_equal(target[name], expected, err_msg=name)
    assert ffn * 2 == target["model.layers.0.mlp.up_proj.weight"].shape[0]


def test_direct_width_at_a_whole_ratio_is_that_tiling_too():
    source = source_of(ODD)
    one, two = planned("hypercloning", factor=2), planned("direct-width", hidden=48, ffn=74, kv=4)
    for (name, a), (_, b) in zip(grow(one, source), grow(two, source), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert one.target_config == two.target_config


def test_a_head_widens_by_kv_blocks_not_as_one_flat_axis():
    source = source_of(ODD)
    target = dict(grow(planned("direct-width", kv=4), source))
    name = "model.layers.0.self_attn.q_proj.weight"
    blocks, old = target[name].reshape(4, 3, 10, 24), source[name].reshape(2, 3, 10, 24)
    np.testing.assert_array_equal(blocks[2], old[0])
    assert not np.array_equal(target[name][60:120], np.repeat(source[name], 2, 0)[60:120])


def test_staged_width_is_block_diagonal():
    source = source_of(ODD)
    target = dict(grow(planned("staged-width"), source))
    up, old = target["model.layers.1.mlp.up_proj.weight"], source["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(up, np.block([[old, np.zeros_like(old)], [np.zeros_like(old), old]]))


def test_aki_takes_new_neurons_from_the_layer_above():
    source = source_of(ODD)
    target = dict(grow(planned("aki", ffn=50), source))
    name = "model.layers.{}.mlp.up_proj.weight"
    np.testing.assert_array_equal(target[name.format(0)][:37], source[name.format(0)])
    np.testing.assert_array_equal(target[name.format(0)][37:], source[name.format(1)][:13])
    np.testing.assert_array_equal(target[name.format(2)][37:], source[name.format(2)][:13])  # nothing lies above the last


def test_mergekit_scales_what_ends_the_branches_of_repeated_layers():
    source = source_of(ODD)
    target = dict(grow(planned("mergekit", layers="0-1,1-2"), source))
    for place, layer, factor in [(0, 0, 1), (1, 1, 0.5**0.5), (2, 1, 0.5**0.5), (3, 2, 1)]:
        for module, scaled in [("self_attn.o_proj", True), ("mlp.down_proj", True), ("mlp.up_proj", False)]:
            expected = source[f"model.layers.{layer}.{module}.weight"] * (factor if scaled else 1)
            np.testing.assert_array_equal(target[f"model.layers.{place}.{module}.weight"], expected)


def test_llama_pro_inserts_identity_blocks_and_trains_only_those():
    plan = planned("llama-pro", TINY["llama"], blocks=2)
    assert plan.layers == (0, 1, 1, 2, 3, 3)
    assert plan.trains_only_fresh
    fresh = {tensor.layer for tensor in LLAMA.tensors(plan.target_config) if plan.is_new(tensor)}
    assert fresh == {2, 5}
    target = dict(grow(plan, source_of(TINY["llama"])))
    assert not target["model.layers.2.mlp.down_proj.weight"].any()
    assert target["model.layers.2.mlp.up_proj.weight"].any()


def test_post_norm_families_zero_the_norm_that_ends_a_branch():
    """Zeroing o would put a norm on a zero, whose gradient is 1/sqrt(eps)."""
    target = dict(grow(planned("zero-depth", TINY["olmo2"]), source_of(TINY["olmo2"])))
    assert not target["model.layers.4.post_attention_layernorm.weight"].any()
    assert target["model.layers.4.self_attn.o_proj.weight"].any()
    gemma = dict(grow(planned("zero-depth", TINY["gemma2"]), source_of(TINY["gemma2"])))
    assert (gemma["model.layers.4.post_feedforward_layernorm.weight"] == -1).all()  # stored without its one


def test_noise_is_the_papers_formula_and_seeded():
    source = source_of(ODD)
    target = dict(grow(planned("noise", share=0.2, seed=7), source))
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_allclose(target[name], 0.8 * source[name] + 0.2 * 0.3 * normal(7, f"noise {name}", (37, 24)), rtol=1e-5, atol=1e-6)
    assert target["model.norm.weight"] is source["model.norm.weight"]
    again = dict(grow(planned("noise", share=0.2, seed=7), source))
    other = dict(grow(planned("noise", share=0.2, seed=8), source))
    np.testing.assert_array_equal(target[name], again[name])
    assert not np.array_equal(target[name], other[name])


def test_random_numbers_have_the_scale_of_the_familys_initialisation():
    config = {**ODD, "hidden_size": 120, "intermediate_size": 300}
    target = dict(grow(planned("expand", config, layers=4, weights="random"), source_of(config)))
    assert target["model.layers.3.mlp.up_proj.weight"].std() == pytest.approx(0.3, rel=0.05)
    assert target["model.layers.3.mlp.down_proj.weight"].std() == pytest.approx(0.3 / 8**0.5, rel=0.05)
    assert (target["model.layers.3.input_layernorm.weight"] == 1).all()


def test_masked_growth_hides_random_values_where_the_checkpoint_has_zeros():
    plan = planned("random-width", hidden=40, ffn=50, group=4)
    target = dict(grow(plan, source_of(ODD)))
    hidden = masked(plan)
    for name, (where, values) in hidden.items():
        assert not target[name][where].any(), name
        assert values()[where].all()
        assert (values(slice(1, 5)) == values()[1:5]).all()
    assert set(hidden) == {name for name in target if name.split(".")[-2] in ("embed_tokens", "o_proj", "down_proj")}
    assert masked(planned("zero-width", ffn=50)) == {}


def test_a_model_without_layers_can_be_expanded():
    config = {**ODD, "num_hidden_layers": 0}
    plan = planned("expand", config, layers=3, weights="random")
    assert set(dict(grow(plan, source_of(config)))) == set(arch_for(ODD).shapes(ODD))
    with pytest.raises(OutgrowError, match="a base without layers"):
        planned("expand", config, layers=3)


def test_depth_and_width_compose_in_one_plan():
    plan = planned("stack(factor=2), direct-width(hidden=36, ffn=50), noise(share=0.1)")
    assert [stage.operator for stage in plan.stages] == ["stack", "direct-width", "noise"]
    source = source_of(ODD)
    first = dict(grow(planned("stack", factor=2), source))
    second = dict(grow(planned("direct-width", plan.stages[0].target_config, hidden=36, ffn=50), first))
    third = dict(grow(planned("noise", plan.stages[1].target_config, share=0.1), second))
    for name, value in grow(plan, source):
        np.testing.assert_array_equal(value, third[name], err_msg=name)
    assert GrowthPlan.from_json(json.loads(json.dumps(plan.as_json()))) == plan
    deeper = planned("direct-width(ffn=50), stack(factor=2)")
    assert deeper.target_config == planned("stack(factor=2), direct-width(ffn=50)").target_config
    for (name, a), (_, b) in zip(grow(deeper, source), grow(planned("stack(factor=2), direct-width(ffn=50)"), source), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_then_is_associative_and_refuses_another_config():
    a, b = planned("stack", factor=2), planned("direct-width", {**ODD, "num_hidden_layers": 6}, ffn=50)
    c = planned("noise", b.target_config)
    assert a.then(b).then(c) == a.then(b.then(c))
    with pytest.raises(OutgrowError, match="was planned for another config"):
        a.then(planned("noise"))
    with pytest.raises(OutgrowError, match="make it the last"):
        planned("random-width(ffn=50), stack")


def test_a_composed_plan_claims_what_all_its_stages_claim():
    plan = planned("stack(factor=2), direct-width(ffn=50)")
    assert plan.claims == Claims(preserves=False, trains=True, dual=False)
    assert planned("zero-depth(factor=2), direct-width(ffn=50)").claims == Claims(preserves=True, trains=True, dual=True)
    assert GrowthPlan.from_json(json.loads(json.dumps(plan.as_json()))) == plan
    older = {
        **plan.as_json(),
        "claims": {"preserves": True, "trains": True, "dual": True},
    }  # earlier versions wrote those of the last stage
    assert GrowthPlan.from_json(older) == plan


def test_the_first_source_of_a_tensor_is_known_through_all_stages():
    plan = planned("stack(factor=2), expand(layers=8, weights='random'), upcycle(experts=4), more-experts")
    tensors = {tensor.name: tensor for tensor in plan.grown_arch.tensors(plan.target_config)}
    expert = "model.layers.{}.block_sparse_moe.experts.7.w1.weight"
    assert plan.first_source(tensors[expert.format(4)]) == "model.layers.1.mlp.gate_proj.weight"
    assert plan.first_source(tensors[expert.format(6)]) is plan.first_source(tensors["model.layers.4.block_sparse_moe.gate.weight"]) is None
    assert set(map(plan.first_source, tensors.values())) - {None} == set(LLAMA.shapes(ODD))
    lines = list(plan_lines(planned("stack(factor=2), direct-width(ffn=50)")))
    assert "model.layers.4.mlp.up_proj.weight [50, 24] <- model.layers.1.mlp.up_proj.weight" in lines
    names = planned("llama-pro", blocks=3).new_tensors
    assert {name.split(".")[2] for name in names} == {"1", "3", "5"}


def test_what_a_learned_map_mixes_copies_nothing():
    assert planned("direct-width(ffn=74), learn-width(ffn=80)").copies == {}
    assert planned("learn-width(ffn=80), direct-width(ffn=160, kv=4)").copies == {"kv": [0, 1, 0, 1]}
    assert planned("stack(factor=2), learn-depth(factor=2), stack(factor=2)").copies == {}


@pytest.mark.parametrize("operator", ["lemon", "msg"])
def test_methods_of_width_and_depth_grow_depth_alone(operator):
    plan = planned(operator, layers=6)
    assert (len(plan.layers), plan.lifts, plan.ends.count(0)) == (6, {}, 3)
    with pytest.raises(OutgrowError, match="no space is asked to grow"):
        planned(operator, layers=3)


def test_only_pure_copies_are_copied():
    grown = Grown(planned("stack(factor=2), direct-width(ffn=50)"), lambda name, rows: source_of(ODD)[name])
    assert grown.copied_from("model.layers.4.self_attn.q_proj.weight") == "model.layers.1.self_attn.q_proj.weight"
    assert grown.copied_from("model.layers.4.mlp.up_proj.weight") is None
    assert grown.reference("model.layers.4.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "text", ["direct-width(hidden=36, kv=4)", "mergekit(layers='0-2,0-2')", "learn-depth", "learn-width(ffn=50)", "aki(ffn=50)"]
)
def test_a_plan_survives_json(text):
    plan = planned(text, ODD | {"rms_norm_eps": 1e-6})
    again = GrowthPlan.from_json(json.loads(json.dumps(plan.as_json())))
    assert again == plan
    assert again.target_config == plan.target_config
    source = source_of(ODD)
    for (_, a), (_, b) in zip(grow(plan, source), grow(again, source), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again != replace(plan, seed=5)


def test_a_plan_of_other_making_is_refused():
    for content in ({}, [], {"operator": "x"}, {**planned("stack").as_json(), "surprise": 1}, {**planned("stack").as_json(), "layers": 3}):
        with pytest.raises(OutgrowError, match="not one that outgrow wrote"):
            GrowthPlan.from_json(content)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"config": {"num_hidden_layers": 9}}, "lists 6 layers, and its config says 9"),
        ({"config": {"attention_bias": True}}, r"makes 'self_attn\.\w_proj\.bias' of '.*', which the source does not have"),
        ({"config": {"tie_word_embeddings": True}}, "tie the output head, and the source's own would be lost"),
        ({"keys": {"mlp.up_proj.weight": "model.embed_tokens.weight"}}, "of 'model.embed_tokens.weight', which the source does not have"),
        ({"keys": {"model.norm.weight": "input_layernorm.weight"}}, "of 'input_layernorm.weight', which the source does not have"),
        ({"keys": {"mlp.gate_proj.weight": "self_attn.k_proj.weight"}}, r"\[37, 24\] of 'self_attn.k_proj.weight' \[20, 24\]"),
    ],
)
def test_a_plan_written_by_hand_is_held_against_its_source(edit, message):
    with pytest.raises(OutgrowError, match=message):
        GrowthPlan.from_json({**planned("stack(factor=2)").as_json(), **edit})
    swapped = {**planned("stack").as_json(), "keys": {"mlp.gate_proj.weight": "mlp.up_proj.weight"}}
    assert GrowthPlan.from_json(swapped).source_of(next(t for t in LLAMA.tensors(ODD) if "gate_proj" in t.name)).endswith("up_proj.weight")


def test_a_layer_list_of_numpys_numbers_is_json():
    plan = replace(planned("stack(factor=2)"), layers=tuple(np.arange(6) % 3))
    assert GrowthPlan.from_json(json.loads(json.dumps(plan.as_json()))) == planned("stack(factor=2)")


def test_the_config_changes_only_where_growth_changes_it():
    kinds = ["full_attention", "sliding_attention"]
    config = {**ODD, "num_hidden_layers": 4, "rms_norm_eps": 1e-5, "layer_types": kinds * 2, "x_unknown": [1, 2]}
    grown = planned("stack", config, factor=2).target_config
    assert grown["num_hidden_layers"] == 8
    assert grown["layer_types"] == kinds * 4
    others = set(config) - {"num_hidden_layers", "layer_types"}
    assert {key: grown[key] for key in others} == {key: config[key] for key in others}
    assert set(grown) == set(config)
    wide = planned("direct-width", config, kv=4, hidden=36).target_config
    assert (wide["num_attention_heads"], wide["num_key_value_heads"], wide["hidden_size"]) == (12, 4, 36)
    assert wide["rms_norm_eps"] == 1e-5


@pytest.mark.parametrize(("family", "eps"), [("llama", 1e-3 * 24 / 36), ("qwen3", 1e-3), ("olmo2", 1e-3)])
def test_new_channels_scale_the_eps_where_no_other_norm_shares_it(family, eps):
    assert planned("zero-width", TINY[family], hidden=36).target_config["rms_norm_eps"] == pytest.approx(eps)


def test_side_tables_grow():
    qwen = {**TINY["qwen2"], "max_window_layers": 2, "use_sliding_window": False}
    assert planned("stack", qwen, factor=2).target_config["max_window_layers"] == 2
    assert planned("interpolate", qwen, factor=2).target_config["max_window_layers"] == 4
    assert planned("stack", {**qwen, "max_window_layers": 28}, factor=8).target_config["max_window_layers"] == 32
    sliding = {**qwen, "use_sliding_window": True, "sliding_window": 4}
    assert planned("interpolate", sliding, factor=2).target_config["max_window_layers"] == 4
    assert planned("msg", sliding, ffn=56, layers=8).target_config["max_window_layers"] == 4  # fresh ones are as the layer before them
    with pytest.raises(OutgrowError, match="copies of the first 2 layers behind others, which 'max_window_layers' of qwen2 cannot say"):
        planned("stack", sliding, factor=2)
    table = {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}
    assert planned("stack", {**sliding, **table}, factor=2).target_config["layer_types"] == table["layer_types"] * 2
    moe = planned("more-experts", TINY["qwen3_moe"], factor=3).target_config
    assert (moe["num_experts"], moe["num_experts_per_tok"]) == (12, 6)
    gpt2 = planned("direct-width", {**TINY["gpt2"], "n_inner": None}, hidden=36, kv=3).target_config
    assert (gpt2["n_embd"], gpt2["n_head"], gpt2["n_inner"]) == (36, 3, 96)
    opt = planned("direct-width", TINY["opt"], hidden=36, kv=3).target_config
    assert opt["word_embed_proj_dim"] == 36


@pytest.mark.parametrize("text", ["interpolate(block=1)", "gradual(block=1)", "arrange(layers='0-2,0-3')"])
def test_partial_periods_of_a_hybrid_model_are_refused(text):
    with pytest.raises(OutgrowError, match="breaks the pattern in which gemma2's layers of 2 kinds take turns; repeat whole periods of 2"):
        planned(text, TINY["gemma2"])
    assert planned("interpolate", TINY["gemma2"]).layers == (0, 1, 0, 1, 2, 3, 2, 3)
    assert planned("interpolate", {**TINY["gemma2"], "num_hidden_layers": 2}).layers == (0, 1, 0, 1)


@pytest.mark.parametrize(
    "text", ["interpolate(block=1)", "gradual(block=1)", "arrange(layers='0-2,0-3')", "staged-depth", "lemon(ffn=50, layers=5)"]
)
def test_a_table_of_kinds_says_any_order(text):
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 2
    plan = planned(text, {**TINY["qwen2"], "layer_types": kinds, "sliding_window": 4, "use_sliding_window": True})
    assert plan.target_config["layer_types"] == [kinds[layer] for layer in plan.layers]
    taking_turns = {**TINY["gemma2"], "layer_types": ["sliding_attention", "full_attention"] * 2}
    assert planned("interpolate", taking_turns).layers == (0, 1, 0, 1, 2, 3, 2, 3)
    assert planned("interpolate(block=1)", taking_turns).layers == (0, 0, 1, 1, 2, 2, 3, 3)


def test_layers_of_kinds_in_no_order_are_repeated_one_by_one():
    """Their pattern is the whole depth, which is no block: a block of it is what `stack` repeats."""
    config = {**TINY["qwen2"], "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2, "sliding_window": 4}
    assert planned("interpolate", config, factor=2).layers == planned("staged-depth", config).layers == (0, 0, 1, 1, 2, 2, 3, 3)
    assert planned("gradual", config).layers == (0, 1, 2, 3, 3)
    assert planned("llama-pro", config, blocks=2).layers == (0, 1, 1, 2, 3, 3)


BY_ROWS = [
    *OPERATORS, "direct-width(ffn=74), direct-width(hidden=36, kv=3, noise=0.5)", "stack(factor=2), fpi(hidden=48, kv=4)",
    "aki(hidden=48, kv=4, ffn=74), noise(share=0.3)", "expand(layers=6, weights='random'), staged-width",
    "more-experts(factor=3, noise=0.5)",
]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("text", BY_ROWS)
def test_tensors_made_in_pieces_are_those_made_at_once(text, family, monkeypatch):
    """Weights and moments, to the last bit; learned maps, which multiply matrices, to rounding."""
    monkeypatch.setattr("outgrow.growth.rows._PIECE", 8 * 24)
    config = TINY[family]
    try:
        plan = planned(text, config, **(default_knobs(text, arch_for(config), config) if text in OPERATORS else {}))
    except OutgrowError as error:
        assert text.startswith(("upcycle", "more-experts")), error
        return
    source = {name: value.astype(np.float32) for name, value in source_of(config).items()}
    learned = "learn" in text
    grown = Grown(plan, lambda name, rows: source[name][rows].copy())
    apart = 0
    for name in grown.tensors:
        pieces = list(grown.pieces(name))
        apart += len(pieces) > 1
        found, whole = np.concatenate([grown.weight(name, rows) for rows in pieces]), grown.weight(name)
        np.testing.assert_allclose(found, whole, *((1e-4, 1e-6) if learned else (0, 0)))
        for channel, policy in [] if learned else [("gradient", "carry"), ("square", "fresh-new")]:
            found = np.concatenate([grown.state(name, channel, policy, rows) for rows in pieces])
            np.testing.assert_array_equal(found, grown.state(name, channel, policy))
    assert apart > 0.5 * sum(tensor.spec.decays for tensor in plan.grown_arch.tensors(plan.target_config))


def test_what_is_fresh_needs_no_rows_of_what_cannot_be_made_by_rows():
    """The rows of q and k behind a learned map of the heads are made all at once."""
    plan = planned("learn-width(kv=4), random-depth")
    made = dict(grow(plan, source_of(ODD)))
    assert {name: array.shape for name, array in made.items()} == LLAMA.shapes(plan.target_config)
    assert made["model.layers.5.self_attn.q_proj.weight"].any()


def test_one_thread_works_out_a_mean_for_all(monkeypatch):
    from outgrow.growth import apply

    plan, source = planned("zero-width(ffn=50)"), source_of(ODD)
    started, counted = threading.Event(), []

    def mean(parts):
        counted.append(1)
        started.set()
        time.sleep(0.2)
        return 1.0

    monkeypatch.setattr(apply, "_mean", mean)
    grown = Grown(plan, rows_of(source))
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(grown.state, "model.layers.0.mlp.up_proj.weight", "square", "carry")
        started.wait(10)
        two = pool.submit(grown.state, "model.layers.0.mlp.up_proj.weight", "square", "carry")
        np.testing.assert_array_equal(one.result(), two.result())
    assert len(counted) == 1


def test_a_lift_may_leave_old_indices_behind():
    """None that preserves does; one of a user's own may."""
    source = np.r_[0:36, 0, 0, 5]
    factors = [np.ones(len(source))] * 3
    plan = replace(lifted(ODD), claims=Claims(preserves=False, trains=True), lifts={"ffn": Lift(37, source, *factors)})
    weights = source_of(ODD)
    grown = Grown(plan, lambda name, rows: weights[name][rows].copy())
    for key, axis in (("up_proj", 0), ("down_proj", 1)):
        name = f"model.layers.0.mlp.{key}.weight"
        np.testing.assert_array_equal(grown.weight(name), weights[name].take(source, axis))
        np.testing.assert_array_equal(grown.weight(name, slice(20, 24)), weights[name].take(source, axis)[20:24])


def test_transport_of_a_second_moment_is_the_square_of_the_dual():
    sizes = LLAMA.sizes(ODD)
    lifts = {"hidden": isometry(24, 31), "ffn": copies(37, 50)}
    for tensor in LLAMA.tensors(ODD):
        first = np.random.default_rng(0).normal(size=LLAMA.shape(tensor.spec, sizes))
        squared = transport(tensor.spec, first**2, lifts, sizes, "square")
        np.testing.assert_allclose(squared, transport(tensor.spec, first, lifts, sizes, "gradient") ** 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (0, 3)}, "must name layers 0 to 2"),
        ({"layers": ()}, "must name layers 0 to 2"),
        ({"ends": (1.0,)}, "scales the branches of 1 layers, and the target has 6"),
        (
            {"lifts": {"head": copies(10, 20)}},
            "cannot widen 'head' 10 -> 20 in llama: RoPE frequencies .* widen hidden, kv, group, ffn instead",
        ),
        ({"lifts": {"vocab": copies(53, 60)}}, "cannot widen 'vocab'"),
        ({"lifts": {"width": copies(2, 4)}}, "'width' is not a space of llama"),
        ({"lifts": {"ffn": copies(36, 40)}}, "enlarges a space of 36, and the source has 37"),
    ],
)
def test_a_wrong_plan_cannot_be_made(change, message):
    with pytest.raises(OutgrowError, match=message):
        replace(planned("stack", factor=2), **change)


@pytest.mark.parametrize(
    ("family", "lifts", "message"),
    [
        ("llama", {"hidden": copies(24, 36)}, "'hidden' 24 -> 36 in llama does not fit RMSNorm; use an isometry, a tiling or a pad"),
        ("llama", {"hidden": mean(24, 36)}, "does not fit RMSNorm"),
        ("gpt2", {"hidden": pad(24, 36), "kv": copies(2, 3)}, "does not fit LayerNorm; use even copies or new indices that hold the mean"),
        ("gpt2", {"hidden": isometry(24, 36), "kv": copies(2, 3)}, "does not fit LayerNorm"),
        ("opt", {"hidden": mean(24, 36), "kv": copies(2, 3)}, "needs another eps, which opt shares or does not have"),
        ("olmo2", {"kv": copies(2, 3)}, "cannot widen 'kv' 2 -> 3 in olmo2 exactly: .* to a multiple of 2, or leave it as it is"),
        ("qwen3_moe", {"expert": copies(4, 6)}, "copies, such as direct-width, to a multiple of 4"),
        ("gpt2", {"hidden": mean(24, 36)}, "gpt2 derives 'head' from its other sizes, and it would go from 12 to 18; grow hidden and kv"),
    ],
)
def test_a_lift_that_its_space_does_not_admit_is_refused(family, lifts, message):
    with pytest.raises(OutgrowError, match=message):
        lifted(TINY[family], **lifts)


def test_a_layer_table_of_another_length_is_refused():
    with pytest.raises(OutgrowError, match="'layer_types' has 2 entries for 3 layers"):
        planned("stack", {**ODD, "layer_types": ["full_attention"] * 2})


@pytest.mark.parametrize(
    ("text", "knobs", "message"),
    [
        ("stak", {}, "unknown operator 'stak'; known: stack"),
        ("stack", {"times": 2}, "has no knob 'times'; it has: factor"),
        ("staged-width", {"times": 2}, "has no knob 'times'; it has none"),
        ("stack", {"factor": 1}, "factor must be at least 2, not 1"),
        ("stack", {"factor": 10**12}, r"more than 10,000; lower the factor"),
        ("stack", {"factor": "4"}, "must be of type int, not '4'"),
        ("stack", {"factor": 2.5}, "must be of type int, not 2.5"),
        ("stack", {"factor": True}, "must be of type int, not True"),
        ("stack(factor=2)", {"factor": 2}, "has knobs of its own"),
        ("stack(2)", {}, r"cannot read the knobs '\(2\)' of 'stack'"),
        ("stack(factor=open('x'))", {}, "cannot read the operator"),
        ("stack(factor=os.name)", {}, "cannot read the knobs"),
        ("stack(factor={[]:1})", {}, "cannot read the knobs"),
        ("stack stack", {}, "cannot read the operator"),
        ("", {}, "cannot read the operator ''"),
        ("arrange", {}, "'arrange' needs the knob 'layers'"),
        ("arrange(layers='0-9')", {}, "must name layers 0 to 2"),
        ("direct-width", {}, r"no space is asked to grow \(hidden is 24, ffn is 37, kv is 2, group is 3\)"),
        ("direct-width(ffn=20)", {}, "cannot grow 'ffn' of llama from 37 to 20"),
        ("solar(removed=2)", {}, "fewer than half of the 3 layers"),
        ("llama-pro(blocks=2)", {}, "splits the 3 layers into equal groups"),
        ("interpolate(protect=2)", {}, "between 2 protected ones at each end of 3"),
        ("midas(block=4)", {}, "copies a block of 1 to 3 layers, not 4"),
        ("expand(layers=3)", {}, "more layers than the source's 3"),
        ("noise(share=1)", {}, "share between 0 and 1"),
        ("more-experts", {}, "llama has no experts; use upcycle first"),
        ("upcycle(experts=2, chosen=3)", {}, "sends a token to 1 to 2 of at least 2 experts, not to 3"),
        ("upcycle(experts=10000000)", {}, "10,000,000 experts are more than 10,000; ask for fewer"),
        ("hypercloning(factor=30000000)", {}, "cannot grow a space of 24 to 720,000,000: that is more than 16,777,216"),
        ("hypercloning(factor=100000000000000000000)", {}, "that is more than 16,777,216"),
        ("upcycle(experts=8), more-experts(factor=10000)", {}, "80,000 experts are more than 10,000"),
        ("lemon(kv=4, seed=-1)", {}, "the seed of 'lemon' must be at least 0, not -1"),
        ("random-width(ffn=96, seed=-1)", {}, "the seed of 'random-width' must be at least 0, not -1"),
        ("direct-width(ffn=96, noise=1.5)", {}, "'noise' is a share between 0 and 1, not 1.5"),
        ("hypercloning(noise=-0.1)", {}, "'noise' is a share between 0 and 1, not -0.1"),
        ("arrange(layers='0-2,0-2', scale=1e999)", {}, "'scale' of 'arrange' must be a finite number, not inf"),
        ("arrange", {"layers": "0-" + "9" * 5000}, "is not a layer list"),
        ("lemon(ffn=50, layers=2)", {}, "must lie between the source's 3 and 10,000, not 2"),
    ],
)
def test_wrong_knobs_are_refused(text, knobs, message):
    with pytest.raises(OutgrowError, match=message):
        planned(text, **knobs)


def test_upcycling_a_model_with_biases_is_refused():
    with pytest.raises(OutgrowError, match="the source's 'attention_bias' is true"):
        planned("upcycle", {**ODD, "attention_bias": True})


def test_upcycling_says_what_the_source_left_to_its_defaults():
    """Mixtral's own defaults differ from Llama's: an eps of 1e-5 and a rotary base of 1e6."""
    bare = {key: value for key, value in TINY["mistral"].items() if key not in ("rms_norm_eps", "sliding_window")}
    grown = planned("upcycle", bare, experts=4).target_config
    assert (grown["rms_norm_eps"], grown["rope_theta"], grown["sliding_window"]) == (1e-6, 10000.0, 4096)
    told = planned("upcycle", {**TINY["mistral"], "rope_parameters": {"rope_theta": 7.0}}).target_config
    assert "rope_theta" not in told
    assert told["sliding_window"] is None
    with pytest.raises(OutgrowError, match="attend to a sliding window"):
        planned("upcycle", {**TINY["qwen3"], "layer_types": ["sliding_attention"] * 4})


def test_upcycling_leaves_no_window_where_there_was_none():
    """Qwen3-MoE gives every layer the window that the config switches on; in Qwen3 some or all of them have none."""
    windowed = {**TINY["qwen3"], "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    with pytest.raises(OutgrowError, match="attend to a sliding window"):
        planned("upcycle", windowed)
    assert planned("upcycle", {**windowed, "layer_types": ["full_attention"] * 4}).target_config["use_sliding_window"] is False
    assert "use_sliding_window" not in planned("upcycle", TINY["qwen3"]).target_config


def test_growing_from_an_incomplete_source_names_the_tensor():
    with pytest.raises(OutgrowError, match=r"no tensor 'model\.embed_tokens\.weight'"):
        dict(grow(planned("stack", factor=2), {}))


def test_the_papers_eight_operators_are_there():
    atomic = {f"{kind}-{way}" for kind in ("learn", "zero", "random") for way in ("depth", "width")} | {"stack", "direct-width"}
    assert atomic <= OPERATORS.keys()


def test_every_family_describes_itself_wholly():
    from outgrow.extensions import family_problems

    assert {arch.family: family_problems(arch) for arch in FAMILIES} == {arch.family: [] for arch in FAMILIES}


def test_the_operator_of_the_design_page_works():
    """The page's ten lines, run as they stand there."""
    page = (Path(__file__).parents[1] / "docs" / "design.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    assert names["repeat_in_place"](LLAMA, ODD).layers == (0, 0, 1, 1, 2, 2)
