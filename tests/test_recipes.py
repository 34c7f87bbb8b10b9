"""Recipes of stages: what they stand for, overrides, budgets, trackers, jobs; growth in place; kills at random instants."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from rich.progress import Progress
from safetensors.torch import load_file

from outgrow.arch import LLAMA, arch_for
from outgrow.data.packed import prepare
from outgrow.errors import Interrupted, OutgrowError
from outgrow.growth.operators import make_plan
from outgrow.lab.ancestry import in_order, model_of
from outgrow.lab.budget import need_of
from outgrow.lab.execute import _alone, differences, execute, refuse_early
from outgrow.lab.recipe import SHIPPED, changed, find_recipe, read_runs
from outgrow.lab.runs import place
from outgrow.lab.stopping import on_stop
from outgrow.lab.submit import executor
from outgrow.lab.track import trackers
from outgrow.lab.watch import Watch
from outgrow.models.build import empty, resolved
from outgrow.training.config import OptimizerConfig, ScheduleConfig, SpikeConfig, Start
from outgrow.training.loop import train
from outgrow.training.optim import Optimizer
from outgrow.training.origin import can_grow_in_place
from outgrow.training.record import FINISHED, checkpoints, latest_checkpoint, read_rows
from outgrow.training.rewarm import rewarm_of
from outgrow.training.schedule import share_of_peak

from .conftest import ODD
from .processes import COMMAND_LINE, Process, python
from .test_extensions import refused
from .test_extensions import run as cli  # noqa: F401
from .test_training import BATCH, Observer, packed, record, run, weights  # noqa: F401

MODEL = {**ODD, "vocab_size": 300, "num_hidden_layers": 1}


@pytest.fixture
def recipe(corpus, tmp_path):
    """A recipe file: two growths, with each policy of the learning rate, and a branch."""
    content = {
        "name": "tiny",
        "model": MODEL,
        "data": {"corpus": str(corpus), "vocab": 300, "context": 16, "validation_share": 0.1, "validation_tokens": 128},
        "batch_tokens": BATCH,
        "stages": [
            {"tokens": 6 * BATCH},
            {"tokens": 6 * BATCH, "grow": "stack(factor=2)", "rate": "rewarm-new", "optimizer": "carry"},
            {"tokens": 8 * BATCH, "grow": "stack(factor=2)", "rate": "keep", "learning_rate": 0.005, "optimizer": "carry"},
        ],
        "branches": [{"at": 14 * BATCH, "tokens": 4 * BATCH}],
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"warmup_tokens": 4 * BATCH, "decay_tokens": 5 * BATCH},
        "save_every": 4 * BATCH,
        "validate_every": 5 * BATCH,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


# --- what a recipe stands for ------------------------------------------------------------------------------------------


def test_stages_are_runs_that_start_from_one_another(recipe):
    first, second, third, branch = read_runs(recipe, [])
    assert [one.tokens // BATCH for one in (first, second, third, branch)] == [6, 12, 20, 18]
    assert second.start.run.identity() == first.identity()
    assert third.start.run.identity() == second.identity()
    assert branch.start.run.identity() == third.identity()
    assert branch.start.tokens == 14 * BATCH
    assert branch.schedule.decay_tokens == 4 * BATCH
    assert second.start.rewarm_tokens == 4 * BATCH
    assert third.optimizer.learning_rate == 0.005
    rates = {
        clock: share_of_peak(one.schedule, clock * BATCH, BATCH, begin * BATCH, one.tokens)
        for one, begin, end in ((first, 0, 6), (second, 6, 12), (third, 12, 20))
        for clock in range(begin, end)
    }
    whole = ScheduleConfig(warmup_tokens=4 * BATCH, decay_tokens=5 * BATCH)
    assert rates == {clock: share_of_peak(whole, clock * BATCH, BATCH, 0, 20 * BATCH) for clock in range(20)}


def test_restarting_warms_up_again_towards_the_same_end(recipe):
    runs = read_runs(
        recipe, ["stages.1.rate=restart", "stages.1.optimizer=reset", "schedule.kind=cosine", "schedule.decay_tokens=0", "branches=[]"]
    )
    shares = [share_of_peak(runs[1].schedule, clock * BATCH, BATCH, 6 * BATCH, runs[1].tokens) for clock in (6, 9, 11)]
    assert shares[0] == pytest.approx(0.25)
    assert shares[1] == 1
    assert 0.9 < shares[2] < 1


def test_keeping_the_rate_goes_on_with_what_restarted_last(recipe):
    runs = read_runs(recipe, ["stages.1.rate=restart", "schedule.kind=cosine", "schedule.decay_tokens=0", "branches=[]"])
    second, third = runs[1:]
    assert third.schedule.begin == 6 * BATCH
    before = share_of_peak(second.schedule, 12 * BATCH, BATCH, 6 * BATCH, second.tokens)
    after = share_of_peak(third.schedule, 12 * BATCH, BATCH, 12 * BATCH, third.tokens)
    assert after == pytest.approx(before)


def test_a_horizon_apart_from_the_length_moves_with_a_restart(recipe):
    runs = read_runs(
        recipe, ["stages.1.rate=restart", f"schedule.end={100 * BATCH}", "schedule.kind=cosine", "schedule.decay_tokens=0", "branches=[]"]
    )
    assert [one.schedule.end // BATCH for one in runs] == [100, 106, 106]


def test_settings_are_changed_by_name(recipe):
    assert read_runs(recipe, ["optimizer.learning_rate=0.5", "stages.2.tokens=64", "branches=[]"])[2].tokens == 13 * BATCH
    assert changed({"a": [1, {"b": 2}]}, "a.1.b=[3]") == {"a": [1, {"b": [3]}]}
    for change, words in (
        ("optimizer.learning_rat=1", "did you mean 'learning_rate'"),
        ("stages.7.tokens=64", "'7' is not one of the 3 entries"),
        ("tokens", "--set takes NAME=VALUE"),
        ("name.x=1", "there is nothing under 'tiny'"),
        ("stages.0.tokens=65", "no multiple of batch_tokens"),
        ("stages.0.grow=stack", "the first stage grows nothing"),
        ("stages.1.grow=null", "stage 2 says nothing about how it grows"),
        ("branches.0.at=100000", "leave the trunk before its end"),
        ("branches.0.at=1024", r"leaves the trunk at 1,024 tokens, where its learning rate is 0.8 of its peak"),
        ("branches.0.at=448", "what is new still warms up"),
        ("schedule.begin=64", "schedule.begin has no meaning in a recipe"),
        ("data.epochs=[1", r"--set data.epochs: '\[1' is not YAML"),
        ("micro_batch_tokens=24", r"micro_batch_tokens \(24\) must be a multiple of data.context"),
        ("optimizer.learning_rate=.inf", "'optimizer.learning_rate' should be a finite number"),
        ("optimizer.tuned_at={hidden: 0}", "should be greater than 0"),
        ("schedule.warmup_tokens=0", "warms up what is new, and schedule.warmup_tokens is 0"),
    ):
        with pytest.raises(OutgrowError, match=words):
            read_runs(recipe, [change])


def test_mistakes_are_told_all_at_once(recipe):
    with pytest.raises(OutgrowError, match="'optimizer.learning_rate'.*'schedule.kind'"):
        read_runs(recipe, ["optimizer.learning_rate=-1", "schedule.kind=square"])
    with pytest.raises(OutgrowError, match=r"stage 2 says nothing.*stage 3 of 65 tokens is no multiple.*a branch of 256 tokens"):
        read_runs(recipe, ["stages.1.grow=null", "stages.2.tokens=65", "branches.0.at=99999"])


def test_all_runs_are_looked_at_before_the_first_is_trained(recipe, tmp_path, cli):  # noqa: F811
    changes = ("stages.1.grow=learn-depth(factor=2)", "stages.2.tokens=640000", "optimizer.tuned_at={width: 3}", "branches=[]")
    done = cli("train", recipe, "--runs", tmp_path / "runs", *[part for change in changes for part in ("--set", change)])
    refused(done, "no law moves optimizer state through learned maps", "it reads 640,768 tokens", "tuned_at names the space 'width'")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["data"]
    done = cli("train", recipe, "--dry-run", "--ranks", "3")
    refused(done, "'tiny-stage1': 3 ranks do not divide the 4 sequences", "'tiny-stage3': 3 ranks")
    refused(cli("train", recipe, "--dry-run", "--set", "model.max_position_embeddings=8"), "data.context (16) is more than the 8 positions")


def test_a_dry_run_refuses_what_training_would(recipe, cli):  # noqa: F811
    def told(*changes, ranks=1):
        edits = [part for change in ("branches=[]", *changes) for part in ("--set", change)]
        return cli("train", recipe, "--dry-run", "--ranks", str(ranks), "--set", "micro_batch_tokens=32", *edits)

    masked = ("stages.1.grow=random-depth(factor=2)", "stages.1.optimizer=reset", "stages.1.rate=restart")
    assert told(*masked)[0] == told(*masked, ranks=2)[0] == 0
    wide = ("stages.1.grow=direct-width(hidden=36)", "stages.1.rate=rewarm-new", "stages.2.grow=stack(factor=2)")
    assert told(*wide, ranks=2)[0] == 0
    refused(told("stages.1.unmask_tokens=64"), "start.unmask_tokens has no effect with the operator 'stack(factor=2)', which masks nothing")
    refused(told("stages.1.learn={steps: 3}"), "start.learn has no effect with the operator 'stack(factor=2)', which has no maps to learn")
    frozen = ("stages.1.grow=llama-pro(blocks=1)", "stages.2.optimizer=carry", "stages.2.rate=restart")
    refused(
        told(*frozen, "stages.1.optimizer=reset"),
        "'tiny-stage3': start.optimizer is 'carry', and under 'llama-pro' only new layers are trained",
    )
    refused(told("stages.0.rate=keep", "stages.0.unmask_tokens=64"), "stages.0.rate has no effect", "stages.0.unmask_tokens has no effect")
    refused(cli("train", recipe, "--ranks", "2"), "--ranks and --days are questions to --dry-run and have no effect without it")
    branch = ("schedule={}", "branches=[{at: 448, tokens: 64}]")  # 64 tokens after growth at 384
    refused(told(*masked, "stages.1.unmask_tokens=128", *branch), "where masks still open; they are open at 512")
    assert told(*masked, "stages.1.unmask_tokens=64", *branch)[0] == 0


def test_learned_maps_have_nothing_to_warm_up_alone(recipe, tmp_path):
    changes = ["stages.1.grow=learn-depth(factor=2)", "stages.1.optimizer=reset", "branches=[]"]
    runs = read_runs(recipe, changes)
    with pytest.raises(OutgrowError, match=r"'tiny-stage2': no law says what of learned maps is new.* let 'rate' be 'restart' or 'keep'"):
        refuse_early(runs, tmp_path / "runs")
    refuse_early(read_runs(recipe, [*changes, "stages.1.rate=restart"]), tmp_path / "runs")


@pytest.mark.parametrize("steps", [6, 5])  # the trunk's last, or one that it saved and went beyond
def test_a_branch_off_what_the_trunk_has_passed_is_told_before_anything_is_trained(recipe, tmp_path, steps):
    changes = ["stages=[{tokens: 384}]", "schedule={}", "branches=[]"]
    trunk = in_order(read_runs(recipe, changes))[0]
    with suppress(Interrupted):
        execute(trunk, tmp_path / "runs", Observer(stop_after=steps))
    for at, kept in ((2, False), (steps, True), (6, True)):
        wanted = in_order(read_runs(recipe, [*changes, f"branches=[{{at: {at * BATCH}, tokens: 128}}]"]))
        if kept:
            refuse_early(wanted, tmp_path / "runs")
            continue
        with pytest.raises(OutgrowError, match=r"'tiny' kept no checkpoint at 128 tokens; remove '.*' and run it again"):
            refuse_early(wanted, tmp_path / "runs")


def test_a_changed_recipe_is_refused_before_anything_is_trained_again(recipe, tmp_path, cli):  # noqa: F811
    first, second, *_ = in_order(read_runs(recipe, []))
    execute(first, tmp_path / "runs", Observer())
    with pytest.raises(Interrupted):
        execute(second, tmp_path / "runs", Observer(stop_after=4))
    before = sorted(path.name for path in (tmp_path / "runs").iterdir())
    refused(cli("train", recipe, "--runs", tmp_path / "runs", "--set", "seed=3"), "left half-way with other settings", "seed: 0 -> 3")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == before


def test_the_papers_recipes_need_what_their_sizes_say(cli):  # noqa: F811
    sizes = {"410m": (0.374e9, 0.142e9), "1.1b": (1.364e9, 0.439e9), "3b": (2.40e9, 0.723e9), "7b": (5.93e9, 1.68e9)}
    for name, (target, base) in sizes.items():
        grown, scratch = (read_runs(Path(f"{name}-{arm}"), []) for arm in ("grown", "scratch"))
        needs = [need_of(one, 8) for one in grown]
        assert needs[0].parameters == pytest.approx(base, rel=0.01)
        assert needs[1].parameters == pytest.approx(target, rel=0.01)
        assert need_of(scratch[0], 8).parameters == needs[1].parameters
        assert scratch[0].tokens == grown[1].tokens
        assert grown[0].tokens == pytest.approx(10e9, rel=1e-3)
        assert needs[1].state_bytes == 2 * needs[1].parameters
        assert needs[1].checkpoint_bytes == 12 * needs[1].parameters
    status, out, _ = cli("train", "7b-grown", "--dry-run", "--ranks", "64", "--days", "30")
    assert status == 0
    assert "tokens/s" in out
    assert "7b-grown-stage2" in out


@pytest.mark.parametrize(
    ("model_type", "left_out", "space", "size"),
    [("qwen3", "head_dim", "head", 128), ("mistral", "num_key_value_heads", "kv", 8), ("gemma2", "num_key_value_heads", "kv", 4)],
)
def test_what_a_recipe_leaves_to_its_family_is_counted_as_it_is_built(recipe, model_type, left_out, space, size):
    model = {key: value for key, value in MODEL.items() if key != left_out} | {"model_type": model_type, "num_attention_heads": 8}
    one = read_runs(recipe, [f"model={json.dumps(model)}", "branches=[]"])[1]
    built = sum(value.numel() for value in empty(resolved(model | {"num_hidden_layers": 2})).parameters())
    assert arch_for(model).sizes(model_of(one))[space] == size
    assert need_of(one).parameters == built  # which refuses where it is not what transformers builds
    with pytest.raises(OutgrowError, match=r"num_attention_heads' \(6\) is not a multiple of 'kv' \(32\)"):
        resolved({key: value for key, value in ODD.items() if key != "num_key_value_heads"} | {"model_type": "qwen2"})


# --- running them ------------------------------------------------------------------------------------------------------


def train_all(recipe, root, live):
    kept = []
    for one in in_order(read_runs(recipe, [])):
        execute(one, root, Observer(), kept if live else None)


def test_growing_in_place_is_growing_through_the_disk(recipe, tmp_path):
    train_all(recipe, tmp_path / "live", live=True)
    train_all(recipe, tmp_path / "disk", live=False)
    for one in read_runs(recipe, []):
        live, disk = (place(one, tmp_path / name) for name in ("live", "disk"))
        assert record(live) == record(disk)
        assert weights(live) == weights(disk)
        assert (disk / "start").is_dir() == bool(one.start and one.start.operator)
        assert not (live / "start").exists()
        configs = [(latest_checkpoint(directory) / "config.json").read_text() for directory in (live, disk)]
        assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("operator", "policy", "can"), [("zero-depth", "carry", False), ("zero-depth", "reset", True), ("stack", "carry", True)]
)
def test_a_rank_grows_its_shards_where_they_say_all(operator, policy, can):
    """The mean at which a new branch's second moment begins is of the whole tensor, which no rank has."""
    assert can_grow_in_place(make_plan(operator, LLAMA, MODEL, {"factor": 2}), policy) == can


def rows_in(root):
    return sum(len(path.read_text().splitlines()) for path in root.glob("tiny-*/metrics.jsonl"))


def test_a_recipe_survives_kill_at_random_instants(recipe, tmp_path):
    """SIGKILL again and again, in training, growth and the writing of checkpoints; the end is that of an undisturbed run."""
    command = [*COMMAND_LINE, "train", recipe, "--runs"]
    runs = read_runs(recipe, [])
    prepare(runs[0].data, tmp_path / "killed" / "data")
    chance = random.Random(0)
    kills = 0
    for rows in (3, 20, 34):  # of the 39 steps and the validations among them; resuming cuts a few off
        with Process(*command, tmp_path / "killed") as process:
            while process.poll() is None and rows_in(tmp_path / "killed") < rows:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 2
    for name in ("killed", "whole"):
        python(*command, tmp_path / name).check_returncode()
    for one in runs:
        killed, whole = (place(one, tmp_path / name) for name in ("killed", "whole"))
        assert record(killed) == record(whole)
        assert weights(killed) == weights(whole)


def test_a_recipe_survives_kill_in_growth_and_in_the_writing_of_checkpoints(recipe, tmp_path):
    """Each kill at a place that it names: before a checkpoint has its name, at growth in memory, before what was grown through the disk
    has its name, in the middle of a checkpoint's tensors, before the end is noted."""
    script, runs = Path(__file__).parent / "scripts" / "kill_at.py", read_runs(recipe, [])

    def trained(name, *kill):
        return python(*((script, *kill) if kill else COMMAND_LINE), "train", recipe, "--runs", tmp_path / name).returncode

    def left(index):
        """What of a run is there: its named checkpoints, and unfinished directories."""
        found = place(runs[index], tmp_path / "killed")
        return [path.name for path in checkpoints(found)], [path.name.split("-")[0] for path in found.rglob(".*partial*") if path.is_dir()]

    killed = -signal.SIGKILL
    assert trained("killed", "pathlib", "Path.rename", "3") == killed  # the packed corpus has the first
    assert left(0) == (["000000000000256"], [".000000000000384.partial"])
    assert trained("killed", "outgrow.lab.execute", "grown_in_place", "1") == killed
    assert left(0)[0] == ["000000000000384"]
    assert left(1) == ([], [])
    assert trained("killed", "pathlib", "Path.rename", "1") == killed
    assert left(1) == ([], [".start.partial"])
    assert trained("killed", "outgrow.training.distributed", "write_at", "30") == killed
    assert left(1)[1] == [".000000000000512.partial"]
    assert trained("killed", "outgrow.training.loop", "write_json", "1") == killed
    assert left(1)[0][-1] == "000000000000768"
    assert trained("killed") == 0
    train_all(recipe, tmp_path / "whole", live=True)
    for one in runs:
        here, there = (place(one, tmp_path / name) for name in ("killed", "whole"))
        assert record(here) == record(there)
        assert weights(here) == weights(there)


def test_sigterm_saves_and_ends(recipe, tmp_path):
    settings = ("--set", "stages.0.tokens=640000", "--set", "data.epochs=10000", "--set", "branches=[]")
    with Process(*COMMAND_LINE, "train", recipe, "--runs", tmp_path / "runs", *settings) as process:
        for _ in range(600):
            time.sleep(0.1)
            if any(read_rows(path.parent)[5:] for path in tmp_path.glob("runs/*/metrics.jsonl")):
                break
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "is saved at" in err
    assert "Traceback" not in err
    assert len(list(tmp_path.glob("runs/tiny-stage1-*/checkpoints/*/model.safetensors"))) == 1


def test_a_half_trained_run_is_not_left_for_one_of_its_name(recipe, tmp_path):
    one = read_runs(recipe, [])[0]
    with pytest.raises(Interrupted):
        execute(one, tmp_path / "runs", Observer(stop_after=4))
    other = read_runs(recipe, ["optimizer.learning_rate=0.02", "seed=1"])[0]
    with pytest.raises(OutgrowError, match=r"left half-way with other settings: optimizer.learning_rate: 0.01 -> 0.02; seed: 0 -> 1; give"):
        refuse_early([other], tmp_path / "runs")
    refuse_early([other.model_copy(update={"name": "other"})], tmp_path / "runs")
    refuse_early([one, other], tmp_path / "runs")  # both are meant, as two branches that end at one clock are
    beyond = other.model_copy(update={"start": Start(run=one, tokens=20 * BATCH), "model": None, "tokens": 30 * BATCH, "name": "on"})
    maps = beyond.model_copy(update={"start": Start(run=one, operator="learn-depth(factor=2)", learn={"batch_tokens": 40}), "name": "maps"})
    on = beyond.model_copy(update={"start": Start(run=one)})
    before = on.model_copy(update={"start": Start(run=on, tokens=BATCH), "name": "before"})
    for run_, message in (
        (beyond, r"starts at 1,280 tokens of 'tiny-stage1', .* ends at 384; let"),
        (before, r"starts at 64 tokens of 'on', .* begins at 384 and ends at 1,920; let"),
        (maps, r"learn.batch_tokens \(40\) is"),
    ):
        with pytest.raises(OutgrowError, match=message):
            refuse_early([run_], tmp_path / "runs")
    assert differences({"a": {"b": 1}}, {"a": {"b": 1, "c": [2]}}) == ["a.c: None -> [2]"]


def test_a_run_that_was_left_goes_on_with_other_memory_settings(recipe, tmp_path):
    """On fewer or more GPUs, say: they change rounding alone."""
    one, again = (
        read_runs(recipe, ["precision=fp32", *changes])[0] for changes in ([], ["micro_batch_tokens=16", "recompute=true", "keep_last=2"])
    )
    execute(one, tmp_path / "whole", Observer())
    with pytest.raises(Interrupted):
        execute(one, tmp_path / "parts", Observer(stop_after=2))
    refuse_early([again], tmp_path / "parts")
    execute(again, tmp_path / "parts", Observer())
    whole, parts = ([row["loss"] for row in read_rows(place(one, tmp_path / name)) if "loss" in row] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-4)


def test_a_warm_up_that_outlasts_the_run_is_refused(run, packed, tmp_path):  # noqa: F811
    """But not in a base of one step, as a study has that grows at once."""
    short = run.model_copy(update={"tokens": 2 * BATCH, "schedule": ScheduleConfig(warmup_tokens=3 * BATCH)})
    with pytest.raises(OutgrowError, match=r"warmup_tokens \(192\) .* 128 tokens of the schedule, which never reaches its peak"):
        train(short, tmp_path / "run", packed, None, Observer())
    train(short.model_copy(update={"tokens": BATCH}), tmp_path / "one", packed, None, Observer())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.hidden_act=foo", "'foo', with hidden_act 'foo'"),
        ("model.rope_parameters={rope_type: yarn}", "Missing required keys in `rope_parameters`"),
        ("model.rope_theta=1e4", "with rope_theta '1e4'"),
        ("model.dtype=foo", "with dtype 'foo'"),
    ],
)
def test_values_that_transformers_stumbles_over_are_told(recipe, cli, change, words):  # noqa: F811
    refused(cli("train", recipe, "--dry-run", "--set", change), "transformers refuses the model: ", words)


# --- spikes, checkpoints, optimizers -----------------------------------------------------------------------------------


def test_a_spike_is_rolled_back_with_its_data_left_out(run, packed, tmp_path):  # noqa: F811
    """One batch of noise in the middle: the run goes back, leaves it out, and says which it was."""
    from dataclasses import replace as with_

    plain = run.model_copy(update={"schedule": ScheduleConfig(), "save_every": 4 * BATCH})
    tokens = torch.tensor(packed.training[:]).numpy().copy()
    from outgrow.data.packed import Batches

    bad = Batches(packed.training, 16, 0).at(9 * BATCH, 4)
    for row in bad:
        start = next(i for i in range(len(tokens) - 17) if (tokens[i : i + 17] == row).all())
        tokens[start : start + 17] = torch.randint(0, 300, (17,), generator=torch.Generator().manual_seed(start)).numpy()
    spoilt = with_(packed, training=tokens)
    train(plain, tmp_path / "plain", spoilt, None, Observer())
    losses = [row["loss"] for row in read_rows(tmp_path / "plain") if "loss" in row]
    assert losses[9] > max(losses[5:9]) + 0.1
    guarded = plain.model_copy(update={"spike": SpikeConfig(action="roll back", above=losses[9] - sum(losses[6:9]) / 3 - 0.05, window=3)})
    train(guarded, tmp_path / "guarded", spoilt, None, Observer())
    rows = read_rows(tmp_path / "guarded")
    back = [row for row in rows if "rolled_back" in row]
    assert len(back) == 1
    assert "sequences 36 to 39 of seed 0" in back[0]["rolled_back"]
    assert back[0]["tokens"] == 8 * BATCH
    assert [row["tokens"] for row in rows if "loss" in row] == [n * BATCH for n in range(1, 21)]
    clock = json.loads((latest_checkpoint(tmp_path / "guarded") / "training.json").read_text())
    assert clock["skipped"] == 2 * BATCH
    assert rows[-1]["flops"] == 22 * BATCH * (rows[1]["flops"] / BATCH)  # two steps were made in vain, and are paid for
    again = tmp_path / "stopped"  # stopped again and again, it goes the same way
    for steps in (3, 8, 2, 100):
        with suppress(Interrupted):
            train(guarded, again, spoilt, None, Observer(stop_after=steps))
    assert record(again) == record(tmp_path / "guarded")
    assert weights(again) == weights(tmp_path / "guarded")
    stopping = guarded.model_copy(update={"spike": guarded.spike.model_copy(update={"action": "stop"})})
    with pytest.raises(OutgrowError, match=r"over the mean of the last 3 steps at 576 tokens .*sequences 36 to 39 of seed 0"):
        train(stopping, tmp_path / "stopping", spoilt, None, Observer())


@pytest.mark.parametrize("first_save", [6, 1])  # the base is needed for the way back until there is a checkpoint
def test_rolling_back_holds_one_run_in_memory(recipe, tmp_path, monkeypatch, first_save):
    """Nor does the base that was grown in place stay once nothing goes back to it."""
    from outgrow.training import loop

    changes = ["branches=[]", "spike.action=roll back", f"save_every={first_save * BATCH}"]
    base, grown, *_ = in_order(read_runs(recipe, changes))
    live, opened, alive, wild = [], [], [], [8 * BATCH]
    execute(base, tmp_path / "runs", Observer(), live)
    bases = weakref.ref(next(iter(live[0].parameters.values())))

    def open_run(*arguments):
        alive.append([one() is not None for one in opened] + [bases() is not None])
        made = real_open(*arguments)
        opened.append(weakref.ref(next(iter(made.parameters.values()))))
        return made

    def step(trained, batches):
        if trained.clock.tokens in wild:
            wild.clear()
            raise loop.SpikeError("once")
        return real_step(trained, batches)

    real_open, real_step = loop.open_run, loop._step
    monkeypatch.setattr(loop, "open_run", open_run)
    monkeypatch.setattr(loop, "_step", step)
    execute(grown, tmp_path / "runs", Observer(), live)
    assert sum("rolled_back" in row for row in read_rows(place(grown, tmp_path / "runs"))) == 1
    assert alive == [[True], [False, first_save == 6]]


def test_weights_that_are_no_numbers_are_neither_kept_nor_called_an_end(run, packed, tmp_path):  # noqa: F811
    wild = run.model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e39, clip=1e30), "schedule": ScheduleConfig()})
    for name, edits in (
        ("one", {"tokens": BATCH}),
        ("some", {"save_every": BATCH, "validate_every": 10**6, "spike": SpikeConfig(action="roll back")}),
    ):
        with pytest.raises(OutgrowError, match=r"(no numbers|held-out loss .* is nan|is nan|is inf).*lower optimizer.learning_rate"):
            train(wild.model_copy(update=edits), tmp_path / name, packed, None, Observer())
        assert not (tmp_path / name / FINISHED).exists()
        assert checkpoints(tmp_path / name) == []
        for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_how_often_the_text_was_read_is_counted(run, packed, tmp_path):  # noqa: F811
    usable = (len(packed.training) - 1) // 16 * 16
    data = run.data.model_copy(update={"epochs": 3})
    steps = 2 * usable // BATCH
    twice = run.model_copy(
        update={"data": data, "tokens": steps * BATCH, "validate_every": 10**9, "save_every": 10**9, "schedule": ScheduleConfig()}
    )
    train(twice, tmp_path / "run", packed, None, Observer())
    assert read_rows(tmp_path / "run")[-1]["epochs"] == pytest.approx(steps * BATCH / usable, abs=1e-3)


def test_tokens_per_second_and_mfu_are_what_was_computed_over_what_it_took(run, packed, tmp_path, monkeypatch):  # noqa: F811
    """Every reading of the clock is a quarter of a second after the one before."""
    from outgrow.training import loop

    ticks = iter(range(10**6))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(ticks) / 4)
    train(run.model_copy(update={"tokens": 3 * BATCH, "schedule": ScheduleConfig()}), tmp_path / "run", packed, None, Observer())
    assert {row["tokens_per_second"] for row in read_rows(tmp_path / "run") if "loss" in row} == {4 * BATCH}
    one = train(run.model_copy(update={"tokens": BATCH, "schedule": ScheduleConfig()}), tmp_path / "one", packed, None, Observer())
    monkeypatch.setattr(loop, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    speed = loop._speed(one, seconds=0.5)
    assert speed["mfu"] == pytest.approx(one.flops_per_token * BATCH / 0.5 / 989e12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")  # of torch, by torch
def test_a_compiled_run_is_the_run(run, packed, tmp_path):  # noqa: F811
    short = run.model_copy(update={"tokens": 3 * BATCH, "schedule": ScheduleConfig(), "precision": "fp32"})
    train(short, tmp_path / "plain", packed, None, Observer())
    train(short.model_copy(update={"compile": True}), tmp_path / "compiled", packed, None, Observer())
    plain, compiled = ([row["loss"] for row in read_rows(tmp_path / name) if "loss" in row] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, abs=1e-5)


def test_a_step_count_lies_where_its_parameter_does():
    parameters = {"model.norm.weight": torch.nn.Parameter(torch.empty(24, device="meta"))}
    optimizer = Optimizer(OptimizerConfig(learning_rate=1.0), parameters, LLAMA, {**ODD})
    optimizer.restore(
        {moment: {name: torch.zeros_like(value) for name, value in parameters.items()} for moment in ("exp_avg", "exp_avg_sq")}, 3
    )
    (state,) = optimizer.torch["adamw"].state.values()
    assert state["step"].device.type == "meta"


def test_the_newest_checkpoints_are_kept(run, packed, tmp_path):  # noqa: F811
    train(run.model_copy(update={"keep_last": 2, "save_every": 3 * BATCH}), tmp_path / "run", packed, None, Observer())
    assert [int(path.name) // BATCH for path in checkpoints(tmp_path / "run")] == [18, 20]


def test_muon_takes_the_matrices_of_blocks_and_resumes(run, packed, tmp_path):  # noqa: F811
    muon = run.model_copy(update={"optimizer": OptimizerConfig(learning_rate=0.01, kind="muon")})
    train(muon, tmp_path / "whole", packed, None, Observer())
    with pytest.raises(Interrupted):
        train(muon, tmp_path / "parts", packed, None, Observer(stop_after=7))
    train(muon, tmp_path / "parts", packed, None, Observer())
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    buffers, moments = (load_file(latest_checkpoint(tmp_path / "whole") / f"{name}.safetensors") for name in ("momentum_buffer", "exp_avg"))
    assert all(".layers." in name and value.ndim == 2 for name, value in buffers.items())
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= moments.keys()
    assert len(buffers) == 2 * 7
    assert not buffers.keys() & moments.keys()


@pytest.mark.parametrize("policy", ["carry", "fresh-new"])
def test_a_model_of_no_layers_grows_under_muon(recipe, tmp_path, policy):
    """There is no matrix whose momentum could be carried: that of the new ones begins at zero, the rest goes on."""
    edits = ["model.num_hidden_layers=0", "optimizer.kind=muon", "stages.1.grow=expand(layers=2, weights='random')", "branches=[]"]
    base, grown, *_ = read_runs(recipe, [*edits, f"stages.1.optimizer={policy}", "stages.1.rate=keep"])
    for one in (base, grown):
        execute(one, tmp_path / "runs", Observer())
    moments, momentum = (
        load_file(latest_checkpoint(place(grown, tmp_path / "runs")) / f"{name}.safetensors") for name in ("exp_avg", "momentum_buffer")
    )
    assert len(momentum) == 2 * 7
    assert all(value.any() for value in momentum.values())
    assert not moments.keys() & momentum.keys()


def test_learning_rates_move_with_the_width(make_model):
    model = make_model(vocab_size=53)
    settings = OptimizerConfig(learning_rate=1.0, tuned_at={"hidden": 12, "ffn": 37})
    optimizer = Optimizer(settings, dict(model.named_parameters()), LLAMA, model.config.to_dict())
    share = {id(p): group["share"] for group in optimizer.torch["adamw"].param_groups for p in group["params"]}
    named = {name: share[id(value)] for name, value in model.named_parameters()}
    assert named["model.layers.0.self_attn.q_proj.weight"] == 0.5  # reads hidden, 24
    assert named["lm_head.weight"] == 0.5
    assert named["model.layers.0.mlp.down_proj.weight"] == 1  # reads ffn, as tuned
    assert named["model.embed_tokens.weight"] == named["model.norm.weight"] == 1


@pytest.mark.parametrize("operator", ["stack(factor=2)", "direct-width(hidden=48)", "stack(factor=2), direct-width(ffn=74)"])
def test_rewarming_slows_what_is_new_and_nothing_else(make_model, operator):
    import outgrow

    config = {**ODD}
    plan = outgrow.plan(config, operator)
    target = make_model(**{key: value for key, value in plan.target_config.items() if key in ODD})
    parameters = dict(target.named_parameters())
    before = {name: value.detach().clone() for name, value in parameters.items()}
    warm = rewarm_of(plan, parameters, first=100, tokens=50)
    assert warm.share(100) == 0
    assert warm.share(125) == 0.5
    assert warm.share(1000) == 1
    warm.hold(parameters)
    with torch.no_grad():
        for value in parameters.values():
            value.add_(1.0)
    warm.shorten(parameters, 0.25)
    steps = torch.cat([(parameters[name] - before[name]).flatten().detach() for name in parameters])
    new = ((steps - 0.25).abs() < 1e-5).sum()
    old = ((steps - 1).abs() < 1e-5).sum()
    assert new + old == steps.numel()
    assert old == sum(value.numel() for value in make_model(**ODD).parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_blocks_are_compiled_once_for_any_depth(make_model, tokens):
    from torch._dynamo.testing import CompileCounterWithBackend

    from outgrow.models.decoder import Decoder

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    shallow, deep = (Decoder(make_model(num_hidden_layers=layers), torch.float32) for layers in (2, 6))
    compiled = torch.compile(shallow._block, dynamic=False, backend=counter)
    for decoder in (shallow, deep):
        decoder.block = compiled
        decoder._hold(decoder.top())
    plain = Decoder(make_model(num_hidden_layers=6), torch.float32).loss(tokens[:, :-1], tokens[:, 1:])
    shallow.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    graphs = counter.frame_count
    loss = deep.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert counter.frame_count == graphs == 1
    torch.testing.assert_close(loss, plain)


def test_recomputing_changes_no_bit(run, packed, tmp_path):  # noqa: F811
    for name, recompute in (("kept", False), ("again", True)):
        train(
            run.model_copy(update={"recompute": recompute, "tokens": 4 * BATCH, "schedule": ScheduleConfig()}),
            tmp_path / name,
            packed,
            None,
            Observer(),
        )
    assert record(tmp_path / "kept") == record(tmp_path / "again")


# --- trackers and jobs -------------------------------------------------------------------------------------------------


def test_tensorboard_is_told_every_row(run, tmp_path):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (told,) = trackers(["tensorboard"], run, tmp_path, 0)
    for step in (1, 2):
        told({"tokens": step * BATCH, "flops": 1.0, "loss": 3.0 / step, "rolled_back": "text"})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(BATCH, 3.0), (2 * BATCH, 1.5)]
    (again,) = trackers(["tensorboard"], run, tmp_path, 2 * BATCH)  # resumed there: what was told of later is told anew
    again({"tokens": 2 * BATCH, "flops": 1.0, "loss": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(BATCH, 3.0), (2 * BATCH, 1.0)]
    with pytest.raises(OutgrowError, match="there is no tracker 'mlflow'; known: tensorboard, wandb"):
        trackers(["mlflow"], run, tmp_path, 0)
    with pytest.raises(OutgrowError, match="pip install wandb"):
        trackers(["wandb"], run, tmp_path, 0)


def test_weights_and_biases_is_told_rows_that_go_back(run, tmp_path, monkeypatch):  # noqa: F811
    """A stand-in that drops them, as the real one does, where it is given steps."""
    (tmp_path / "wandb.py").write_text(
        "kept, axes = [], []\n"
        "class Run:\n"
        "    last = -1\n"
        "    def define_metric(self, name, step_metric): axes.append((name, step_metric))\n"
        "    def log(self, values, step=None):\n"
        "        step = self.last + 1 if step is None else step\n"
        "        kept.extend([values] if step >= self.last else [])\n"
        "        self.last = max(step, self.last)\n"
        "def init(**settings): return Run()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (told,) = trackers(["wandb"], run, tmp_path, 0)
    assert "wandb" not in sys.modules  # until the first row
    for tokens in (BATCH, 2 * BATCH, BATCH):
        told({"tokens": tokens, "loss": 1.0})
    wandb = sys.modules.pop("wandb")
    assert [row["tokens"] for row in wandb.kept] == [BATCH, 2 * BATCH, BATCH]
    assert wandb.axes == [("*", "tokens")]


def test_a_second_process_at_a_run_opens_no_tracker(recipe, tmp_path, cli):  # noqa: F811
    one = in_order(read_runs(recipe, []))[0]
    prepare(one.data, tmp_path / "runs" / "data")
    with _alone(one, tmp_path / "runs", patient=False):
        refused(cli("train", recipe, "--runs", tmp_path / "runs"), "another process is training 'tiny-stage1'")
    assert not (place(one, tmp_path / "runs") / "tensorboard").exists()


def test_a_job_trains_a_recipe_on_two_local_ranks(recipe, tmp_path, cli):  # noqa: F811
    options = ("--cluster", "local", "--ranks", "2", "--runs", tmp_path / "runs", "--logs", tmp_path / "logs", "--wait")
    status, out, err = cli("submit", recipe, *options)
    assert status == 0, err
    assert "tiny-annealed-1152: held-out loss" in out
    runs = read_runs(recipe, [])
    assert all((place(one, tmp_path / "runs") / FINISHED).exists() for one in runs)
    assert not (place(runs[1], tmp_path / "runs") / "start").exists()  # each rank grew its own shards
    train_all(recipe, tmp_path / "alone", live=True)
    for one in runs:
        here, there = (read_rows(place(one, tmp_path / name))[-1]["validation_loss"] for name in ("runs", "alone"))
        assert here == pytest.approx(there, abs=0.02)
    refused(cli("submit", tmp_path / "none.yaml", *options), "there is no file")
    refused(cli("submit", recipe, "--cluster", "pbs"), "there is no cluster 'pbs' here")
    refused(cli("submit", recipe, "--cluster", "slurm"), "there is no cluster 'slurm' here")
    failing = ("--ranks", "1", "--set", "optimizer.learning_rate=1e30")
    refused(
        cli("submit", recipe, *options, *failing),
        "failed",
        "SpikeError: the gradient's norm of 'tiny-stage1'",
        "what its ranks printed is in",
    )
    refused(cli("submit", recipe, *options, "--ranks", "3"), "'tiny-stage1': 3 ranks do not divide the")
    refused(cli("submit", recipe, *options[:2], "--nodes", "2"), "local takes no job of 2 nodes with 8 ranks each (LocalExecutor can use")
    assert find_recipe(Path("7b-grown")).is_file()
    refused(cli("train", "7b-grow", "--dry-run"), "no recipe of that name comes with outgrow; did you mean '7b-grown'?")


def test_a_job_goes_on_however_often_its_time_is_up(tmp_path, monkeypatch):
    """submitit finds SLURM by its `srun`."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "srun").touch(mode=0o755)
    made = executor("slurm", tmp_path / "logs", nodes=1, ranks=1, hours=1, options={})
    assert made._executor.max_num_timeout >= 10**6


def test_recipes_that_are_shipped_read_no_more_text_than_they_allow():
    """SlimPajama has 627B tokens."""
    for path in SHIPPED.glob("*.yaml"):
        if "stages" in path.read_text() and "slimpajama" in path.read_text():
            last = read_runs(path, [])[-1]
            assert last.tokens <= last.data.epochs * 627e9, path.name


def test_an_evaluation_that_no_run_reaches_is_refused(recipe):
    end = max(one.tokens for one in read_runs(recipe, []))
    assert read_runs(recipe, [f"evaluate={{at: [{end}]}}"])
    with pytest.raises(OutgrowError, match="evaluate.at names .* tokens, which lie beyond the end"):
        read_runs(recipe, [f"evaluate={{at: [{end + BATCH}]}}"])


def test_a_signal_that_someone_has_taken_stays_his():
    """submitit passes SIGTERM by in its jobs, which are queued again; a run that ended there would have failed."""
    asked = []

    def theirs(number, frame):
        asked.append("theirs")

    def ours(number):
        asked.append("ours")

    before, interrupt = signal.signal(signal.SIGTERM, theirs), signal.getsignal(signal.SIGINT)
    try:
        for _ in range(2):  # a worker trains one run after another
            with on_stop(ours):
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)
        assert asked == ["theirs", "ours"] * 2
        assert signal.getsignal(signal.SIGTERM) is theirs
        assert signal.getsignal(signal.SIGINT) is interrupt
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with on_stop(lambda number: asked.append("both")):
            signal.raise_signal(signal.SIGTERM)
        assert asked[-1] == "both"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_job_whose_time_is_up_saves_before_it_is_queued_again():
    """submitit queues it again in its handler of SIGUSR2, and ends it there."""
    done = []

    def queue_again(number, frame):
        done.append("queued")
        raise SystemExit

    def train_until_it_is_up():
        with on_stop(lambda number: done.append("asked")):
            signal.raise_signal(signal.SIGUSR2)
            done.append("saved")
            raise Interrupted("saved")

    before = signal.signal(signal.SIGUSR2, queue_again)
    try:
        with pytest.raises(SystemExit):
            train_until_it_is_up()
        assert done == ["asked", "saved", "queued"]
        assert signal.getsignal(signal.SIGUSR2) is queue_again
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_only_ctrl_c_twice_stops_at_once():
    """Under torchrun a worker hears SIGTERM from the cluster and from torchrun itself."""
    with Progress(disable=True) as progress:
        watch = Watch(progress, progress.add_task(""), 0.0)
        for number in (signal.SIGTERM, signal.SIGTERM):
            watch.ask(number)
        assert watch.stop()
        with pytest.raises(KeyboardInterrupt):
            watch.ask(signal.SIGINT)


def test_a_start_that_warms_nothing_is_refused():
    with pytest.raises(ValueError, match=r"start.rewarm_tokens has no effect without start.operator"):
        Start(checkpoint="x", rewarm_tokens=3)
