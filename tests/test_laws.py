"""What operators claim, measured on tiny float64 models of every family with transformers' own forward pass."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from outgrow.arch import arch_for
from outgrow.checkpoint.grow import grow_directory
from outgrow.errors import OutgrowError
from outgrow.files import read_json
from outgrow.growth.laws import EXACT, alike, gradient_difference, logit_difference, untrained
from outgrow.growth.operators import OPERATORS, make_plan
from outgrow.growth.plan import Claims, GrowthPlan
from outgrow.lab.check import behaviour, check, three_steps
from outgrow.lab.tiny import TINY, read_tensors, write_tiny
from outgrow.models.exact import exact_logits, exact_model
from outgrow.spaces import copies, isometry, split

REFUSED = {
    "upcycle": set(TINY) - {"llama", "mistral", "qwen3"},
    "more-experts": set(TINY) - {"qwen3_moe", "mixtral"},
}
PRESERVES = {
    "direct-width", "zero-depth", "zero-width", "random-depth", "random-width", "llama-pro", "fpi", "hypercloning", "lemon", "msg",
    "staged-depth", "staged-width", "upcycle", "more-experts",
}  # fmt: skip


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("operator", OPERATORS)
def test_claims_are_backed(operator, family):
    verdict = check(operator, TINY[family])
    assert bool(verdict.refusal) == (family in REFUSED.get(operator, set())), verdict.refusal
    assert verdict.broken == []
    if verdict.plan:
        assert verdict.plan.claims.trains
        assert verdict.plan.claims.preserves == (operator in PRESERVES)
        assert verdict.plan.claims.preserves or verdict.logits > 1e-3  # the measure can tell


# transformers wants hidden to be a multiple of the number of heads, whatever head_dim is
WIDTHS = [{"hidden": 36}, {"hidden": 48}, {"hidden": 66}, {"ffn": 38}, {"ffn": 90}, {"kv": 4}, {"kv": 3, "hidden": 27}, {"group": 4}]
NORMED_HEADS = [{"hidden": 36}, {"hidden": 48}, {"ffn": 50}, {"kv": 4}, {"group": 6}, {"kv": 6, "group": 6, "hidden": 72, "ffn": 74}]
DERIVED_HEADS = [{"hidden": 36, "kv": 3}, {"hidden": 48, "kv": 4}, {"hidden": 60, "kv": 5, "ffn": 90}, {"ffn": 38}]
BY_SPACE = [
    (family, widths)
    for family in TINY
    for widths in {"olmo2": NORMED_HEADS, "gpt2": DERIVED_HEADS, "gpt_neox": DERIVED_HEADS, "opt": DERIVED_HEADS}.get(family, WIDTHS)
]


@pytest.mark.parametrize(("family", "widths"), BY_SPACE, ids=str)
def test_every_space_widens_alone_and_exactly(family, widths):
    verdict = check("direct-width", TINY[family], widths)
    assert verdict.refusal == ""
    assert verdict.broken == []


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "olmo2", "phi3", "gpt2", "gpt_neox", "opt", "mixtral"])
@pytest.mark.parametrize("operator", ["direct-width", "zero-width", "hypercloning", "staged-width", "lemon"])
def test_the_other_way_of_tying_is_exact_too(operator, family):
    tied = family in ("gemma2", "gpt2", "opt", "qwen2", "qwen3")
    verdict = check(operator, {**TINY[family], "tie_word_embeddings": not tied})
    assert verdict.refusal == ""
    assert verdict.broken == []


@pytest.mark.parametrize("widths", [{"hidden": 48, "kv": 4, "ffn": 74}, {"hidden": 36, "kv": 3, "ffn": 50}], ids=["even", "uneven"])
@pytest.mark.parametrize("family", sorted(set(TINY) - {"olmo2"}))
def test_projected_noise_leaves_the_function_and_parts_the_copies(family, widths):
    verdict = check("direct-width", TINY[family], {**widths, "noise": 0.5})
    assert verdict.broken == []
    assert verdict.logits < EXACT
    assert verdict.alike == ()
    assert check("direct-width", TINY[family], widths).alike
    assert check("noise", TINY[family]).logits > 1e-2


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_copied_experts_part_by_noise_that_adds_up_to_nothing_alone(family):
    plain, noisy = check("more-experts", TINY[family]), check("more-experts", TINY[family], {"factor": 3, "noise": 0.5})
    assert (plain.alike, plain.broken) == (("expert",), [])
    assert (noisy.alike, noisy.broken, noisy.plan.claims.preserves) == ((), [], True)


ALIKE = [
    ("gpt2", "direct-width(hidden=36, kv=3)", ["hidden", "kv"]),  # new channels that hold the mean
    ("gpt2", "zero-width(hidden=36, kv=3), direct-width(hidden=48, kv=4)", ["hidden", "kv"]),
    ("llama", "direct-width(hidden=48, ffn=74, kv=4), upcycle(experts=4)", ["ffn", "kv"]),  # the router reads hidden
    ("llama", "direct-width(hidden=48, kv=4), zero-width(ffn=50)", ["kv"]),
    ("llama", "direct-width(ffn=74), zero-width(ffn=100)", ["ffn"]),
    ("llama", "direct-width(ffn=74, kv=4), direct-width(ffn=148, noise=0.5)", ["kv"]),
    ("llama", "direct-width(ffn=74), lemon(ffn=148)", []),
    ("llama", "direct-width(hidden=48, ffn=74), expand(layers=6, weights='random')", []),
    ("llama", "learn-width(ffn=74, kv=4, noise=0.0)", ["ffn", "kv"]),
    ("llama", "direct-width(ffn=74, kv=4), learn-width(ffn=80)", ["kv"]),
    ("olmo2", "lemon(kv=4)", ["kv"]),
    ("mixtral", "more-experts, direct-width(kv=4, noise=0.5)", ["expert"]),
    ("mixtral", "more-experts, direct-width(ffn=74, noise=0.5)", []),
]


@pytest.mark.parametrize(("family", "text", "spaces"), ALIKE, ids=str)
def test_which_copies_never_part_is_read_off_the_plan(tmp_path, family, text, spaces):
    write_tiny(tmp_path / "source", TINY[family])
    config = read_json(tmp_path / "source" / "config.json")
    plan = make_plan(text, arch_for(config), config)
    grow_directory(tmp_path / "source", tmp_path / "target", plan)
    assert sorted(plan.alike) == sorted(alike(plan, three_steps(plan, tmp_path / "target")[1])) == spaces


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt2"])
@pytest.mark.parametrize("operator", ["lemon", "msg"])
def test_depth_alone_is_exact_and_trains(operator, family):
    verdict = check(operator, TINY[family], {"layers": 6})
    assert (verdict.refusal, verdict.broken, verdict.plan.claims.preserves) == ("", [], True)


def test_biases_on_every_projection_are_exact():
    for operator in ("direct-width", "zero-width", "zero-depth", "random-width"):
        assert check(operator, {**TINY["llama"], "attention_bias": True, "mlp_bias": True}).broken == []


def test_a_composed_plan_keeps_what_its_stages_keep(tmp_path):
    write_tiny(tmp_path / "source", TINY["qwen3"])
    config = read_json(tmp_path / "source" / "config.json")
    plan = make_plan("zero-depth(factor=2), direct-width(hidden=36, kv=3, group=4), zero-width(ffn=50)", arch_for(config), config)
    grow_directory(tmp_path / "source", tmp_path / "target", plan)
    assert logits_differ(tmp_path) < EXACT


def logits_differ(tmp_path):
    return logit_difference(behaviour(tmp_path / "source").logits, behaviour(tmp_path / "target").logits)


def gradients_differ(plan, tmp_path):
    return gradient_difference(plan, behaviour(tmp_path / "source").gradients, behaviour(tmp_path / "target").gradients)


def plan_of(config, claims, **lifts):
    arch = arch_for(config)
    return GrowthPlan("lifts", {}, arch, config, tuple(range(arch.layers(config))), claims, "", lifts)


def grown(tmp_path, family, claims, **lifts):
    write_tiny(tmp_path / "source", TINY[family])
    plan = plan_of(read_json(tmp_path / "source" / "config.json"), claims, **lifts)
    grow_directory(tmp_path / "source", tmp_path / "target", plan)
    return plan


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_an_isometry_is_exact_with_gain_and_eps(tmp_path, family):
    plan = grown(tmp_path, family, Claims(True, True), hidden=isometry(24, 42))
    assert plan.target_config["rms_norm_eps"] == pytest.approx(1e-3 * 24 / 42)
    assert logits_differ(tmp_path) < EXACT
    assert gradients_differ(plan, tmp_path) < EXACT


def test_an_uneven_plain_copy_of_hidden_is_not_exact(tmp_path):
    """The measure can tell: arXiv 2405.15319 is right that uneven plain copies break RMSNorm."""
    grown(tmp_path, "llama", Claims(preserves=False, trains=True), hidden=copies(24, 42))
    assert logits_differ(tmp_path) > 1e-2


def test_gradients_do_not_follow_where_a_claim_would_be_false(tmp_path):
    """Unequal shares of heads that are normed together: exact logits, other gradients."""
    plan = grown(tmp_path, "olmo2", Claims(preserves=True, trains=True), kv=split(2, 4))
    assert logits_differ(tmp_path) < EXACT
    assert gradients_differ(plan, tmp_path) > 1e-6


def test_dead_neurons_are_found(tmp_path):
    """Gate and up both zero never get a gradient: the trap of ffn-only zero growth in the paper's code."""
    write_tiny(tmp_path / "source", TINY["llama"])
    config = read_json(tmp_path / "source" / "config.json")
    plan = make_plan("zero-width", arch_for(config), config, {"ffn": 50})
    grow_directory(tmp_path / "source", tmp_path / "target", plan)
    assert untrained(plan, *three_steps(plan, tmp_path / "target")) == []
    before = read_tensors(tmp_path / "target")
    dead = {**before}
    for layer in range(4):
        for module in ("gate_proj", "up_proj"):
            name = f"model.layers.{layer}.mlp.{module}.weight"
            dead[name] = np.concatenate([dead[name][:37], np.zeros((13, 24))])
    save_numpy(dead, tmp_path / "target" / "model.safetensors", {"format": "pt"})
    found = untrained(plan, *three_steps(plan, tmp_path / "target"))
    assert "model.layers.0.mlp.gate_proj.weight, index 37 of axis 0" in found
    assert "model.layers.0.mlp.down_proj.weight, index 37 of axis 1" in found


def test_float64_is_float64_through_and_through(tmp_path):
    """Without it transformers' norms and softmax compute in float32, and nothing below 1e-7 could be told."""
    write_tiny(tmp_path, TINY["qwen3_moe"])
    model, tokens = exact_model(tmp_path), torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, exact = model(input_ids=tokens).logits, exact_logits(model, tokens)
    assert 1e-12 < float((plain - exact).abs().max()) < 1e-3
    assert exact.dtype == torch.float64


def test_an_operator_that_does_not_keep_its_claims_is_found():
    def wrong(arch, config, factor: int = 2):
        plan = OPERATORS["stack"](arch, config, factor)
        return GrowthPlan("wrong", {}, arch, config, plan.layers, Claims(preserves=True, trains=True, dual=True), "none")

    verdict = check("wrong", TINY["llama"], {}, {"wrong": wrong})
    assert [text.split(",")[0] for text in verdict.broken] == ["claims to preserve", "claims dual gradients"]


def test_fp8_is_copied_and_never_computed_with(tmp_path):
    write_tiny(tmp_path / "source", TINY["llama"])
    tensors = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(tmp_path / "source" / "model.safetensors").items()}
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    config = read_json(tmp_path / "source" / "config.json")
    grow_directory(tmp_path / "source", tmp_path / "copied", make_plan("stack", arch_for(config), config))
    with pytest.raises(OutgrowError, match=r"is stored as F8_E4M3, in which growth cannot compute"):
        grow_directory(tmp_path / "source", tmp_path / "wide", make_plan("direct-width", arch_for(config), config, {"ffn": 50}))
    assert not (tmp_path / "wide").exists()
