"""Training on several gloo ranks: the same losses, the same files, resumed by any number of ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import outgrow
from outgrow.errors import OutgrowError
from outgrow.lab.recipe import read_runs
from outgrow.lab.runs import execute, in_order, place
from outgrow.training.config import OptimizerConfig, ScheduleConfig
from outgrow.training.loop import train
from outgrow.training.record import latest_checkpoint, read_rows

from .test_recipes import recipe  # noqa: F401
from .test_training import BATCH, Observer, packed, record, run, weights  # noqa: F401

SCRIPT = Path(__file__).parent / "scripts" / "train_run.py"


def on_ranks(count, config, directory, packed, start=None):  # noqa: F811
    """Trains a run on so many processes."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    settings = directory.with_suffix(".json")
    settings.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), str(SCRIPT)]
    command += [str(settings), str(directory), str(packed.directory), *([str(start)] if start else [])]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


def losses(directory):
    return [row.get("loss", row.get("validation_loss")) for row in read_rows(directory)]


def test_two_ranks_train_what_one_does_and_either_resumes_the_other(run, packed, tmp_path):  # noqa: F811
    run = run.model_copy(update={"precision": "fp32", "model": {**run.model, "tie_word_embeddings": True}, "micro_batch_tokens": 32})
    train(run, tmp_path / "one", packed, None, Observer())
    done = on_ranks(2, run, tmp_path / "two", packed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    one, two = (load_file(latest_checkpoint(tmp_path / name) / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    assert {path.name for path in latest_checkpoint(tmp_path / "one").iterdir()} == {
        path.name for path in latest_checkpoint(tmp_path / "two").iterdir()
    }
    config, other = ((latest_checkpoint(tmp_path / name) / "config.json").read_text() for name in ("one", "two"))
    assert config == other
    AutoModelForCausalLM.from_pretrained(latest_checkpoint(tmp_path / "two"))
    with pytest.raises(OutgrowError):  # stops one rank half-way ...
        train(run, tmp_path / "half", packed, None, Failing(13))
    done = on_ranks(2, run, tmp_path / "half", packed)  # ... and two go on
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)


class Failing(Observer):
    """Dies after so many steps."""

    def stop(self):
        if self.left <= 0:
            raise OutgrowError("died")
        return False


def test_ranks_resume_bit_for_bit_and_grow_like_any_run(run, packed, tmp_path):  # noqa: F811
    short = run.model_copy(update={"tokens": 12 * BATCH, "schedule": run.schedule.model_copy(update={"decay_tokens": 0})})
    assert on_ranks(2, short, tmp_path / "whole", packed).returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(latest_checkpoint(tmp_path / "again"))
    (tmp_path / "again" / "finished.json").unlink()
    assert on_ranks(2, short, tmp_path / "again", packed).returncode == 0
    assert record(tmp_path / "again") == record(tmp_path / "whole")
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")
    outgrow.grow(latest_checkpoint(tmp_path / "whole"), tmp_path / "grown", "stack(factor=2)", optimizer="carry")
    start = run.model_dump() | {"model": None, "start": {"checkpoint": str(tmp_path / "grown"), "optimizer": "carry"}}
    child = type(run).model_validate(start)
    done = on_ranks(2, child, tmp_path / "child", packed, tmp_path / "grown")
    assert done.returncode == 0, done.stderr[-3000:]
    train(child, tmp_path / "same", packed, tmp_path / "grown", Observer())
    assert losses(tmp_path / "child") == pytest.approx(losses(tmp_path / "same"), abs=0.02)


def outgrow_on_ranks(count, *arguments):
    """The command line on so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--no-python"]
    command += [sys.executable, "-c", "from outgrow.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_recipe_on_ranks_grows_in_depth_and_width_and_is_resumed_after_growth(recipe, tmp_path):  # noqa: F811
    changes = ("stages.2.grow=direct-width(hidden=48, kv=4, noise=0.2)", "stages.2.rate=restart", "stages.2.optimizer=carry")
    changes += ("precision=fp32", "branches=[]", "keep_last=2", "schedule.decay_tokens=0")
    settings = [part for change in changes for part in ("--set", change)]
    done = outgrow_on_ranks(2, "train", recipe, "--runs", tmp_path / "two", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = read_runs(recipe, list(changes))
    for one in in_order(runs):
        execute(one, tmp_path / "one", Observer())
    for one in runs:
        assert losses(place(one, tmp_path / "two")) == pytest.approx(losses(place(one, tmp_path / "one")), abs=5e-5)
    # As after a kill in the stage that was grown in depth: only an older checkpoint of it is there.
    before = losses(place(runs[1], tmp_path / "two"))
    shutil.rmtree(place(runs[2], tmp_path / "two"))
    (place(runs[1], tmp_path / "two") / "finished.json").unlink()
    shutil.rmtree(latest_checkpoint(place(runs[1], tmp_path / "two")))
    done = outgrow_on_ranks(2, "train", recipe, "--runs", tmp_path / "two", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(place(runs[1], tmp_path / "two")) == before
    assert not (place(runs[1], tmp_path / "two") / "start").exists()  # resuming needs no grown copy of the base


def test_the_residual_stream_stays_in_fp32_between_sharded_blocks():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT.with_name("block_dtypes.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "torch.float32\n"


def test_muon_trains_on_ranks_too(run, packed, tmp_path):  # noqa: F811
    muon = run.model_copy(
        update={
            "optimizer": OptimizerConfig(learning_rate=1e-2, kind="muon"),
            "precision": "fp32",
            "tokens": 6 * BATCH,
            "schedule": ScheduleConfig(),
        }
    )
    train(muon, tmp_path / "one", packed, None, Observer())
    done = on_ranks(2, muon, tmp_path / "two", packed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=0.02)
    assert (latest_checkpoint(tmp_path / "two") / "momentum_buffer.safetensors").exists()


def test_ranks_that_do_not_divide_the_batch_are_refused(run, packed, tmp_path):  # noqa: F811
    done = on_ranks(3, run, tmp_path / "run", packed)
    assert done.returncode != 0
    assert "3 ranks do not divide the 4 sequences of a forward pass" in done.stderr
