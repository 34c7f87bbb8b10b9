"""Training on several gloo ranks: the same losses, the same files, resumed by any number of ranks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import outgrow
from outgrow.checkpoint.optimizer_state import BEHIND_MASKS
from outgrow.errors import Interrupted, OutgrowError
from outgrow.lab.ancestry import in_order
from outgrow.lab.execute import execute
from outgrow.lab.recipe import read_runs
from outgrow.lab.runs import place
from outgrow.training.config import EvaluateConfig, OptimizerConfig, ScheduleConfig, SpikeConfig
from outgrow.training.loop import train
from outgrow.training.record import checkpoints, latest_checkpoint, read_rows

from .processes import COMMAND_LINE, on_ranks
from .test_recipes import recipe  # noqa: F401
from .test_training import BATCH, Observer, packed, record, run, weights  # noqa: F401

SCRIPT = Path(__file__).parent / "scripts" / "train_run.py"


def torchrun(count, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def train_on(count, config, directory, packed, start=None, launch=on_ranks):  # noqa: F811
    """Trains a run on so many processes."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    settings = directory.with_suffix(".json")
    settings.write_text(config.model_dump_json())
    return launch(count, SCRIPT, settings, directory, packed.directory, *([start] if start else []))


def losses(directory):
    return [row.get("loss", row.get("validation_loss")) for row in read_rows(directory)]


def test_two_ranks_train_what_one_does_and_either_resumes_the_other(run, packed, tmp_path):  # noqa: F811
    run = run.model_copy(update={"precision": "fp32", "model": {**run.model, "tie_word_embeddings": True}, "micro_batch_tokens": 32})
    train(run.model_copy(update={"micro_batch_tokens": None}), tmp_path / "one", packed, None, Observer())
    done = train_on(2, run, tmp_path / "two", packed, launch=torchrun)
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
    done = train_on(2, run, tmp_path / "half", packed)  # ... and two go on
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
    assert train_on(2, short, tmp_path / "whole", packed).returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(latest_checkpoint(tmp_path / "again"))
    (tmp_path / "again" / "finished.json").unlink()
    assert train_on(2, short, tmp_path / "again", packed).returncode == 0
    assert record(tmp_path / "again") == record(tmp_path / "whole")
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")
    outgrow.grow(latest_checkpoint(tmp_path / "whole"), tmp_path / "grown", "stack(factor=2)", optimizer="carry")
    start = run.model_dump() | {"model": None, "start": {"checkpoint": str(tmp_path / "grown"), "optimizer": "carry"}}
    child = type(run).model_validate(start)
    done = train_on(2, child, tmp_path / "child", packed, tmp_path / "grown")
    assert done.returncode == 0, done.stderr[-3000:]
    train(child, tmp_path / "same", packed, tmp_path / "grown", Observer())
    assert losses(tmp_path / "child") == pytest.approx(losses(tmp_path / "same"), abs=0.02)


ON_RANKS = """
import sys, time
from pathlib import Path
import torch
from torch import distributed
from outgrow.checkpoint.ranks import join_ranks, leads, rank
from outgrow.data.packed import open_packed
from outgrow.training import loop
from outgrow.training.config import RunConfig
from outgrow.training.distributed import wait

class Observer:
    def row(self, row): pass
    def stop(self): return False

torch.set_num_threads(1)
join_ranks()
config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
def train():
    loop.train(config, Path(sys.argv[2]), open_packed(Path(sys.argv[3])), None, Observer())
"""


def prints_on_ranks(code, config, directory, packed):  # noqa: F811
    """What two processes print, in any order, that run some code on a run."""
    script, settings = directory.with_suffix(".py"), directory.with_suffix(".json")
    script.write_text(ON_RANKS + code)
    settings.write_text(config.model_dump_json())
    done = on_ranks(2, script, settings, directory, packed.directory)
    assert done.returncode == 0, done.stderr[-3000:]
    return sorted(done.stdout.splitlines())


def test_ranks_that_roll_back_open_one_checkpoint(run, packed, tmp_path):  # noqa: F811
    """The first rank is slow to give the checkpoint of step 6 its name; the loss of step 8 rises."""
    code = """
import os
from outgrow import files
from outgrow.training import run as opening
step, latest, flush, bad = loop._step, opening.latest_checkpoint, files.flush, [True]
def slow(path):
    time.sleep(0.2)
    flush(path)
def spiking(run, batches):
    if run.clock.tokens == 7 * config.batch_tokens and bad:
        bad.clear()
        raise loop.SpikeError("made up")
    return step(run, batches)
def told(directory):
    found = latest(directory)
    if found:
        sys.stdout.write(f"{int(found.name)}\\n")
        sys.stdout.flush()
        wait()
        os._exit(0)
    return found
if leads():
    files.flush = slow
loop._step, opening.latest_checkpoint = spiking, told
train()
"""
    guarded = run.model_copy(update={"save_every": 3 * BATCH, "spike": SpikeConfig(action="roll back")})
    assert prints_on_ranks(code, guarded, tmp_path / "run", packed) == [str(6 * BATCH)] * 2


def test_ranks_open_the_checkpoint_that_the_first_one_sees(run, packed, tmp_path):  # noqa: F811
    """Over a network the other may list the folder as it was before."""
    kept = run.model_copy(update={"save_every": 3 * BATCH, "keep_last": 3, "spike": SpikeConfig(action="roll back")})
    with pytest.raises(Interrupted):
        train(kept, tmp_path / "run", packed, None, Observer(stop_after=8))
    code = """
from outgrow.training import run as opening
from outgrow.training.record import checkpoints
opening.latest_checkpoint = lambda directory: checkpoints(directory)[-1 if leads() else 0]
print(opening.open_run(config, Path(sys.argv[2]), open_packed(Path(sys.argv[3])), None).clock.tokens)
"""
    assert prints_on_ranks(code, kept, tmp_path / "run", packed) == [str(8 * BATCH)] * 2


def test_a_checkpoint_is_of_one_clock_where_a_rank_sees_the_folder_as_it_was(run, packed, tmp_path):  # noqa: F811
    """Evaluation saves, and the step saves again; a network's client may go on saying that the first is not there."""
    code = """
from outgrow.checkpoint.safetensors_file import stored_in
from outgrow.training.distributed import from_files, held_rows, local
exists, known = Path.exists, {}
if not leads():
    Path.exists = lambda path: known.setdefault(path, exists(path)) if path.parent.name == "checkpoints" else exists(path)
directory, packed = Path(sys.argv[2]), open_packed(Path(sys.argv[3]))
done = loop.train(config, directory, packed, None, Observer(), lambda checkpoint: {"eval/a/acc": 0.5})
read = from_files(stored_in(directory / "checkpoints" / f"{config.tokens:015}" / "model.safetensors"))
print(all(torch.equal(read(name, held_rows(value)), local(value)) for name, value in done.parameters.items()))
"""
    ends = {"tokens": 8 * BATCH, "schedule": ScheduleConfig(), "save_every": 4 * BATCH, "evaluate": EvaluateConfig(every=4 * BATCH)}
    assert prints_on_ranks(code, run.model_copy(update=ends), tmp_path / "run", packed) == ["True"] * 2


def test_ranks_wait_for_one_that_works_alone(run, packed, tmp_path):  # noqa: F811
    """Longer than gloo does by itself, for an evaluation or a corpus that takes an hour; also where a checkpoint is written."""
    code = """
from datetime import timedelta
from outgrow.training.state import Writer
groups = distributed.group.WORLD, Writer()._group
print(all(group._get_backend(torch.device("cpu")).options._timeout > timedelta(days=1) for group in groups))
"""
    assert prints_on_ranks(code, run, tmp_path / "run", packed) == ["True"] * 2


def test_gradients_are_shared_out_after_every_micro_batch(run, packed, tmp_path):  # noqa: F811
    """A whole gradient on every rank, kept until the last micro-batch, would not fit where a model is sharded because it does not."""
    code = """
from outgrow.training.run import Run
loss, seen = Run.loss, []
def watched(run, rows):
    if run.model.training and torch.is_grad_enabled():
        seen.append(sum(value.grad is not None for value in run.parameters.values()))
    return loss(run, rows)
Run.loss = watched
train()
print(*sorted(set(seen)))
"""
    short = run.model_copy(update={"tokens": 2 * BATCH, "micro_batch_tokens": 32, "schedule": ScheduleConfig()})
    assert prints_on_ranks(code, short, tmp_path / "run", packed) == [f"0 {2 * 9 + 3}"] * 2


def test_a_recipe_on_ranks_grows_in_depth_and_width_and_is_resumed_after_growth(recipe, tmp_path):  # noqa: F811
    changes = ("stages.2.grow=direct-width(hidden=48, kv=4, noise=0.2)", "stages.2.rate=restart", "stages.2.optimizer=carry")
    changes += ("precision=fp32", "branches=[]", "keep_last=2", "schedule.decay_tokens=0")
    settings = [part for change in changes for part in ("--set", change)]
    done = on_ranks(2, *COMMAND_LINE, "train", recipe, "--runs", tmp_path / "two", *settings)
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
    done = on_ranks(2, *COMMAND_LINE, "train", recipe, "--runs", tmp_path / "two", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(place(runs[1], tmp_path / "two")) == before
    assert not (place(runs[1], tmp_path / "two") / "start").exists()  # resuming needs no grown copy of the base


@pytest.mark.parametrize(
    ("operator", "slowly"),
    [
        ("random-width(hidden=48, kv=4)", f"unmask_tokens={4 * BATCH}"),
        ("random-depth", f"unmask_tokens={4 * BATCH}"),
        ("direct-width(hidden=48, kv=4, noise=0.2)", "rate=rewarm-new"),
    ],
)
def test_masks_open_and_parts_of_tensors_warm_up_on_ranks_too(recipe, tmp_path, operator, slowly):  # noqa: F811
    changes = (
        "stages.1.rate=restart",
        f"stages.1.grow={operator}",
        f"stages.1.{slowly}",
        "stages.1.optimizer=reset",
        "stages.2.grow=stack",
    )
    changes += ("stages.2.optimizer=reset", "precision=fp32", "branches=[]", "keep_last=9")
    settings = [part for change in changes for part in ("--set", change)]
    runs = read_runs(recipe, list(changes))[:2]
    for one in runs:
        execute(one, tmp_path / "one", Observer())
    done = on_ranks(2, *COMMAND_LINE, "train", recipe, "--runs", tmp_path / "two", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    grown = place(runs[1], tmp_path / "two")
    before = losses(grown)
    assert before == pytest.approx(losses(place(runs[1], tmp_path / "one")), abs=5e-5)
    first, *later = checkpoints(grown)
    for left in later:
        shutil.rmtree(left)
    (grown / "finished.json").unlink()
    assert (first / BEHIND_MASKS).exists() == operator.startswith("random")
    assert on_ranks(2, *COMMAND_LINE, "train", recipe, "--runs", tmp_path / "two", *settings).returncode == 0
    assert losses(grown) == before


def test_the_residual_stream_stays_in_fp32_between_sharded_blocks():
    done = on_ranks(2, SCRIPT.with_name("block_dtypes.py"))
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
    done = train_on(2, muon, tmp_path / "two", packed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=0.02)
    assert (latest_checkpoint(tmp_path / "two") / "momentum_buffer.safetensors").exists()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_step_of_muon_over_ranks_is_that_over_whole_matrices(ranks):
    """Rows that the ranks do not divide, and fewer of them than ranks; one exchange there and one back for each of the four shapes."""
    done = on_ranks(ranks, SCRIPT.with_name("muon_step.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    apart, kept, sent = map(float, done.stdout.split())
    assert (apart < 1e-6, kept, sent) == (True, 0, 2 * 4)


def test_ranks_that_do_not_divide_the_batch_are_refused(run, packed, tmp_path):  # noqa: F811
    done = train_on(3, run, tmp_path / "run", packed)
    assert done.returncode != 0
    assert "3 ranks do not divide the 4 sequences of a forward pass" in done.stderr
