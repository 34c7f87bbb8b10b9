"""Growing on disk: what may be asked of it beside the plan, and what it withstands."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import outgrow
from outgrow.arch import LLAMA
from outgrow.checkpoint import writing
from outgrow.checkpoint.hub import local
from outgrow.checkpoint.huggingface import Checkpoint, open_checkpoint
from outgrow.checkpoint.layout import reader
from outgrow.checkpoint.safetensors_file import Stored, write_header
from outgrow.checkpoint.verify import verify
from outgrow.errors import OutgrowError
from outgrow.growth.apply import Grown
from outgrow.lab.tiny import TINY, write_tiny

from .test_extensions import refused, run  # noqa: F401

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path):
    write_tiny(tmp_path / "source", TINY["llama"], dtype=torch.bfloat16)
    return tmp_path / "source"


def weights(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


# --- the Python API ----------------------------------------------------------------------------------------------------


def test_grow_is_one_call(source, tmp_path):
    plan = outgrow.grow(source, tmp_path / "target", "stack", {"factor": 2})
    assert plan.layers == (0, 1, 2, 3) * 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "target").config.num_hidden_layers == 8
    again = outgrow.grow(source, tmp_path / "again", plan)
    assert again is plan
    assert weights(tmp_path / "again") == weights(tmp_path / "target")
    with pytest.raises(outgrow.OutgrowError, match="unknown operator"):
        outgrow.grow(source, tmp_path / "x", "stak")


def test_arrays_grow_in_memory_with_their_moments(monkeypatch):
    config = {key: value for key, value in TINY["llama"].items()}
    plan = outgrow.plan(config, "direct-width(hidden=36, kv=4)")
    generator = np.random.default_rng(0)
    arrays = {name: generator.normal(size=shape) for name, shape in LLAMA.shapes(config).items()}
    shapes = {name: array.shape for name, array in outgrow.grow_state(plan, arrays).items()}
    assert shapes == LLAMA.shapes(plan.target_config)
    assert {name: array.shape for name, array in outgrow.grow_moments(plan, arrays).items()} == shapes
    squares = {name: value**2 for name, value in arrays.items()}
    found = outgrow.grow_moments(outgrow.plan(config, "zero-width(hidden=36, kv=4)"), squares, squares=True)
    assert min(array.min() for array in found.values()) >= 0
    monkeypatch.setattr("outgrow.growth.rows._PIECE", 8 * 24)  # as large tensors are: made by rows
    by_rows = outgrow.grow_moments(outgrow.plan(config, "zero-width(hidden=36, kv=4)"), squares, squares=True)
    assert all((array == by_rows[name]).all() for name, array in found.items())
    with pytest.raises(outgrow.OutgrowError, match="no tensor 'model.embed_tokens.weight', which the plan reads"):
        outgrow.grow_moments(plan, {})


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_grown_moments_have_memory_of_their_own(kind):
    """Optimizers change moments in place: copies of a layer would share theirs, and with the old optimizer too."""
    plan = outgrow.plan(TINY["llama"], "stack(factor=2)")
    old = {name: kind(np.ones(shape)) for name, shape in LLAMA.shapes(TINY["llama"]).items()}
    found = outgrow.grow_moments(plan, old)
    for state in found.values():
        state += 1
    assert all((state == 2).all() for state in found.values())
    assert all((state == 1).all() for state in old.values())


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_every_example_runs(example, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    assert "loss" in capsys.readouterr().out


@pytest.mark.parametrize("operator", ["random-width(hidden=36)", "zero-width(hidden=36)", "stack(factor=2), zero-width(hidden=36)"])
def test_rows_made_apart_are_those_of_the_whole(source, tmp_path, operator, monkeypatch):
    monkeypatch.setattr("outgrow.growth.rows._PIECE", 7 * 36)
    plan = outgrow.grow(source, tmp_path / "target", operator, dtype="float32")
    whole = outgrow.grow_state(plan, {name: value.float() for name, value in load_file(source / "model.safetensors").items()})
    assert all(torch.equal(value, whole[name]) for name, value in load_file(tmp_path / "target" / "model.safetensors").items())


# --- dtype, overwrite, card, sources -------------------------------------------------------------------------------------


def test_the_dtype_is_kept_unless_asked_for(source, tmp_path, run):  # noqa: F811
    assert run("grow", source, tmp_path / "kept", "--factor", "2", "--no-measure")[0] == 0
    assert {value.dtype for value in load_file(tmp_path / "kept" / "model.safetensors").values()} == {torch.bfloat16}
    assert run("grow", source, tmp_path / "wide", "--factor", "2", "--no-measure", "--dtype", "float32")[0] == 0
    wide, kept = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "kept"))
    assert all(torch.equal(wide[name], kept[name].float()) for name in kept)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    assert verify(tmp_path / "wide", source) == len(wide)
    refused(
        run("grow", source, tmp_path / "x", "--dtype", "int8"), "weights can be stored as float64, float32, float16, bfloat16, not 'int8'"
    )


def test_overwriting_is_asked_for_and_never_touches_the_source_or_strangers(source, tmp_path, run):  # noqa: F811
    target, before = tmp_path / "target", weights(source)
    run("grow", source, target, "--factor", "2", "--no-measure")
    refused(run("grow", source, target, "--factor", "3", "--no-measure"), "exists already", "--overwrite")
    assert run("grow", source, target, "--factor", "3", "--no-measure", "--overwrite")[0] == 0
    assert json.loads((target / "config.json").read_text())["num_hidden_layers"] == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    refused(run("grow", source, source, "--overwrite"), "holds the source, which is never overwritten")
    refused(run("grow", source, tmp_path, "--overwrite"), "holds the source")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("x")
    refused(run("grow", source, tmp_path / "mine", "--overwrite"), "is not a checkpoint directory, so it is not overwritten")
    os.symlink(target, tmp_path / "link")
    refused(run("grow", source, tmp_path / "link", "--overwrite"), "is not a checkpoint directory")
    assert weights(source) == before


def test_the_card_says_what_was_grown_from_what(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\ntags:\n- old\n---\n# Old words\n")
    outgrow.grow(source, tmp_path / "target", "stack(factor=2), direct-width(ffn=50)")
    card = (tmp_path / "target" / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "license: mit\n" in front
    assert "- model-growth\n" in front
    assert "old" not in front
    assert "1. `stack(factor=2)`, arXiv:2405.15319: the function is no longer that of the source" in card
    assert "2. `direct-width(ffn=50)`" in card
    assert "| layers | 4 | 8 |" in card
    assert "Old words" not in card
    assert "sha256" in card


def test_a_single_file_is_a_source(source, tmp_path):
    outgrow.grow(source / "model.safetensors", tmp_path / "target")
    outgrow.grow(source, tmp_path / "same")
    assert weights(tmp_path / "target") == weights(tmp_path / "same")


def test_weights_are_downloaded_once(monkeypatch, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **settings: asked.update(settings) or tmp_path)
    local("someone/model")
    here = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "additional_chat_templates/rag.jinja"]
    copies = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "original/model.safetensors", "onnx/a/b.safetensors"]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*here, *copies, "pytorch_model.bin"], **patterns)) == here


def test_a_hub_id_is_found_in_the_cache_and_missed_in_one_sentence(source, tmp_path, monkeypatch, run):  # noqa: F811
    """The cache's own layout, made by hand; the network is switched off."""
    cache = tmp_path / "cache"
    snapshot = cache / "models--someone--base" / "snapshots" / "abc123"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(source, snapshot)
    (cache / "models--someone--base" / "refs").mkdir()
    (cache / "models--someone--base" / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run("grow", "someone/base", tmp_path / "target", "--factor", "2", "--no-measure")[0] == 0
    assert open_checkpoint(tmp_path / "target").config["num_hidden_layers"] == 8
    refused(run("grow", "someone/other", tmp_path / "x"), "there is no 'someone/other' here or in the hub's cache", "cannot be reached")
    assert local("no-slash") == Path("no-slash")


# --- verify --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "operator", ["stack(factor=2)", "direct-width(hidden=36, kv=4)", "zero-width(ffn=50)", "random-depth", "noise(share=0.1)"]
)
def test_what_was_grown_verifies_however_it_was_sharded(source, tmp_path, operator):
    outgrow.grow(source, tmp_path / "target", operator, max_shard_bytes=20_000)
    assert verify(tmp_path / "target", source) == len(open_checkpoint(tmp_path / "target").tensors)


def test_what_earlier_versions_grew_verifies(source, tmp_path):
    """They wrote the last stage's claims as those of the whole plan."""
    outgrow.grow(source, tmp_path / "target", "stack(factor=2), direct-width(ffn=50)")
    receipt = json.loads((tmp_path / "target" / "outgrow.json").read_text())
    receipt["plan"]["claims"] = {"preserves": True, "trains": True, "dual": True}
    (tmp_path / "target" / "outgrow.json").write_text(json.dumps(receipt))
    assert verify(tmp_path / "target", source)


def test_verify_finds_a_flipped_bit_another_source_and_another_config(source, tmp_path, run):  # noqa: F811
    target = tmp_path / "target"
    outgrow.grow(source, target, "stack(factor=2)")
    assert "all 75 tensors are what the plan makes" in run("verify", target, "--source", source)[1]
    file = target / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(run("verify", target, "--source", source), "of the target is not what the plan makes: bytes differ")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    refused(run("verify", target, "--source", source), "says rms_norm_eps = 0.5, and its plan 0.001")
    write_tiny(tmp_path / "other", TINY["llama"], seed=1, dtype=torch.bfloat16)
    refused(run("verify", target, "--source", tmp_path / "other"), "are not those", "hashes differ")
    refused(run("verify", source, "--source", source), "has no plan")


@pytest.mark.parametrize("name", ["exp_avg.safetensors", "training.json", "behind_masks.safetensors"])
def test_verify_finds_state_that_growth_left_behind(source, tmp_path, name):
    """A run that starts here and carries the optimizer's state would load it."""
    outgrow.grow(source, tmp_path / "grown")
    if name == "training.json":
        (tmp_path / "grown" / name).write_text("{}")
    else:
        save_file({"model.norm.weight": torch.ones(24)}, tmp_path / "grown" / name)
    with pytest.raises(outgrow.OutgrowError, match=f"'{name.partition('.')[0]}.*' of '.*grown' is not made by the plan"):
        outgrow.verify(tmp_path / "grown", source)


def test_a_config_that_is_no_mapping_is_refused_with_what_to_give():
    for wrong in ("a-directory", AutoConfig.for_model("llama")):
        with pytest.raises(OutgrowError, match=r"a config is a mapping, such as model.config.to_dict\(\), not (str|LlamaConfig)"):
            outgrow.plan(wrong, "stack")


# --- bytes, memory, kills --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["stack(factor=2), zero-width(ffn=50)", "direct-width(hidden=36, ffn=50, noise=0.2)"])
def test_bytes_do_not_depend_on_threads_or_on_how_copies_are_made(source, tmp_path, monkeypatch, operator):
    found = []
    torch.set_num_threads(2)
    monkeypatch.setattr(writing.os, "cpu_count", lambda: 5)
    monkeypatch.setattr("outgrow.growth.rows._PIECE", 300)
    monkeypatch.setattr(writing, "_RANGE", 1000)
    for threads, broken in ((1, False), (5, False), (2, True)):
        monkeypatch.setattr(writing, "THREADS", threads)
        monkeypatch.setattr(writing, "MAKERS", threads)
        if broken:  # another file system, or another system

            def refuse(*arguments):
                raise OSError(18, "Invalid cross-device link")

            monkeypatch.setattr(writing.os, "copy_file_range", refuse)
        target = tmp_path / f"{threads}"
        outgrow.grow(source, target, operator, max_shard_bytes=30_000)
        found.append(weights(target))
        assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert found[0] == found[1] == found[2]


def test_what_one_thread_refuses_ends_all(source, tmp_path):
    """A weight that float16 cannot hold stops the growth, whichever thread meets it, and leaves nothing."""
    state = load_file(source / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][:] = 1e6
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutgrowError, match=r"up_proj.weight' holds numbers that float16 cannot"):
        outgrow.grow(source, tmp_path / "target", "direct-width(ffn=50)", dtype="float16")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", 3.4e38), ("float32", 1e39)])
def test_numbers_that_become_infinite_are_refused_in_any_type(source, tmp_path, dtype, wide):
    state = {name: value.double() for name, value in load_file(source / "model.safetensors").items()}
    state["model.layers.3.mlp.up_proj.weight"][0, :2] = torch.tensor([torch.inf, torch.nan])  # which stay what they are
    save_file(state, source / "model.safetensors", {"format": "pt"})
    outgrow.grow(source, tmp_path / "fits", dtype=dtype)
    state["model.layers.3.mlp.up_proj.weight"][5, 7] = -wide
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutgrowError, match=rf"3.mlp.up_proj.weight' holds numbers that {dtype} cannot; store it as float64 with --dtype"):
        outgrow.grow(source, tmp_path / "target", dtype=dtype)
    assert not (tmp_path / "target").exists()


def test_what_is_copied_has_the_shape_of_what_it_becomes(source, tmp_path, monkeypatch):
    """The plan is held against it first, and what is written once more."""
    plan = outgrow.plan(open_checkpoint(source).config).as_json()
    plan["keys"] = {"mlp.gate_proj.weight": "self_attn.k_proj.weight"}
    with pytest.raises(OutgrowError, match=r"makes 'mlp.gate_proj.weight' \[37, 24\] of 'self_attn.k_proj.weight' \[20, 24\]"):
        outgrow.GrowthPlan.from_json(plan)
    monkeypatch.setattr("outgrow.growth.checks._check_sources", lambda plan: None)
    with pytest.raises(OutgrowError, match=r"gate_proj.weight' is \[37, 24\], and 'model.layers.0.self_attn.k_proj.weight', of which"):
        outgrow.grow(source, tmp_path / "target", outgrow.GrowthPlan.from_json(plan))


def test_verify_holds_every_byte_against_something(source, tmp_path, monkeypatch):
    outgrow.grow(source, tmp_path / "target")
    blocks = Stored.blocks
    monkeypatch.setattr(Stored, "blocks", lambda self: (block[:-2] for block in blocks(self)))
    with pytest.raises(OutgrowError, match=r"of the target has [\d,]+ bytes, and the plan makes [\d,]+ of them"):
        verify(tmp_path / "target", source)


def huge(directory, hidden=1024, ffn=4096, layers=4, vocab=32000):
    """A checkpoint of a few hundred MB that occupies no disk: a header and a hole."""
    config = {**TINY["llama"], "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": 16,
              "num_key_value_heads": 16, "head_dim": 64, "vocab_size": vocab}  # fmt: skip
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    header, entries = write_header({name: ("BF16", shape) for name, shape in LLAMA.shapes(config).items()})
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(max(entry.end for entry in entries.values()))
    return directory


def peak_megabytes(code, *arguments):
    """Peak resident memory of a Python process; getrusage would count what it was forked from."""
    tail = "; print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    done = subprocess.run(
        [sys.executable, "-c", code + tail, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=True
    )
    return int(done.stdout.split()[-1]) / 1024


def test_copies_take_no_memory_and_no_torch(tmp_path):
    """The command as people give it."""
    code = "import sys; from outgrow.cli import app; app(['grow', *sys.argv[1:]], standalone_mode=False); assert 'torch' not in sys.modules"
    source = huge(tmp_path / "source", layers=6)
    assert peak_megabytes(code, source, tmp_path / "target", "--factor", "2") < 150
    assert (tmp_path / "target" / "model.safetensors").stat().st_size > 300e6


@pytest.mark.parametrize(
    "operator", ["direct-width(hidden=1536, kv=24)", "direct-width(hidden=1536, kv=24, noise=0.2)", "random-width(hidden=1536, kv=24)"]
)
def test_arithmetic_takes_a_few_times_the_largest_tensor(tmp_path, operator):
    """Tables are made a few rows at a time, so no more than three times the largest tensor is ever held."""
    code = f"import sys, outgrow; outgrow.grow(sys.argv[1], sys.argv[2], {operator!r})"
    small = huge(tmp_path / "small", layers=1)
    libraries = peak_megabytes("import torch, safetensors, outgrow")
    largest = 32000 * 1536 * 2 / 2**20
    assert peak_megabytes(code, small, tmp_path / "one") < libraries + 3 * largest
    large = huge(tmp_path / "large", layers=6)
    assert peak_megabytes(code, large, tmp_path / "six") < libraries + 3 * largest


WIDER = "hidden=1536, kv=24, ffn=24576"


@pytest.mark.parametrize(
    ("operator", "form"),
    [(f"direct-width({WIDER}, noise=0.2)", "huggingface"), (f"aki({WIDER})", "huggingface"), (f"aki({WIDER})", "dcp")],
)
def test_so_does_a_largest_tensor_that_grows_on_both_sides(tmp_path, operator, form):
    """A matrix of a block, all of whose rows grow too, is made a few rows at a time as well."""
    code = f"import sys, outgrow; outgrow.grow(sys.argv[1], sys.argv[2], {operator!r}, form={form!r})"
    libraries = peak_megabytes("import torch, safetensors, outgrow" + (", torch.distributed.checkpoint" if form == "dcp" else ""))
    source = huge(tmp_path / "source", ffn=16384, layers=1, vocab=1000)
    assert peak_megabytes(code, source, tmp_path / "target") < libraries + 3 * (24576 * 1536 * 2 / 2**20)


def test_moments_take_a_few_times_the_largest_of_them(tmp_path):
    source = huge(tmp_path / "source", layers=2)
    config = json.loads((source / "config.json").read_text())
    header, entries = write_header({name: ("F32", shape) for name, shape in LLAMA.shapes(config).items()})
    for moment in ("exp_avg", "exp_avg_sq"):
        with (source / f"{moment}.safetensors").open("wb") as file:
            file.write(header)
            file.truncate(max(entry.end for entry in entries.values()))
    (source / "training.json").write_text("{}")
    code = "import sys, outgrow; outgrow.grow(sys.argv[1], sys.argv[2], 'zero-width(hidden=1536, kv=24)', optimizer='carry')"
    libraries, largest = peak_megabytes("import torch, safetensors, outgrow"), 32000 * 1536 * 4 / 2**20
    assert peak_megabytes(code, source, tmp_path / "target") < libraries + 3 * largest


def test_a_killed_growth_leaves_nothing_and_the_same_command_does_it(tmp_path):
    source, target = huge(tmp_path / "source"), tmp_path / "target"
    code = "import sys, outgrow; outgrow.grow(sys.argv[1], sys.argv[2], 'stack(factor=4)')"
    command = [sys.executable, "-c", code, str(source), str(target)]
    with subprocess.Popen(command) as process:
        for _ in range(3000):
            if any(path.name.startswith(".target.partial") and any(path.iterdir()) for path in tmp_path.iterdir()):
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    if process.returncode == -signal.SIGKILL:
        assert not target.exists()
    else:
        shutil.rmtree(target)
    subprocess.run(command, check=True, timeout=120)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    assert open_checkpoint(target).config["num_hidden_layers"] == 16


def test_symlink_loops_and_places_that_cannot_be_written(source, tmp_path, run):  # noqa: F811
    loop = tmp_path / "loop"
    os.symlink(loop, loop)
    refused(run("grow", loop, tmp_path / "x"), "there is no directory")
    (tmp_path / "looped").mkdir()
    shutil.copy(source / "config.json", tmp_path / "looped")
    os.symlink("model.safetensors", tmp_path / "looped" / "model.safetensors")
    refused(run("grow", tmp_path / "looped", tmp_path / "x"), "no weights")
    (tmp_path / "file").write_text("x")
    refused(run("grow", source, tmp_path / "file" / "target"), "file")
    assert not (tmp_path / "x").exists()


def test_a_computed_tensor_that_fails_stops_the_copies(source, tmp_path, monkeypatch):
    from outgrow.growth.apply import Grown

    def fail(self, name, rows):
        raise MemoryError

    monkeypatch.setattr(Grown, "weight", fail)
    with pytest.raises(MemoryError):
        outgrow.grow(source, tmp_path / "target", "direct-width(ffn=50)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


# --- what is stopped -------------------------------------------------------------------------------------------------------


def test_what_fails_does_not_wait_for_the_hash_of_its_source(source, tmp_path, monkeypatch):
    told = []

    def hashes(self, stopped):
        told.append(stopped.wait(30))
        return {}

    monkeypatch.setattr(Checkpoint, "hashes", hashes)
    monkeypatch.setattr("outgrow.checkpoint.grow.write_shards", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        outgrow.grow(source, tmp_path / "target")
    assert told == [True]


def test_a_hash_is_given_up_between_two_blocks(source, monkeypatch):
    stopped, opened = Event(), open_checkpoint(source)
    whole = {"model.safetensors": hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()}
    assert opened.hashes(stopped) == opened.hashes() == whole
    stopped.set()
    assert opened.hashes(stopped) == {"model.safetensors": hashlib.sha256().hexdigest()}


def test_what_one_thread_refuses_is_told_while_another_is_at_work(source, tmp_path, monkeypatch):
    """Some tensors are made by a thread of their own, one after another; it stops at the first."""
    begun = []

    def make(shard, name, rows, file, report):
        if shard.grown.reads_apart(name):
            raise MemoryError
        begun.append(name)
        for _ in range(1000):
            report(0)  # raises once it is known
            time.sleep(0.002)

    reads_apart = Grown.reads_apart
    monkeypatch.setattr(Grown, "reads_apart", lambda self, name: "up_proj" not in name and reads_apart(self, name))
    monkeypatch.setattr(writing, "_make", make)
    with pytest.raises(MemoryError):
        outgrow.grow(source, tmp_path / "target", "direct-width(ffn=50)")
    assert len(begun) <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_second_ctrl_c_makes_nothing_more(source, tmp_path, monkeypatch):
    begun, pressed, once = [], [], Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            once.set()
            super().shutdown(wait=wait, cancel_futures=cancel_futures)
            if wait and not pressed:
                pressed.append(True)
                raise KeyboardInterrupt

    def make(*arguments):
        begun.append(arguments)
        once.wait(30)

    def interrupted(jobs, return_when):
        raise KeyboardInterrupt

    monkeypatch.setattr("outgrow.growth.rows._PIECE", 7 * 24)
    monkeypatch.setattr(writing, "MAKERS", 1)
    monkeypatch.setattr(writing, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(writing, "_make", make)
    monkeypatch.setattr(writing, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        outgrow.grow(source, tmp_path / "target", "direct-width(ffn=50)")
    assert len(begun) <= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_ctrl_c_says_what_is_true_of_growing(source, tmp_path, monkeypatch, run):  # noqa: F811
    monkeypatch.setattr("outgrow.checkpoint.grow.grow_directory", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    status, _, err = run("grow", source, tmp_path / "target")
    assert status == 130
    assert f"interrupted; '{tmp_path / 'target'}' is as it was before, and the same command begins anew" in err


def test_what_waits_does_not_grow_with_the_model(source, tmp_path, monkeypatch):
    """A handful of jobs, however many pieces there are."""
    submitted, made, make = [], [], writing._make

    class Pool(ThreadPoolExecutor):
        def submit(self, *arguments):
            submitted.append(arguments)
            return super().submit(*arguments)

    monkeypatch.setattr("outgrow.growth.rows._PIECE", 7 * 24)
    monkeypatch.setattr(writing, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(writing, "_make", lambda *arguments: (made.append(1), make(*arguments)))
    outgrow.grow(source, tmp_path / "target", "direct-width(ffn=50)")
    assert len(made) > 50
    assert len(submitted) <= 2 + writing.MAKERS


def test_a_kernel_that_copies_nothing_is_gone_without(source, tmp_path, monkeypatch):
    monkeypatch.setattr(writing.os, "copy_file_range", lambda *arguments: 0)
    outgrow.grow(source, tmp_path / "target")
    assert verify(tmp_path / "target", source)


def test_chunks_that_are_read_in_turn_are_loaded_once():
    loaded = []

    class Lies:
        def __init__(self, value):
            self.value = value

        def whole(self):
            loaded.append(self.value)
            return torch.full((4, 2), self.value)

    read = reader({"a": Lies(1.0), "b": Lies(2.0), "c": Lies(3.0)})
    for name in "ababcbab":
        assert read(name, slice(1, 2))[0, 0] == {"a": 1.0, "b": 2.0, "c": 3.0}[name]
    assert loaded == [1.0, 2.0, 3.0, 1.0]


def test_weights_without_float_types_are_copied(tmp_path, source):
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].double()}, source / "model.safetensors")
    outgrow.grow(source, tmp_path / "target", "direct-width(ffn=50)")
    assert load_file(tmp_path / "target" / "model.safetensors")["model.norm.weight"].dtype == torch.float64
