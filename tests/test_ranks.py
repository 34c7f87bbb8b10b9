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
from outgrow.training.config import OptimizerConfig
from outgrow.training.loop import train
from outgrow.training.record import latest_checkpoint, read_rows

from .test_training import BATCH, Observer, packed, record, run, weights  # noqa: F401

SCRIPT = Path(__file__).parent / "scripts" / "train_run.py"


def on_ranks(count, config, directory, packed, start=None):  # noqa: F811
    """Trains a run on so many processes."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    recipe = directory.with_suffix(".json")
    recipe.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), str(SCRIPT)]
    command += [str(recipe), str(directory), str(packed.directory), *([str(start)] if start else [])]
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


def test_muon_trains_on_ranks_too(run, packed, tmp_path):  # noqa: F811
    muon = run.model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e-2, kind="muon"), "precision": "fp32", "tokens": 6 * BATCH})
    train(muon, tmp_path / "one", packed, None, Observer())
    done = on_ranks(2, muon, tmp_path / "two", packed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=0.02)
    assert (latest_checkpoint(tmp_path / "two") / "momentum_buffer.safetensors").exists()


def test_ranks_that_do_not_divide_the_batch_are_refused(run, packed, tmp_path):  # noqa: F811
    done = on_ranks(3, run, tmp_path / "run", packed)
    assert done.returncode != 0
    assert "3 ranks do not divide the 4 sequences of a forward pass" in done.stderr
