"""What no other test pins down, found by mutation: the arithmetic of optimizers, schedules, losses and statistics, worked out by hand."""

# ruff: noqa: F401, F811  # fixtures of other files

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from statistics import mean, median
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from outgrow.arch import LLAMA, arch_for
from outgrow.data.corpus import Document
from outgrow.errors import Interrupted, OutgrowError
from outgrow.lab.tiny import TINY
from outgrow.training.config import OptimizerConfig, ScheduleConfig, SpikeConfig, Start
from outgrow.training.loop import train, validation_loss
from outgrow.training.optim import Optimizer
from outgrow.training.record import latest_checkpoint, read_rows
from outgrow.training.schedule import share_of_peak

from .conftest import ODD
from .test_dcp import plain, saved
from .test_evaluation import place, tasks
from .test_growth import planned, source_of
from .test_growth_training import base, grow_on, settings
from .test_lab import outcome
from .test_optimizer_state import plan_for, with_state
from .test_training import BATCH, Observer, packed, record, run


def optimizer_of(model, **settings):
    return Optimizer(OptimizerConfig(**settings), dict(model.named_parameters()), arch_for(model.config.to_dict()), model.config.to_dict())


def test_moments_are_of_clipped_gradients_with_the_runs_own_betas(run, packed, tmp_path):
    one = run.model_copy(
        update={
            "tokens": BATCH,
            "schedule": ScheduleConfig(),
            "precision": "fp32",
            "optimizer": OptimizerConfig(learning_rate=1e-2, beta1=0.8, beta2=0.9, clip=0.01),
        }
    )
    train(one, tmp_path / "run", packed, None, Observer())
    (step,) = [row for row in record(tmp_path / "run") if "loss" in row]
    assert step["gradient_norm"] > 0.5  # before clipping
    first, second = (load_file(latest_checkpoint(tmp_path / "run") / f"{name}.safetensors") for name in ("exp_avg", "exp_avg_sq"))
    assert float(sum(v.square().sum() for v in first.values())) ** 0.5 == pytest.approx(0.2 * 0.01, rel=1e-3)
    assert float(sum(v.sum() for v in second.values())) == pytest.approx(0.1 * 0.01**2, rel=1e-3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_without_gradient_shrinks_matrices_by_the_decay_and_nothing_else(make_model, kind):
    model = make_model(attention_bias=True)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = optimizer_of(model, learning_rate=1.0, weight_decay=0.5, kind=kind)
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    optimizer.step(0.1)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), before[name] * (0.95 if value.ndim == 2 else 1.0), msg=name)


def test_a_step_takes_the_share_of_the_rate_that_its_width_says(make_model):
    model = make_model()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = optimizer_of(model, learning_rate=1.0, weight_decay=0.0, tuned_at={"hidden": 12})
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step(0.1)  # Adam's first step is the rate
    for name, step in (("model.layers.0.self_attn.q_proj.weight", 0.05), ("model.embed_tokens.weight", 0.1), ("model.norm.weight", 0.1)):
        torch.testing.assert_close(
            before[name] - dict(model.named_parameters())[name].detach(), torch.full_like(before[name], step), rtol=1e-3, atol=1e-5
        )


def test_muon_steps_at_adams_size_with_its_momentum_and_nesterov(make_model):
    model = make_model(hidden_size=192, intermediate_size=512)
    name = "model.layers.0.mlp.up_proj.weight"
    weight = dict(model.named_parameters())[name]
    optimizer = optimizer_of(model, learning_rate=1.0, weight_decay=0.0, kind="muon", momentum=0.8)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    before = weight.detach().clone()
    weight.grad = gradient.clone()
    optimizer.step(0.01)
    first = weight.detach() - before
    torch.testing.assert_close(optimizer.moments()["momentum_buffer"][name], 0.2 * gradient)
    assert 0.13 < float(first.square().mean().sqrt()) / 0.01 < 0.25  # RMS of 0.2, as of AdamW
    before = weight.detach().clone()
    weight.grad = -0.7 * gradient  # momentum alone still points along the first, Nesterov's does not
    optimizer.step(0.01)
    assert float((first * (weight.detach() - before)).sum()) < 0


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("matrix", ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"])
def test_a_step_changes_outputs_alike_at_every_width(kind, matrix):
    """Square matrices, with more inputs or outputs, and with as many outputs at every width (keys): muP's law, from the width 64 on."""
    name, changes = f"model.layers.0.{matrix}.weight", []
    for width in (64, 256, 1024):
        config = {**ODD, "hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // 8, "head_dim": 8}
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(LLAMA.shapes(config)[name]))
        settings = OptimizerConfig(learning_rate=1.0, kind=kind, tuned_at={"hidden": 64, "ffn": 192, "group": 4})
        optimizer = Optimizer(settings, {name: weight}, LLAMA, config)
        given, wanted = (torch.randn(size, generator=generator) for size in reversed(weight.shape))
        weight.grad = torch.outer(wanted, given)
        optimizer.step(1.0)
        changes.append(float((weight.detach() @ given).square().mean().sqrt()))
    assert changes == pytest.approx([changes[0]] * 3, rel=0.2)


def test_bits_per_byte_is_nats_over_bytes(run, packed, tmp_path):
    train(run.model_copy(update={"tokens": BATCH, "schedule": ScheduleConfig()}), tmp_path / "run", packed, None, Observer())
    row = read_rows(tmp_path / "run")[-1]
    assert row["bits_per_byte"] == pytest.approx(row["validation_loss"] / math.log(2) / packed.bytes_per_token)
    assert row["bits_per_byte"] < row["validation_loss"] / math.log(2)  # a token has more than one byte


def test_the_held_out_loss_weighs_every_sequence_alike(run, packed, tmp_path):
    from outgrow.data.packed import validation_batches

    odd = run.model_copy(
        update={
            "data": run.data.model_copy(update={"validation_tokens": 5 * 16}),
            "tokens": BATCH,
            "schedule": ScheduleConfig(),
            "precision": "fp32",
        }
    )
    made = train(odd, tmp_path / "run", packed, None, Observer())
    with torch.no_grad():
        each = [float(made.loss(torch.from_numpy(rows))) for rows in validation_batches(packed, odd.data, 1)]
    assert len(each) == 5  # batches of 4 and 1
    assert validation_loss(made) == pytest.approx(mean(each), rel=1e-5)


def test_a_run_rewarms_what_is_new_step_by_step(grow_on, tmp_path):
    from outgrow.lab.execute import execute
    from outgrow.lab.runs import GROWN, final_checkpoint, place

    root = tmp_path / "runs"
    plain, warm = (grow_on("stack(factor=2)", optimizer="carry", **more) for more in ({}, {"rewarm_tokens": 4 * BATCH}))
    for one in (plain, warm):
        with pytest.raises(Interrupted):
            execute(one, root, Observer(stop_after=1))
    start = load_file(place(plain, root) / GROWN / "model.safetensors")
    whole, part = (load_file(latest_checkpoint(place(one, root)) / "model.safetensors") for one in (plain, warm))
    for name in start:
        share = 0.25 if name.startswith(("model.layers.2.", "model.layers.3.")) else 1.0
        torch.testing.assert_close(part[name] - start[name], share * (whole[name] - start[name]), rtol=1e-3, atol=1e-6, msg=name)


def test_data_that_was_left_out_stays_left_out_for_what_starts_there(run, packed, tmp_path):
    from outgrow.training.run import open_run

    train(run, tmp_path / "base", packed, None, Observer())
    place = latest_checkpoint(tmp_path / "base")
    receipt = json.loads((place / "outgrow.json").read_text())
    (place / "outgrow.json").write_text(json.dumps({**receipt, "skipped": 2 * BATCH}))
    on = run.model_copy(update={"model": None, "start": Start(checkpoint=str(place)), "tokens": 30 * BATCH})
    assert open_run(on, tmp_path / "on", packed, place).clock.skipped == 2 * BATCH


def test_masks_open_over_a_tenth_of_the_run_and_in_proportion(grow_on, tmp_path):
    from outgrow.lab.execute import execute
    from outgrow.lab.runs import place
    from outgrow.models.masks import Masks
    from outgrow.training.state import BEHIND_MASKS

    one, root = grow_on("random-depth"), tmp_path / "runs"  # 20 steps
    for steps, masked in ((1, True), (1, False)):
        with pytest.raises(Interrupted):
            execute(one, root, Observer(stop_after=steps))
        assert (latest_checkpoint(place(one, root)) / BEHIND_MASKS).exists() == masked
    masks = Masks({"a": torch.tensor([1.0, 0.0])}, {"a": torch.tensor([4.0, 4.0])})
    assert masks.opened({"a": torch.tensor([8.0, 8.0])}, 0.25)["a"].tolist() == [5.0, 8.0]


def test_decays_end_at_their_final_share_and_stay_there():
    wsd = ScheduleConfig(decay_tokens=20, final=0.1)
    assert share_of_peak(wsd, 90, 1, 0, 100) == pytest.approx(0.55)
    assert share_of_peak(wsd, 100, 1, 0, 100) == pytest.approx(0.1)
    for schedule in (ScheduleConfig(kind="cosine", final=0.1, end=50), ScheduleConfig(decay_tokens=20, final=0.1, end=50)):
        assert share_of_peak(schedule, 75, 1, 0, 100) == pytest.approx(0.1)


def test_half_a_row_of_a_killed_writer_is_dropped(tmp_path):
    from outgrow.training.record import METRICS, forget_rows_after

    (tmp_path / METRICS).write_text('{"tokens": 64}\n{"tokens": 128}\n{"tokens": 1')
    forget_rows_after(tmp_path / METRICS, 128)
    assert [row["tokens"] for row in read_rows(tmp_path)] == [64, 128]


def test_a_run_rolls_back_as_often_as_it_may(run, packed, tmp_path, monkeypatch):
    from outgrow.training import loop

    real, bad = loop._step, []

    def step(*arguments):
        if bad:
            raise loop.SpikeError(bad.pop())
        return real(*arguments)

    monkeypatch.setattr(loop, "_step", step)
    guarded = run.model_copy(update={"spike": SpikeConfig(action="roll back", times=2), "tokens": 2 * BATCH, "schedule": ScheduleConfig()})
    bad[:] = ["one", "two"]
    train(guarded, tmp_path / "two", packed, None, Observer())
    assert sum("rolled_back" in row for row in read_rows(tmp_path / "two")) == 2  # by which a resumed run counts
    bad[:] = ["one", "two", "three"]
    with pytest.raises(OutgrowError):
        train(guarded, tmp_path / "three", packed, None, Observer())


def test_sides_are_those_that_committed_results_were_made_with():
    from outgrow.data.corpus import is_held_out

    assert [n for n in range(40) if is_held_out(Document("", str(n)), 0.2)] == GOLDEN


def test_a_vocabulary_is_trained_on_training_documents_alone(monkeypatch, tmp_path):
    from outgrow.data import packing
    from outgrow.data.corpus import is_held_out

    seen = []
    monkeypatch.setattr(packing.bpe, "train", lambda texts, vocab: seen.extend(texts))
    monkeypatch.setattr(packing.bpe, "save", lambda *arguments: None)
    found = [Document("", str(n)) for n in range(40)]
    packing.train_on(found, 300, 0.2)(tmp_path)
    assert seen == [one.text for one in found if not is_held_out(one, 0.2)] != [one.text for one in found]


def test_bytes_of_a_mixture_are_weighed_by_its_shares(tmp_path, monkeypatch):
    from outgrow.config import parse
    from outgrow.data.config import DataConfig
    from outgrow.data.packed import open_packed, prepare, validation_batches
    from outgrow.data.packing import prepare_sources

    from .test_data_prepare import TEXTS, records

    (tmp_path / "a.jsonl").write_bytes(records(TEXTS))
    (tmp_path / "b.jsonl").write_bytes(records([text.upper() for text in TEXTS]))
    prepare_sources([str(tmp_path / "a.jsonl")], tmp_path / "one", vocab=300, validation_share=0.2)
    prepare_sources([str(tmp_path / "b.jsonl")], tmp_path / "two", str(tmp_path / "one"), validation_share=0.2)
    config = {
        "sources": [{"path": str(tmp_path / "one"), "weight": 0.75}, {"path": str(tmp_path / "two"), "weight": 0.25}],
        "context": 16,
        "validation_tokens": 160,
    }
    settings = parse(DataConfig, config, "test")
    mixed = prepare(settings, tmp_path / "cache")
    one, two = (open_packed(tmp_path / name).bytes_per_token for name in ("one", "two"))
    assert abs(one - two) > 0.1
    assert mixed.bytes_per_token == pytest.approx(0.75 * one + 0.25 * two)
    assert sum(len(rows) for rows in validation_batches(mixed, settings, 4)) == 9  # 7 and 2, no more than is asked for


def test_moments_that_nothing_stands_behind_begin_at_the_mean(tmp_path):
    from outgrow.checkpoint.grow import grow_directory

    source = with_state(tmp_path / "source")
    grow_directory(source, tmp_path / "target", plan_for(source, "expand(layers=6, weights='random')"), optimizer="carry")
    name = "model.layers.{}.mlp.up_proj.weight"
    old, new = (load_file(tmp_path / folder / "exp_avg_sq.safetensors") for folder in ("source", "target"))
    assert new[name.format(5)].unique().tolist() == pytest.approx([float(old[name.format(0)].mean())])


def test_moments_of_a_scaled_branch_are_scaled_before_its_end_alone():
    from outgrow.growth.apply import Grown

    plan = planned("mergekit", layers="0-1,1-2")
    source = source_of(ODD)
    grown = Grown(plan, lambda name, rows: source[name][rows])
    inner, end = "model.layers.{}.mlp.up_proj.weight", "model.layers.{}.mlp.down_proj.weight"
    for channel, power in (("gradient", 1), ("square", 2)):
        np.testing.assert_allclose(grown.state(inner.format(1), channel, "carry"), source[inner.format(1)] * 0.5 ** (power / 2), rtol=1e-6)
        np.testing.assert_allclose(grown.state(end.format(1), channel, "carry"), source[end.format(1)])
        np.testing.assert_allclose(grown.state(inner.format(0), channel, "carry"), source[inner.format(0)])


def test_gains_behind_a_mask_are_one():
    from outgrow.growth.fresh import masked

    found = masked(planned("random-depth", TINY["olmo2"]))
    gains = [values() for name, (_, values) in found.items() if name.endswith("norm.weight")]
    assert gains
    assert all((values == 1).all() for values in gains)


def test_projected_noise_has_the_size_it_says():
    from outgrow.growth.apply import grow

    config = {**ODD, "hidden_size": 120, "intermediate_size": 300}
    source = source_of(config)
    plain, noisy = (dict(grow(planned("direct-width", config, hidden=240, noise=share), source)) for share in (0.0, 0.5))
    name = "model.layers.1.mlp.up_proj.weight"
    assert (noisy[name] - plain[name]).std() == pytest.approx(0.5 * 0.3 * 0.5**0.5, rel=0.05)  # half of its directions are seen


def test_what_a_living_process_writes_is_left_to_it(tmp_path):
    from outgrow.files import new_directory

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        theirs = tmp_path / f".target.partial-{other.pid}"
        theirs.mkdir()
        with new_directory(tmp_path / "target"):
            pass
        assert theirs.is_dir()
        other.communicate(b"\n")


def test_all_is_on_the_disk_before_a_directory_appears(tmp_path, monkeypatch):
    from outgrow import files

    flushed = []
    monkeypatch.setattr(files, "flush", lambda path: flushed.append((path.name, (tmp_path / "target").exists())))
    with files.new_directory(tmp_path / "target") as temporary:
        (temporary / "a").write_text("x")
    assert ("a", False) in flushed
    assert any(name.startswith(".target.partial") and not there for name, there in flushed)
    assert flushed[-1] == (tmp_path.name, True)


def test_tensors_begin_at_multiples_of_eight():
    from outgrow.checkpoint.safetensors_file import write_header

    for length in range(1, 9):
        header, entries = write_header({"a" * length: ("F32", (2,))})
        assert len(header) % 8 == 0
        assert entries["a" * length].begin == len(header)


def test_chunks_may_split_any_axis(tmp_path):
    from outgrow.checkpoint.dcp import Chunk, _chunked

    whole = torch.arange(24.0).reshape(4, 6)
    boxes = [((r, c), (2, 3)) for r in (0, 2) for c in (0, 3)]
    chunks = [Chunk(at, size, tmp_path, lambda at=at: whole[at[0] : at[0] + 2, at[1] : at[1] + 3]) for at, size in boxes]
    assert torch.equal(_chunked("a", "F32", (4, 6), chunks).whole(), whole)
    with pytest.raises(OutgrowError, match="without overlapping"):
        _chunked("a", "F32", (4, 6), [*chunks[:3], replace(chunks[3], offsets=(2, 2))])


def test_figures_of_seeds():
    from outgrow.lab.findings import rank_correlation
    from outgrow.lab.speedup import OverSeeds, bootstrap

    assert bootstrap([0.1, 0.2, 0.3]) == (pytest.approx(0.1), pytest.approx(0.3))  # 1 of 27 resamples is of the lowest alone, 3.7%
    assert OverSeeds((0.4, 0.6), 2.0).saving == pytest.approx(1 / 3)

    def row(paper, figure, is_baseline=False):
        return SimpleNamespace(arm=SimpleNamespace(paper=paper), budgets=(1,), speed_ups={"annealed": figure}, is_baseline=is_baseline)

    def known(value, beyond=""):
        return OverSeeds((value,), 2.0, beyond=beyond)

    rows = [row(0.1, known(0.1)), row(0.2, known(0.2)), row(0.3, known(0.3)), row(0.4, known(9.0))]
    assert rank_correlation(rows, "annealed") == (pytest.approx(1.0), 4)
    assert rank_correlation([*rows, row(0.5, known(0.0, ">"))], "annealed") == (pytest.approx(1.0), 4)  # a bound has no rank
    assert rank_correlation([row(0.5, None, True), *rows], "annealed") == (pytest.approx(0.0), 5)  # what they are compared with is at 0


def test_a_sweep_goes_on_below_its_lower_edge(tmp_path):
    from outgrow.lab.sweep import MOST_RATES, sweep

    from .test_study import made_up, nano

    study, scale = nano("operators")
    only = study.model_copy(update={"arms": {"scratch": study.arms["scratch"]}})
    falling = made_up(only, scale, tmp_path / "edge.jsonl", lambda arm, seed, rate, run, flops: 5 + rate, seeds=1)
    found = sweep(only, scale, "scratch", 1, falling)
    assert found.best == min(found.losses) == min(scale.rates) / 2 ** (MOST_RATES - len(scale.rates))


def test_a_row_of_the_table_is_worked_out_by_hand():
    from outgrow.lab.table import rows

    from .test_advise import RECORDS

    found = [row for _, row in rows(RECORDS)]
    assert all(row["tokens_per_param"] == row["tokens"] / row["params"] for row in found)
    named = {row["name"]: row for row in found}
    assert named["direct-depth-rate0.012-seed0-annealed-2199552"]["speed_up"] == pytest.approx(0.1157, abs=1e-4)


def test_a_table_says_the_speed_ups_of_the_studies():
    """Of each arm's seeds at its largest budget: the same rate is best, scratch is the same, no policy is taken for another."""
    from outgrow.lab.findings import findings
    from outgrow.lab.records import Records
    from outgrow.lab.study import open_study
    from outgrow.lab.table import rows

    from .test_advise import RECORDS

    found = {row["name"]: row for _, row in rows(RECORDS)}
    records = Records(RECORDS)
    for name, arms in {
        "state": ("reset-restart", "reset-keep", "fresh-restart", "fresh-keep", "carry-restart", "carry-keep", "carry-new"),
        "sizes": ("quarter-stack", "eighth-stack", "half-stack"),
    }.items():
        study, scale = open_study(name, "nano", RECORDS.parents[1])
        study = study.model_copy(update={"arms": {key: arm for key, arm in study.arms.items() if not arm.growths or key in arms}})
        for finding in findings(study, scale, 3, records):
            if finding.name not in arms:
                continue
            ends = [found[records[one.branches[max(one.branches)].identity()].name] for one in finding.trials]
            # Records of other studies add budgets between those of this one.
            assert [end["speed_up"] for end in ends] == pytest.approx(finding.speed_ups["annealed"].values, abs=0.02)
            assert all(end["tuned"] == "true" for end in ends)


def test_all_hops_make_the_growth_factor():
    from outgrow.lab.table import rows

    from .test_advise import RECORDS

    found = [row for _, row in rows(RECORDS)]
    gradual = {round(row["growth_factor"]) for row in found if row["name"].startswith("gradual-") and "trunk" in row["name"]}
    assert gradual == {4}
    assert all(math.isnan(row["growth_factor"]) for row in found if row["name"].startswith("zero-80-") and "growth_factor" in row)


def test_two_readings_of_one_run_are_not_compared():
    """Arms that differ in their decay have one constant-rate trunk: what its validations do is no speed-up."""
    from outgrow.lab.findings import findings
    from outgrow.lab.records import Records
    from outgrow.lab.study import open_study

    from .test_advise import RECORDS

    study, scale = open_study("baseline", "nano", RECORDS.parents[1])
    arms = {name: study.arms[name] for name in ("scratch", "decay-20", "half-batch")}
    found = {row.name: row for row in findings(study.model_copy(update={"arms": arms}), scale, 3, Records(RECORDS))}
    assert found["decay-20"].speed_ups["un-annealed"] is None
    assert found["decay-20"].speed_ups["annealed"] is not None
    assert found["half-batch"].speed_ups["un-annealed"] is not None


def test_points_of_one_trunk_are_drawn_together():
    from outgrow.scaling.fit import fit
    from outgrow.scaling.laws import LAWS

    rng = np.random.default_rng(0)
    flops = np.geomspace(1e18, 1e22, 40)
    trunks = [str(number) for number in range(40) for _ in range(10)]
    loss = np.repeat(np.exp(3 - 0.05 * np.log(flops) + 1e-3 * rng.normal(size=40)), 10)
    columns = {"flops": np.repeat(flops, 10), "loss": loss}
    alone, together = (fit(LAWS["power"], columns, resamples=300, trunks=one).intervals["b"] for one in (None, trunks))
    assert together[1] - together[0] == pytest.approx(10**0.5 * (alone[1] - alone[0]), rel=0.3)


def test_losses_that_rise_follow_no_power_law():
    from outgrow.scaling.fit import fit
    from outgrow.scaling.laws import LAWS

    flops = np.geomspace(1e18, 1e22, 20)
    with pytest.raises(OutgrowError, match="do not follow 'power'"):
        fit(LAWS["power"], {"flops": flops, "loss": 1e-3 * flops**0.04})


def test_tasks_are_compared_the_way_their_metric_goes(monkeypatch):
    from outgrow.lab.outcome import Outcome

    curves = {"scratch": [(1e12, 0.3), (2e12, 0.4), (4e12, 0.5)], "grown": [(1e12, 0.35), (2e12, 0.45)]}
    monkeypatch.setattr(Outcome, "on_task", lambda self, kind, arm, seed, field: curves[arm])
    (found,) = Outcome(None, (0,), {}, {}).task_speed_ups("annealed", "eval/sciq/acc")
    assert found.loss == 0.45


def test_perplexities_have_errors_of_their_own_size():
    from outgrow.evaluation.harness import _ratio_errors, ratio_error

    samples = [{"word_perplexity": (-nats, words)} for nats, words in ((10.0, 4), (30.0, 9), (22.0, 6))]
    perplexity = math.exp(62 / 19)
    error = ratio_error(np.array([10.0, 30, 22]), np.array([4.0, 9, 6]))
    assert _ratio_errors(samples, {"word_perplexity": perplexity})["word_perplexity_stderr"] == pytest.approx(perplexity * error)


def test_an_interval_of_a_fit_is_of_ninety_five_percent():
    from outgrow.scaling.fit import fit
    from outgrow.scaling.laws import LAWS

    rng = np.random.default_rng(0)
    flops = np.geomspace(1e18, 1e22, 400)
    x = np.log(flops)
    found = fit(LAWS["power"], {"flops": flops, "loss": np.exp(3 - 0.05 * x + 2e-4 * rng.normal(size=400))}, resamples=400)
    low, high = found.intervals["b"]
    assert high - low == pytest.approx(2 * 1.96 * 2e-4 / (x.std() * 20), rel=0.2)


def test_plans_cost_what_they_say():
    from outgrow.lab.advice import advice_lines
    from outgrow.lab.advise import advise
    from outgrow.lab.budget import need_of

    advice = advise("1B", "20B", hardware="h100:8")
    scratch, stacked, *_ = advice.plans
    assert advice.equal_loss_flops(stacked) == pytest.approx(scratch.flops / (1 + stacked.strategy.expected.speed_up))
    (trunk,) = scratch.recipe.trunk()
    assert scratch.disk_bytes == 4 * need_of(trunk, 8).checkpoint_bytes + 2 * advice.budget.tokens  # its end, two kept, one in the making
    text = "\n".join(advice_lines(advice, None))
    hours = scratch.flops / (989e12 * 0.4) / 3600
    line = next(line for line in text.splitlines() if line.startswith("scratch"))
    assert f"  {hours / 8 / 24:,.1f}  " in line


def test_recomputing_needs_less_memory(run):
    from outgrow.lab.budget import need_of

    deep = run.model_copy(update={"model": {**run.model, "num_hidden_layers": 8}})
    kept, again = (need_of(deep.model_copy(update={"recompute": flag})).activation_bytes for flag in (False, True))
    assert again < kept / 3


def test_a_gap_of_one_percent_is_not_met():
    from outgrow.scaling.growth import mixing_tokens

    fixed = [(0, 2.0), (100, 2.0)]
    assert mixing_tokens(fixed, [(50, 3.0), (60, 2.02), (70, 2.009)]) == 20


def test_a_limited_result_is_not_taken_for_a_whole_one(place, tasks, tmp_path):
    from outgrow.evaluation import harness, results
    from outgrow.evaluation.suite import read_suite

    shutil.copytree(place / "checkpoint", tmp_path / "other", ignore=shutil.ignore_patterns("evaluation"))
    suite = read_suite(str(tasks / "code_bracket.yaml"))
    loaded = harness.load_tasks(suite, None)
    assert results.evaluate(tmp_path / "other", suite, loaded, limit=2)["code_bracket"]["samples"] == 2
    assert results.evaluate(tmp_path / "other", suite, loaded)["code_bracket"]["samples"] > 2


def test_shots_are_shown(place, tasks):
    from outgrow.evaluation import harness
    from outgrow.evaluation.model import open_model
    from outgrow.evaluation.suite import read_suite

    (loaded,) = harness.load_tasks(read_suite(str(tasks / "code_bracket.yaml")), None)
    loaded = replace(loaded, choice=loaded.choice.model_copy(update={"shots": 2}))
    harness.run_task(loaded, open_model(place / "checkpoint"), 2, 8)
    assert [task.get_config("num_fewshot") for task in loaded.tasks["tasks"].values()] == [2]


def test_seeds_that_met_scratch_in_part_are_no_pilot(monkeypatch):
    from outgrow.lab import table

    from .test_advise import NANO

    whole = table.pilots(NANO)
    real, calls = table.equal_loss, []
    monkeypatch.setattr(table, "equal_loss", lambda *pair: calls.append(pair) or (None if len(calls) == 1 else real(*pair)))
    assert len(table.pilots(NANO)) == len(whole) - 1


def test_each_source_gives_a_vocabulary_an_equal_share(monkeypatch, tmp_path):
    from outgrow.data import packing

    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": name * 100 + str(n)}) + "\n" for n in range(100)))
    seen = []
    monkeypatch.setattr(packing, "TRAINING_CHARACTERS", 4000)
    monkeypatch.setattr(packing, "pack", lambda target, found, write, *rest: write(tmp_path))
    monkeypatch.setattr(packing.bpe, "train", lambda texts, vocab: seen.extend(texts))
    monkeypatch.setattr(packing.bpe, "save", lambda *arguments: None)
    packing.prepare_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], tmp_path / "out", vocab=300, validation_share=0.01)
    assert abs(sum(text.startswith("a") for text in seen) - sum(text.startswith("b") for text in seen)) <= 3
    assert len(seen) <= 42


def test_a_part_of_another_type_than_the_metadata_says_is_refused(plain, tmp_path, run):
    from .test_dcp import NAME, edited

    edited(plain, lambda m: setattr(m.state_dict_metadata[NAME].properties, "dtype", torch.float64))
    from outgrow.checkpoint.dcp import read_dcp

    with pytest.raises(OutgrowError, match=r"is not torch.float64"):
        read_dcp(plain, trust_pickle=True)[NAME].whole()


def test_what_a_run_cost_is_worked_out_by_hand(outcome):
    from outgrow.arch import flops_per_token
    from outgrow.lab.outcome import cost

    result = outcome.result(outcome.comparison.trunk("scratch", 0))
    row = cost(result)
    assert row.head_share == pytest.approx(6 * 300 * 24 / flops_per_token(LLAMA, outcome.comparison.model, 16))
    assert row.tokens_per_second == median(step["tokens_per_second"] for step in result.steps)


def test_what_is_left_is_told_in_hours_of_what_was_seen(tmp_path):

    from outgrow.lab.ancestry import own_flops
    from outgrow.lab.findings import state_lines
    from outgrow.lab.records import Records
    from outgrow.lab.sweep import wanted

    from .test_study import made_up, nano, power

    study, scale = nano("operators")
    only = study.model_copy(update={"arms": {"scratch": study.arms["scratch"]}})
    made_up(only, scale, tmp_path / "r.jsonl", lambda *a: power(*a, gain={}), seeds=1)
    records = Records(tmp_path / "r.jsonl")
    for key in list(records):
        dict.__setitem__(records, key, replace(records[key], seconds=own_flops_of(records[key]) / 1e9))
    *_, last = state_lines(only, scale, 3, records)
    left = sum(own_flops(run) for run in wanted(only, scale, 3, records) if run.identity() not in records)
    assert f"about {left / 1e9 / 3600:.1f} hours of one job" in last


def own_flops_of(record):
    return record.points[-1][1] - record.points[0][1]


def test_epochs_count_what_was_left_out(run, packed, tmp_path):
    from outgrow.data.packed import Batches
    from outgrow.training.loop import _validation_row

    made = train(run.model_copy(update={"tokens": BATCH, "schedule": ScheduleConfig()}), tmp_path / "run", packed, None, Observer())
    batches = Batches(packed.training, 16, 0)
    made.clock = replace(made.clock, skipped=9 * BATCH)
    assert _validation_row(made, batches)["epochs"] == pytest.approx(10 * BATCH / 16 / batches.sequences_per_epoch, abs=1e-4)


def test_adams_state_may_not_be_missing_for_what_is_new(make_model):
    optimizer = optimizer_of(make_model(), learning_rate=1.0)
    saved = {moment: dict(values) for moment, values in optimizer.moments().items()}
    del saved["exp_avg"]["model.norm.weight"]
    with pytest.raises(OutgrowError, match="nothing for 'model.norm.weight' under adamw"):
        optimizer.restore(saved, 3, fresh=["model.norm.weight"])


GOLDEN = [8, 9, 39]
EXPECTED = 0.0
