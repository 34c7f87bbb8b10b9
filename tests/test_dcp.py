"""Distributed checkpoints (DCP), in and out: saved by a real sharded model, read by torch's own reader, and attacked."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import MetadataIndex

import outgrow
from outgrow.checkpoint.dcp import METADATA, Chunked, read_dcp
from outgrow.checkpoint.huggingface import open_checkpoint
from outgrow.checkpoint.names import Names, names_of
from outgrow.checkpoint.verify import verify
from outgrow.errors import OutgrowError
from outgrow.lab.tiny import TINY, write_tiny
from outgrow.models.build import initialised

from .processes import COMMAND_LINE, on_ranks
from .test_extensions import refused, run  # noqa: F401

ROOT = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with `source` (transformers), and what two ranks saved after two steps: `plain`, `nested` (pickle and .distcp), `chunks`."""
    folder = tmp_path_factory.mktemp("saved")
    write_tiny(folder / "source", TINY["llama"], dtype=torch.float32)
    done = on_ranks(2, ROOT / "scripts" / "save_sharded.py", folder / "source", folder)
    assert done.returncode == 0, done.stderr
    for form in ("plain", "nested", "chunks"):
        shutil.copyfile(folder / "source" / "config.json", folder / form / "config.json")
    return folder


@pytest.fixture
def plain(saved, tmp_path):
    """A copy of the pickled form, to be spoilt."""
    shutil.copytree(saved / "plain", tmp_path / "plain")
    return tmp_path / "plain"


def loaded(directory, shapes):
    """Tensors as torch's own reader gives them."""
    state = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    dcp.load(state, checkpoint_id=directory)
    return state


def test_a_sharded_run_grows_with_its_optimizer(saved, tmp_path):
    plan = outgrow.plan(json.loads((saved / "source" / "config.json").read_text()), "stack(factor=2), direct-width(hidden=36)")
    outgrow.grow(saved / "plain", tmp_path / "grown", plan, optimizer="carry", form="dcp", trust_pickle=True)
    before, after = plan.arch.shapes(plan.origin), plan.grown_arch.shapes(plan.target_config)
    weights = outgrow.grow_state(plan, loaded(saved / "plain", before))
    assert all(torch.equal(value, weights[name]) for name, value in loaded(tmp_path / "grown", after).items())
    for moment in ("exp_avg", "exp_avg_sq"):
        place = f"optimizer.state.{{}}.{moment}".format
        old = {name: loaded(saved / "plain", {place(name): shape})[place(name)] for name, shape in before.items()}
        moments = outgrow.grow_moments(plan, old, squares=moment == "exp_avg_sq")
        new = loaded(tmp_path / "grown", {place(name): shape for name, shape in after.items()})
        assert all(torch.equal(new[place(name)], value) for name, value in moments.items())
        assert max(float(value.abs().max()) for value in new.values()) > 0
    held = read_dcp(tmp_path / "grown", trust_pickle=True)
    last = "model.layers.7.mlp.up_proj.weight"
    assert float(held[f"optimizer.state.{last}.step"].whole()) == 2
    settings = {"lr": None, "betas": None}
    for name in settings:
        state = {f"optimizer.param_groups.{last}.{name}": None}
        dcp.load(state, checkpoint_id=tmp_path / "grown")
        settings.update({name: next(iter(state.values()))})
    assert settings == {"lr": 1e-3, "betas": (0.9, 0.999)}
    state = {"train_state.step": 0}
    dcp.load(state, checkpoint_id=tmp_path / "grown")
    assert state == {"train_state.step": 2}
    opened = open_checkpoint(tmp_path / "grown", trust_pickle=True)
    assert verify(opened, open_checkpoint(saved / "plain", trust_pickle=True)) == len(opened.held)


def test_the_names_inside_an_optimizer_have_no_prefix_of_the_model(saved, tmp_path):
    """{"model": ..., "optimizer": ...}, as torch's own tutorials save."""
    for form in ("plain", "nested"):
        outgrow.grow(saved / form, tmp_path / form, "direct-width(ffn=72)", optimizer="carry", form="dcp", trust_pickle=True)
    plain, nested = (read_dcp(tmp_path / form, trust_pickle=True) for form in ("plain", "nested"))
    names = {name: name if name.startswith("optimizer.") else f"model.{name}" for name in plain if name != "train_state.step"}
    assert set(names.values()) == nested.keys()
    for name, other in names.items():
        if isinstance(plain[name], Chunked):
            assert torch.equal(plain[name].whole(), nested[other].whole()), name


def test_two_processes_write_what_one_writes(saved, tmp_path):
    command = Path(sys.executable).with_name("outgrow")
    options = ("--form", "dcp", "--optimizer", "fresh-new", "--trust-pickle", "--factor", "2")
    done = torchrun("--no-python", command, "grow", saved / "plain", tmp_path / "two", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert {path.name for path in (tmp_path / "two").glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    outgrow.grow(saved / "plain", tmp_path / "one", "stack", {"factor": 2}, optimizer="fresh-new", form="dcp", trust_pickle=True)
    one, two = (read_dcp(tmp_path / name, trust_pickle=True) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, held in one.items():
        assert torch.equal(held.whole(), two[name].whole()) if isinstance(held, Chunked) else held.read() == two[name].read()
    again = on_ranks(2, *COMMAND_LINE, "grow", saved / "plain", tmp_path / "two", *options)
    assert again.returncode != 0
    assert "exists already" in again.stderr


def test_chunks_in_safetensors_need_no_trust_and_grow_to_a_model_directory(saved, tmp_path, run):  # noqa: F811
    code, _, err = run("grow", saved / "chunks", tmp_path / "grown", "--factor", "2")
    assert code == 0, err
    outgrow.grow(saved / "plain", tmp_path / "same", "stack", {"factor": 2}, trust_pickle=True)
    grown, same = (load_file(tmp_path / name / "model.safetensors") for name in ("grown", "same"))
    assert all(torch.equal(value, same[name]) for name, value in grown.items())
    assert verify(tmp_path / "grown", saved / "chunks") == len(grown)
    assert run("inspect", saved / "chunks")[0] == 0


# --- torchtitan ------------------------------------------------------------------------------------------------------------


def test_torchtitan_rows_give_the_same_attention():
    """Scores with rotary pairs side by side, as torchtitan computes them, equal those with halves, as transformers does."""
    heads, head, length, hidden = 2, 6, 5, 7
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, heads * head, hidden, generator=generator, dtype=torch.float64)
    x = torch.randn(length, hidden, generator=generator, dtype=torch.float64)
    angle = torch.arange(length).double()[:, None] * 10000.0 ** (-torch.arange(0, head, 2).double() / head)

    def halves(y):
        a, b = y[..., : head // 2], y[..., head // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def pairs(y):
        turned = torch.view_as_complex(y.reshape(*y.shape[:-1], -1, 2).contiguous()) * torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(turned).flatten(-2)

    def scores(q, k, rotate):
        q, k = (rotate((x @ w.T).view(length, heads, head).transpose(0, 1)) for w in (q, k))
        return q @ k.transpose(1, 2)

    names = Names(torchtitan=True, head=head)
    q, k = (names.rows_to(f"model.layers.0.self_attn.{key}_proj.weight")(one) for key, one in zip("qk", weight, strict=True))
    torch.testing.assert_close(scores(q, k, pairs), scores(*weight, halves), rtol=0, atol=1e-12)
    assert torch.equal(names.rows_from("model.layers.0.self_attn.q_proj.weight")(q), weight[0])


def test_torchtitan_names_go_out_and_come_back(saved, tmp_path, run):  # noqa: F811
    assert run("grow", saved / "source", tmp_path / "titan", "--factor", "2", "--form", "torchtitan")[0] == 0
    held = read_dcp(tmp_path / "titan", trust_pickle=True)
    assert {"tok_embeddings.weight", "norm.weight", "output.weight", "layers.7.attention.wq.weight"} <= held.keys()
    assert len(held) == 3 + 8 * 9
    assert verify(open_checkpoint(tmp_path / "titan", trust_pickle=True), saved / "source") == len(held)
    outgrow.grow(tmp_path / "titan", tmp_path / "back", "direct-width", {"hidden": 36}, trust_pickle=True)
    outgrow.grow(saved / "source", tmp_path / "directly", "stack(factor=2), direct-width(hidden=36)")
    back, directly = (load_file(tmp_path / name / "model.safetensors") for name in ("back", "directly"))
    assert all(torch.equal(value, directly[name]) for name, value in back.items())
    write_tiny(tmp_path / "qwen", TINY["qwen3"], dtype=torch.float32)
    refused(run("grow", tmp_path / "qwen", tmp_path / "x", "--form", "torchtitan"), "torchtitan's Llama has no tensor like")


def test_a_prefix_before_every_name_is_found(saved):
    held = {f"app.model.{name}": one for name, one in read_dcp(saved / "chunks").items()}
    checkpoint = open_checkpoint(saved / "chunks")
    names = names_of(held, checkpoint.arch, checkpoint.config)
    assert names.prefix == "app.model."
    assert names.tensors(held, checkpoint.arch, checkpoint.config).keys() == checkpoint.tensors.keys()


def test_a_tied_head_that_is_another_is_not_lost_from_a_distributed_checkpoint_either(tmp_path):
    config = {**TINY["llama"], "tie_word_embeddings": True}
    write_tiny(tmp_path / "source", config, dtype=torch.float32)
    state = load_file(tmp_path / "source" / "model.safetensors")
    for name, head in (("same", state["model.embed_tokens.weight"].clone()), ("other", torch.randn(53, 24))):
        dcp.save({**state, "lm_head.weight": head}, checkpoint_id=tmp_path / name)
        shutil.copy(tmp_path / "source" / "config.json", tmp_path / name)
    outgrow.grow(tmp_path / "same", tmp_path / "grown", form="dcp", trust_pickle=True)
    for form in ("dcp", "huggingface"):
        with pytest.raises(OutgrowError, match=r"'lm_head.weight' of '.*other' is not 'model.embed_tokens.weight'"):
            outgrow.grow(tmp_path / "other", tmp_path / "x", form=form, trust_pickle=True)
    assert not (tmp_path / "x").exists()


def test_a_tied_model_opens_what_was_grown_for_it(tmp_path):
    """torch names both keys of a tied pair, and torchtitan's Llama has an output of its own."""
    write_tiny(tmp_path / "source", {**TINY["llama"], "tie_word_embeddings": True}, dtype=torch.float32)
    plan = outgrow.grow(tmp_path / "source", tmp_path / "grown", form="dcp")
    state = initialised(plan.target_config, 0).state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "grown")
    opened = open_checkpoint(tmp_path / "grown", trust_pickle=True)
    assert torch.equal(state["lm_head.weight"], opened.tensors["model.embed_tokens.weight"].load())
    outgrow.grow(tmp_path / "source", tmp_path / "titan", form="torchtitan")
    held = read_dcp(tmp_path / "titan", trust_pickle=True)
    assert torch.equal(held["output.weight"].whole(), held["tok_embeddings.weight"].whole())
    for name in ("grown", "titan"):
        after = open_checkpoint(tmp_path / name, trust_pickle=True)
        assert verify(after, tmp_path / "source") == len(after.held)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("optimizer.state.model.norm.weight.max_exp_avg_sq", (24,)),
        ("ema.model.norm.weight", (24,)),
        ("ema.model.embed_tokens.weight", (53, 24)),
    ],
)
def test_what_no_law_grows_is_not_carried_with_its_old_shape(saved, tmp_path, key, shape):
    """AMSGrad's maxima, an average of the weights."""
    held = {name: one.whole() for name, one in read_dcp(saved / "plain", trust_pickle=True).items() if isinstance(one, Chunked)}
    dcp.save({**held, key: torch.ones(shape), "dataloader.rng": torch.ones(7)}, checkpoint_id=tmp_path / "source")
    shutil.copy(saved / "plain" / "config.json", tmp_path / "source")
    options = {"form": "dcp", "trust_pickle": True}
    with pytest.raises(OutgrowError, match=f"no law says how '{key}' .* grows; .* --optimizer reset"):
        outgrow.grow(tmp_path / "source", tmp_path / "x", "direct-width(hidden=36)", optimizer="carry", **options)
    assert not (tmp_path / "x").exists()
    outgrow.grow(tmp_path / "source", tmp_path / "reset", "direct-width(hidden=36)", **options)


def test_groups_of_parameters_by_lists_are_refused_where_new_layers_have_no_place(saved, tmp_path):
    held = {name: one.whole() for name, one in read_dcp(saved / "plain", trust_pickle=True).items() if isinstance(one, Chunked)}
    lists = {"state": {}, "param_groups": [{"params": ["model.norm.weight"], "lr": 0.1}, {"params": ["lm_head.weight"], "lr": 0.2}]}
    dcp.save({**held, "optim": lists}, checkpoint_id=tmp_path / "source")
    shutil.copy(saved / "plain" / "config.json", tmp_path / "source")
    with pytest.raises(OutgrowError, match="are lists of parameters, in which new layers have no place; save the optimizer with"):
        outgrow.grow(tmp_path / "source", tmp_path / "x", "stack", optimizer="carry", form="dcp", trust_pickle=True)


@pytest.mark.parametrize("name", ["lm_head.bias", "model.mtp.weight"])
def test_a_tensor_outside_of_the_layers_that_the_config_does_not_know_is_refused(saved, tmp_path, name):
    state = load_file(saved / "source" / "model.safetensors")
    dcp.save({**state, name: torch.ones(3), "freqs_cis": torch.ones(3)}, checkpoint_id=tmp_path / "source")
    shutil.copy(saved / "plain" / "config.json", tmp_path / "source")
    for form in ("dcp", "huggingface"):
        with pytest.raises(OutgrowError, match=f"holds the tensor '{name}', which its config.json does not call for"):
            outgrow.grow(tmp_path / "source", tmp_path / "x", "stack", form=form, trust_pickle=True)


def test_verify_finds_what_the_plan_does_not_make(saved, tmp_path):
    outgrow.grow(saved / "plain", tmp_path / "grown", "stack", form="dcp", trust_pickle=True)
    held = {name: one.whole() for name, one in read_dcp(tmp_path / "grown", trust_pickle=True).items()}
    others = [path for path in (tmp_path / "grown").iterdir() if path.suffix == ".json"]
    dcp.save({**held, "optimizer.state.model.norm.weight.exp_avg": torch.ones(24)}, checkpoint_id=tmp_path / "more")
    for path in others:
        shutil.copy(path, tmp_path / "more")
    before, after = (open_checkpoint(place, trust_pickle=True) for place in (saved / "plain", tmp_path / "more"))
    with pytest.raises(OutgrowError, match="'optimizer.state.model.norm.weight.exp_avg' is there, and neither"):
        verify(after, before)


# --- bad input -------------------------------------------------------------------------------------------------------------


def test_no_pickle_is_opened_unasked(plain, tmp_path, run):  # noqa: F811
    refused(run("grow", plain, tmp_path / "x", "--form", "dcp"), "is a pickle, which is not opened unasked", "--trust-pickle")
    (plain / "config.json").unlink()
    refused(run("inspect", plain, "--trust-pickle"), "has no 'config.json' beside it", "--config")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


def test_an_evil_pickle_is_named_and_not_run(plain, tmp_path, run, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (plain / METADATA).write_bytes(pickle.dumps(Evil()))
    refused(run("inspect", plain, "--trust-pickle"), "none of DCP's own classes; it is not opened")
    assert not (tmp_path / "evil-was-here").exists()


def edited(plain, change):
    with (plain / METADATA).open("rb") as file:
        metadata = pickle.load(file)
    change(metadata)
    (plain / METADATA).write_bytes(pickle.dumps(metadata))


NAME = "model.layers.0.mlp.up_proj.weight"


def first(metadata):
    return metadata.storage_data[MetadataIndex(NAME, [0, 0])]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(first(m), "relative_path", "../plain/__0_0.distcp"), "which is not in its directory"),
        (lambda m: setattr(first(m), "relative_path", "/etc/passwd"), "which is not in its directory"),
        (lambda m: setattr(first(m), "length", 10**12), "points beyond"),
        (lambda m: setattr(first(m), "offset", -1), "points beyond"),
        (lambda m: setattr(first(m), "transform_descriptors", ["zstd"]), "was compressed"),
        (lambda m: m.state_dict_metadata[NAME].chunks.pop(), "do not fill its shape"),
        (lambda m: setattr(m.state_dict_metadata[NAME].chunks[1], "offsets", torch.Size([0, 0])), "do not fill its shape"),
        (lambda m: m.state_dict_metadata.pop(NAME), "lacks the tensor"),
        (lambda m: m.storage_data.clear(), "does not describe a distributed checkpoint"),
        (lambda m: m.state_dict_metadata.update({NAME.replace("0", "9", 1): m.state_dict_metadata[NAME]}), "does not describe"),
        (lambda m: setattr(first(m), "offset", first(m).offset + 1), "cannot be read"),
        (lambda m: setattr(m, "state_dict_metadata", 3), "does not describe"),
    ],
)
def test_metadata_that_lies_is_refused_in_one_sentence(plain, tmp_path, run, change, words):  # noqa: F811
    edited(plain, change)
    refused(run("grow", plain, tmp_path / "x", "--trust-pickle", "--operator", "direct-width(hidden=36)"), words)
    assert not (tmp_path / "x").exists()


def test_a_layer_that_the_config_does_not_know_is_refused(saved, plain, tmp_path, run):  # noqa: F811
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    refused(run("grow", plain, tmp_path / "x", "--trust-pickle"), "holds the tensor 'model.layers.3.", "does not call for")
    header = load_file(saved / "chunks" / "shard-00001-model-00001-of-00001.safetensors")
    shutil.copytree(saved / "chunks", tmp_path / "chunks")
    save_file(header, tmp_path / "chunks" / "shard-00001-model-00001-of-00001.safetensors", {"DCP_SHARDING_INFO": "{]"})
    refused(run("inspect", tmp_path / "chunks"), "does not say which part of each tensor it holds")


@pytest.mark.parametrize("seed", range(4))
def test_spoilt_metadata_never_crashes_and_never_reads_otherwise(plain, seed):
    """Mutations of the pickle, 250 a seed: refused in a sentence, or what it was."""
    original = (plain / METADATA).read_bytes()
    whole = {name: held.entry for name, held in open_checkpoint(plain, trust_pickle=True).tensors.items()}
    generator = random.Random(seed)
    for _ in range(250):
        data = bytearray(original)
        for _ in range(generator.randint(1, 3)):
            place = generator.randrange(len(data))
            if generator.random() < 0.2:
                del data[place:]
                break
            data[place] = generator.randrange(256)
        (plain / METADATA).write_bytes(data)
        try:
            found = open_checkpoint(plain, trust_pickle=True)
        except OutgrowError as error:
            assert "\n" not in str(error)
        else:
            assert {name: held.entry for name, held in found.tensors.items()} == whole
