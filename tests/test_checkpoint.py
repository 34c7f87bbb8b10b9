from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from outgrow.arch import LLAMA
from outgrow.checkpoint import grow as growing
from outgrow.checkpoint import writing
from outgrow.checkpoint.describe import checkpoint_facts, plan_lines
from outgrow.checkpoint.grow import grow_directory
from outgrow.checkpoint.huggingface import INDEX, SINGLE, open_checkpoint
from outgrow.checkpoint.lineage import read_lineage
from outgrow.checkpoint.safetensors_file import read_header
from outgrow.errors import OutgrowError
from outgrow.files import new_directory, write_json
from outgrow.growth.apply import grow
from outgrow.growth.operators import stack
from outgrow.growth.plan import Claims, GrowthPlan
from outgrow.spaces import copies, isometry

from .conftest import ODD


def plan_for(directory, factor=2):
    checkpoint = open_checkpoint(directory)
    return stack(checkpoint.arch, checkpoint.config, factor)


def snapshot(directory):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


@pytest.mark.parametrize("edits", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
@pytest.mark.parametrize("shard", ["5GB", "10KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grown_directory_gives_the_logits_of_growing_in_memory(make_model, tmp_path, tokens, edits, shard, dtype):
    model = make_model(**edits).to(dtype)
    source, target = tmp_path / "source", tmp_path / "target"
    model.save_pretrained(source, max_shard_size=shard)
    before = snapshot(source)
    plan = plan_for(source, 3)
    grow_directory(source, target, plan, max_shard_bytes=20_000)
    assert snapshot(source) == before
    assert len(list(target.glob("*.safetensors"))) > 1

    loaded = AutoModelForCausalLM.from_pretrained(target)
    in_memory = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plan.target_config), dtype=dtype)
    in_memory.load_state_dict(dict(grow(plan, model.state_dict())), strict=False)
    assert loaded.dtype == dtype
    assert loaded.config.num_hidden_layers == 9
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, in_memory(tokens).logits)


def test_bytes_do_not_depend_on_how_the_source_was_sharded(make_checkpoint, tmp_path):
    outputs = []
    for name, shard in (("one", "5GB"), ("many", "8KB")):
        source = make_checkpoint(name, shard)
        grow_directory(source, tmp_path / f"{name}-grown", plan_for(source))
        outputs.append(
            {
                path.name: path.read_bytes()
                for path in (tmp_path / f"{name}-grown").iterdir()
                if path.name not in ("outgrow.json", "README.md")
            }
        )
    assert outputs[0] == outputs[1]


def test_lifts_are_computed_on_disk_as_in_memory(make_model, tmp_path):
    model = make_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    config = open_checkpoint(tmp_path / "source").config
    lifts = {"hidden": isometry(24, 48), "ffn": copies(37, 50)}
    plan = GrowthPlan("lifts", {}, LLAMA, config, (0, 1, 2), Claims(True, True), "derived", lifts)
    grow_directory(tmp_path / "source", tmp_path / "target", plan)
    wide = {name: value.float() for name, value in model.state_dict().items()}
    expected = {name: value.to(torch.bfloat16) for name, value in grow(plan, wide)}
    found = load_file(tmp_path / "target" / SINGLE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_receipt_names_plan_and_parents(make_checkpoint, tmp_path):
    source = make_checkpoint(shard="10KB")
    write_json(source / "outgrow.json", {"tokens": 1000, "flops": 5.0, "run": "abc"})
    plan = plan_for(source)
    grow_directory(source, tmp_path / "target", plan)
    receipt = read_lineage(tmp_path / "target")
    assert GrowthPlan.from_json(receipt.plan) == plan
    assert receipt.parents == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.glob("*.safetensors")}
    assert (receipt.tokens, receipt.flops, receipt.run) == (1000, 5.0, None)
    assert receipt.parent == {"tokens": 1000, "flops": 5.0, "run": "abc"}
    assert "stack" in checkpoint_facts(open_checkpoint(tmp_path / "target"))["grown by"]


@pytest.mark.parametrize("text", ["[]", '{"tokens": "many"}', '{"plan": 3}', "{"])
def test_a_malformed_receipt_is_refused(make_checkpoint, tmp_path, text):
    source = make_checkpoint()
    (source / "outgrow.json").write_text(text)
    with pytest.raises(OutgrowError, match=r"outgrow\.json' is not"):
        grow_directory(source, tmp_path / "target", plan_for(source))
    assert os.listdir(tmp_path) == ["source"]


def test_side_files_travel_and_weights_and_state_do_not(make_checkpoint, tmp_path):
    source = make_checkpoint()
    others = ("exp_avg.safetensors", "training.json", "pytorch_model.bin", "params.json")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", *others):
        (source / name).write_text("{}")
    grow_directory(source, tmp_path / "target", plan_for(source))
    assert {path.name for path in (tmp_path / "target").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "outgrow.json", "README.md", "tokenizer.json", "chat_template.jinja",
        "LICENSE",
    }  # fmt: skip


def test_config_is_edited_not_retyped(make_checkpoint, tmp_path):
    source = make_checkpoint()
    config = json.loads((source / "config.json").read_text()) | {"a_key_of_the_future": {"kept": True}}
    (source / "config.json").write_text(json.dumps(config))
    grow_directory(source, tmp_path / "target", plan_for(source))
    grown = json.loads((tmp_path / "target" / "config.json").read_text())
    assert list(grown) == list(config)
    assert {key for key in grown if grown[key] != config[key]} <= {"num_hidden_layers", "layer_types"}


def test_old_buffers_and_tied_aliases_are_dropped(make_model, tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    save_file(tensors, tmp_path / "source" / SINGLE)
    grow_directory(tmp_path / "source", tmp_path / "target", plan_for(tmp_path / "source"))
    assert not {"lm_head.weight"} & set(load_file(tmp_path / "target" / SINGLE))
    assert not [name for name in load_file(tmp_path / "target" / SINGLE) if "inv_freq" in name]


def test_the_plan_in_words(make_checkpoint):
    lines = list(plan_lines(plan_for(make_checkpoint())))
    assert "layers: 3 -> 6 (x2)" in lines
    assert "layer map: 0 1 2 0 1 2" in lines
    assert "model.layers.4.mlp.up_proj.weight [37, 24] <- model.layers.1.mlp.up_proj.weight" in lines


def test_growing_needs_neither_torch_nor_transformers(make_checkpoint, tmp_path):
    source = make_checkpoint()
    code = (
        "import sys; sys.argv = ['outgrow', 'grow', *sys.argv[1:]]\n"
        "from outgrow.cli import main\n"
        "try:\n    main()\nfinally:\n    print(sorted(m for m in ('torch', 'transformers') if m in sys.modules))"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "target"), "--factor", "2", "--no-measure"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("[]\n"), done.stderr
    assert (tmp_path / "target" / "config.json").exists()


# --- bad input -------------------------------------------------------------------------------------------------------


def refused(source, tmp_path, message):
    """Growing `source` is refused in one sentence and leaves nothing."""
    before = set(os.listdir(tmp_path))
    with pytest.raises(OutgrowError, match=message) as error:
        grow_directory(source, tmp_path / "target", plan_for(source))
    assert "\n" not in str(error.value)
    assert set(os.listdir(tmp_path)) == before


def test_missing_and_empty_directories(tmp_path):
    refused(tmp_path / "nowhere", tmp_path, "there is no directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "no 'config.json' in")


def test_a_directory_without_weights(make_checkpoint, tmp_path):
    source = make_checkpoint()
    (source / SINGLE).unlink()
    refused(source, tmp_path, "holds no weights")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    refused(source, tmp_path, "pickled weights only, which are not opened")


@pytest.mark.parametrize("text", ["{", "[]", "\xff", '{"model_type": "llama"}'])
def test_malformed_configs(make_checkpoint, tmp_path, text):
    source = make_checkpoint()
    (source / "config.json").write_text(text, encoding="latin-1")
    refused(source, tmp_path, "config")


def test_an_unknown_architecture(make_checkpoint, tmp_path):
    source = make_checkpoint()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    refused(source, tmp_path, "unknown architecture 'mamba'; known: llama, mistral")


def test_weights_that_contradict_the_config(make_checkpoint, tmp_path):
    source = make_checkpoint()
    config = json.loads((source / "config.json").read_text())
    for edit, message in (
        ({"num_hidden_layers": 4}, r"lacks the tensor 'model\.layers\.3\.\S+' \(and \d more\)"),
        ({"num_hidden_layers": 2}, r"holds the tensor 'model\.layers\.2"),
        ({"num_hidden_layers": 10**12}, r"says 1,000,000,000,000 layers, and its files hold \d+ tensors"),
        ({"vocab_size": 54}, r"has shape \[53, 24\], and config.json says \[54, 24\]"),
    ):
        (source / "config.json").write_text(json.dumps(config | edit))
        refused(source, tmp_path, message)


def test_truncated_files(make_checkpoint, tmp_path):
    source = make_checkpoint()
    whole = (source / SINGLE).read_bytes()
    for length in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        (source / SINGLE).write_bytes(whole[:length])
        refused(source, tmp_path, "truncated|not valid JSON")
    (source / SINGLE).write_bytes(whole + b"x")
    refused(source, tmp_path, "1 bytes after its last tensor")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "..\\x"])
def test_an_index_that_escapes(make_checkpoint, tmp_path, name):
    source = make_checkpoint(shard="10KB")
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (source / INDEX).write_text(json.dumps(index))
    refused(source, tmp_path, "points outside its directory")


def test_an_index_that_lies(make_checkpoint, tmp_path):
    source = make_checkpoint(shard="10KB")
    whole = (source / INDEX).read_text()
    index = json.loads(whole)
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = files[0] if index["weight_map"]["model.norm.weight"] != files[0] else files[1]
    (source / INDEX).write_text(json.dumps(index))
    refused(source, tmp_path, "says that 'model.norm.weight' is in")
    (source / INDEX).write_text(whole)
    shutil.copy(source / files[0], source / "again.safetensors")
    index = json.loads(whole)
    index["weight_map"]["again"] = "again.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    refused(source, tmp_path, "stands in both")
    for text in ("[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'):
        (source / INDEX).write_text(text)
        refused(source, tmp_path, "needs a 'weight_map'")
    (source / INDEX).write_text(whole)
    (source / files[0]).unlink()
    refused(source, tmp_path, f"names the shard '{files[0]}', which is missing")


def test_an_existing_target_is_left_alone(make_checkpoint, tmp_path):
    source = make_checkpoint()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("mine")
    refused(source, tmp_path, "exists already")
    assert os.listdir(tmp_path / "target") == ["mine"]


def test_a_plan_of_another_model_is_refused(make_checkpoint, tmp_path):
    plan = plan_for(make_checkpoint("other", num_hidden_layers=2))
    with pytest.raises(OutgrowError, match="made for another config"):
        grow_directory(make_checkpoint(), tmp_path / "target", plan)
    assert not (tmp_path / "target").exists()


def test_no_disk_space(make_checkpoint, tmp_path, monkeypatch):
    source = make_checkpoint()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(growing.shutil, "disk_usage", lambda path: usage)
    refused(source, tmp_path, r"needs [\d,]+ bytes, and its disk has 1,000 free")


def test_a_disk_that_fills_up_midway_leaves_nothing(make_checkpoint, tmp_path, monkeypatch):
    source = make_checkpoint()
    before = set(os.listdir(tmp_path))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "copy_range", full)
    with pytest.raises(OutgrowError, match="No space left"):
        grow_directory(source, tmp_path / "target", plan_for(source))
    assert set(os.listdir(tmp_path)) == before


def test_a_killed_writer_leaves_nothing_that_looks_finished(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from outgrow.files import new_directory\n"
        "with new_directory(Path(sys.argv[1])) as t:\n    (t / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "target")], check=False, timeout=60)
    assert not (tmp_path / "target").exists()
    assert len(os.listdir(tmp_path)) == 1
    with new_directory(tmp_path / "target") as temporary:
        (temporary / "whole").write_text("x")
    assert os.listdir(tmp_path) == ["target"]


def _header_file(tmp_path, header, data):
    path = tmp_path / "file.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, "unknown dtype 'F33'"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "does not fill its bytes"),
        ({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, "whole numbers"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "whole numbers"),
        ({"a": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}}, "overlaps another or leaves a gap"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "overlaps"),
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, "is truncated: tensor 'a' ends at"),
        ({"a": 3}, "unknown dtype None"),
        ([], "must be a JSON object"),
        (b'{"a":{},"a":{}}', "names 'a' twice"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xff", "not valid JSON"),
        (b'{"a":' + b"1" * 5000 + b"}", "not valid JSON"),
        ({}, "4 bytes after its last tensor"),
    ],
)  # fmt: skip
def test_malformed_headers(tmp_path, header, message):
    with pytest.raises(OutgrowError, match=message):
        read_header(_header_file(tmp_path, header, b"\0" * 4))


ODD_VALUES = [None, 0, -1, 1, 3, 10**30, 1.5, float("nan"), "x", "", True, False, [], {}, [1], {"a": 1}, "3"]


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_odd_configs_and_indexes_are_refused_or_understood(valid_directory, data):
    config, index = (json.loads((valid_directory / name).read_text()) for name in ("config.json", INDEX))
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from([config, config, index, index["weight_map"]]))
        part[data.draw(st.sampled_from(sorted(part)))] = copy.deepcopy(data.draw(st.sampled_from(ODD_VALUES)))
        if not isinstance(index["weight_map"], dict) or not index["weight_map"]:
            break
    directory = valid_directory.parent / "mutated"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(valid_directory, directory)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / INDEX).write_text(json.dumps(index))
    try:
        checkpoint = open_checkpoint(directory)
        assert list(plan_lines(stack(checkpoint.arch, checkpoint.config, 2)))
        assert checkpoint_facts(checkpoint)["layers"] == config["num_hidden_layers"]
    except OutgrowError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def valid_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("valid") / "source"
    config = AutoConfig.for_model(**ODD, layer_types=["full_attention"] * 3)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory, max_shard_size="10KB")
    return directory


@pytest.fixture(scope="module")
def valid_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("valid") / "file.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.ones(0)}, path)
    return path.read_bytes()


@given(seed=st.integers(0, 2**32), edits=st.integers(1, 4))
@settings(max_examples=1500, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_mutated_headers_never_crash_and_never_lie(valid_bytes, tmp_path, seed, edits):
    """What we accept the safetensors library accepts too, and reads the same; everything else is one sentence."""
    generator = random.Random(seed)
    changed = bytearray(valid_bytes)
    for _ in range(edits):
        place = generator.randrange(len(changed) - 40)
        changed[place] = generator.choice(b'0123456789[]{}",:ABFN \0\xff')
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(bytes(changed))
    try:
        header = read_header(path)
    except OutgrowError as error:
        assert "\n" not in str(error)
        return
    with safe_open(path, framework="pt") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {name: entry.shape for name, entry in header.items()} == theirs
