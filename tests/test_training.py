from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from outgrow.config import parse, read_yaml
from outgrow.data.config import DataConfig
from outgrow.data.packed import prepare
from outgrow.errors import Interrupted, OutgrowError
from outgrow.lab.ancestry import own_flops
from outgrow.lab.tiny import TINY
from outgrow.training import state
from outgrow.training.config import OptimizerConfig, RunConfig, ScheduleConfig, Start
from outgrow.training.loop import train
from outgrow.training.record import FINISHED, checkpoint_at, latest_checkpoint, read_rows
from outgrow.training.schedule import share_of_peak

from .conftest import ODD
from .processes import Process

BATCH = 64


class Observer:
    """Stops a run after so many rows of steps."""

    def __init__(self, stop_after=10**9):
        self.left = stop_after

    def row(self, row):
        self.left -= "loss" in row

    def stop(self):
        return self.left <= 0


@pytest.fixture
def packed(corpus, tmp_path):
    return prepare(DataConfig(corpus=str(corpus), vocab=300, context=16, validation_share=0.1), tmp_path / "data")


@pytest.fixture
def run(corpus):
    return RunConfig(
        model={**ODD, "vocab_size": 300, "num_hidden_layers": 2},
        data=DataConfig(corpus=str(corpus), vocab=300, context=16, validation_share=0.1, validation_tokens=128),
        tokens=20 * BATCH,
        batch_tokens=BATCH,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(warmup_tokens=3 * BATCH, decay_tokens=5 * BATCH),
        validate_every=7 * BATCH,
        save_every=6 * BATCH,
    )


def record(directory):
    """The rows without their timings."""
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in read_rows(directory)]


def weights(directory):
    return {path.name: path.read_bytes() for path in latest_checkpoint(directory).glob("*.safetensors")}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("steps", [1, 6, 7, 13, 19])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(run, packed, tmp_path, precision, steps):
    run = run.model_copy(update={"precision": precision})
    train(run, tmp_path / "whole", packed, None, Observer())
    with pytest.raises(Interrupted, match=rf"saved at {steps * BATCH:,} tokens"):
        train(run, tmp_path / "parts", packed, None, Observer(stop_after=steps))
    assert not (tmp_path / "parts" / FINISHED).exists()
    train(run, tmp_path / "parts", packed, None, Observer())
    assert record(tmp_path / "parts") == record(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_killed_run_resumes_bitwise(run, packed, tmp_path):
    """kill -9 at several instants of a real process, checkpoint writing among them."""
    train(run, tmp_path / "whole", packed, None, Observer())
    (tmp_path / "run.json").write_text(run.model_dump_json())
    code = (
        "import sys, time, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from outgrow.data.packed import open_packed; from outgrow.training.config import RunConfig\n"
        "from outgrow.training.loop import train\n"
        "class O:\n    def row(self, row): print('row', flush=True); time.sleep(0.05)\n    def stop(self): return False\n"
        "run = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "train(run, Path(sys.argv[2]), open_packed(Path(sys.argv[3])), None, O())"
    )
    for rows in (3, 9):
        with Process("-c", code, tmp_path / "run.json", tmp_path / "killed", packed.directory) as process:
            while process.printed().count("row") < rows:
                assert process.poll() is None
                time.sleep(0.005)
            time.sleep(0.01 * rows)
            process.kill()
    train(run, tmp_path / "killed", packed, None, Observer())
    assert record(tmp_path / "killed") == record(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_a_checkpoint_is_a_hugging_face_directory(run, packed, tmp_path):
    train(run, tmp_path / "run", packed, None, Observer())
    place = checkpoint_at(tmp_path / "run", run.tokens)
    model = AutoModelForCausalLM.from_pretrained(place)
    assert model.num_parameters() > 0
    assert AutoTokenizer.from_pretrained(place).decode([1]) is not None
    names = set(load_file(place / "model.safetensors"))
    assert names == set(load_file(place / "exp_avg.safetensors")) == set(load_file(place / "exp_avg_sq.safetensors"))


def test_micro_batches_add_up_to_the_batch(run, packed, tmp_path):
    train(run.model_copy(update={"precision": "fp32"}), tmp_path / "one", packed, None, Observer())
    train(run.model_copy(update={"precision": "fp32", "micro_batch_tokens": 16}), tmp_path / "four", packed, None, Observer())
    for one, four in zip(record(tmp_path / "one"), record(tmp_path / "four"), strict=True):
        assert one.keys() == four.keys()
        assert all(one[key] == pytest.approx(four[key], rel=1e-3) for key in one)


def test_training_learns(run, packed, tmp_path):
    train(run.model_copy(update={"tokens": 80 * BATCH}), tmp_path / "run", packed, None, Observer())
    losses = [row["validation_loss"] for row in record(tmp_path / "run") if "validation_loss" in row]
    assert losses[0] > math.log(300) - 0.5
    assert losses[-1] < losses[0] - 1.5


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_record_has_a_row_a_step_with_flops_that_add_up(kind, run, packed, tmp_path):
    run = run.model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e-2, kind=kind)})
    train(run, tmp_path / "run", packed, None, Observer())
    rows = record(tmp_path / "run")
    steps = [row for row in rows if "loss" in row]
    assert [row["tokens"] for row in steps] == [BATCH * (n + 1) for n in range(20)]
    assert [row["tokens"] for row in rows if "validation_loss" in row] == [0, 7 * BATCH, 14 * BATCH, 20 * BATCH]
    per_token = {row["flops"] / row["tokens"] for row in steps}
    assert len(per_token) == 1
    assert steps[-1]["flops"] == own_flops(run)
    assert json.loads((tmp_path / "run" / FINISHED).read_text()) == {"tokens": 20 * BATCH, "flops": steps[-1]["flops"]}


def test_only_wanted_checkpoints_stay(run, packed, tmp_path):
    train(run.model_copy(update={"keep": (4 * BATCH, 11 * BATCH)}), tmp_path / "run", packed, None, Observer())
    kept = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [4 * BATCH, 11 * BATCH, 20 * BATCH]


def test_matrices_decay_and_vectors_do_not(make_model):
    from outgrow.arch import LLAMA
    from outgrow.training.optim import Optimizer

    model = make_model(attention_bias=True)
    optimizer = Optimizer(OptimizerConfig(learning_rate=1e-3), dict(model.named_parameters()), LLAMA, model.config.to_dict())
    groups = optimizer.torch["adamw"].param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed, plain = ({id(p) for p in group["params"]} for group in groups)
    assert decayed == {id(p) for p in model.parameters() if p.ndim == 2}
    assert plain == {id(p) for p in model.parameters() if p.ndim == 1}


def test_a_full_disk_during_a_checkpoint_loses_no_earlier_one(run, packed, tmp_path, monkeypatch):
    def full(path, values, group):
        if path.parent.name.startswith(f".{12 * BATCH:015d}"):
            raise OSError(28, "No space left on device")
        real(path, values, group)

    real = state.write_tensors
    monkeypatch.setattr(state, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        train(run, tmp_path / "run", packed, None, Observer())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"{6 * BATCH:015d}"]
    monkeypatch.undo()
    train(run, tmp_path / "run", packed, None, Observer())
    train(run, tmp_path / "whole", packed, None, Observer())
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_what_killed_processes_left_of_checkpoints_goes_when_the_run_is_opened(run, packed, tmp_path):
    """At any clock, since an interrupted run is saved where none is due; a living process's own stays."""
    with pytest.raises(Interrupted):
        train(run, tmp_path / "run", packed, None, Observer(stop_after=2))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [tmp_path / "run" / "checkpoints" / f".{7 * BATCH:015d}.partial-{pid}" for pid in (dead.pid, os.getppid())]
    for place in left:
        place.mkdir()
    train(run, tmp_path / "run", packed, None, Observer())
    assert [place.exists() for place in left] == [False, True]


def test_too_little_data_is_said_with_both_numbers(run, packed, tmp_path):
    long = run.model_copy(update={"tokens": 10**6 * BATCH})
    with pytest.raises(OutgrowError, match=r"reads 64,000,000 tokens, and the corpus has [\d,]+; .* data.epochs: \d+"):
        train(long, tmp_path / "run", packed, None, Observer())
    wide = run.model_copy(update={"batch_tokens": 10**6})
    with pytest.raises(OutgrowError, match=r"too few for one batch of 1,000,000"):
        train(wide, tmp_path / "run", packed, None, Observer())
    repeating = run.model_copy(update={"data": run.data.model_copy(update={"epochs": 10**6}), "tokens": 20 * BATCH})
    train(repeating, tmp_path / "repeating", packed, None, Observer())


def test_a_loss_that_is_not_a_number_stops_the_run(run, packed, tmp_path):
    hot = run.model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e30)})
    with pytest.raises(OutgrowError, match="lower optimizer.learning_rate"):
        train(hot, tmp_path / "run", packed, None, Observer())
    assert not (tmp_path / "run" / FINISHED).exists()


def test_a_vocabulary_larger_than_the_models_is_refused(run, packed, tmp_path):
    with pytest.raises(OutgrowError, match=r"vocabulary \(299\) is smaller than the tokenizer.s \(300\)"):
        train(run.model_copy(update={"model": {**ODD, "vocab_size": 299}}), tmp_path / "run", packed, None, Observer())


@given(seen=st.integers(0, 99), kind=st.sampled_from(["wsd", "cosine", "constant"]))
def test_schedules_stay_between_final_and_peak(seen, kind):
    schedule = ScheduleConfig(kind=kind, warmup_tokens=10, decay_tokens=20 if kind == "wsd" else 0, final=0.1)
    share = share_of_peak(schedule, seen, 1, 0, 100)
    assert 0.1 <= share <= 1  # the first of ten steps of warmup has a tenth too
    if 9 <= seen <= 80 and kind != "cosine":
        assert share == 1


def test_schedules_at_their_corners():
    wsd = ScheduleConfig(warmup_tokens=10, decay_tokens=20)
    assert share_of_peak(wsd, 0, 1, 0, 100) == pytest.approx(0.1)
    assert share_of_peak(wsd, 90, 1, 0, 100) == pytest.approx(0.5)
    assert share_of_peak(wsd, 99, 1, 0, 100) == pytest.approx(0.05)
    cosine = ScheduleConfig(kind="cosine", warmup_tokens=10, final=0.1)
    assert share_of_peak(cosine, 10, 1, 0, 100) == pytest.approx(1)
    assert share_of_peak(cosine, 55, 1, 0, 100) == pytest.approx(0.55)
    assert share_of_peak(cosine, 100, 1, 0, 100) == pytest.approx(0.1)


GOOD = {"model": ODD, "tokens": 512, "batch_tokens": 512, "optimizer": {"learning_rate": 1e-3}}


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"tokns": 1}, r"unknown key 'tokns'; did you mean 'tokens'\?"),
        ({"optimizer": {"learning_rat": 1}}, r"'optimizer.learning_rate' is missing; unknown key 'optimizer.learning_rat'; did you mean 'learning_rate'\?"),
        ({"data": {"contxt": 2}}, r"unknown key 'data.contxt'; did you mean 'context'\?"),
        ({"tokens": 0}, "'tokens' should be greater than or equal to 1, not 0"),
        ({"tokens": "many"}, "'tokens' should be"),
        ({"tokens": 513}, "not multiples of batch_tokens"),
        ({"keep": [512, 1024]}, r"the clocks \[1024\], which lie beyond the run's end \(512\); remove them, or raise tokens"),
        ({"batch_tokens": 500}, "not a multiple of data.context"),
        ({"micro_batch_tokens": 384}, "must be a multiple of data.context"),
        ({"model": None}, "exactly one of 'model'"),
        ({"schedule": {"kind": "cosine", "decay_tokens": 5}}, "has no effect with schedule.kind 'cosine'"),
        ({"model": None, "start": {}}, "exactly one of 'run' and 'checkpoint'"),
        ({"model": None, "start": {"checkpoint": "x", "tokens": 5}}, "remove it"),
        ({"model": None, "start": {"checkpoint": "x", "knobs": {"factor": 4}}}, "no effect without start.operator"),
        ({"model": None, "start": {"checkpoint": "x", "optimizer": "fresh-new"}}, "'fresh-new' has no effect without start.operator"),
        ({"model": None, "start": {"checkpoint": "x", "learn": {}}}, "start.learn has no effect without start.operator"),
        ({"name": "../escape"}, "'name' should"),
    ],
)  # fmt: skip
def test_mistakes_in_a_run_are_told(edits, message):
    with pytest.raises(OutgrowError, match=message):
        parse(RunConfig, {**GOOD, **edits}, where="'run.yaml'")


def test_a_key_of_yaml_that_stands_twice_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    for text, name in (("tokens: 1\nseed: 0\ntokens: 2\n", "tokens"), ("data: {vocab: 3, 'vocab': 4}", "vocab")):
        file.write_text(text)
        with pytest.raises(OutgrowError, match=f"'{file}' is not YAML: the key '{name}' stands twice"):
            read_yaml(file)
    file.write_text("base: &base {a: 1, b: 2}\nmine: {<<: *base, b: 3}\n")  # one that is merged in may be given anew
    assert read_yaml(file)["mine"] == {"a": 1, "b": 3}


def test_all_mistakes_are_told_at_once():
    with pytest.raises(OutgrowError) as error:
        parse(RunConfig, {**GOOD, "tokns": 1, "seed": -1, "precision": "fp8"}, where="'run.yaml'")
    assert all(word in str(error.value) for word in ("tokns", "seed", "precision"))
    assert "\n" not in str(error.value)


def test_identity_is_of_what_changes_the_result():
    run = RunConfig(**GOOD)
    memory = ({"micro_batch_tokens": 256}, {"compile": True}, {"recompute": True})
    for edit in ({"name": "other"}, {"validate_every": 3}, {"save_every": 3}, {"keep": (512,)}, *memory):
        assert run.model_copy(update=edit).identity() == run.identity()
    for edit in ({"seed": 1}, {"tokens": 1024}, {"precision": "fp32"}, {"model": {**ODD, "num_hidden_layers": 2}}):
        assert run.model_copy(update=edit).identity() != run.identity()


def test_the_environment_is_clean_after_a_run(run, packed, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train(run, tmp_path / "run", packed, None, Observer())
    assert torch.equal(torch.rand(1), expected)
    assert not [name for name in os.listdir(tmp_path / "run" / "checkpoints") if name.startswith(".")]
    shutil.rmtree(tmp_path / "run")


FAMILIES = {name: config for name, config in TINY.items() if name not in ("llama", "mistral")}
FAMILIES["windows"] = {**TINY["mistral"], "sliding_window": 5}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_by_transformers_own_forward_pass(family, run, packed, tmp_path):
    """Bit for bit through an interruption, and the loss falls; tensors that transformers renames or stacks are refused."""
    model = {**FAMILIES[family], **({"pad_token_id": None} if family == "phi3" else {})}
    config = run.model_copy(update={"model": {**model, "vocab_size": 300}, "precision": "fp32", "save_every": 5 * BATCH})
    if family in ("qwen3_moe", "mixtral", "gpt_neox"):
        with pytest.raises(OutgrowError, match="under another name, or stacked with others"):
            train(config, tmp_path / "run", packed, None, Observer())
        return
    train(config, tmp_path / "whole", packed, None, Observer())
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", packed, None, Observer(stop_after=7))
    train(config, tmp_path / "parts", packed, None, Observer())
    assert record(tmp_path / "parts") == record(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    losses = [row["validation_loss"] for row in read_rows(tmp_path / "whole") if "validation_loss" in row]
    assert losses[-1] < losses[0]
    AutoModelForCausalLM.from_pretrained(latest_checkpoint(tmp_path / "whole"))


def test_a_run_does_not_drop_a_tied_head_that_is_another(run, packed, tmp_path, make_checkpoint):
    source = make_checkpoint(vocab_size=300, tie_word_embeddings=True)
    state = load_file(source / "model.safetensors")
    on = run.model_copy(update={"model": None, "start": Start(checkpoint=str(source))})
    save_file({**state, "lm_head.weight": torch.randn(300, 24)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutgrowError, match=r"'lm_head.weight' of '.*' is not 'model.embed_tokens.weight', .* tie_word_embeddings to false"):
        train(on, tmp_path / "run", packed, source, Observer())
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, source / "model.safetensors", {"format": "pt"})
    train(on, tmp_path / "run", packed, source, Observer())
