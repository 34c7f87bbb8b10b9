from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from outgrow.arch import arch_for
from outgrow.checkpoint.grow import grow_directory
from outgrow.checkpoint.huggingface import open_checkpoint
from outgrow.errors import OutgrowError
from outgrow.files import read_json
from outgrow.growth.apply import Grown
from outgrow.growth.operators import make_plan
from outgrow.growth.plan import Claims, GrowthPlan
from outgrow.lab.check import behaviour
from outgrow.lab.tiny import TINY, read_tensors, write_tiny

from .conftest import ODD


def with_state(directory, config=TINY["llama"], moments=("exp_avg", "exp_avg_sq")):
    """A checkpoint with moments beside it, made of its own gradients as AdamW would have."""
    write_tiny(directory, config)
    gradients = behaviour(directory).gradients
    values = {"exp_avg": gradients, "exp_avg_sq": {k: v**2 for k, v in gradients.items()}, "momentum_buffer": gradients}
    for moment in moments:
        kept = {k: v for k, v in values[moment].items() if moment != "momentum_buffer" or v.ndim > 1}
        save_file(kept, directory / f"{moment}.safetensors", {"format": "pt"})
    (directory / "training.json").write_text(json.dumps({"tokens": 100, "flops": 5.0, "steps": 7}))
    return directory


def plan_for(directory, text):
    found = open_checkpoint(directory)
    return make_plan(text, found.arch, found.config)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "olmo2", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("text", ["hypercloning", "zero-depth", "staged-width"])
def test_carried_moments_are_those_of_the_grown_models_own_gradients(tmp_path, family, text):
    """After a preserving growth: the first moment is what the grown model's gradients would have given, the second its square."""
    source = with_state(tmp_path / "source", TINY[family])
    plan = plan_for(source, text)
    grow_directory(source, tmp_path / "target", plan, optimizer="carry")
    own = behaviour(tmp_path / "target").gradients
    first, second = load_file(tmp_path / "target" / "exp_avg.safetensors"), load_file(tmp_path / "target" / "exp_avg_sq.safetensors")
    assert set(first) == set(read_tensors(tmp_path / "target"))
    checked = 0
    for tensor in plan.grown_arch.tensors(plan.target_config):
        if not plan.adds_nothing(tensor.layer):
            np.testing.assert_allclose(first[tensor.name], own[tensor.name], atol=1e-10)
            np.testing.assert_allclose(second[tensor.name], own[tensor.name] ** 2, atol=1e-10)
            checked += 1
    assert checked >= len(read_tensors(source)) - 4
    assert read_json(tmp_path / "target" / "training.json")["steps"] == 7
    assert read_json(tmp_path / "target" / "outgrow.json")["optimizer"] == "carry"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_what_lies_before_the_end_of_a_scaled_branch_takes_the_scale(tmp_path, family):
    """Where branches are so small that the residual stream does not see them, gradients differ by what scales a branch alone."""
    write_tiny(tmp_path / "plain", TINY[family])
    small = scaled(tmp_path / "plain", 1e-7)
    grow_directory(tmp_path / "plain", tmp_path / "small", small)
    plan = scaled(tmp_path / "small", 3.0)
    grow_directory(tmp_path / "small", tmp_path / "grown", plan)
    before, after = (behaviour(tmp_path / name).gradients for name in ("small", "grown"))
    for name, own in after.items():
        carried = Grown(plan, lambda name, rows: before[name][rows]).state(name, "gradient", "carry")
        np.testing.assert_allclose(carried, own, rtol=1e-3, atol=1e-4 * abs(own).max(), err_msg=name)


def scaled(directory, factor):
    """A plan that scales all branches."""
    found = open_checkpoint(directory)
    layers = tuple(range(found.arch.layers(found.config)))
    return GrowthPlan("scaled", {}, found.arch, found.config, layers, Claims(False, True), "", ends=(factor,) * len(layers))


@pytest.mark.parametrize("chosen", [2, 4])
def test_experts_share_the_moments_of_the_dense_block_that_they_copy(tmp_path, chosen):
    """The router's weights sum to one, and so the experts' gradients to the dense block's."""
    source = with_state(tmp_path / "source")
    grow_directory(source, tmp_path / "target", plan_for(source, f"upcycle(experts=4, chosen={chosen})"), optimizer="carry")
    own = behaviour(tmp_path / "target").gradients
    first, second = (load_file(tmp_path / "target" / f"{moment}.safetensors") for moment in ("exp_avg", "exp_avg_sq"))
    for part in ("w1", "w2", "w3"):
        names = [f"model.layers.1.block_sparse_moe.experts.{expert}.{part}.weight" for expert in range(4)]
        np.testing.assert_allclose(sum(first[name] for name in names), sum(own[name] for name in names), atol=1e-10)
        assert all((second[name] == first[name] ** 2).all() for name in names)


def test_doubling_halves_the_first_moment_and_quarters_the_second(tmp_path):
    """As staged training says, arXiv 2203.06211; here it follows from the dual lift."""
    source = with_state(tmp_path / "source")
    grow_directory(source, tmp_path / "target", plan_for(source, "staged-width"), optimizer="carry")
    name = "model.layers.1.mlp.up_proj.weight"
    for moment, share in (("exp_avg", 2), ("exp_avg_sq", 4)):
        old, new = (load_file(tmp_path / folder / f"{moment}.safetensors")[name] for folder in ("source", "target"))
        np.testing.assert_allclose(new, np.tile(old, (2, 2)) / share, rtol=1e-12)


@pytest.mark.parametrize(("policy", "text", "copies"), [("fresh-new", "direct-width(ffn=50)", 2), ("carry", "zero-width(ffn=50)", 1)])
def test_new_entries_begin_at_zero_and_at_the_mean_of_the_second_moment(tmp_path, policy, text, copies):
    """Zero with an old step count would take first steps of 3.2 times the learning rate (beta2 = .999)."""
    source, target = with_state(tmp_path / "source"), tmp_path / "target"
    grow_directory(source, target, plan_for(source, text), optimizer=policy)
    name = "model.layers.1.mlp.up_proj.weight"
    old, new = (
        {moment: load_file(place / f"{moment}.safetensors")[name] for moment in ("exp_avg", "exp_avg_sq")} for place in (source, target)
    )
    for moment, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        np.testing.assert_allclose(new[moment][:13], old[moment][:13] / copies**power, rtol=1e-12)
        np.testing.assert_allclose(new[moment][13:37], old[moment][13:37], rtol=1e-12)
    square = old["exp_avg_sq"]
    carried = square[13:].sum() + (square[:13].sum() / 4 * 2 if copies == 2 else square[:13].sum())
    assert not new["exp_avg"][37:].any()
    np.testing.assert_allclose(new["exp_avg_sq"][37:], carried / new["exp_avg_sq"].size, rtol=1e-6)


def test_fresh_layers_keep_the_old_layers_state(tmp_path):
    source = with_state(tmp_path / "source")
    grow_directory(source, tmp_path / "fresh", plan_for(source, "stack(factor=2)"), optimizer="fresh-new")
    grow_directory(source, tmp_path / "carry", plan_for(source, "stack(factor=2)"), optimizer="carry")
    old = load_file(source / "exp_avg.safetensors")
    fresh, carry = (load_file(tmp_path / name / "exp_avg.safetensors") for name in ("fresh", "carry"))
    lower, upper = "model.layers.1.mlp.up_proj.weight", "model.layers.5.mlp.up_proj.weight"
    np.testing.assert_array_equal(fresh[lower], old[lower])
    assert not fresh[upper].any()
    np.testing.assert_array_equal(carry[upper], old[lower])
    assert load_file(tmp_path / "fresh" / "exp_avg_sq.safetensors")[upper].min() > 0


@pytest.mark.parametrize(
    "text", ["random-depth", "msg(hidden=36, ffn=50, layers=6)", "expand(layers=6, weights='random')", "random-width(ffn=50)"]
)
@pytest.mark.parametrize("policy", ["carry", "fresh-new"])
def test_every_operator_gives_every_tensor_a_state(tmp_path, text, policy):
    source = with_state(tmp_path / "source")
    grow_directory(source, tmp_path / "target", plan_for(source, text), optimizer=policy)
    shapes = {name: array.shape for name, array in read_tensors(tmp_path / "target").items()}
    for moment in ("exp_avg", "exp_avg_sq"):
        found = load_file(tmp_path / "target" / f"{moment}.safetensors")
        assert {name: array.shape for name, array in found.items()} == shapes
        assert all(np.isfinite(array).all() for array in found.values())
        assert moment == "exp_avg" or all(array.min() >= 0 for array in found.values())


def test_muons_momentum_covers_the_matrices_and_moves_as_gradients_do(tmp_path):
    source = with_state(tmp_path / "source", moments=("momentum_buffer",))
    plan = plan_for(source, "direct-width(hidden=36, kv=4), stack(factor=2)")
    grow_directory(source, tmp_path / "target", plan, optimizer="carry")
    found = load_file(tmp_path / "target" / "momentum_buffer.safetensors")
    assert set(found) == {tensor.name for tensor in plan.arch.tensors(plan.target_config) if tensor.spec.decays}
    momentum = load_file(source / "momentum_buffer.safetensors")
    width = Grown(plan_for(source, "direct-width(hidden=36, kv=4)"), lambda name, rows: momentum[name])
    name = "model.layers.2.self_attn.q_proj.weight"
    np.testing.assert_allclose(found["model.layers.6.self_attn.q_proj.weight"], width.state(name, "gradient", "carry"))


def test_reset_leaves_the_state_behind(tmp_path):
    source = with_state(tmp_path / "source")
    grow_directory(source, tmp_path / "target", plan_for(source, "stack"))
    found = sorted(path.name for path in (tmp_path / "target").iterdir())
    assert found == ["README.md", "config.json", "generation_config.json", "model.safetensors", "outgrow.json"]


def test_what_cannot_be_carried_is_said(tmp_path):
    write_tiny(tmp_path / "bare", TINY["llama"])
    with pytest.raises(OutgrowError, match=r"carries no optimizer state to carry; use --optimizer reset"):
        grow_directory(tmp_path / "bare", tmp_path / "target", plan_for(tmp_path / "bare", "stack"), optimizer="carry")
    source = with_state(tmp_path / "source")
    with pytest.raises(OutgrowError, match=r"no law moves optimizer state through the learned maps of 'learn-depth'"):
        grow_directory(source, tmp_path / "target", plan_for(source, "learn-depth"), optimizer="carry")
    (source / "exp_avg.safetensors").write_bytes(b"junk")
    with pytest.raises(OutgrowError, match=r"exp_avg\.safetensors' is truncated"):
        grow_directory(source, tmp_path / "target", plan_for(source, "stack"), optimizer="carry")
    assert not (tmp_path / "target").exists()


def test_state_of_other_shapes_is_refused(tmp_path):
    source = with_state(tmp_path / "source")
    state = load_file(source / "exp_avg.safetensors")
    state["model.norm.weight"] = np.zeros(3)
    save_file(state, source / "exp_avg.safetensors", {"format": "pt"})
    with pytest.raises(OutgrowError, match=r"'model\.norm\.weight' in '.*exp_avg.safetensors' has shape \[3\], and the weight has \[24\]"):
        grow_directory(source, tmp_path / "target", plan_for(source, "stack"), optimizer="carry")


def test_adams_next_steps_of_all_copies_are_those_of_their_source():
    """m/sqrt(v) does not see the share with which a copy is read; each of a tensor tiled twofold steps as what it copies."""
    config = {**ODD, "num_hidden_layers": 1}
    arch = arch_for(config)
    plan = make_plan("hypercloning", arch, config)
    generator = np.random.default_rng(0)
    m = {name: torch.tensor(generator.normal(size=shape)) for name, shape in arch.shapes(config).items()}
    v = {name: torch.tensor(generator.uniform(0.1, 1.0, shape)) for name, shape in arch.shapes(config).items()}
    grown_m, grown_v = (Grown(plan, lambda name, rows, held=held: held[name]) for held in (m, v))
    for name in grown_m.tensors:
        step = grown_m.state(name, "gradient", "carry") / grown_v.state(name, "square", "carry").sqrt()
        source = m[name] / v[name].sqrt()
        assert any(new == 2 * old for new, old in zip(step.shape, source.shape, strict=True))
        torch.testing.assert_close(step, source.tile([new // old for new, old in zip(step.shape, source.shape, strict=True)]))


@pytest.mark.parametrize("policy", ["carry", "fresh-new"])
@pytest.mark.parametrize("text", ["zero-depth", "llama-pro(blocks=4)", "random-depth"])
def test_a_branch_that_begins_at_zero_has_a_second_moment_all_the_same(tmp_path, text, policy):
    source = with_state(tmp_path / "source")
    plan = plan_for(source, text)
    grow_directory(source, tmp_path / "target", plan, optimizer=policy)
    first, second = (load_file(tmp_path / "target" / f"{moment}.safetensors") for moment in ("exp_avg", "exp_avg_sq"))
    new = [tensor.name for tensor in plan.arch.tensors(plan.target_config) if plan.adds_nothing(tensor.layer)]
    assert new
    assert all(not first[name].any() and second[name].min() > 0 for name in new)
