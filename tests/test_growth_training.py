"""Training through growth: masks that open, layers that stay frozen, maps that are learned, state that goes on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import outgrow
from outgrow.checkpoint.huggingface import open_checkpoint
from outgrow.checkpoint.lineage import read_lineage
from outgrow.checkpoint.optimizer_state import BEHIND_MASKS
from outgrow.data.config import DataConfig
from outgrow.data.packed import prepare
from outgrow.errors import Interrupted, OutgrowError
from outgrow.growth.fresh import masked
from outgrow.growth.operators import make_plan
from outgrow.growth.plan import GrowthPlan
from outgrow.lab.ancestry import flops_before, own_flops
from outgrow.lab.execute import execute
from outgrow.lab.runs import GROWN, final_checkpoint, place
from outgrow.models.masks import make_masks
from outgrow.training.config import LearnConfig, OptimizerConfig, RunConfig, Start
from outgrow.training.maps import learn_maps, learning_flops
from outgrow.training.record import latest_checkpoint, read_rows
from outgrow.training.refusals import problems

from .conftest import ODD
from .test_training import Observer

BATCH = 64


@pytest.fixture
def settings(corpus):
    return {
        "data": DataConfig(corpus=str(corpus), vocab=300, context=16, validation_share=0.1, validation_tokens=128),
        "batch_tokens": BATCH,
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "precision": "fp32",
        "save_every": 10**9,
    }


@pytest.fixture
def base(settings):
    return RunConfig(name="base", model={**ODD, "vocab_size": 300, "num_hidden_layers": 2}, tokens=20 * BATCH, **settings)


@pytest.fixture
def grow_on(base, settings, tmp_path):
    """Trains the base, and makes runs that grow it."""
    execute(base, tmp_path / "runs", Observer())

    def make(operator, tokens=40 * BATCH, **start):
        return RunConfig(name="target", start=Start(run=base, operator=operator, **start), tokens=tokens, **settings)

    return make


def validation(run, root):
    return [row["validation_loss"] for row in read_rows(place(run, root)) if "validation_loss" in row]


MASKED = ["random-depth", "random-width(hidden=36, ffn=50, kv=4)", "msg(ffn=50, layers=4)"]


@pytest.mark.parametrize("operator", MASKED)
def test_masked_growth_begins_at_the_bases_loss_and_opens(base, grow_on, tmp_path, operator):
    run, root = grow_on(operator, unmask_tokens=5 * BATCH), tmp_path / "runs"
    execute(run, root, Observer())
    assert validation(run, root)[0] == pytest.approx(validation(base, root)[-1], abs=1e-5)
    assert validation(run, root)[-1] < validation(base, root)[-1]
    end = load_file(final_checkpoint(run, root) / "model.safetensors")
    plan = GrowthPlan.from_json(read_lineage(place(run, root) / GROWN).plan)
    start = load_file(place(run, root) / GROWN / "model.safetensors")
    for name, (where, _) in masked(plan).items():
        assert not start[name][torch.from_numpy(where.copy())].any()
        assert end[name][torch.from_numpy(where.copy())].abs().min() > 0
    assert not (final_checkpoint(run, root) / BEHIND_MASKS).exists()


def test_a_directory_grown_behind_masks_by_hand_is_unmasked_too(base, grow_on, tmp_path):
    run, root = grow_on("random-depth", unmask_tokens=5 * BATCH), tmp_path / "runs"
    execute(run, root, Observer())
    source = final_checkpoint(base, root)
    for name, operator in (("masked", "random-depth"), ("plain", "stack(factor=2)")):
        outgrow.grow(source, tmp_path / name, operator)
    by_hand = run.model_copy(update={"start": Start(checkpoint=str(tmp_path / "masked"), unmask_tokens=5 * BATCH)})
    execute(by_hand, root, Observer())
    assert validation(by_hand, root) == validation(run, root)
    plain = run.model_copy(update={"start": Start(checkpoint=str(tmp_path / "plain"), unmask_tokens=5 * BATCH)})
    with pytest.raises(OutgrowError, match="was not grown behind masks; remove it"):
        execute(plain, root, Observer())


@pytest.mark.parametrize("operator", MASKED[:2])
def test_a_masked_run_resumes_bitwise_and_its_checkpoint_is_what_it_computes(grow_on, tmp_path, operator):
    whole, parts = grow_on(operator, unmask_tokens=15 * BATCH), tmp_path / "runs"
    with pytest.raises(Interrupted):
        execute(whole, parts, Observer(stop_after=6))
    half_open = latest_checkpoint(place(whole, parts))
    assert (half_open / BEHIND_MASKS).exists()
    rows = read_rows(place(whole, parts))
    execute(whole, parts, Observer())
    resumed = {path.name: path.read_bytes() for path in final_checkpoint(whole, parts).glob("*.safetensors")}
    again = whole.model_copy(update={"name": "again", "save_every": 7 * BATCH})
    import shutil

    shutil.move(place(whole, parts), tmp_path / "kept")
    execute(again, parts, Observer())
    assert {path.name: path.read_bytes() for path in final_checkpoint(again, parts).glob("*.safetensors")} == resumed
    kept = read_rows(tmp_path / "kept")
    assert [row["loss"] for row in kept if "loss" in row][:6] == [row["loss"] for row in rows if "loss" in row]


def test_a_half_open_checkpoint_loads_as_the_model_that_was_trained(grow_on, base, tmp_path):
    """transformers computes from the files what the run computed through its masks."""
    run, root = grow_on("random-depth", unmask_tokens=15 * BATCH).model_copy(update={"validate_every": BATCH}), tmp_path / "runs"
    with pytest.raises(Interrupted):
        execute(run, root, Observer(stop_after=6))
    half_open = latest_checkpoint(place(run, root))
    model = AutoModelForCausalLM.from_pretrained(half_open)
    packed = prepare(run.data, root / "data")
    from outgrow.data.packed import validation_batches

    total = count = 0.0
    for rows in validation_batches(packed, run.data, 4):
        rows = torch.from_numpy(rows)
        with torch.no_grad():
            logits = model(input_ids=rows[:, :-1]).logits
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())) * len(rows)
        count += len(rows)
    assert total / count == pytest.approx(validation(run, root)[-1], abs=1e-4)
    with pytest.raises(OutgrowError, match="has masks that are not open yet, and what is behind them would be lost"):
        outgrow.grow(half_open, tmp_path / "again")
    with pytest.raises(OutgrowError, match="has masks that are not open yet"):
        execute(run.model_copy(update={"start": Start(checkpoint=str(half_open))}), root, Observer())


@pytest.mark.parametrize(
    ("operator", "word"), [("random-depth", "random-depth"), ("msg(ffn=50, layers=4)", "msg"), ("llama-pro(blocks=2)", "llama-pro")]
)
def test_what_training_is_to_finish_is_not_grown_before(base, tmp_path, operator, word):
    """As one plan refuses it: masks would be forgotten, and which layers alone are trained."""
    root = tmp_path / "runs"
    execute(base, root, Observer())
    outgrow.grow(final_checkpoint(base, root), tmp_path / "grown", operator)
    with pytest.raises(OutgrowError, match=f"was grown by '{word}', which only training finishes"):
        outgrow.grow(tmp_path / "grown", tmp_path / "again", "stack")
    assert not (tmp_path / "again").exists()


def test_masks_lie_where_the_parameters_do():
    """Not where they were read: an accelerator takes no mask of another device, nor does the meta device."""
    behind = {"w": (torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2))}
    masks = make_masks({"w": torch.zeros(2, 2, device="meta")}, behind)
    assert masks.where["w"].device.type == masks.preserving["w"].device.type == "meta"


@pytest.mark.parametrize("name", ["unmask_tokens", "rewarm_tokens"])
def test_what_would_never_be_whole_is_refused(grow_on, name):
    run = grow_on("random-depth", **{name: 21 * BATCH})
    (found,) = problems(run, base_model(run), 20 * BATCH, None, 1)
    assert f"start.{name} (1,344) is more than the 1,280 tokens that it trains for; lower it" in found
    assert not list(problems(grow_on("random-depth", **{name: 20 * BATCH}), base_model(run), 20 * BATCH, None, 1))


def base_model(run):
    return run.start.run.model


def test_clocks_outside_of_a_run_are_refused(grow_on):
    run = grow_on("stack").model_copy(update={"keep": (10 * BATCH, 30 * BATCH)})
    (found,) = problems(run, base_model(run), 20 * BATCH, None, 1)
    assert "keep names the clocks [640], which lie before its first token (1,280); remove them" in found


def test_masks_work_under_compile_without_recompiling(make_model, tokens):
    """The share is a tensor, so opening the masks is no new graph; the model is transformers' own, untouched."""
    model = make_model()
    plan = make_plan("random-width", *described(model), {"ffn": 50})
    behind = {name: (torch.from_numpy(where.copy()), torch.from_numpy(values())) for name, (where, values) in masked(plan).items()}
    wide = make_model(intermediate_size=50)
    parameters = dict(wide.named_parameters())
    with torch.no_grad():
        for name, (where, _) in behind.items():
            parameters[name][where] = 0
    masks = make_masks(parameters, behind)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=count)
    def loss(share):
        return functional_call(wide, masks.opened(parameters, share), kwargs={"input_ids": tokens, "use_cache": False}).logits.sum()

    found = [loss(torch.tensor(share)) for share in (0.0, 0.25, 1.0)]
    compiled = len(graphs)
    for share, one in zip((0.0, 0.25, 1.0), found, strict=True):
        plain = functional_call(wide, masks.opened(parameters, share), kwargs={"input_ids": tokens}).logits.sum()
        torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-4)
    loss(torch.tensor(0.5)).backward()
    assert parameters["model.layers.0.mlp.down_proj.weight"].grad[:, 37:].abs().min() > 0
    assert len(graphs) == compiled


def described(model):
    from outgrow.arch import arch_for

    config = model.config.to_dict()
    return arch_for(config), config


def test_llama_pro_trains_the_new_layers_and_nothing_else(grow_on, settings, tmp_path):
    run, root = grow_on("llama-pro(blocks=2)"), tmp_path / "runs"
    execute(run, root, Observer())
    before, after = (load_file(path / "model.safetensors") for path in (place(run, root) / GROWN, final_checkpoint(run, root)))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("model.layers.1.", "model.layers.3."))}
    assert set(load_file(final_checkpoint(run, root) / "exp_avg.safetensors")) == changed
    on = RunConfig(name="on", start=Start(run=run, optimizer="carry"), tokens=45 * BATCH, **settings)
    execute(on, root, Observer())
    further = load_file(final_checkpoint(on, root) / "model.safetensors")
    assert {name for name in before if not torch.equal(after[name], further[name])} == changed


@pytest.mark.parametrize("policy", ["carry", "fresh-new"])
def test_optimizer_state_goes_on_through_growth_with_its_step_counter(grow_on, tmp_path, policy):
    run, root = grow_on("stack(factor=2)", optimizer=policy), tmp_path / "runs"
    execute(run, root, Observer())
    start, end = place(run, root) / GROWN, final_checkpoint(run, root)
    assert json.loads((start / "training.json").read_text())["steps"] == 20
    assert json.loads((end / "training.json").read_text())["steps"] == 40
    reset = grow_on("stack(factor=2)")
    execute(reset, root, Observer())
    assert json.loads((final_checkpoint(reset, root) / "training.json").read_text())["steps"] == 20
    assert validation(run, root)[0] == validation(reset, root)[0]
    assert validation(run, root)[-1] != validation(reset, root)[-1]


@pytest.mark.parametrize("operator", ["learn-depth(factor=2)", "learn-width(hidden=36, ffn=50, kv=4)"])
def test_learned_maps_lower_the_loss_they_start_from_and_are_paid_for(base, grow_on, tmp_path, operator):
    learn = LearnConfig(steps=30, batch_tokens=BATCH, learning_rate=1e-2)
    run, root = grow_on(operator, learn=learn), tmp_path / "runs"
    execute(run, root, Observer())
    source = final_checkpoint(base, root)
    untrained = make_plan(operator, *(getattr(open_checkpoint(source), part) for part in ("arch", "config")))
    paid = learning_flops(untrained, learn, 16)
    first = read_rows(place(run, root))[0]
    assert first["flops"] == pytest.approx(own_flops(base) + paid)
    assert first["flops"] == pytest.approx(flops_before(run))
    plan = GrowthPlan.from_json(read_lineage(place(run, root) / GROWN).plan)
    assert plan.flops == paid
    from outgrow.checkpoint.grow import grow_directory

    grow_directory(source, tmp_path / "untrained", untrained)
    on = run.model_copy(update={"name": "plain", "start": Start(checkpoint=str(tmp_path / "untrained"))})
    execute(on, root, Observer())
    assert validation(run, root)[0] < validation(on, root)[0]


@pytest.mark.parametrize(("noise", "parted"), [(0.0, False), (0.2, True)])
def test_learned_maps_part_copies_where_they_begin_with_noise_and_only_there(base, grow_on, tmp_path, noise, parted):
    run, root = (
        grow_on(f"learn-width(ffn=64, noise={noise})", learn=LearnConfig(steps=20, batch_tokens=BATCH, learning_rate=1e-2)),
        tmp_path,
    )
    execute(run, root / "runs", Observer())
    plan = GrowthPlan.from_json(read_lineage(place(run, root / "runs") / GROWN).plan)
    matrix = np.asarray(plan.lifts["ffn"].matrix)
    old = matrix.shape[1]
    assert bool(np.abs(matrix[old:] - matrix[: len(matrix) - old]).max() > 1e-2) is parted


def test_the_base_is_frozen_while_maps_are_learned(base, grow_on, tmp_path):
    grow_on("stack")
    source, root = final_checkpoint(base, tmp_path / "runs"), tmp_path / "runs"
    before = (source / "model.safetensors").read_bytes()
    found = open_checkpoint(source)
    plan = make_plan("learn-depth", found.arch, found.config)
    packed = prepare(base.data, root / "data")
    trained = learn_maps(plan, source, packed, LearnConfig(steps=2, batch_tokens=BATCH), 16, seed=0)
    assert (source / "model.safetensors").read_bytes() == before
    assert not trained.is_untrained
    assert trained == GrowthPlan.from_json(json.loads(json.dumps(trained.as_json())))
    with pytest.raises(OutgrowError, match=r"learn.batch_tokens \(50\) is not a multiple of the context \(16\)"):
        learn_maps(plan, source, packed, LearnConfig(steps=2, batch_tokens=50), 16, seed=0)


def test_identities_of_runs_without_the_new_settings_are_what_they_were():
    run = RunConfig(
        model={**ODD, "vocab_size": 300},
        tokens=64,
        batch_tokens=64,
        data=DataConfig(context=16),
        optimizer=OptimizerConfig(learning_rate=0.1),
    )
    plain = RunConfig(
        start=Start(run=run, operator="stack"), tokens=128, batch_tokens=64, data=DataConfig(context=16), optimizer=run.optimizer
    )
    masked_run = plain.model_copy(update={"start": Start(run=run, operator="random-depth", unmask_tokens=64)})
    assert plain.identity() != masked_run.identity()
    assert "learn" in plain.start.model_dump()
