"""What a checkpoint on disk may be made of, and what may happen while one is grown: one sentence each, and nothing is left or lost."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import outgrow
from outgrow.checkpoint.card import CARD
from outgrow.checkpoint.huggingface import open_checkpoint
from outgrow.checkpoint.lineage import read_lineage
from outgrow.checkpoint.safetensors_file import read_header
from outgrow.checkpoint.verify import verify
from outgrow.errors import OutgrowError
from outgrow.growth.as_json import array_to_json
from outgrow.growth.plan import GrowthPlan
from outgrow.lab.tiny import TINY, write_tiny
from outgrow.models.measure import measured
from outgrow.spaces import copies

from .test_extensions import refused, run  # noqa: F401


@pytest.fixture
def source(tmp_path):
    write_tiny(tmp_path / "source", TINY["llama"], dtype=torch.bfloat16)
    return tmp_path / "source"


def edited(directory, **config):
    """A directory whose config.json says something else."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return directory


def grows(source, target, *arguments, **environment):
    """The command line in a process of its own, killed after a while."""
    command = [sys.executable, "-c", "from outgrow.cli import main; main()", "grow", str(source), str(target), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


# --- which weights are meant -------------------------------------------------------------------------------------------


def test_a_tied_head_that_is_another_is_not_lost(run, source, tmp_path):  # noqa: F811
    edited(source, tie_word_embeddings=True)
    refused(run("grow", source, tmp_path / "target", "--factor", "2"), "'lm_head.weight'", "is not 'model.embed_tokens.weight'")
    assert not (tmp_path / "target").exists()
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    assert run("grow", source, tmp_path / "target", "--factor", "2")[0] == 0


def test_the_single_file_is_meant_where_there_is_an_index_too(source, tmp_path):
    """As transformers has it."""
    tensors = load_file(source / "model.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in tensors.items()}, source / "other.safetensors")
    weight_map = dict.fromkeys(tensors, "other.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    outgrow.grow(source, tmp_path / "target")
    assert load_file(tmp_path / "target" / "model.safetensors")["model.norm.weight"].any()


def test_measuring_opens_no_pickle_and_no_other_file(run, source, tmp_path):  # noqa: F811
    (source / "model.safetensors").rename(source / "w.safetensors")
    torch.save({name: torch.zeros_like(value) for name, value in load_file(source / "w.safetensors").items()}, source / "pytorch_model.bin")
    assert "not measured" in run("grow", source / "w.safetensors", tmp_path / "one", "--operator", "zero-depth", "--measure")[1]
    shutil.copy(source / "w.safetensors", source / "model.safetensors")
    assert "not measured" in run("grow", source / "w.safetensors", tmp_path / "two", "--operator", "zero-depth", "--measure")[1]
    assert "measured: logits differ" in run("grow", source, tmp_path / "three", "--operator", "zero-depth")[1]


def test_copies_are_measured_if_asked_for(run, source, tmp_path):  # noqa: F811
    assert "not measured: copies" in run("grow", source, tmp_path / "one", "--factor", "2")[1]
    assert "not measured: it was not asked for" in run("grow", source, tmp_path / "two", "--factor", "2", "--no-measure")[1]
    assert "measured: logits differ" in run("grow", source, tmp_path / "three", "--factor", "2", "--measure")[1]


# --- files that are no files, numbers that are none --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "config.json", "outgrow.json", "exp_avg.safetensors"]
)
def test_a_pipe_is_refused_and_not_waited_for(source, tmp_path, name):
    if name == "model.safetensors.index.json":
        (source / "model.safetensors").unlink()
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    (source / "training.json").write_text("{}")
    done = grows(source, tmp_path / "target", "--optimizer", "carry" if name == "exp_avg.safetensors" else "reset")
    assert done.returncode == 1
    assert done.stderr.startswith("outgrow: ")
    assert "is not a regular file" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_shape_of_a_hundred_thousand_axes_is_refused_at_once(source):
    text = json.dumps({"a": {"dtype": "F32", "shape": [2**62] * 100_000, "data_offsets": [0, 4]}}).encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(outgrow.OutgrowError, match="does not fill its bytes"):
        read_header(source / "model.safetensors")


def test_a_header_is_utf8(source):
    text = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode("utf-16")
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(outgrow.OutgrowError, match="is not valid JSON"):
        read_header(source / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "operator", "says"),
    [
        ({"initializer_range": float("nan")}, "random-width(ffn=50)", "'initializer_range' must be a finite number"),
        ({"initializer_range": "0.02"}, "random-width(ffn=50)", "'initializer_range' must be a finite number"),
        ({"rms_norm_eps": float("inf")}, "zero-width(hidden=36)", "'rms_norm_eps' must be a finite number"),
        ({"rms_norm_eps": [1e-5]}, "zero-width(hidden=36)", "'rms_norm_eps' must be a finite number"),
        ({"layer_types": [["full_attention"]] * 4}, "stack", "'layer_types' must name the kind of each layer"),
        ({}, "direct-width(ffn=1000000000)", "that is more than"),
        ({}, "direct-width(hidden=25, kv=3)", "no multiple of its 9 query heads; choose hidden=27"),
    ],
)
def test_odd_numbers_are_refused(source, tmp_path, config, operator, says):
    edited(source, **config)
    with pytest.raises(outgrow.OutgrowError, match=says):
        outgrow.grow(source, tmp_path / "target", operator)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("key", "value", "says"), [("num_experts", 10**9, "says 1,000,000,000 experts"), ("num_experts_per_tok", "x", "whole number")]
)
def test_odd_experts_are_refused(tmp_path, key, value, says):
    write_tiny(tmp_path / "source", TINY["qwen3_moe"])
    with pytest.raises(outgrow.OutgrowError, match=says):
        outgrow.grow(edited(tmp_path / "source", **{key: value}), tmp_path / "target")


def test_numbers_that_float16_cannot_hold_are_refused(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(outgrow.OutgrowError, match=r"'model.layers.\d+.mlp.up_proj.weight' holds numbers that float16 cannot"):
        outgrow.grow(source, tmp_path / "target", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_names_with_control_characters_stay_on_one_line(run, source, tmp_path):  # noqa: F811
    edited(source, model_type="lla\x1b[31m\nma")
    status, _, err = run("grow", source, tmp_path / "target")
    assert status == 1
    assert len(err.splitlines()) == 1
    assert "\x1b" not in err


def test_a_plan_that_people_edited_never_crashes(source, tmp_path):
    """A value at a time, of the wrong kind."""
    opened = open_checkpoint(source)
    texts = ("stack(factor=2), direct-width(ffn=50)", "noise(share=0.1)", "zero-width(hidden=36)", "staged-width", "aki(ffn=50)")
    plans = [outgrow.plan(opened.config, text).as_json() for text in texts]
    odd = [None, -1, 3, 10**30, 1.5, float("nan"), "x", True, [], {}, [[1]], {"a": 1}]
    rng = np.random.default_rng(0)
    for number in range(300):
        plan = json.loads(json.dumps(plans[number % len(plans)]))
        place, key = plan, rng.choice([key for key in plan if key != "source_config"])
        while isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.8:
            place = place[key]
            key = rng.choice(list(place)) if isinstance(place, dict) else int(rng.integers(len(place)))
        place[key] = odd[rng.integers(len(odd))]
        try:
            outgrow.grow(source, tmp_path / "target", GrowthPlan.from_json(plan))
        except outgrow.OutgrowError as error:
            assert "\n" not in str(error)
        assert not list(tmp_path.glob(".target*"))
        shutil.rmtree(tmp_path / "target", ignore_errors=True)


def test_a_lift_fits_its_space():
    lift = copies(4, 6)
    for source in (lift.source + 1, lift.source[:5], lift.source - 5, lift.source[:0]):
        with pytest.raises(outgrow.OutgrowError, match="a lift of a space of 4"):
            type(lift)(4, source, lift.write, lift.read, lift.gain)


# --- places ------------------------------------------------------------------------------------------------------------


def test_places_that_are_refused(run, source, tmp_path, monkeypatch):  # noqa: F811
    refused(run("grow", source, source / "grown"), "lies inside the source")
    (tmp_path / "loop").symlink_to("loop")
    refused(run("grow", source, tmp_path / "loop", "--overwrite"), "is not a checkpoint directory")
    refused(run("grow", "a--b/c..d", tmp_path / "target"), "it is no id of the hub")
    refused(run("grow", source, tmp_path / "target", "--max-shard-size", "²GB"), "--max-shard-size takes a size")
    refused(run("grow", source, tmp_path / "target", "--operator", ""), "cannot read the operator ''")
    refused(run("grow", source, tmp_path / "target", "--form", "dcp", "--max-shard-size", "1GB"), "has no effect with --form dcp")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run("grow", source, tmp_path / "alone", "--factor", "2")[0] == 0  # a stray variable says nothing
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    refused(run("grow", source, tmp_path / "target"), "leave torchrun out, or use --form dcp")
    assert not (tmp_path / "target").exists()


def test_a_dry_run_refuses_what_the_run_would(run, source, tmp_path):  # noqa: F811
    (tmp_path / "there").mkdir()
    refused(run("grow", source, tmp_path / "there", "--dry-run"), "exists already")
    refused(run("grow", source, tmp_path / "target", "--dry-run", "--dtype", "int8"), "weights can be stored as")
    refused(run("grow", source, tmp_path / "target", "--dry-run", "--optimizer", "carry"), "carries no optimizer state")
    assert run("grow", source, tmp_path / "target", "--dry-run")[0] == 0


def test_overwriting_replaces_checkpoints_and_no_projects(run, source, tmp_path, monkeypatch):  # noqa: F811
    project, clone = tmp_path / "project", tmp_path / "clone"
    for directory in (project, clone):
        (directory / ".git").mkdir(parents=True)
        (directory / "config.json").write_text("{}")
    shutil.copy(source / "model.safetensors", clone)
    refused(run("grow", source, project, "--overwrite"), "is not a checkpoint directory, so it is not overwritten")
    refused(run("grow", source, clone, "--overwrite"), "is a git repository, whose history would be lost")
    refused(run("grow", source, clone, "--overwrite", "--dry-run"), "is a git repository")
    monkeypatch.chdir(shutil.copytree(source, tmp_path / "here"))
    refused(run("grow", source, "", "--overwrite"), "TARGET is empty")
    refused(run("grow", "", tmp_path / "target"), "the source is an empty text; give a directory, a file or a hub id")
    assert (tmp_path / "here" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    outgrow.grow(source, tmp_path / "dcp", form="dcp")
    (tmp_path / "dcp" / "outgrow.json").unlink()
    outgrow.grow(source, tmp_path / "dcp", overwrite=True)
    assert (tmp_path / "dcp" / "model.safetensors").exists()


def test_a_file_grows_beside_itself(source, run, monkeypatch):  # noqa: F811
    monkeypatch.chdir(source)
    assert run("grow", "model.safetensors", "./grown", "--factor", "2")[0] == 0
    assert verify(source / "grown", source / "model.safetensors")
    refused(run("grow", "model.safetensors", source, "--overwrite"), "holds the source")


def test_parents_that_were_made_go_with_what_failed(source, tmp_path, monkeypatch):
    monkeypatch.setattr("outgrow.checkpoint.grow.write_shards", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(outgrow.OutgrowError, match=r"new/a/target' could not be written \(No space left on device\), and nothing is left"):
        outgrow.grow(source, tmp_path / "new" / "a" / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_leftovers_of_the_dead_go_and_strangers_stay(source, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".g[1].partial-{dead.pid}", ".g[1].partial-notes"):
        (tmp_path / name).mkdir()
    outgrow.grow(source, tmp_path / "g[1]")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".g[1].partial-notes", "g[1]", "source"]


def test_a_kill_while_overwriting_loses_nothing(source, tmp_path, monkeypatch):
    target = tmp_path / "target"
    outgrow.grow(source, target, "stack(factor=2)")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    target.rename(tmp_path / f".target.replaced-{dead.pid}")  # killed between the two renames
    with pytest.raises(outgrow.OutgrowError, match="exists already"):
        outgrow.grow(source, target)
    assert open_checkpoint(target).config["num_hidden_layers"] == 8

    rename = Path.rename

    def fails(self, place):
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, place)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output error"):
        outgrow.grow(source, target, "stack(factor=3)", overwrite=True)
    assert open_checkpoint(target).config["num_hidden_layers"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_file_that_may_not_grow_is_one_sentence_in_every_form(source, tmp_path):
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); from outgrow.cli import main; main()"
    for form in ("huggingface", "dcp"):
        command = [sys.executable, "-c", code, "grow", str(source), str(tmp_path / "target"), "--form", form]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "File too large" in done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


# --- what travels along ------------------------------------------------------------------------------------------------


def test_what_holds_of_the_source_alone_stays_behind(source, tmp_path):
    (source / "additional_chat_templates").mkdir()
    stay = {
        "trainer_state.json",
        "eval_results.json",
        "all_results.json",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors.index.json",
    }
    go = {"NOTICE", "USE_POLICY.md", "modeling_mine.py", "additional_chat_templates/tools.jinja", "LICENSE.txt"}
    for name in stay | go:
        (source / name).write_text("x")
    outgrow.grow(source, tmp_path / "target")
    found = {str(path.relative_to(tmp_path / "target")) for path in (tmp_path / "target").rglob("*") if path.is_file()}
    assert go <= found
    assert not stay & found


def test_what_lies_beside_a_file_and_is_not_its_own_stays_behind(source, tmp_path):
    go = {
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "chat_template.jinja",
        "LICENSE",
    }
    for name in go | {"service-account.json", "passwords.txt", "train.py", "other.model"}:
        (source / name).write_text("{}")
    outgrow.grow(source / "model.safetensors", tmp_path / "target")
    made = {"config.json", "generation_config.json", "model.safetensors", "outgrow.json", "README.md"}
    assert {path.name for path in (tmp_path / "target").iterdir()} == go | made


def test_links_that_lead_out_of_the_source_are_not_followed_but_into_the_hubs_blobs(source, tmp_path):
    cached = tmp_path / "models--someone--base" / "snapshots" / "0123abc"
    cached.parent.mkdir(parents=True)
    source.rename(cached)
    blobs = tmp_path / "models--someone--base" / "blobs"
    blobs.mkdir()
    for place in (blobs / "abc", tmp_path / "secret.json", cached / "inner.json"):
        place.write_text("{}")
    (cached / "tokenizer.json").symlink_to("../../blobs/abc")
    (cached / "merges.txt").symlink_to("inner.json")
    outgrow.grow(cached, tmp_path / "target")
    assert {"tokenizer.json", "merges.txt", "inner.json"} <= {path.name for path in (tmp_path / "target").iterdir()}
    (cached / "vocab.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(OutgrowError, match="'.*vocab.json' is a link out of its checkpoint, and is not followed"):
        outgrow.grow(cached, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("front", ["date: 2024-02-30", "a: " + "[" * 5000, "license: " + "[" * 300 + "]" * 300, "a: [", "license: {a: b}"])
def test_no_card_of_a_source_stops_a_growth(source, tmp_path, front):
    (source / CARD).write_text(f"---\n{front}\n---\n# Base\n")
    outgrow.grow(source, tmp_path / "target")
    assert "license" not in (tmp_path / "target" / CARD).read_text()


def test_what_transformers_cannot_import_is_not_measured(source, tmp_path, monkeypatch):
    def fail(directory):
        raise ImportError("Using `bitsandbytes` requires it")

    monkeypatch.setattr("outgrow.models.measure.exact_model", fail)
    outgrow.grow(source, tmp_path / "target", measure=measured)
    assert "requires it" in read_lineage(tmp_path / "target").measured["not measured"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [({"seed": -1}, "seed: "), ({"knobs": {"share": np.float32(1)}}, "float32")],
)
def test_a_plan_that_could_not_be_read_again_is_not_carried_out(source, tmp_path, monkeypatch, edit, message):
    plan = replace(outgrow.plan(open_checkpoint(source).config, "stack"), **edit)
    monkeypatch.setattr("outgrow.checkpoint.grow.new_directory", None)  # refused before that
    with pytest.raises(
        outgrow.OutgrowError, match=f"'stack' cannot be carried out, since its receipt could not be read again: .*{message}"
    ):
        outgrow.grow(source, tmp_path / "target", plan)


def test_the_card_and_the_receipt_name_a_source_of_the_hub(source, tmp_path):
    cached = tmp_path / "models--someone--base" / "snapshots" / "0123abc"
    cached.parent.mkdir(parents=True)
    source.rename(cached)
    (cached / CARD).write_text("---\nlanguage:\n- en\n- de\nlicense: apache-2.0\nbase_model: older/base\n---\n# Base\n")
    outgrow.grow(cached, tmp_path / "target", "stack(factor=2), direct-width(ffn=50)")
    card = (tmp_path / "target" / CARD).read_text()
    assert "# someone/base@0123abc, grown" in card
    assert "language:\n- en\n- de\n" in card
    assert "base_model: someone/base\n" in card
    assert json.loads((tmp_path / "target" / "outgrow.json").read_text())["source"] == "someone/base@0123abc"


def test_inspect_says_all_stages(run, source, tmp_path):  # noqa: F811
    outgrow.grow(source, tmp_path / "target", "stack(factor=2), direct-width(ffn=50)")
    out = run("inspect", tmp_path / "target")[1]
    assert "stack {'factor': 2}" in out
    assert "direct-width {'ffn': 50}" in out


def test_verify_sees_the_clock_and_moments_that_nothing_made(source, tmp_path):
    moments = {name: value.float() for name, value in load_file(source / "model.safetensors").items()}
    for moment in ("exp_avg", "exp_avg_sq"):
        save_file(moments, source / f"{moment}.safetensors")
    (source / "training.json").write_text('{"tokens": 1, "flops": 1.0, "steps": 1}')
    outgrow.grow(source, tmp_path / "target", optimizer="carry")
    verify(tmp_path / "target", source)
    (tmp_path / "target" / "training.json").write_text('{"tokens": 2, "flops": 1.0, "steps": 1}')
    with pytest.raises(outgrow.OutgrowError, match=r"training.json' is not the source's"):
        verify(tmp_path / "target", source)
    shutil.copy(source / "training.json", tmp_path / "target")
    save_file(moments, tmp_path / "target" / "momentum_buffer.safetensors")
    with pytest.raises(outgrow.OutgrowError, match="'momentum_buffer' of .* is not made by the plan"):
        verify(tmp_path / "target", source)


def test_state_does_not_cross_between_the_forms_and_says_so(run, source, tmp_path):  # noqa: F811
    moments = {name: value.float() for name, value in load_file(source / "model.safetensors").items()}
    for moment in ("exp_avg", "exp_avg_sq"):
        save_file(moments, source / f"{moment}.safetensors")
    (source / "training.json").write_text("{}")
    refused(run("grow", source, tmp_path / "target", "--form", "dcp", "--optimizer", "carry"), "goes into a Hugging Face directory")
    assert run("grow", source, tmp_path / "dcp", "--form", "dcp")[0] == 0
    done = run("grow", tmp_path / "dcp", tmp_path / "target", "--trust-pickle", "--optimizer", "carry")
    refused(done, "goes into another distributed checkpoint")


# --- places ------------------------------------------------------------------------------------------------------------


def test_a_link_on_the_way_does_not_lead_into_the_source(run, source, tmp_path):  # noqa: F811
    """`link/../source` is beside what the link points to, for the system and so for us; the source stands elsewhere."""
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    (tmp_path / "else" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "else" / "inner")
    (tmp_path / "same").symlink_to(source)
    refused(run("grow", source, tmp_path / "same" / "grown"), "lies inside the source, which is only read")
    assert run("grow", source, f"{tmp_path}/link/../source", "--overwrite")[0] == 0
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert verify(tmp_path / "else" / "source", source)


def test_a_base_without_layers_grows_in_words_too(run, tmp_path):  # noqa: F811
    write_tiny(tmp_path / "none", {**TINY["llama"], "num_hidden_layers": 0}, dtype=torch.float32)
    operator = ("--operator", "expand(layers=2, weights='random')")
    for more in (("--dry-run",), ()):
        status, out, err = run("grow", tmp_path / "none", tmp_path / "two", *operator, *more)
        assert status == 0, err
        assert "layers: 0 -> 2\n" in out


def test_an_exact_operator_is_measured_by_the_coarser_of_the_types(run, tmp_path):  # noqa: F811
    write_tiny(tmp_path / "fine", TINY["llama"], dtype=torch.float32)
    status, out, err = run("grow", tmp_path / "fine", tmp_path / "coarse", "--operator", "zero-depth", "--dtype", "bfloat16")
    assert status == 0, err
    assert "measured: logits differ by at most" in out


def test_verify_sees_a_head_that_was_put_in(source, tmp_path):
    """transformers would load it in the place of the embedding that the config ties it to."""
    tensors = load_file(edited(source, tie_word_embeddings=True) / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors")
    outgrow.grow(source, tmp_path / "target")
    verify(tmp_path / "target", source)
    grown = load_file(tmp_path / "target" / "model.safetensors")
    save_file({**grown, "lm_head.weight": torch.ones(53, 24, dtype=torch.bfloat16)}, tmp_path / "target" / "model.safetensors")
    with pytest.raises(outgrow.OutgrowError, match=r"'lm_head.weight' of '.*target' is not 'model.embed_tokens.weight'"):
        verify(tmp_path / "target", source)


def test_what_is_upcycled_says_what_its_family_takes_otherwise(tmp_path):
    """A Llama without num_key_value_heads has as many as heads, and a Mixtral has eight."""
    config = {key: value for key, value in TINY["llama"].items() if key not in ("num_key_value_heads", "head_dim")}
    config |= {"num_attention_heads": 4}
    write_tiny(tmp_path / "old", config, dtype=torch.float32)
    written = json.loads((tmp_path / "old" / "config.json").read_text())
    written.pop("num_key_value_heads", None)
    (tmp_path / "old" / "config.json").write_text(json.dumps(written))
    outgrow.grow(tmp_path / "old", tmp_path / "many", "upcycle(experts=2, chosen=1)", measure=measured)
    assert read_lineage(tmp_path / "many").measured["logit_difference"] < 1e-5


@pytest.mark.parametrize("rope", [None, {"rope_type": "default"}])
def test_upcycling_keeps_the_base_of_a_rope_that_is_not_told(tmp_path, rope):
    """Llama's is 10,000 and Mixtral's a million."""
    write_tiny(tmp_path / "old", TINY["llama"], dtype=torch.float32)
    written = json.loads((tmp_path / "old" / "config.json").read_text())
    written.pop("rope_theta", None)
    (tmp_path / "old" / "config.json").write_text(json.dumps({**written, "rope_parameters": rope}))
    outgrow.grow(tmp_path / "old", tmp_path / "many", "upcycle(experts=2, chosen=1)", measure=measured)
    assert read_lineage(tmp_path / "many").measured["logit_difference"] < 1e-5


def test_a_phi_with_lists_of_rope_factors_grows_as_transformers_takes_it(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1], "long_factor": [2.0, 2.1]}
    config = {**TINY["phi3"], "rope_parameters": rope, "original_max_position_embeddings": 8}
    config.pop("head_dim", None)
    heads = config["num_attention_heads"]
    config |= {"hidden_size": 4 * heads}
    write_tiny(tmp_path / "source", config, dtype=torch.float32)
    kv = config["num_key_value_heads"]
    with pytest.raises(outgrow.OutgrowError, match="lists of RoPE factors .* grow hidden and kv by the same factor"):
        outgrow.grow(tmp_path / "source", tmp_path / "x", f"direct-width(hidden={8 * heads})")
    outgrow.grow(tmp_path / "source", tmp_path / "wide", f"direct-width(hidden={8 * heads}, kv={2 * kv})", measure=measured)
    assert read_lineage(tmp_path / "wide").measured["logit_difference"] < 1e-4


def test_a_target_that_transformers_refuses_is_not_written(source, tmp_path, monkeypatch):
    from huggingface_hub.errors import StrictDataclassError

    from outgrow.models import measure

    real = measure._logits

    def refusing(directory, tokens):
        if directory != source:
            raise StrictDataclassError("hidden must be even")
        return real(directory, tokens)

    monkeypatch.setattr(measure, "_logits", refusing)
    with pytest.raises(
        outgrow.OutgrowError, match=r"transformers refuses what 'stack' makes of it: hidden must be even; nothing was written"
    ):
        outgrow.grow(source, tmp_path / "target", "stack", measure=measured)
    assert not (tmp_path / "target").exists()


def test_more_files_than_may_be_open_are_refused_in_words(source, tmp_path):
    """The limit of this process stands; sixty files are more than one of thirty allows."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); from outgrow.cli import main; main()"
    command = [sys.executable, "-c", code, "grow", str(source), str(tmp_path / "target"), "--factor", "2", "--max-shard-size", "1KB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "weight files are more than the 40 that may be open at once; raise --max-shard-size" in done.stderr
    assert not (tmp_path / "target").exists()


def test_comments_that_are_no_text_are_refused_as_the_library_does(source, tmp_path):
    path = source / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps({**header, "__metadata__": {"a": 5}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(outgrow.OutgrowError, match="has comments .* that are no text"):
        outgrow.grow(source, tmp_path / "target")


def test_moments_that_are_no_floats_are_refused(source, tmp_path):
    moments = {name: value.to(torch.uint8) for name, value in load_file(source / "model.safetensors").items()}
    save_file(moments, source / "exp_avg.safetensors")
    (source / "training.json").write_text('{"tokens": 1, "flops": 1.0, "steps": 1}')
    with pytest.raises(outgrow.OutgrowError, match="is U8, and moments that grow are floats; use --optimizer reset"):
        outgrow.grow(source, tmp_path / "target", "direct-width(ffn=50)", optimizer="carry")


def test_options_without_effect_and_places_that_are_not_there(run, source, tmp_path):  # noqa: F811
    refused(run("grow", source, tmp_path / "x", "--form", "dcp", "--measure"), "--measure has no effect with distributed checkpoints")
    refused(run("learn", source, tmp_path / "nowhere" / "plan.json"), "exists already, or its directory does not")
    refused(run("check", "--operator", "stack", "--markdown", tmp_path / "nowhere" / "t.md"), "there is no directory")
    refused(run("report", "operators", "--comparison", "x.yaml"), "--comparison is a report of its own")


def test_a_plan_that_names_what_is_not_there_is_refused(source):
    plan = outgrow.plan(TINY["llama"], "stack").as_json()
    arch = outgrow.plan(TINY["llama"], "stack").arch
    odd = {"keys": {"mlp.up_proj.weight": "mlp.none.weight"}}, {"depth_maps": {"mlp.up_proj": array_to_json(np.ones((3, 4)))}}
    for edit, says in zip(odd, ("does not have", r"must be \[16, 4\]"), strict=True):
        with pytest.raises(outgrow.OutgrowError, match=says):
            GrowthPlan.from_json({**plan, **edit}, (arch,))


def test_heads_that_no_longer_divide_the_width_are_said_in_the_config(run, tmp_path):  # noqa: F811
    config = {key: value for key, value in TINY["mistral"].items() if key != "head_dim"} | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    grown = outgrow.plan(config, "zero-width(hidden=42)").target_config
    assert (grown["hidden_size"], grown["head_dim"], grown["num_attention_heads"]) == (42, 6, 4)


def test_nothing_follows_what_leaves_only_new_layers_to_training(run, source, tmp_path):  # noqa: F811
    done = run("grow", source, tmp_path / "target", "--operator", "llama-pro(blocks=2), noise(share=0.1)")
    refused(done, "'llama-pro' leaves only its new layers to training, so nothing can follow it in one plan; make it the last")
